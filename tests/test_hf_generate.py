"""fastattn.hf while generating: token by token what eager gives, with every cache."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_models import FAMILIES, GENERATES, Counter, build, inputs_of

import fastattn.hf

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def models():
    return functools.cache(build)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def generate(model, inputs, **ways):
    """Tokens, and the logits of each step."""
    inputs = {key: x for key, x in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    found = model.generate(**inputs, **options, **wanted, pad_token_id=0, **ways)
    return found["sequences"], torch.stack(found["logits"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATES)
def test_tokens_equal_eager(name, way, models, counter):
    model = models(name)
    padding = "left" if "left" in FAMILIES[name].paddings else "none"
    inputs = inputs_of(name, padding)
    model.set_attn_implementation("eager")
    tokens, logits = generate(model, inputs, **WAYS[way])
    assert counter.take() == 0
    fastattn.hf.enable(model)
    got_tokens, got_logits = generate(model, inputs, **WAYS[way])
    assert counter.take() >= 2 * NEW_TOKENS
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-3, atol=1e-3)

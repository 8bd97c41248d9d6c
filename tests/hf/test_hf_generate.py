"""fastattn.hf in generation: the same tokens as eager, with every cache."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_models import CACHE, FAMILIES, GENERATES, Counter, build, inputs_of
from transformers import DynamicCache, StaticCache

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


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_generation(name, models, counter):
    """The assistant's candidates are checked several at a time, at the end of a cache."""
    model, assistant = models(name), build(name, seed=1)
    inputs = {"input_ids": inputs_of(name)["input_ids"][:1]}
    found = []
    for implementation in ("eager", "fastattn"):
        for x in (model, assistant):
            x.set_attn_implementation(implementation)
        found.append(generate(model, inputs, assistant_model=assistant)[0])
    assert torch.equal(*found)
    assert counter.names
    # Compared several rows with a cache before them:
    assert any(1 < q_len < kv_len for q_len, kv_len in counter.lengths)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_prompts_in_pieces(name, padding, kind, models, counter):
    """Several rows at an offset, a tensor position in a static cache, and windows whose cache drops
    keys."""
    model, inputs = models(name), inputs_of(name, padding)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    rows = torch.ones_like(ids) if mask is None else mask
    positions = (rows.cumsum(-1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    want = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    fastattn.hf.enable(model)
    cache, got = CACHES[kind](model.config), []
    with torch.no_grad():
        for a, b in ((0, 3), (3, 7), (7, 8), (8, 9)):
            out = model(
                input_ids=ids[:, a:b], attention_mask=None if mask is None else mask[:, :b],
                position_ids=positions[:, a:b], **{CACHE: cache},
            )  # fmt: skip
            got.append(out.logits)
    assert counter.take() == 4 * 2
    got = torch.cat(got, 1)[rows.bool()]
    torch.testing.assert_close(got, want[rows.bool()], rtol=1e-4, atol=1e-4)

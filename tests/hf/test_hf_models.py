"""fastattn.hf: every family equals eager, forward and every gradient, and runs on fastattn."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_models import FAMILIES, Counter, build, inputs_of, visible

import fastattn.hf

CASES = [(name, padding) for name, x in FAMILIES.items() for padding in x.paddings]


@pytest.fixture(scope="module")
def models():
    """Each family is built once; tests switch its attention."""
    return functools.cache(build)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def loss_and_gradients(name, model, inputs):
    """Output rows that are not padding, and the gradient of a weighted sum of them."""
    model.zero_grad()
    out = visible(name, inputs, getattr(model(**inputs, use_cache=False), FAMILIES[name].output))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return out.detach(), {key: grad.clone() for key, grad in grads.items()}


@pytest.mark.parametrize("name, padding", CASES)
def test_equals_eager(name, padding, models, counter):
    model, inputs = models(name).train(), inputs_of(name, padding)
    model.set_attn_implementation("eager")
    want, want_grads = loss_and_gradients(name, model, inputs)
    assert counter.take() == 0
    fastattn.hf.enable(model)
    got, got_grads = loss_and_gradients(name, model, inputs)
    assert counter.take() == FAMILIES[name].calls
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got_grads.keys() == want_grads.keys()
    largest = max(grad.abs().max().item() for grad in want_grads.values())
    for key, grad in got_grads.items():  # some are zero but for rounding: a key's bias, say
        error = (grad - want_grads[key]).abs().max().item()
        assert error <= 1e-5 * largest, f"{key} is off by {error}, the largest is {largest}"

"""Attention with a KVCache: decoding in steps equals the whole sequence at once."""

from __future__ import annotations

import copy

import pytest
import torch
from block_checks import close

from fastattn import nn as fnn

OPTIONS = {"rotary": True, "causal": True, "kv_heads": 2, "window": (4, 0), "sinks": True}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_the_whole_at_once(dtype):
    m = fnn.Attention(32, 4, **OPTIONS, dtype=dtype)
    x = torch.randn(3, 10, 32, dtype=dtype)
    cache = m.make_cache(3, 12)
    parts = [m(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9), (9, 10))]
    close(torch.cat(parts, 1), m(x))
    assert cache.lens.tolist() == [10] * 3
    with pytest.raises(ValueError, match="12 slots less 3 new keys"):
        m(x[:, :3], cache=cache)
    assert cache.lens.tolist() == [10] * 3


@torch.no_grad()
def test_decoding_ragged_prompts():
    """Prompts padded on the right (with garbage), then one token at a time for each."""
    m = fnn.Attention(32, 4, **OPTIONS)
    x, lens = torch.randn(2, 9, 32), torch.tensor([5, 2])
    whole = m(x)
    prompt = x[:, :5].clone()
    prompt[1, 2:] = 1e4
    cache = m.make_cache(2, 9)
    out = m(prompt, cache=cache, kv_lens=lens)
    close(out[0], whole[0, :5])
    close(out[1, :2], whole[1, :2])
    for step in range(4):
        token = torch.stack([x[b, lens[b] + step] for b in range(2)]).unsqueeze(1)
        out = m(token, cache=cache)
        close(out[:, 0], torch.stack([whole[b, lens[b] + step] for b in range(2)]))


@torch.no_grad()
def test_decoding_left_padded():
    """As in transformers: padding before the prompt, hidden by a mask that grows."""
    m = fnn.Attention(32, 4, rotary=True, causal=True)
    x = torch.randn(2, 8, 32)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    cache = m.make_cache(2, 10)
    parts = [m(x[:, :6], mask=mask[:, :6], cache=cache)]
    parts += [m(x[:, n : n + 1], mask=mask[:, : n + 1], cache=cache) for n in (6, 7)]
    out = torch.cat(parts, 1)
    close(out[0], m(x)[0])
    close(out[1, 3:], m(x[1:, 3:])[0])
    with pytest.raises(ValueError, match="mask has 8 columns and the cache will hold 9 keys"):
        m(x[:, :1], mask=mask, cache=cache)


@torch.no_grad()
def test_cross_cache_keeps_the_context():
    m = fnn.Attention(16, 2, context_dim=12)
    x, context, lens = torch.randn(2, 5, 16), torch.randn(2, 7, 12), torch.tensor([7, 3])
    whole = m(x, context, kv_lens=lens)
    cache = m.make_cache(2, 7)
    with pytest.raises(ValueError, match="the cache is empty; the first call needs it"):
        m(x[:, :1], cache=cache)
    parts = [m(x[:, :2], context, kv_lens=lens, cache=cache)]
    parts += [m(x[:, n : n + 1], cache=cache) for n in (2, 3, 4)]
    close(torch.cat(parts, 1), whole)
    assert cache.lens.tolist() == [7, 3]


@torch.no_grad()
def test_cache_reorder_truncate_reset():
    m = fnn.Attention(32, 4, **OPTIONS)
    x = torch.randn(2, 6, 32)
    cache = m.make_cache(2, 8)
    m(x[:, :5], cache=cache)
    beams = torch.tensor([1, 1, 0])
    cache.reorder(beams)
    assert cache.batch == 3 and "batch=3" in repr(cache)
    close(m(x[beams, 5:], cache=cache), m(x)[beams, 5:])
    cache.truncate(torch.tensor([3, 9, 4]))
    assert cache.lens.tolist() == [3, 6, 4]
    cache.truncate(3)
    close(m(x[beams, 3:4], cache=cache), m(x[:, :4])[beams, 3:])
    copied = copy.deepcopy(cache)
    cache.reset()
    assert cache.lens.tolist() == [0, 0, 0] and copied.lens.tolist() == [4, 4, 4]
    close(m(x[beams], cache=cache), m(x)[beams])


def test_cache_has_no_gradient():
    m = fnn.Attention(16, 2, causal=True)
    with pytest.raises(NotImplementedError, match="a cache came with an input that requires grad"):
        m(torch.randn(1, 2, 16), cache=m.make_cache(1, 4))


@torch.no_grad()
def test_compiled_decoding():
    m, x = fnn.Attention(16, 2, rotary=True, causal=True), torch.randn(2, 4, 16)
    cache = m.make_cache(2, 8)
    step = torch.compile(lambda x: m(x, cache=cache), fullgraph=True, backend="aot_eager")
    close(torch.cat([step(x[:, n : n + 1]) for n in range(4)], 1), m(x))
    assert cache.lens.tolist() == [4, 4]

"""Models sharded by torch's tools, and calls with some of the heads. tests/support/sharded_cases.py
has the checks that need two processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from two_processes import assert_right

import fastattn
from fastattn.nn import Attention, KVCache, RMSNorm, TransformerBlock


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_are_as_one():
    assert_right("sharded_cases.py")


# ---- every head's operands, of which head_origin takes this process's ----------------------------

OPERANDS = {
    "sinks": torch.randn(8),
    "alibi_slopes": torch.rand(8),
    "bias": torch.randn(8, 1, 1),
    "mask": torch.rand(1, 8, 6, 1) > 0.3,
}
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


def packed(q, k, v, **more):
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return fastattn.varlen_attention(q, k, v, CU, CU, 6, 6, **more).transpose(0, 1)[None]


CALLS = {
    "dense": fastattn.attention,
    "packed": packed,
    "decoding": lambda *x, **more: fastattn.decode_attention(*x, cache_lens=6, **more),
}


def qkv(heads=8, kv_heads=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 6, 16, generator=generator) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("names", [(name,) for name in OPERANDS] + [tuple(OPERANDS)])
def test_operands_of_every_head(call, names):
    operands = {name: OPERANDS[name] for name in names}
    whole = CALLS[call](*qkv(), **operands)
    parts = [
        CALLS[call](*(x.chunk(2, 1)[n] for x in qkv()), head_origin=(4 * n, 8), **operands)
        for n in range(2)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_without_head_origin_they_are_refused_with_that_hint(call, name):
    q, k, v = (x[:, : x.shape[1] // 2] for x in qkv())
    with pytest.raises(ValueError, match=rf"{name} has shape \[8\].*head_origin = \(first"):
        CALLS[call](q, k, v, **{name: OPERANDS[name]})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        CALLS[call](q, k, v, head_origin=(0, 16), **{name: OPERANDS[name]})


def test_gradients_of_every_heads_operands():
    sinks, bias = (OPERANDS[n].clone().requires_grad_() for n in ("sinks", "bias"))
    fastattn.attention(*qkv(), sinks=sinks, bias=bias).square().sum().backward()
    wanted = [x.grad.clone() for x in (sinks, bias)]
    sinks.grad = bias.grad = None
    for n in range(2):
        q, k, v = (x.chunk(2, 1)[n] for x in qkv())
        out = fastattn.attention(q, k, v, sinks=sinks, bias=bias, head_origin=(4 * n, 8))
        out.square().sum().backward()
    for x, want in zip((sinks, bias), wanted):
        torch.testing.assert_close(x.grad, want)


def test_a_module_whose_projections_others_sharded():
    """Plain weights of some heads, as Megatron's layers have them."""
    torch.manual_seed(0)
    layer = Attention(32, 4, 2, causal=True, sinks=True)
    nn.init.normal_(layer.sinks)
    x = torch.randn(2, 5, 32)
    whole = layer(x)
    parts = []
    for n in range(2):
        part = Attention(32, 4, 2, causal=True, sinks=True, head_origin=(2 * n, 4))
        part.sinks = layer.sinks
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer, name).weight.detach().chunk(2)[n]
            getattr(part, name).weight = nn.Parameter(weight)
        part.o_proj.weight = nn.Parameter(layer.o_proj.weight.detach().chunk(2, 1)[n])
        parts.append(part(x))
        cache = part.make_cache(2, 8)
        with torch.no_grad():
            torch.testing.assert_close(part(x, cache=cache), parts[-1])
        assert cache.k.shape == (2, 1, 8, 8) and cache.filled
        part.head_origin = None
        with pytest.raises(ValueError, match=r"sinks has shape \[4\].*head_origin"):
            part(x)
    torch.testing.assert_close(sum(parts), whole)


# ---- a cache whose heads are not known yet -------------------------------------------------------


def test_a_cache_takes_its_memory_from_the_first_keys():
    q, k, v = qkv(4, 2)
    known, unknown = (KVCache(1, heads, 8, 16) for heads in (2, None))
    assert unknown.k.numel() == 0 and (unknown.batch, unknown.max_len) == (1, 8)
    unknown.reorder(torch.zeros(1, dtype=torch.long))
    unknown.reset()
    for _ in range(2):
        found, wanted = (c.attend(q[:, :, :3], k[:, :, :3], v[:, :, :3]) for c in (unknown, known))
        assert torch.equal(found, wanted)
    assert torch.equal(known.k, unknown.k) and unknown.v.shape == (1, 2, 8, 16)
    with pytest.raises(ValueError, match="k has shape"):
        unknown.attend(q[:, :, :1], *(x[:, :1, :1] for x in (k, v)))
    with pytest.raises(ValueError, match="kv_heads is 0; accepted is an int of at least 1"):
        KVCache(1, 0, 8, 16)


# ---- norms that are not, or no longer, ours alone ------------------------------------------------


@pytest.mark.parametrize("kind", ["hooked", "torch's"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_block_calls_a_wrapped_norm_with_one_tensor(kind, dropout):
    torch.manual_seed(0)
    block = TransformerBlock(32, 4, context_dim=24, dropout=dropout)
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 24)

    def out():
        torch.manual_seed(1)
        return block(x, context)

    wanted, seen = out(), []
    for name in ("attn_norm", "cross_norm", "mlp_norm"):
        if kind == "torch's":
            setattr(block, name, nn.RMSNorm(32, 1e-6))
        hook = getattr(block, name).register_forward_hook(
            lambda module, args, y: seen.append((len(args), type(y)))
        )
        assert hook is not None
    torch.testing.assert_close(out(), wanted)
    assert seen == [(1, torch.Tensor)] * 3


def test_a_norm_of_ours_still_adds():
    norm, x = RMSNorm(32), torch.randn(2, 5, 32)
    normed, summed = norm(x, x)
    torch.testing.assert_close(summed, 2 * x)
    torch.testing.assert_close(normed, norm(2 * x))

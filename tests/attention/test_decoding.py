"""decode_attention(): what it appends, where, and what it attends to. merge_states()."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.native)]
B, HQ, HKV, S_MAX, D, DV = 3, 4, 2, 13, 8, 6


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


class Call:
    """A cache, new tokens, and the keys and values that each entry ends up with."""

    def __init__(self, lens, new=2, dtype=torch.float32, rows=B):
        self.lens, self.new = lens, new
        self.q = torch.randn(B, HQ, new or 2, D).to(dtype)
        self.k_cache = torch.randn(rows, HKV, S_MAX, D).to(dtype)
        self.v_cache = torch.randn(rows, HKV, S_MAX, DV).to(dtype)
        self.k = torch.randn(B, HKV, new, D).to(dtype)
        self.v = torch.randn(B, HKV, new, DV).to(dtype)

    def entry(self, b, row):
        """Keys and values of entry b after the call, in order."""
        n = self.lens[b]
        return (
            torch.cat([cache[row, :, :n], fresh[b]], dim=1)[None]
            for cache, fresh in ((self.k_cache, self.k), (self.v_cache, self.v))
        )

    def poison(self, rows):
        """Values beyond an entry's length, or in a row of no entry, are NaN."""
        for cache in (self.k_cache, self.v_cache):
            for row in range(cache.shape[0]):
                cache[row, :, self.lens[rows.index(row)] if row in rows else 0 :] = torch.nan


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lens", [(5, 5, 5), (0, 11, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}, {"softcap": 2.0}],
                         ids=str)  # fmt: skip
def test_append_and_attend(lens, options, backend):
    call = Call(lens)
    call.poison([0, 1, 2])
    entries = [tuple(call.entry(b, b)) for b in range(B)]
    before = call.k_cache.clone(), call.v_cache.clone()
    out, lse = fastattn.decode_attention(
        call.q, call.k_cache, call.v_cache, cache_lens=ints(*lens), k=call.k, v=call.v, **options,
        return_lse=True, backend=backend,
    )  # fmt: skip
    assert out.shape == (B, HQ, 2, DV) and lse.shape == (B, HQ, 2)
    for b, (k, v) in enumerate(entries):
        want, want_lse = fastattn.attention(
            call.q[b : b + 1], k, v, **options, return_lse=True, backend=backend
        )
        torch.testing.assert_close(out[b : b + 1], want)
        torch.testing.assert_close(lse[b : b + 1], want_lse)
        for cache, old, new in zip((call.k_cache, call.v_cache), before, (call.k, call.v)):
            n = lens[b]
            assert torch.equal(cache[b, :, n : n + 2], new[b])
            old[b, :, n : n + 2] = new[b]
    for cache, old in zip((call.k_cache, call.v_cache), before):
        assert torch.equal(cache.isnan(), old.isnan())
        assert torch.equal(cache.nan_to_num(), old.nan_to_num())  # nothing else is written


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_splits", [None, 0, 1, 3])
def test_without_new_tokens(num_splits, backend):
    call = Call((5, 13, 1), new=0)
    call.poison([0, 1, 2])
    caches = call.k_cache.clone(), call.v_cache.clone()
    out = fastattn.decode_attention(
        call.q, *caches, cache_lens=ints(5, 13, 1), num_splits=num_splits, backend=backend
    )
    want = fastattn.attention(call.q, *caches, kv_lens=ints(5, 13, 1), backend=backend)
    torch.testing.assert_close(out, want)
    one = fastattn.decode_attention(call.q, *caches, cache_lens=1, backend=backend)
    want = fastattn.attention(call.q, *(x[:, :, :1] for x in caches), backend=backend)
    torch.testing.assert_close(one, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lens", [(5, 5, 5), (0, 11, 4)], ids=str)
def test_pages(lens, backend):
    """The same call with the cache cut into scattered pages of 4."""
    call = Call(lens)
    rows = [0, 1, 2]
    call.poison(rows)
    table = torch.randperm(20)[: B * 4].view(B, 4).int()
    pages = []
    for cache in (call.k_cache, call.v_cache):
        padded = torch.nn.functional.pad(cache, (0, 0, 0, 3), value=torch.nan)
        paged = torch.full((20, HKV, 4, cache.shape[3]), torch.nan)
        paged[table.long()] = padded.unflatten(2, (4, 4)).transpose(1, 2)
        pages.append(paged)
    options = {"cache_lens": ints(*lens), "k": call.k, "v": call.v, "causal": True}
    want = fastattn.decode_attention(call.q, call.k_cache, call.v_cache, **options)
    out = fastattn.decode_attention(call.q, *pages, **options, page_table=table, backend=backend)
    torch.testing.assert_close(out, want)
    for paged, cache in zip(pages, (call.k_cache, call.v_cache)):
        gathered = paged[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :S_MAX]
        assert torch.equal(gathered.nan_to_num(), cache.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_batch_idx(backend):
    call, rows = Call((3, 0, 9), rows=6), [4, 0, 5]
    call.poison(rows)
    entries = [tuple(call.entry(b, rows[b])) for b in range(B)]
    out = fastattn.decode_attention(
        call.q, call.k_cache, call.v_cache, cache_lens=ints(3, 0, 9), k=call.k, v=call.v,
        cache_batch_idx=ints(*rows), causal=True, backend=backend,
    )  # fmt: skip
    for b, (k, v) in enumerate(entries):
        want = fastattn.attention(call.q[b : b + 1], k, v, causal=True, backend=backend)
        torch.testing.assert_close(out[b : b + 1], want)
        assert torch.equal(call.k_cache[rows[b], :, call.lens[b] : call.lens[b] + 2], call.k[b])
    assert call.k_cache[1:4].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_hides_slots_and_moves_nothing(backend):
    call = Call((5, 8, 4))
    call.poison([0, 1, 2])
    pads = (2, 0, 4)
    entries = [tuple(call.entry(b, b)) for b in range(B)]
    for b, pad in enumerate(pads):
        call.k_cache[b, :, :pad] = call.v_cache[b, :, :pad] = torch.nan
    slopes = torch.rand(HQ)
    out = fastattn.decode_attention(
        call.q, call.k_cache, call.v_cache, cache_lens=ints(5, 8, 4), k=call.k, v=call.v,
        cache_leftpad=ints(*pads), causal=True, alibi_slopes=slopes, backend=backend,
    )  # fmt: skip
    for b, (k, v) in enumerate(entries):
        visible = torch.arange(k.shape[2]) >= pads[b]
        want = fastattn.attention(call.q[b : b + 1], k, v, causal=True, mask=visible,
                                  alibi_slopes=slopes)  # fmt: skip
        torch.testing.assert_close(out[b : b + 1], want)


def rotate(x, positions, cos, sin, interleaved):
    """Rotary embedding by complex numbers, an implementation independent of the library's."""
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half].double(), x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).mT
    spun = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[positions]
    pairs = torch.view_as_real(spun)
    turned = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, None)}], ids=str)
def test_rotary(interleaved, rotary_dim, options):
    lens = (5, 8, 0)
    angles = torch.rand(S_MAX, rotary_dim // 2, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    turned, plain = Call(lens), Call(lens)
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        setattr(plain, name, getattr(turned, name).clone())
    arguments = {"cache_lens": ints(*lens), **options}
    out = fastattn.decode_attention(
        turned.q, turned.k_cache, turned.v_cache, k=turned.k, v=turned.v, **arguments,
        rotary=(cos.float(), sin.float()), rotary_interleaved=interleaved,
    )  # fmt: skip
    moving = torch.tensor(lens)[:, None] + torch.arange(2)
    fixed = torch.tensor(lens)[:, None].expand(B, 2)  # FlashAttention's rule without a band
    for b in range(B):
        at = moving[b] if options else fixed[b]
        plain.q[b] = rotate(plain.q[b], at, cos, sin, interleaved)
        plain.k[b] = rotate(plain.k[b], moving[b], cos, sin, interleaved)
    want = fastattn.decode_attention(
        plain.q, plain.k_cache, plain.v_cache, k=plain.k, v=plain.v, **arguments
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(turned.k_cache, plain.k_cache)
    assert torch.equal(turned.v_cache, plain.v_cache)


def test_token_by_token_is_the_whole_sequence():
    q, k, v = (torch.randn(2, h, 9, D) for h in (HQ, HKV, HKV))
    k_cache, v_cache = torch.full((2, HKV, 9, D), torch.nan), torch.full((2, HKV, 9, D), torch.nan)
    outs = [
        fastattn.decode_attention(
            q[:, :, n : n + 1], k_cache, v_cache, cache_lens=n, k=k[:, :, n : n + 1],
            v=v[:, :, n : n + 1], causal=True, window=(4, None),
        )
        for n in range(9)
    ]  # fmt: skip
    want = fastattn.attention(q, k, v, causal=True, window=(4, None))
    torch.testing.assert_close(torch.cat(outs, 2), want)


def test_masks_bias_and_half_precision_under_autocast():
    call = Call((5, 8, 0), dtype=torch.bfloat16)
    bias = torch.randn(HQ, 1, S_MAX)
    mask = torch.rand(B, 1, 1, S_MAX) > 0.2
    options = {"cache_lens": ints(5, 8, 0), "bias": bias, "mask": mask}
    caches = call.k_cache.clone(), call.v_cache.clone()
    want = fastattn.decode_attention(call.q, *caches, **options, k=call.k, v=call.v)
    options |= {"k": call.k.float(), "v": call.v.float()}
    with torch.autocast("cpu", dtype=torch.float16):  # what is written to the cache takes its dtype
        out = fastattn.decode_attention(call.q.float(), call.k_cache, call.v_cache, **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)


@pytest.mark.native
def test_compiled_decoding():
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, lens, k, v):
        return fastattn.decode_attention(
            q, k_cache, v_cache, cache_lens=lens, k=k, v=v, causal=True, num_splits=2
        )

    call = Call((5, 8, 0))
    caches = call.k_cache.clone(), call.v_cache.clone()
    want = step(call.q, *caches, ints(5, 8, 0), call.k, call.v)
    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        out = compiled(call.q, call.k_cache, call.v_cache, ints(5, 8, 0), call.k, call.v)
    torch._dynamo.reset()
    torch.testing.assert_close(out, want)
    assert torch.equal(call.k_cache, caches[0]) and torch.equal(call.v_cache, caches[1])


# ---- refusals: nothing is written ---------------------------------------------------------------

TABLE = {"page_table": ints(0, 1).expand(3, 2)}
WRONG = {
    "overrun": (ValueError, r"cache_lens\[1\] is 12; accepted is 13 slots less 2 new keys: \[0, 11",
                {"cache_lens": ints(5, 12, 0)}),
    "overrun by an int": (ValueError, r"cache_lens\[0\] is 12", {"cache_lens": 12}),
    "negative": (ValueError, r"cache_lens\[2\] is -1", {"cache_lens": ints(5, 2, -1)}),
    "lens shape": (ValueError, r"cache_lens has shape \[2\]", {"cache_lens": ints(5, 2)}),
    "lens dtype": (TypeError, "cache_lens is torch.float32", {"cache_lens": torch.zeros(3)}),
    "lens huge": (ValueError, "cache_lens is 4294967296", {"cache_lens": 2**32}),
    "v alone": (ValueError, "v came alone", {"k": None}),
    "k shape": (ValueError, r"k has shape \[3, 4, 2, 8\]; accepted is",
                {"k": torch.zeros(3, 4, 2, 8)}),
    "v length": (ValueError, r"v has shape \[3, 2, 3, 6\]", {"v": torch.zeros(3, 2, 3, 6)}),
    "k dtype": (TypeError, "k is torch.float64 and q is torch.float32",
                {"k": torch.zeros(3, 2, 2, 8).double()}),
    "both tables": (ValueError, "came together", {**TABLE, "cache_batch_idx": ints(0, 1, 2)}),
    "row twice": (ValueError, "names a row twice", {"cache_batch_idx": ints(0, 1, 1)}),
    "row out of range": (ValueError, r"cache_batch_idx\[2\] is 3",
                         {"cache_batch_idx": ints(0, 1, 3)}),
    "page out of range": (ValueError, "page_table row 0 names page 3",
                          {"page_table": ints(3, 0, 0).view(3, 1)}),
    "leftpad": (ValueError, r"cache_leftpad\[0\] is -1", {"cache_leftpad": ints(-1, 0, 0)}),
    "rotary type": (TypeError, "rotary is of type Tensor", {"rotary": torch.zeros(9, 4)}),
    "rotary too wide": (ValueError, "rotary's cos has shape",
                        {"rotary": (torch.zeros(13, 5),) * 2}),
    "rotary too short": (ValueError, r"cache_lens\[1\] is 8; accepted is a position",
                         {"rotary": (torch.zeros(9, 4),) * 2}),
    "rotary ints": (TypeError, "rotary's cos is torch.int64",
                    {"rotary": (torch.zeros(13, 4).long(),) * 2}),
    "kv_lens": (NotImplementedError, "cache_lens says", {"kv_lens": ints(1, 1, 1)}),
    "documents": (NotImplementedError, "one document", {"document_ids": torch.zeros(3, 13)}),
    "num_splits": (ValueError, "num_splits is -1", {"num_splits": -1}),
    "mask shape": (ValueError, r"mask has shape \[2, 12\]", {"mask": torch.ones(2, 12).bool()}),
    "backend": (NotImplementedError, "backend='cuda' cannot run", {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_refusals(wrong):
    kind, sentence, changes = WRONG[wrong]
    call = Call((5, 8, 0))
    arguments = {"cache_lens": ints(5, 8, 0), "k": call.k, "v": call.v} | changes
    before = call.k_cache.clone(), call.v_cache.clone()
    with pytest.raises(kind, match=sentence):
        fastattn.decode_attention(call.q, call.k_cache, call.v_cache, **arguments)
    assert torch.equal(call.k_cache, before[0]) and torch.equal(call.v_cache, before[1])


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v"])
def test_gradients_are_refused(name):
    call = Call((5, 8, 0))
    tensors = {n: getattr(call, n) for n in ("q", "k_cache", "v_cache", "k", "v")}
    tensors[name].requires_grad_()
    with pytest.raises(NotImplementedError, match="requires grad, and calls with it have no gradi"):
        fastattn.decode_attention(**tensors, cache_lens=ints(5, 8, 0))
    with torch.no_grad():
        fastattn.decode_attention(**tensors, cache_lens=ints(5, 8, 0))


def test_a_table_that_is_too_short():
    call = Call((5, 5, 5))
    pages = call.k_cache[:, :, :4], call.v_cache[:, :, :4]
    with pytest.raises(ValueError, match="4 slots less 2 new keys"):
        fastattn.decode_attention(
            call.q, *pages, cache_lens=ints(5, 5, 5), k=call.k, v=call.v,
            page_table=ints(0, 1, 2).view(3, 1),
        )  # fmt: skip


# ---- merge_states -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_merging_the_parts_gives_the_whole(dtype, backend):
    q, k, v = (torch.randn(2, h, n, D).to(dtype) for h, n in ((HQ, 5), (HKV, 20), (HKV, 20)))
    options = {"return_lse": True, "backend": backend}
    whole = fastattn.attention(q, k, v, **options)
    cuts = [0, 7, 7, 8, 20]  # one of the two is empty
    parts = [
        fastattn.attention(q, k[:, :, a:b], v[:, :, a:b], **options) for a, b in pairwise(cuts)
    ]
    state = parts[0]
    for part in parts[1:]:
        state = fastattn.merge_states(*state, *part)
    assert state[0].dtype == dtype and state[1].dtype == whole[1].dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(state[0], whole[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state[1], whole[1], rtol=1e-5, atol=1e-5)


def test_merging_empty_states():
    out, lse = torch.randn(4, 3), torch.tensor([0.5, -math.inf, 2.0, -math.inf])
    empty, never = torch.full((4, 3), torch.nan), torch.full((4,), -math.inf)
    leaves = [x.clone().requires_grad_() for x in (out, lse, empty, never)]
    merged, total = fastattn.merge_states(*leaves)
    alive = lse > -math.inf
    assert torch.equal(merged[alive], out[alive]) and torch.equal(total, lse)
    assert (merged[~alive] == 0).all()
    grads = torch.autograd.grad(merged.sum() + total[alive].sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[1], alive.float()) and (grads[2] == 0).all() and (grads[3] == 0).all()
    swapped = fastattn.merge_states(empty, never, out, lse)
    assert torch.equal(swapped[0], merged) and torch.equal(swapped[1], total)


def test_merging_far_apart_and_equal_states():
    out_a, out_b = torch.randn(3, 2), torch.randn(3, 2)
    lse_a, lse_b = torch.tensor([1e4, -1e4, 3.0]), torch.tensor([0.0, 0.0, 3.0])
    out, lse = fastattn.merge_states(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, torch.stack([out_a[0], out_b[1], (out_a[2] + out_b[2]) / 2]))
    torch.testing.assert_close(lse, torch.tensor([1e4, 0.0, 3.0 + math.log(2)]))


def test_merging_is_differentiable():
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3))]
    leaves += [torch.randn_like(x).requires_grad_() for x in leaves]
    assert gradcheck(fastattn.merge_states, leaves, check_forward_ad=True)
    assert gradgradcheck(fastattn.merge_states, leaves)


def test_merging_refuses():
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for kind, sentence, arguments in (
        (TypeError, "lse_a is of type float", (out, 0.0, out, lse)),
        (TypeError, "out_b is torch.int64", (out, lse, out.long(), lse)),
        (ValueError, r"out_b has shape \[3, 4\] and out_a \[2, 3, 4\]", (out, lse, out[0], lse)),
        (ValueError, r"lse_b has shape \[2\]; accepted is", (out, lse, out, lse[:, 0])),
        (ValueError, "lse_b is on meta", (out, lse, out, lse.to("meta"))),
    ):
        with pytest.raises(kind, match=sentence):
            fastattn.merge_states(*arguments)

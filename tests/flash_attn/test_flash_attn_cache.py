"""flash_attn_with_kvcache: what it writes, where, how it rotates, and what it attends to."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from flash_calls import BATCH, DIM, HEADS, assert_all_close, pairs, plain, slopes_of

from fastattn.flash_attn import flash_attn_func, flash_attn_with_kvcache

F64 = torch.float64
SLOTS, NEW, KV_HEADS = 12, 3, 2
LENS = (5, 9)
CACHED = [
    (name, options)
    for name, options in pairs()
    if not options.keys() & {"dropout_p", "deterministic", "kv_heads"}
]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape):
    return torch.randn(*shape, dtype=F64)


def turned(x, cos, sin, positions, interleaved):
    """x [S, H, D], its first channels as complex numbers times exp(i * angle) at the positions."""
    half = cos.shape[1]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).mT
    product = torch.view_as_complex(pairs.contiguous()) * (cos + 1j * sin)[positions][:, None]
    pairs = torch.view_as_real(product)
    return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), rest], dim=-1)


class Cache:
    """Entries of random length, stored as rows, as other rows (cache_batch_idx), or in scattered
    pages."""

    def __init__(self, home, lens=LENS):
        self.home, self.lens = home, lens
        self.q = randn(BATCH, NEW, HEADS, DIM)
        self.k, self.v = randn(BATCH, NEW, KV_HEADS, DIM), randn(BATCH, NEW, KV_HEADS, DIM)
        self.old = randn(2, BATCH, SLOTS, KV_HEADS, DIM)  # keys and values, slot by slot
        for n, length in enumerate(lens):
            self.old[:, n, length:] = torch.nan
        self.rows = [4, 1]
        self.table = torch.tensor([[6, 0, 3], [2, 5, 1]], dtype=torch.int32)  # pages of 4
        self.caches = [self._laid_out(x) for x in self.old]
        self.where = {
            "rows": {},
            "other rows": {"cache_batch_idx": ints(*self.rows)},
            "blocks": {"block_table": self.table},
        }[home]

    def _laid_out(self, x):
        if self.home == "rows":
            return x.clone()
        if self.home == "other rows":
            cache = torch.full((6, SLOTS, KV_HEADS, DIM), torch.nan, dtype=F64)
            cache[self.rows] = x
            return cache
        blocks = torch.full((8, 4, KV_HEADS, DIM), torch.nan, dtype=F64)
        blocks[self.table.long()] = x.unflatten(1, (3, 4))
        return blocks

    def now(self, n):
        """Keys and values of all slots of entry n."""
        if self.home == "blocks":
            return (x[self.table[n].long()].flatten(0, 1) for x in self.caches)
        return (x[n if self.home == "rows" else self.rows[n]] for x in self.caches)


@pytest.mark.parametrize("home", ["rows", "other rows", "blocks"])
def test_appends_and_attends(home):
    """Every option and pair of options, with and without left padding: out, lse and the cache."""
    for (name, options), leftpad in product(CACHED, (None, (2, 0))):
        cache = Cache(home)
        out, lse = flash_attn_with_kvcache(
            cache.q, *cache.caches, cache.k, cache.v, cache_seqlens=ints(*LENS), **cache.where,
            cache_leftpad=leftpad and ints(*leftpad), return_softmax_lse=True, **options,
        )  # fmt: skip
        assert out.is_contiguous()
        for n, length in enumerate(LENS):
            keys, values = cache.old[:, n].clone()
            keys[length : length + NEW], values[length : length + NEW] = cache.k[n], cache.v[n]
            for got, want in zip(cache.now(n), (keys, values)):
                assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0)), name
            one = plain(
                cache.q[n], *(x[: length + NEW] for x in (keys, values)),
                first=leftpad[n] if leftpad else 0,
                **options | {"alibi_slopes": slopes_of(options.get("alibi_slopes"), n)},
            )  # fmt: skip
            assert_all_close((out[n], lse[n]), one[:2], msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("home", ["rows", "blocks"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 1)}], ids=str)
@pytest.mark.parametrize("rotary_dim", [DIM, 4])
def test_rotary(home, interleaved, options, rotary_dim):
    """Keys are rotated at their slots; queries too if causal or windowed, else all at the first."""
    angle = torch.arange(20)[:, None] * torch.rand(rotary_dim // 2, dtype=F64)
    cos, sin = angle.cos(), angle.sin()
    cache = Cache(home)
    out = flash_attn_with_kvcache(
        cache.q, *cache.caches, cache.k, cache.v, cos, sin, ints(*LENS), **cache.where,
        rotary_interleaved=interleaved, **options,
    )  # fmt: skip
    for n, length in enumerate(LENS):
        at = length + torch.arange(NEW)
        new = turned(cache.k[n], cos, sin, at, interleaved)
        keys, values = (x[: length + NEW] for x in cache.now(n))
        torch.testing.assert_close(keys[length:], new)
        assert torch.equal(values[length:], cache.v[n])
        q = turned(cache.q[n], cos, sin, at if options else at[:1].expand(NEW), interleaved)
        torch.testing.assert_close(out[n], plain(q, keys, values, **options).out)


@pytest.mark.parametrize("home", ["rows", "other rows", "blocks"])
def test_lengths_may_be_one_int_or_none(home):
    cache = Cache(home, lens=(SLOTS, SLOTS))
    before = [x.clone() for x in cache.caches]
    keys, values = cache.old
    whole = flash_attn_with_kvcache(cache.q, *cache.caches, **cache.where)
    torch.testing.assert_close(whole, flash_attn_func(cache.q, keys, values))
    for splits in (0, 1, 3):
        out = flash_attn_with_kvcache(
            cache.q, *cache.caches, cache_seqlens=7, num_splits=splits, causal=True, **cache.where
        )
        want = flash_attn_func(cache.q, keys[:, :7], values[:, :7], causal=True)
        torch.testing.assert_close(out, want)
    for now, then in zip(cache.caches, before):
        assert torch.equal(now.nan_to_num(9.0), then.nan_to_num(9.0))


def test_values_of_another_size_and_packed_queries():
    """out is contiguous in any case."""
    k_cache, v_cache = torch.randn(BATCH, 6, KV_HEADS, DIM), torch.randn(BATCH, 6, KV_HEADS, 5)
    q = torch.randn(BATCH, NEW, 3, HEADS, DIM)[:, :, 1]
    for values in (v_cache, k_cache):
        out = flash_attn_with_kvcache(q, k_cache, values, causal=True)
        assert out.is_contiguous()
        torch.testing.assert_close(out, flash_attn_func(q, k_cache, values, causal=True))


def test_decoding_token_by_token_equals_one_call():
    q, k, v = (torch.randn(BATCH, 10, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    caches = [torch.full((BATCH, 16, KV_HEADS, DIM), torch.nan) for _ in range(2)]
    steps = [
        flash_attn_with_kvcache(
            q[:, n : n + 1], *caches, k[:, n : n + 1], v[:, n : n + 1], cache_seqlens=n, causal=True
        )
        for n in range(10)
    ]
    want = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(steps, dim=1), want)


def test_row_that_sees_nothing():
    q, cache = torch.randn(1, 3, 1, DIM), torch.randn(1, 4, 1, DIM)
    out, lse = flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=1, causal=True, return_softmax_lse=True
    )
    assert not out[:, :2].any() and (lse[..., :2] == torch.inf).all()
    torch.testing.assert_close(out[:, 2], cache[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = (torch.randn(BATCH, 1, h, DIM).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    caches = [torch.randn(BATCH, 40, KV_HEADS, DIM).to(dtype) for _ in range(2)]
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=ints(30, 11), causal=True, return_softmax_lse=True
    )
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for n, length in enumerate((31, 12)):
        want = plain(q[n].double(), *(x[n, :length].double() for x in caches)).out
        atol = 2 * torch.finfo(dtype).eps + 1e-6
        torch.testing.assert_close(out[n].double(), want, rtol=0, atol=atol)


@pytest.mark.native
def test_compiles_whole():
    """Without a graph break; the cache is written in place."""

    def step(q, k_cache, v_cache, k, v, lens, table):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lens, block_table=table, causal=True
        )

    a, b = Cache("blocks"), Cache("blocks")
    b.caches = [x.clone() for x in a.caches]
    got = torch.compile(step, fullgraph=True)(a.q, *a.caches, a.k, a.v, ints(*LENS), a.table)
    want = step(a.q, *b.caches, a.k, a.v, ints(*LENS), a.table)
    torch.testing.assert_close(got, want)
    assert_all_close(a.caches, b.caches, equal_nan=True, rtol=0, atol=0)

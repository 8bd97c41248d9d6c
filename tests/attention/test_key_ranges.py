"""key_ranges and fastattn.masks are the bool masks that say the same, through every public call."""

from __future__ import annotations

import doctest

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.core import ranges as key_ranges
from fastattn.weights import attention_weights


def draw(seed: int, *shape: int, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_mask(ranges, kv_len: int) -> torch.Tensor:
    """bool, broadcastable to [B, heads, rows, keys]."""
    begin, end = (x.unsqueeze(-1) for x in ranges)
    j = torch.arange(kv_len)
    return (begin <= j) & (j < end)


def random_ranges(*shape: int, kv_len: int):
    made = torch.Generator().manual_seed(7)
    ends = (torch.randint(-4, kv_len + 4, shape, generator=made) for _ in range(2))
    return tuple(x.sort(-1).values.int() for x in ends)


# ---- fastattn.masks ------------------------------------------------------------------------------

P = torch.arange(3, 10)[:, None]  # rows at positions 3 to 9, and keys 0 to 9
J = torch.arange(10)
MASKS = {
    "prefix": (masks.prefix(5, 7, offset=3), (J < 5) | (J <= P)),
    "prefix of none": (masks.prefix(0, 7, offset=3), J <= P),
    "chunked": (masks.chunked(4, 7, offset=3), J // 4 == P // 4),
    "chunked past padding": (masks.chunked(4, 7, offset=3, first=2), (J - 2) // 4 == (P - 2) // 4),
    "block_causal": (masks.block_causal(4, 7, offset=3), J // 4 <= P // 4),
    "block_causal of sizes": (
        masks.block_causal([1, 4, 2, 3], 7, offset=3),
        torch.tensor([0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
        <= torch.tensor([1, 1, 2, 2, 3, 3, 3])[:, None],
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_their_definition(name):
    ranges, mask = MASKS[name]
    assert all(x.dtype == torch.int32 and x.dim() == 3 for x in ranges)
    assert torch.equal(as_mask(ranges, 10)[0, 0], mask)


def test_masks_of_positions_far_beyond_the_keys():
    """Beyond 2**30 there is no key, so ends are clamped there: none wraps around."""
    far = 1 << 30
    ends = masks.prefix(torch.tensor([2**40]), 3)[1]
    assert ends.flatten().tolist() == [far] * 3
    assert masks.prefix(1, 3, offset=torch.tensor([2**31 - 2]))[1].flatten().tolist() == [far] * 3
    begin, end = masks.chunked(far - 1, 2, offset=far - 1, first=1 - far)
    assert begin.flatten().tolist() == [far - 1] * 2 and end.flatten().tolist() == [far] * 2
    for sizes in (2, [2, 2]):
        ends = masks.block_causal(sizes, 5, offset=-3)[1]
        seen = fastattn.attention(*[torch.zeros(1, 1, 5, 8)] * 3, key_ranges=masks.block_causal(
            sizes, 5, offset=-3), return_lse=True)[1].exp().round().flatten().tolist()  # fmt: skip
        assert ends.clamp(min=0).flatten().tolist() == [0, 0, 0, 2, 2] == seen


def test_masks_of_each_entry():
    """Lengths, offsets and paddings may differ; whatever is one for all stays of size 1."""
    lens, offset = torch.tensor([2, 0, 9]), torch.tensor([0, 3, 5])
    for made, one in (
        (masks.prefix(lens, 4), lambda n: masks.prefix(int(lens[n]), 4)),
        (masks.prefix(2, 4, offset=offset), lambda n: masks.prefix(2, 4, offset=int(offset[n]))),
        (masks.chunked(3, 4, offset=offset, first=lens),
         lambda n: masks.chunked(3, 4, offset=int(offset[n]), first=int(lens[n]))),
        (masks.block_causal((2, 3, 4), 4, offset=offset),
         lambda n: masks.block_causal((2, 3, 4), 4, offset=int(offset[n]))),
    ):  # fmt: skip
        for n in range(3):
            alone = one(n)
            assert all(x.shape[0] == 1 for x in alone)
            for x, y in zip(made, alone):
                assert torch.equal(x[n if x.shape[0] > 1 else 0], y[0])


def test_examples_of_the_documentation():
    found = doctest.testmod(masks, extraglobs={"torch": torch})
    assert found.attempted >= 6 and not found.failed


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda: masks.chunked(0, 4), ValueError, r"chunk_size is 0; accepted is an int in \[1"),
        (lambda: masks.chunked(2.0, 4), TypeError, "chunk_size is of type float; accepted is an"),
        (lambda: masks.prefix(2, -1), ValueError, "q_len is -1; accepted is an int in"),
        (lambda: masks.prefix(torch.zeros(2), 3), TypeError, "prefix_lens is torch.float32 of"),
        (
            lambda: masks.prefix(torch.zeros(2, 1).int(), 3),
            TypeError,
            r"of shape \[2, 1\]; accepte",
        ),
        (lambda: masks.block_causal([], 3), ValueError, "block_sizes is empty; accepted are"),
        (lambda: masks.block_causal(4, 3, offset=2**30), ValueError, "offset is 1073741824; accep"),
    ],
)
def test_masks_refuse(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


# ---- the calls -----------------------------------------------------------------------------------

Q, K, V = draw(1, 2, 4, 6, 8), draw(2, 2, 2, 9, 8), draw(3, 2, 2, 9, 5)
OPTIONS = {
    "alone": {},
    "causal": {"causal": True},
    "window, lengths": {"window": (3, 1), "kv_lens": torch.tensor([9, 4], dtype=torch.int32)},
    "sinks, softcap": {"sinks": draw(4, 4), "softcap": 2.0},
    "bias, dropout": {"bias": draw(5, 1, 4, 6, 9), "dropout_p": 0.3, "dropout_seed": (1, 2)},
}
SHAPES = [(6,), (1, 6), (2, 1, 6), (4, 6), (2, 4, 6), (2, 4, 1), (1,)]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, name, backend):
    ranges = random_ranges(*shape, kv_len=9)
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    options = {**OPTIONS[name], "return_lse": True}
    results = []
    for given in ({"key_ranges": ranges, "backend": backend},
                  {"mask": as_mask(ranges, 9), "backend": "reference"}):  # fmt: skip
        out, lse = fastattn.attention(*leaves, **given, **options)
        total = out.square().sum() + lse.clamp(min=-99).sum()
        results.append((out, lse, *torch.autograd.grad(total, leaves)))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rank", [2, 3])
def test_fewer_dimensions(rank):
    q, k, v = (x[:, 0] if rank == 3 else x[0, 0] for x in (Q, K, V))
    ranges = random_ranges(*q.shape[:-1], kv_len=9)
    out = fastattn.attention(q, k, v, key_ranges=ranges)
    torch.testing.assert_close(out, fastattn.attention(q, k, v, mask=as_mask(ranges, 9)))


def test_heads_of_a_whole():
    ranges, whole = random_ranges(4, 6, kv_len=9), fastattn.attention
    want = whole(Q, K, V, key_ranges=ranges)[:, 2:]
    got = whole(Q[:, 2:], K[:, 1:], V[:, 1:], key_ranges=ranges, head_origin=(2, 4))
    torch.testing.assert_close(got, want)


def test_varlen_and_decoding():
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 5, 14]))
    q, k, v = draw(1, 6, 4, 8), draw(2, 14, 2, 8), draw(3, 14, 2, 8)
    for shape in ((4,), (2, 1, 4), (2, 4, 4)):
        ranges = random_ranges(*shape, kv_len=9)
        args = (q, k, v, cu_q, cu_k, 4, 9)
        got = fastattn.varlen_attention(*args, causal=True, key_ranges=ranges)
        want = fastattn.varlen_attention(*args, causal=True, mask=as_mask(ranges, 9))
        torch.testing.assert_close(got, want)
    ranges = random_ranges(2, 4, 6, kv_len=9)
    lens = {"cache_lens": torch.tensor([9, 7], dtype=torch.int32), "causal": True}
    got = fastattn.decode_attention(Q, K, V, **lens, key_ranges=ranges)
    torch.testing.assert_close(
        got, fastattn.decode_attention(Q, K, V, **lens, mask=as_mask(ranges, 9))
    )


def test_what_was_decided_for_one_call_is_not_taken_for_another():
    """Plans are kept by which operands are there."""
    for _ in range(2):
        plain = fastattn.attention(Q, K, V)
        ranged = fastattn.attention(Q, K, V, key_ranges=masks.chunked(3, 6))
        assert not torch.equal(plain, ranged)


def test_weights():
    ranges = random_ranges(2, 4, 6, kv_len=9)
    _, lse = fastattn.attention(Q, K, V, key_ranges=ranges, return_lse=True)
    got = attention_weights(Q, K, lse, key_ranges=ranges)
    torch.testing.assert_close(got, attention_weights(Q, K, lse, mask=as_mask(ranges, 9)))


def test_derivatives():
    ranges = random_ranges(1, 1, 6, kv_len=9)

    def function(key):
        return lambda q, k, v, x=ranges: fastattn.attention(
            q, k, v, **{key: x if key == "key_ranges" else as_mask(x, 9)}
        )

    tangents = tuple(torch.ones_like(x) for x in (Q, K, V))
    batch = [x.expand(3, *x.shape) for x in (Q, K, V)]
    stacked = tuple(
        torch.stack([x.expand(1, 1, 6) for x in y])
        for y in zip(ranges, masks.prefix(2, 6), masks.chunked(4, 6))
    )
    for transform in (
        lambda f: torch.func.jvp(lambda *x: f(*x), (Q, K, V), tangents)[1],
        lambda f: torch.func.vmap(f)(*batch, stacked),
        lambda f: torch.func.grad(
            lambda k: torch.func.grad(lambda q: f(q, k, V).square().sum())(Q).sum()
        )(K),
    ):
        torch.testing.assert_close(transform(function("key_ranges")), transform(function("mask")))


@pytest.mark.native
def test_autocast():
    ranges, (q, k, v) = random_ranges(4, 6, kv_len=9), (x.float() for x in (Q, K, V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fastattn.attention(q, k, v, key_ranges=ranges)
    assert got.dtype == torch.bfloat16
    halves = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(got, fastattn.attention(*halves, key_ranges=ranges))


@pytest.mark.native
@pytest.mark.parametrize("made", ["given", "in the program"])
def test_export(made):
    """The exported program has the operator, and is right at another number of rows."""

    class Module(torch.nn.Module):
        def forward(self, q, k, v, begin, end):
            own = (begin, end) if made == "given" else masks.chunked(4, q.shape[2])
            return fastattn.attention(q, k, v, key_ranges=own)

    rows = torch.export.Dim("rows", min=2, max=64)
    ends = [x.expand(6) for x in (torch.zeros(1).int(), torch.tensor([5]).int())]
    shapes = ({2: rows}, None, None, {0: rows}, {0: rows})
    program = torch.export.export(Module(), (Q, K, V, *ends), dynamic_shapes=shapes)
    assert "fastattn.flash_attn_fwd.default" in {str(node.target) for node in program.graph.nodes}
    call = draw(4, 2, 4, 11, 8), K, V, *random_ranges(11, kv_len=9)
    assert torch.equal(program.module()(*call), Module()(*call))


def test_explain_counts_exactly():
    ranges = random_ranges(2, 4, 6, kv_len=9)
    for options in ({}, {"causal": True}, {"kv_lens": torch.tensor([9, 4], dtype=torch.int32)}):
        told = fastattn.explain(Q, K, V, key_ranges=ranges, **options)
        seen = as_mask(ranges, 9)
        if "causal" in options:
            seen = seen & torch.ones(6, 9, dtype=torch.bool).tril(3)
        if "kv_lens" in options:
            seen = seen & (torch.arange(9) < options["kv_lens"][:, None, None, None])
        assert told.pairs == int(seen.sum())
        assert {"key_begin", "key_end"} <= {*told.operands}


ENDS = torch.arange(6, dtype=torch.int32)
REFUSED = {
    "no pair": (ENDS, TypeError, "key_ranges is of type Tensor; accepted is a pair"),
    "one end": ((ENDS,), TypeError, r"key_ranges is .*; accepted is a pair \(begin"),
    "numbers": ((0, ENDS), TypeError, "key_ranges' begin is 0; key_ranges accepts a pair"),
    "floats": ((ENDS.float(), ENDS), TypeError, "begin is torch.float32; accepted is torch.int32"),
    "rows": (
        (ENDS[1:], ENDS),
        ValueError,
        r"key_ranges' begin has shape \[5\]; accepted is any that broadcasts to \[2, 4, 6\] ",
    ),
    "no heads": ((ENDS, ENDS.expand(2, 6)), ValueError, r"rows\), here end\[:, None\]"),
    "keys": ((ENDS.expand(2, 4, 9, 6), ENDS), ValueError, "key_ranges' begin has shape"),
    "decreasing": (
        (ENDS, torch.tensor([9, 9, 5, 9, 9, 9])),
        ValueError,
        "key_ranges' end decreases along the rows, from 9 to 5 at row 2",
    ),
    "elsewhere": ((ENDS.to("meta"), ENDS), ValueError, "begin is on meta and q on cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    ranges, error, sentence = REFUSED[name]
    with pytest.raises(error, match=sentence):
        fastattn.attention(Q, K, V, key_ranges=ranges)


def test_where_values_are_not_read_ends_never_decrease(monkeypatch):
    """On a GPU a row takes the largest end of the rows up to it; a meta tensor stands for one."""
    ends = torch.tensor([1, 4, 2, 9, 3, 3], dtype=torch.int32)
    largest, cummax = [], torch.Tensor.cummax

    def counted(x, dim):
        largest.append(dim)
        return cummax(x, dim)

    monkeypatch.setattr(torch.Tensor, "cummax", counted)
    found = key_ranges.normal_form((ends.to("meta"),) * 2, (1, 1, 6, 9), torch.device("meta"))
    assert largest == [2, 2]
    assert all(x.shape == (1, 1, 6, 1) and x.dtype == torch.int32 for x in found.values())

"""Calls of the native operators for tests/backends/test_native.py: random valid ones, and hostile
ones.

A `Call` holds everything torch.ops.fastattn.flash_attn_fwd takes, by name. `calls()` is a
hypothesis strategy of valid ones; each of SPOILERS makes one with a single hostile argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.core.spec import OPERANDS, Operands, Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS = tuple(f.name for f in fields(Spec))
PAGE_SIZE = 8
HUGE = 2**40
REFUSALS = (RuntimeError, ValueError, TypeError)  # NotImplementedError is a RuntimeError
TOLERANCES = {  # of the largest value, for draws of a few dozen normal numbers
    torch.float64: 1e-10,
    torch.float32: 3e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
FUZZ = settings(
    max_examples=int(os.environ.get("FASTATTN_FUZZ", "150")),
    deadline=None,
    derandomize=True,  # the same calls in every run; FASTATTN_FUZZ=5000 tries more
    suppress_health_check=list(HealthCheck),
    database=None,
)


@dataclass
class Call:
    """The arguments of one forward call. Operands and numbers that are not named are off."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float | int | bool] = field(default_factory=dict)
    num_splits: int = 0

    def spec(self) -> Spec:
        return Spec(**self.numbers)

    def operands(self) -> Operands:
        return Operands(**self.tensors)

    def shared(self) -> list:
        defaults = {"scale": 0.3, "softcap": 0.0, "left": -1, "right": -1}
        defaults |= {"align_end": True, "dropout_p": 0.0}
        tensors = [self.tensors.get(name) for name in OPERANDS]
        return [*tensors, *((defaults | self.numbers)[name] for name in NUMBERS)]

    def forward(self) -> tuple[Tensor, Tensor]:
        op = torch.ops.fastattn.flash_attn_fwd
        return op(self.q, self.k, self.v, *self.shared(), self.num_splits)

    def backward(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor):
        op = torch.ops.fastattn.flash_attn_bwd
        need = ("bias" in self.tensors, "sinks" in self.tensors)
        return op(dout, dlse, out, lse, self.q, self.k, self.v, *self.shared(), *need)


# ---- valid calls ------------------------------------------------------------------------------


@st.composite
def calls(draw, paged: bool | None = None, dtypes=DTYPES) -> Call:
    """A valid call: any dtype, layout, mask kind and combination of operands, small sizes."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    coin = lambda: draw(st.booleans())  # noqa: E731
    rng = torch.Generator().manual_seed(integer(0, 2**31))
    dtype = draw(st.sampled_from(dtypes))
    paged = coin() and coin() if paged is None else paged
    packed = coin() and coin()
    entries = integer(0 if packed and not paged else 1, 3)
    kv_heads = integer(1, 3)
    heads = kv_heads * integer(1, 3)
    dim = draw(st.sampled_from((1, 3, 8, 17, 32, 64, 72)))
    dim_v = draw(st.sampled_from((dim, dim, 5, 40)))
    sizes = st.sampled_from((0, 1, 2, 7, 16, 33, 70))
    tensors: dict[str, Tensor] = {}

    q_lens = [draw(sizes) for _ in range(entries)] if packed else [draw(sizes)] * entries
    kv_lens = [draw(sizes) for _ in range(entries)] if packed or paged else [draw(sizes)] * entries
    rows, keys = (sum(q_lens), sum(kv_lens)) if packed else (q_lens[0], kv_lens[0])
    if packed:
        rows, keys = rows + draw(st.sampled_from((0, 0, 3))), keys + draw(st.sampled_from((0, 5)))
        tensors["cu_seqlens_q"] = _cumulative(q_lens)
        tensors["cu_seqlens_k"] = _cumulative(kv_lens)
    if paged:
        most = max(1, -(-max(kv_lens) // PAGE_SIZE))
        pages = entries * most + integer(0, 2)
        order = torch.randperm(pages, generator=rng, dtype=torch.int32)
        tensors["page_table"] = order[: entries * most].view(entries, most)
        if not packed:
            tensors["kv_lens"] = torch.tensor(kv_lens, dtype=torch.int32)
    elif coin() and coin():
        ends = [integer(0, n) for n in kv_lens]
        tensors["kv_lens"] = torch.tensor(ends, dtype=torch.int32)
        if coin():
            tensors["kv_starts"] = torch.tensor([integer(0, n) for n in ends], dtype=torch.int32)
    batch = 1 if packed else entries
    q = _tensor(draw, rng, (batch, heads, rows, dim), dtype)
    kv_shape = (pages, kv_heads, PAGE_SIZE) if paged else (batch, kv_heads, keys)
    k = _tensor(draw, rng, (*kv_shape, dim), dtype)
    v = _tensor(draw, rng, (*kv_shape, dim_v), dtype)

    longest = most * PAGE_SIZE if paged and not packed else max(kv_lens, default=0)
    full = (entries, heads, max(q_lens, default=0), longest)
    if packed:  # a caller's max_seqlen may exceed the longest sequence
        full = (*full[:2], full[2] + integer(0, 2), full[3] + integer(0, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if coin() and coin():
        shape = [n if coin() else 1 for n in full]
        tensors["mask"] = (torch.rand(shape, generator=rng) < 0.7).expand(_grow(draw, shape, full))
    if coin() and coin():
        shape = [n if coin() else 1 for n in full]
        bias = torch.randn(shape, generator=rng).to(draw(st.sampled_from((dtype, wide))))
        tensors["bias"] = bias.expand(_grow(draw, shape, full))
    if coin() and coin():
        shape = (entries, heads) if coin() else (heads,)
        tensors["alibi_slopes"] = torch.rand(shape, generator=rng)
    if coin() and coin():
        tensors["sinks"] = torch.randn(heads, generator=rng).to(wide)
    if not packed and not paged and rows == keys and coin():
        ids = torch.randint(0, 4, (entries, rows), generator=rng, dtype=torch.int32)
        tensors["document_ids"] = ids.sort(-1).values
    if coin() and coin():
        for name in ("key_begin", "key_end"):
            shape = [n if coin() else 1 for n in full[:3]] + [1]
            ends = torch.randint(-9, max(1, longest) + 9, shape, generator=rng)
            ends[:, :, : integer(0, 1)] = integer(-(2**31), 0)
            tensors[name] = ends.sort(2).values.int().expand(_grow(draw, shape, (*full[:3], 1)))
    numbers = {
        "scale": draw(st.sampled_from((0.3, 0.0, -0.2, dim**-0.5))),
        "softcap": draw(st.sampled_from((0.0, 0.0, 5.0))),
        "left": draw(st.sampled_from((-1, -1, 0, 3, 2**29))),
        "right": draw(st.sampled_from((-1, -1, 0, 2, 2**29))),
        "align_end": coin(),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.3))),
    }
    if numbers["dropout_p"]:
        seeds = st.integers(-(2**63), 2**63 - 1)
        first = integer(0, 3)
        part = [first, first + heads + integer(0, 3)] if coin() else []
        tensors["dropout_seed"] = torch.tensor([draw(seeds), draw(seeds), *part])
    return Call(q, k, v, tensors, numbers, draw(st.sampled_from((0, 0, 1, 2, 5))))


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _grow(draw, shape: list[int], full: tuple[int, ...]) -> list[int]:
    """The shape itself, or the full one reached with strides of 0."""
    return list(full) if draw(st.booleans()) else shape


def _tensor(draw, rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers in one of the memory layouts that users have."""
    a, b, c, d = shape
    layout = draw(st.sampled_from(("dense", "bshd", "padded", "expanded")))
    if layout == "bshd":
        return torch.randn(a, c, b, d, generator=rng).to(dtype).transpose(1, 2)
    if layout == "padded":  # odd strides, and a start that is aligned to one element only
        return torch.randn(a, b, c + 1, d + 3, generator=rng).to(dtype)[:, :, 1:, 1 : d + 1]
    if layout == "expanded":
        return torch.randn(1, b, c, d, generator=rng).to(dtype).expand(shape)
    return torch.randn(shape, generator=rng).to(dtype)


# ---- hostile ones -----------------------------------------------------------------------------
# Each changes one thing of a valid call: 2 entries, 4 heads on 2, q_len 7, kv_len 33, D 16.


def plain() -> Call:
    """A valid call that every spoiler can spoil."""
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    return Call(q, k, v, {}, {"scale": 0.25})


def packed() -> Call:
    """A valid packed call: sequences of 3 and 4 rows, 13 and 20 keys."""
    call = plain()
    call.q, call.k, call.v = call.q[:1], call.k[:1], call.v[:1]
    call.tensors = {"cu_seqlens_q": _cumulative([3, 4]), "cu_seqlens_k": _cumulative([13, 20])}
    return call


def paged() -> Call:
    """A valid paged call: 5 pages of 8 keys, entries of 11 and 16 keys."""
    call = plain()
    call.k, call.v = torch.randn(5, 2, 8, 16), torch.randn(5, 2, 8, 16)
    table = torch.tensor([[4, 0], [2, 1]], dtype=torch.int32)
    call.tensors = {"page_table": table, "kv_lens": torch.tensor([11, 16], dtype=torch.int32)}
    return call


def _with(base: Callable[[], Call], **changes) -> Callable[[], Call]:
    """A spoiler: `base` with some arguments replaced, wherever each of them lives."""

    def spoil() -> Call:
        call = base()
        for name, value in changes.items():
            value = value(call) if callable(value) else value
            if name in OPERANDS and value is None:
                del call.tensors[name]
            elif name in OPERANDS:
                call.tensors[name] = value
            elif name in NUMBERS:
                call.numbers[name] = value
            else:
                setattr(call, name, value)
        return call

    return spoil


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _ends(rows: int = 7) -> Tensor:
    """One end of key ranges: [1, 1, rows, 1]."""
    return torch.arange(rows, dtype=torch.int32).view(1, 1, rows, 1)


SPOILERS: dict[str, Callable[[], Call]] = {
    # q, k, v
    "q of rank 3": _with(plain, q=lambda c: c.q[0]),
    "q of rank 5": _with(plain, q=lambda c: c.q[None]),
    "k of rank 2": _with(plain, k=lambda c: c.k[0, 0]),
    "v of rank 0": _with(plain, v=torch.tensor(1.0)),
    "integers": _with(plain, **{n: torch.ones(2, 2, 7, 16, dtype=torch.int32) for n in "qkv"}),
    "complex": _with(plain, **{n: torch.ones(2, 2, 7, 16, dtype=torch.complex64) for n in "qkv"}),
    "float8": _with(plain, **{n: torch.ones(2, 2, 7, 16).to(torch.float8_e4m3fn) for n in "qkv"}),
    "k in another dtype": _with(plain, k=lambda c: c.k.bfloat16()),
    "v in another dtype": _with(plain, v=lambda c: c.v.double()),
    "batches differ": _with(plain, k=lambda c: c.k[:1]),
    "v's batch differs": _with(plain, v=lambda c: c.v[:1]),
    "head dims differ": _with(plain, k=lambda c: c.k[..., :8]),
    "v shorter than k": _with(plain, v=lambda c: c.v[:, :, :20]),
    "v longer than k": _with(plain, k=lambda c: c.k[:, :, :20]),
    "heads not divisible": _with(plain, q=lambda c: c.q[:, :3]),
    "v's heads differ": _with(plain, v=lambda c: c.v[:, :1]),
    "no kv heads": _with(plain, k=lambda c: c.k[:, :0], v=lambda c: c.v[:, :0]),
    "head dim 0": _with(plain, q=lambda c: c.q[..., :0], k=lambda c: c.k[..., :0]),
    "last stride 2": _with(plain, q=lambda c: c.q[..., ::2], k=lambda c: c.k[..., ::2]),
    "last stride 0": _with(plain, q=lambda c: c.q[..., :1].expand(-1, -1, -1, 16)),
    "2^31 rows": _with(plain, q=lambda c: c.q[:1, :, :1].expand(-1, -1, 2**31, -1)),
    "2^31 keys": _with(
        plain,
        k=lambda c: c.k[:, :, :1].expand(-1, -1, 2**31, -1),
        v=lambda c: c.v[:, :, :1].expand(-1, -1, 2**31, -1),
    ),
    "k on meta": _with(plain, k=lambda c: c.k.to("meta")),
    "q on meta": _with(plain, q=lambda c: c.q.to("meta")),
    # mask, bias, slopes, sinks
    "mask in float": _with(plain, mask=torch.ones(1, 1, 7, 33)),
    "mask of rank 2": _with(plain, mask=torch.ones(7, 33, dtype=torch.bool)),
    "mask too short": _with(plain, mask=torch.ones(1, 1, 7, 32, dtype=torch.bool)),
    "mask too long": _with(plain, mask=torch.ones(1, 1, 8, 33, dtype=torch.bool)),
    "mask with kv heads": _with(plain, mask=torch.ones(2, 2, 7, 33, dtype=torch.bool)),
    "mask of size 0": _with(plain, mask=torch.ones(1, 0, 1, 1, dtype=torch.bool)),
    "mask on meta": _with(plain, mask=torch.ones(1, 1, 7, 33, dtype=torch.bool, device="meta")),
    "bias in integers": _with(plain, bias=torch.ones(1, 1, 7, 33, dtype=torch.int64)),
    "bias in another half": _with(plain, bias=torch.ones(1, 1, 7, 33, dtype=torch.float16)),
    "bias of rank 3": _with(plain, bias=torch.ones(1, 7, 33)),
    "bias too short": _with(plain, bias=torch.ones(1, 1, 6, 33)),
    "bias on meta": _with(plain, bias=torch.ones(1, 1, 7, 33, device="meta")),
    "slopes in double": _with(plain, alibi_slopes=torch.ones(4, dtype=torch.float64)),
    "slopes too few": _with(plain, alibi_slopes=torch.ones(3)),
    "slopes of rank 0": _with(plain, alibi_slopes=torch.tensor(1.0)),
    "slopes of rank 3": _with(plain, alibi_slopes=torch.ones(2, 4, 1)),
    "sinks too few": _with(plain, sinks=torch.ones(2)),
    "sinks of rank 2": _with(plain, sinks=torch.ones(2, 4)),
    "sinks in integers": _with(plain, sinks=torch.ones(4, dtype=torch.int64)),
    "sinks on meta": _with(plain, sinks=torch.ones(4, device="meta")),
    # lengths and documents
    "kv_lens too large": _with(plain, kv_lens=_int(33, 34)),
    "kv_lens huge": _with(plain, kv_lens=_int(33, 2**31 - 1)),
    "kv_lens negative": _with(plain, kv_lens=_int(-1, 33)),
    "kv_lens in int64": _with(plain, kv_lens=torch.tensor([3, 3])),
    "kv_lens too few": _with(plain, kv_lens=_int(3)),
    "kv_lens of rank 2": _with(plain, kv_lens=_int(3, 3)[None]),
    "kv_lens on meta": _with(plain, kv_lens=_int(3, 3).to("meta")),
    "kv_starts negative": _with(plain, kv_lens=_int(3, 3), kv_starts=_int(-1, 0)),
    "kv_starts huge": _with(plain, kv_lens=_int(3, 3), kv_starts=_int(0, 2**31 - 1)),
    "kv_starts too few": _with(plain, kv_lens=_int(3, 3), kv_starts=_int(0)),
    "documents decrease": _with(
        plain, q=lambda c: c.k.repeat(1, 2, 1, 1), document_ids=torch.arange(33, 0, -1)[None].int()
    ),
    "documents too short": _with(
        plain,
        q=lambda c: c.k.repeat(1, 2, 1, 1),
        document_ids=torch.zeros(2, 32, dtype=torch.int32),
    ),
    "documents, q_len differs": _with(plain, document_ids=torch.zeros(2, 33, dtype=torch.int32)),
    "documents in int64": _with(
        plain,
        q=lambda c: c.k.repeat(1, 2, 1, 1),
        document_ids=torch.zeros(2, 33, dtype=torch.int64),
    ),
    # key ranges
    "key_begin alone": _with(plain, key_begin=_ends()),
    "key_end alone": _with(plain, key_end=_ends()),
    "key ranges in int64": _with(plain, key_begin=_ends().long(), key_end=_ends().long()),
    "key_end in float": _with(plain, key_begin=_ends(), key_end=_ends().float()),
    "key ranges of rank 3": _with(plain, key_begin=_ends()[0], key_end=_ends()[0]),
    "key ranges of rank 0": _with(plain, key_begin=_ends()[0, 0, 0, 0], key_end=_ends()),
    "key ranges for each key": _with(
        plain, key_begin=_ends(), key_end=_ends().expand(-1, -1, -1, 33)
    ),
    "key_begin with too few rows": _with(plain, key_begin=_ends()[:, :, :6], key_end=_ends()),
    "key_end with too many rows": _with(plain, key_begin=_ends(), key_end=_ends(8)),
    "key_end with kv heads": _with(plain, key_begin=_ends(), key_end=_ends().expand(-1, 2, -1, -1)),
    "key_begin of 3 entries": _with(
        plain, key_begin=_ends().expand(3, -1, -1, -1), key_end=_ends()
    ),
    "key_begin decreases": _with(plain, key_begin=_ends().flip(2), key_end=_ends()),
    "key_end decreases": _with(plain, key_begin=_ends(), key_end=_ends().flip(2)),
    "key_end decreases in the last head": _with(
        plain,
        key_begin=_ends(),
        key_end=torch.cat([_ends().expand(2, 3, -1, -1), _ends().flip(2).expand(2, -1, -1, -1)], 1),
    ),
    "key_begin on meta": _with(plain, key_begin=_ends().to("meta"), key_end=_ends()),
    "packed, key_end decreases": _with(
        packed, key_begin=_ends(4), key_end=_int(0, 5, 5, 4).view(1, 1, 4, 1)
    ),
    "packed, key_end with too few rows": _with(packed, key_begin=_ends(4), key_end=_ends(3)),
    # packed and paged
    "cu_seqlens decrease": _with(packed, cu_seqlens_q=_int(0, 5, 3)),
    "cu_seqlens_k decrease": _with(packed, cu_seqlens_k=_int(0, 30, 20)),
    "cu_seqlens overrun": _with(packed, cu_seqlens_q=_int(0, 3, 8)),
    "cu_seqlens_k overrun": _with(packed, cu_seqlens_k=_int(0, 13, 2**31 - 1)),
    "cu_seqlens negative": _with(packed, cu_seqlens_q=_int(-3, 3, 7)),
    "cu_seqlens_k negative": _with(packed, cu_seqlens_k=_int(-(2**31), 13, 33)),
    "cu_seqlens empty": _with(packed, cu_seqlens_q=_int(), cu_seqlens_k=_int()),
    "cu_seqlens in int64": _with(packed, cu_seqlens_q=torch.tensor([0, 3, 7])),
    "cu_seqlens counts differ": _with(packed, cu_seqlens_k=_int(0, 33)),
    "cu_seqlens on meta": _with(packed, cu_seqlens_k=_int(0, 13, 33).to("meta")),
    "cu_seqlens_k alone": _with(packed, cu_seqlens_q=None),
    "cu_seqlens_q alone": _with(packed, cu_seqlens_k=None),
    "packed batch of 2": _with(
        packed, **{n: (lambda c, n=n: getattr(c, n).repeat(2, 1, 1, 1)) for n in "qkv"}
    ),
    "packed, kv_lens too large": _with(packed, kv_lens=_int(14, 20)),
    "packed with documents": _with(packed, document_ids=torch.zeros(1, 7, dtype=torch.int32)),
    "page too large": _with(paged, page_table=_int(4, 0, 2, 5).view(2, 2)),
    "page negative": _with(paged, page_table=_int(4, 0, -1, 1).view(2, 2)),
    "page_table in int64": _with(paged, page_table=torch.tensor([[4, 0], [2, 1]])),
    "page_table of rank 1": _with(paged, page_table=_int(4, 0, 2, 1)),
    "page_table too few": _with(paged, page_table=_int(4, 0).view(1, 2)),
    "page_table without kv_lens": _with(paged, kv_lens=None),
    "paged, kv_lens past the table": _with(paged, kv_lens=_int(11, 17)),
    "page_table of 2^31 columns": _with(
        paged, page_table=torch.zeros(2, 1, dtype=torch.int32).expand(2, 2**31)
    ),
    "2^31 sequences": _with(
        packed, cu_seqlens_q=_int(0).expand(2**31), cu_seqlens_k=_int(0).expand(2**31)
    ),
    "2^30 pages for the lengths": _with(
        paged,
        q=lambda c: c.q[:1].expand(2**20, -1, -1, -1),
        page_table=_int(0).expand(2**20, 2**10),
        kv_lens=_int(2**13).expand(2**20),
    ),
    "batch of 2^25": _with(
        plain, **{n: (lambda c, n=n: getattr(c, n)[:1].expand(2**25, -1, -1, -1)) for n in "qkv"}
    ),
    "2^29 tiles": _with(
        plain,
        q=lambda c: c.q[:1, :1, :0].expand(2**19, 2**10, -1, -1),
        k=lambda c: c.k[:1, :1].expand(2**19, 2**10, -1, -1),
        v=lambda c: c.v[:1, :1].expand(2**19, 2**10, -1, -1),
    ),
    "page size 0": _with(paged, k=lambda c: c.k[:, :, :0], v=lambda c: c.v[:, :, :0]),
    # numbers
    "scale NaN": _with(plain, scale=float("nan")),
    "scale infinite": _with(plain, scale=float("inf")),
    "softcap negative": _with(plain, softcap=-1.0),
    "softcap NaN": _with(plain, softcap=float("nan")),
    "left -2": _with(plain, left=-2),
    "right huge": _with(plain, right=HUGE),
    "left huge": _with(plain, left=2**62),
    "dropout 1.5": _with(plain, dropout_p=1.5, dropout_seed=torch.tensor([1, 2])),
    "dropout -0.1": _with(plain, dropout_p=-0.1, dropout_seed=torch.tensor([1, 2])),
    "dropout NaN": _with(plain, dropout_p=float("nan"), dropout_seed=torch.tensor([1, 2])),
    "dropout without seed": _with(plain, dropout_p=0.1),
    "dropout_seed in int32": _with(plain, dropout_p=0.1, dropout_seed=_int(1, 2)),
    "dropout_seed of one": _with(plain, dropout_p=0.1, dropout_seed=torch.tensor([1])),
    "dropout_seed of three": _with(plain, dropout_p=0.1, dropout_seed=torch.tensor([1, 2, 0])),
    "dropout of too few heads": _with(
        plain, dropout_p=0.1, dropout_seed=torch.tensor([1, 2, 2**62, 2**62])
    ),
    "dropout of a head below 0": _with(
        plain, dropout_p=0.1, dropout_seed=torch.tensor([1, 2, -1, 64])
    ),
    "dropout of too many heads": _with(
        plain, dropout_p=0.1, dropout_seed=torch.tensor([1, 2, 0, 2**63 - 1])
    ),
    "dropout_seed on meta": _with(
        plain, dropout_p=0.1, dropout_seed=torch.tensor([1, 2]).to("meta")
    ),
    "num_splits -1": _with(plain, num_splits=-1),
    "num_splits 2^40": _with(plain, num_splits=HUGE),
}


# ---- what comes of them --------------------------------------------------------------------------

# Hostile but harmless: computing them is as right as refusing them.
LENIENT = {
    "bias in another half",
    "kv_starts huge",
    "last stride 0",
    "last stride 2",
    "left huge",
    "num_splits 2^40",
    "right huge",
}


def refused(run: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether `run` raises with a sentence. A meta operand may instead make the call a meta
    call."""
    try:
        results = run()
    except REFUSALS as error:
        assert len(str(error).strip()) > 10, "a refusal is a sentence"
        return True
    return all(result.is_meta for result in results)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} for {tuple(want.shape)}"
    got, want = got.double(), want.detach().double()
    assert torch.equal(got.isinf(), want.isinf()), f"{name}: infinities in other places"
    got, want = got.nan_to_num(posinf=0, neginf=0), want.nan_to_num(posinf=0, neginf=0)
    allowed = TOLERANCES[dtype] * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"

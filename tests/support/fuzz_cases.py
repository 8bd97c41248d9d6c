"""The fuzzer's calls: a Case is a call as data, draw() makes a random one, build() its tensors."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from fastattn.backends.gpu import interpreting

DTYPES = {x: getattr(torch, x) for x in ("float32", "float64", "bfloat16", "float16")}
LAYOUTS = ("bhsd", "bshd", "sliced", "last", "expanded")


@dataclass(frozen=True)
class Case:
    """The defaults are the simplest call; shrinking goes towards them."""

    call: str = "attention"  # or "varlen", "decode"
    seed: int = 0
    dtype: str = "float32"
    batch: int = 1  # entries, or sequences
    kv_heads: int = 1
    group: int = 1  # query heads of each
    q_len: int = 1  # varlen: the longest sequence
    kv_len: int = 1  # decode: slots of an entry
    dim: int = 2
    v_dim: int = 2
    layout: str = "bhsd"
    scale: float | None = None
    causal: bool = False
    window: tuple | None = None
    align: str = "end"
    mask: str = ""  # which dimensions it has in full, of "bhqk"; "-": none of them
    bias: str = ""
    bias_inf: bool = False
    alibi: str = ""  # "h" or "bh"
    softcap: float = 0.0
    sinks: bool = False
    kv_lens: bool = False
    documents: bool = False
    ranges: str = ""  # a key of RANGES
    ranges_of: str = "q"  # which dimensions they have in full, of "bhq"
    dropout: float = 0.0
    grad: bool = False
    lse: bool = False
    backend: str | None = None
    new: int = 0  # decode: new tokens
    page_size: int = 0  # varlen and decode: 0 is no pages
    leftpad: bool = False
    rows: bool = False  # decode: cache_batch_idx
    rotary: str = ""  # "interleaved" or "halves"
    num_splits: int | None = None
    wrong: str = ""  # an argument to make invalid: the call must be refused

    def __str__(self) -> str:
        changed = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{n}={x!r}" for n, x in changed if x != getattr(SIMPLEST, n))


SIMPLEST = Case()


@dataclass
class Tensors:
    """A case's call: positional and named arguments, and the tensors that need a gradient."""

    case: Case
    positional: list
    named: dict
    leaves: dict = field(default_factory=dict)


# ---- drawing ------------------------------------------------------------------------------------

LENGTHS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 65, 97)
RANGES = {  # (generator, rows, keys, shape [B or 1, heads or 1, rows or 1]) -> begin, end
    "prefix": lambda g, i, keys, shape: (i * 0, (i + 1).clamp(min=_drawn(g, 0, keys, (1, 1, 1)))),
    "chunked": lambda g, i, keys, shape: _chunked(i, 1 + keys // 4),
    "blocks": lambda g, i, keys, shape: (i * 0, _chunked(i, 1 + keys // 5)[1]),
    "random": lambda g, i, keys, shape: (_drawn(g, 0, keys, shape), _drawn(g, 0, keys, shape)),
    "outside": lambda g, i, keys, shape: (
        _drawn(g, -9, keys + 9, shape).where(i > 0, torch.tensor(-(2**31))),
        _drawn(g, -9, keys + 9, shape).where(i < 7, torch.tensor(2**31 - 1)),
    ),
    "empty": lambda g, i, keys, shape: (i + 1, i),
}
BROADCASTS = ("-", "k", "q", "qk", "hqk", "bk", "bqk", "bhqk", "h", "b")


def draw(rng: random.Random) -> Case:
    """A valid call or, one time in twenty, a call with one invalid argument."""

    def often(x, otherwise, p=0.3):
        return x if rng.random() < p else otherwise

    call = rng.choice(("attention", "attention", "varlen", "decode"))
    q_len, kv_len = rng.choice(LENGTHS), rng.choice(LENGTHS)
    documents = call == "attention" and rng.random() < 0.15
    new = rng.choice((0, 1, 1, 2, 5)) if call == "decode" else 0
    if call == "decode":
        q_len = rng.choice((new or 1, 1, 3))
        kv_len += new
    page_size = often(rng.choice((1, 3, 16)), 0) if call != "attention" else 0
    dtype = rng.choice(("float32", "float32", "float64", "bfloat16", "float16"))
    causal = rng.random() < 0.4
    sides = [often(rng.choice((0, 1, 2, 7, 40, -1)), None, 0.7) for _ in range(2)]
    backend = rng.choice((None, None, "cpu", "reference"))
    if interpreting() and dtype == "float32" and rng.random() < 0.02:
        backend, q_len, kv_len = "triton", min(q_len, 17), min(kv_len, 17 + new)
    dim = rng.choice((1, 2, 3, 8, 16, 24, 33, 64))
    case = Case(
        call=call,
        seed=rng.randrange(1 << 20),
        dtype=dtype,
        batch=rng.choice((0, 1, 2, 3) if rng.random() < 0.1 else (1, 2, 3)),
        kv_heads=rng.choice((1, 2, 3)),
        group=rng.choice((1, 1, 2, 4)),
        q_len=q_len,
        kv_len=q_len if documents else kv_len,
        dim=dim,
        v_dim=often(rng.choice((1, 5, 16, 40)), dim),
        layout=rng.choice(LAYOUTS),
        scale=often(rng.choice((0.0, -0.5, 0.3, 1.0)), None),
        causal=causal,
        window=often((sides[0], None if causal else sides[1]), None, 0.4),
        align=rng.choice(("end", "start")),
        mask=often(rng.choice(BROADCASTS), ""),
        bias=often(rng.choice(BROADCASTS), ""),
        bias_inf=rng.random() < 0.2,
        alibi=often(rng.choice(("h", "bh")), "", 0.2),
        softcap=often(rng.choice((0.5, 3.0, 30.0)), 0.0, 0.2),
        sinks=rng.random() < 0.2,
        kv_lens=call != "decode" and rng.random() < 0.3,
        documents=documents,
        ranges=often(rng.choice(list(RANGES)), "", 0.2),
        ranges_of=rng.choice(("", "q", "q", "hq", "bq", "bhq")),
        dropout=often(rng.choice((0.1, 0.5, 0.9)), 0.0, 0.2),
        grad=call != "decode" and not page_size and rng.random() < 0.6,
        lse=rng.random() < 0.5,
        backend=backend,
        new=new,
        page_size=page_size,
        leftpad=call == "decode" and rng.random() < 0.3,
        rows=call == "decode" and not page_size and rng.random() < 0.3,
        rotary=rng.choice(("interleaved", "halves"))
        if new and dim > 1 and rng.random() < 0.3
        else "",
        num_splits=rng.choice((None, 0, 1, 2, 5)) if call == "decode" else None,
    )
    return replace(case, wrong=rng.choice(WRONG)) if rng.random() < 0.05 else case


# ---- building -----------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of a 4-D or 3-D tensor in another memory order."""
    if layout == "bshd":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "last":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and x.numel():
        return x[..., :1, :].expand(x.shape)
    return x


def build(case: Case) -> Tensors:
    g = torch.Generator().manual_seed(case.seed)
    rng = random.Random(case.seed)
    dtype, heads = DTYPES[case.dtype], case.kv_heads * case.group

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    def ints(values):
        return torch.tensor(list(values), dtype=torch.int32)

    named = {"scale": case.scale, "causal": case.causal, "window": case.window}
    named |= {"align": case.align, "softcap": case.softcap, "backend": case.backend}
    named |= {"return_lse": case.lse}
    if case.dropout:
        named |= {"dropout_p": case.dropout, "dropout_seed": (case.seed, 5)}
    leaves = {}
    if case.call == "attention":
        q = randn(case.batch, heads, case.q_len, case.dim)
        k = randn(case.batch, case.kv_heads, case.kv_len, case.dim)
        v = randn(case.batch, case.kv_heads, case.kv_len, case.v_dim)
        positional = [laid_out(x, case.layout) for x in (q, k, v)]
        if case.documents:
            ids = [sorted(rng.choices(range(4), k=case.q_len)) for _ in range(case.batch)]
            ids = ints(x for one in ids for x in one)
            named["document_ids"] = ids.view(case.batch, case.q_len)
        if case.kv_lens:
            named["kv_lens"] = ints(rng.randint(0, case.kv_len) for _ in range(case.batch))
        leaves = dict(zip("qkv", positional))
        full = (case.batch, heads, case.q_len, case.kv_len)
    elif case.call == "varlen":
        lens = [[rng.randint(0, n) for _ in range(case.batch)] for n in (case.q_len, case.kv_len)]
        cu = [ints([0, *(sum(x[: n + 1]) for n in range(len(x)))]) for x in lens]
        rows, keys = sum(lens[0]) + rng.choice((0, 2)), sum(lens[1]) + rng.choice((0, 3))
        q = laid_out(randn(rows, heads, case.dim), case.layout)
        if case.page_size:
            k, v, named["page_table"] = paged(case, rng, randn, case.kv_len, 1)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = (laid_out(randn(keys, case.kv_heads, n), case.layout)
                    for n in (case.dim, case.v_dim))  # fmt: skip
        positional = [q, k, v, *cu, case.q_len, case.kv_len]
        if case.kv_lens:
            named["kv_lens"] = ints(rng.randint(0, n) for n in lens[1])
        leaves = dict(zip("qkv", (q, k, v)))
        full = (case.batch, heads, case.q_len, case.kv_len)
    else:
        q = laid_out(randn(case.batch, heads, case.q_len, case.dim), case.layout)
        slots = case.kv_len
        if case.page_size:
            k, v, named["page_table"] = paged(case, rng, randn, slots, 1)
            slots = named["page_table"].shape[1] * case.page_size
        else:
            entries = case.batch + 2 * case.rows
            k, v = (randn(entries, case.kv_heads, slots, n) for n in (case.dim, case.v_dim))
            k, v = (x if case.layout == "expanded" else laid_out(x, case.layout) for x in (k, v))
            if case.rows:
                named["cache_batch_idx"] = ints(rng.sample(range(entries), case.batch))
        positional = [q, k, v]
        most = slots - case.new
        if case.page_size:
            most = case.kv_len - case.new
        named["cache_lens"] = ints(rng.randint(0, max(0, most)) for _ in range(case.batch))
        if case.new:
            named["k"] = laid_out(randn(case.batch, case.kv_heads, case.new, case.dim), case.layout)
            named["v"] = laid_out(
                randn(case.batch, case.kv_heads, case.new, case.v_dim), case.layout
            )
        if case.leftpad:
            named["cache_leftpad"] = ints(rng.randint(0, slots // 2) for _ in range(case.batch))
        if case.rotary:
            pairs = rng.randint(1, case.dim // 2)
            angles = randn(slots + max(case.q_len, 1), pairs, dtype=torch.float32)
            named |= {"rotary": (angles.cos(), angles.sin()),
                      "rotary_interleaved": case.rotary == "interleaved"}  # fmt: skip
        named["num_splits"] = case.num_splits
        full = (case.batch, heads, case.q_len, slots)

    def part(dims):
        return [n if letter in dims else 1 for n, letter in zip(full, "bhqk")]

    if case.mask:
        named["mask"] = torch.rand(part(case.mask), generator=g) < 0.7
    if case.bias:
        wide = case.seed % 2 and dtype != torch.float64
        bias = randn(*part(case.bias), dtype=torch.float32 if wide else dtype)
        if case.bias_inf:
            bias = bias.masked_fill(torch.rand(bias.shape, generator=g) < 0.2, -math.inf)
        named["bias"] = leaves["bias"] = bias
    if case.alibi:
        named["alibi_slopes"] = torch.rand(
            (heads,) if case.alibi == "h" else (case.batch, heads), generator=g
        )
    if case.sinks:
        named["sinks"] = leaves["sinks"] = randn(heads)
    if case.ranges:
        shape = [n if letter in case.ranges_of else 1 for n, letter in zip(full, "bhq")]
        i = torch.arange(shape[2]).view(1, 1, -1)
        ends = RANGES[case.ranges](g, i, full[3], shape)
        named["key_ranges"] = tuple(x.expand(shape).int() for x in ends)
    if not case.grad:
        leaves = {}
    return Tensors(case, positional, named, leaves)


def _drawn(g, low, high, shape):
    """Integers in [low, high] that never decrease along the rows."""
    return torch.randint(low, high + 1, tuple(shape), generator=g).sort(-1).values


def _chunked(i, size):
    """The chunk of `size` keys of each row, of as many rows."""
    return i // size * size, i // size * size + size


def paged(case, rng, randn, slots, spare):
    """k, v [pages, kv_heads, page_size, *] and a table in which every entry has its own pages."""
    each = -(-slots // case.page_size)
    pages = case.batch * each + spare
    order = rng.sample(range(pages), pages)[: case.batch * each]
    k, v = (randn(pages, case.kv_heads, case.page_size, n) for n in (case.dim, case.v_dim))
    return k, v, torch.tensor(order, dtype=torch.int32).view(case.batch, each)


# ---- spoiling -----------------------------------------------------------------------------------

WRONG = ("q_dtype", "k_heads", "v_len", "mask_shape", "mask_dtype", "bias_shape", "scale_nan",
         "window_type", "align", "softcap", "dropout", "lens", "slopes_shape", "sinks_shape",
         "backend", "mask_sparse", "ranges_shape", "ranges_type")  # fmt: skip


def spoil(t: Tensors) -> None:
    case, named, wrong = t.case, t.named, t.case.wrong
    heads = case.kv_heads * case.group
    values = {
        "mask_shape": ("mask", torch.ones(2, 1, 1, 1, 1, dtype=torch.bool)),
        "mask_dtype": ("mask", torch.ones(1, 1)),
        "mask_sparse": ("mask", torch.ones(1, 1, dtype=torch.bool).to_sparse()),
        "bias_shape": ("bias", torch.zeros(1, heads + 1, 1, 1)),
        "scale_nan": ("scale", math.nan),
        "window_type": ("window", (1, 2, 3)),
        "align": ("align", "middle"),
        "softcap": ("softcap", -1.0),
        "dropout": ("dropout_p", 1.5),
        "slopes_shape": ("alibi_slopes", torch.zeros(heads + 1)),
        "sinks_shape": ("sinks", torch.zeros(heads + 1)),
        "backend": ("backend", "quick"),
        "ranges_shape": ("key_ranges", [torch.zeros(heads + 1, 1, dtype=torch.int32)] * 2),
        "ranges_type": ("key_ranges", [torch.zeros(1)] * 2),
        "lens": ("cache_lens" if case.call == "decode" else "kv_lens",
                 torch.full((case.batch + 1,), 3, dtype=torch.int32)),
    }  # fmt: skip
    if wrong in values:
        named.update([values[wrong]])
    elif wrong == "q_dtype":
        t.positional[0] = t.positional[0].long()
    elif wrong == "k_heads":
        t.positional[1] = torch.cat([t.positional[1]] * 2, 1)
    else:
        v = t.positional[2]
        t.positional[2] = torch.cat([v, v[..., :1, :] if v.shape[-2] else v.new_zeros(
            (*v.shape[:-2], 1, v.shape[-1]))], -2)  # fmt: skip

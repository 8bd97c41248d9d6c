"""The one list of cases, shapes x options, for the tests of every backend and for the benchmarks.

A Case is only a description; `case.make(dtype, seed)` draws its tensors. What does not exist is
filled with NaN: keys outside [kv_starts, kv_lens), unused page slots, rows in no sequence, and the
bias of all those. `select("alone", "edge")` gives whole groups: a name is "group/what".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from typing import NamedTuple

import torch
from case_tensors import (
    BIASES,
    LAYOUTS,
    MASKS,
    RANGES,
    concatenate,
    ids_of_documents,
    int32,
    normal,
    paginate,
)
from torch import Tensor

from fastattn.core.spec import Operands, Spec


class Problem(NamedTuple):
    """One call in the operators' normal form."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: Spec
    operands: Operands

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in a wider dtype."""
        q, k, v = (x.to(dtype) for x in self[:3])
        wide = {
            name: x.to(dtype)
            for name, x in (("bias", self.operands.bias), ("sinks", self.operands.sinks))
            if x is not None
        }
        return Problem(q, k, v, self.spec, replace(self.operands, **wide))


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 0  # 0: as many as heads
    q_len: int = 45
    kv_len: int = 139
    head_dim: int = 24
    v_dim: int = 0  # 0: head_dim
    scale: float | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    align: str = "end"
    mask: str = ""  # a key of MASKS
    bias: str = ""  # a key of BIASES
    bias_fp32: bool = False  # fp32 beside a half q
    alibi: str = ""  # "heads" or "batch"
    softcap: float = 0.0
    sinks: bool = False
    kv_lens: tuple[int, ...] = ()  # one an entry
    kv_starts: tuple[int, ...] = ()  # one an entry
    documents: tuple[int, ...] = ()  # lengths; entry b has the list rotated by b
    ranges: str = ""  # a key of RANGES
    dropout: float = 0.0
    layout: str = "bhsd"  # a key of LAYOUTS
    packed: tuple[tuple[int, int], ...] = ()  # (rows, keys) of each sequence
    page_size: int = 0  # 0: not paged

    @property
    def entries(self) -> int:
        return len(self.packed) or self.batch

    @property
    def has_backward(self) -> bool:
        return not self.page_size

    @property
    def function(self) -> str | None:
        """The public function that takes this case; None: only the operators do."""
        if self.packed:
            return None if self.kv_starts else "varlen_attention"
        if self.page_size or self.kv_starts:
            return None if self.documents else "decode_attention"
        return "attention"

    def spec(self) -> Spec:
        left, right = (-1 if side is None else side for side in self.window or (None, None))
        return Spec(
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            left=left,
            right=0 if self.causal else right,
            align_end=self.align == "end",
            dropout_p=self.dropout,
        )

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Problem:
        """The case's tensors: drawn in fp64, rounded to dtype, laid out in memory."""
        draw = torch.Generator().manual_seed(seed)
        q_lens = [n for n, _ in self.packed] or [self.q_len] * self.batch
        whole_pages = -(-self.kv_len // (self.page_size or 1)) * (self.page_size or 1)
        capacity = [n for _, n in self.packed] or [whole_pages] * self.batch  # keys with a place
        kv_lens, kv_starts = self.kv_lens or capacity, self.kv_starts or [0] * self.entries
        shape = (self.entries, self.heads, max(q_lens, default=0), max(capacity, default=0))

        # Which rows and keys exist: counted within the entries, then where they lie in memory.
        rows = torch.arange(shape[2]) < torch.tensor(q_lens)[:, None]  # [N, longest q_len]
        at = torch.arange(shape[3])
        lengths, starts = (torch.tensor(list(x))[:, None] for x in (kv_lens, kv_starts))
        keys = (at >= starts) & (at < lengths)  # [N, longest kv_len]
        row_places, key_places, page_table = rows, keys, None
        if self.packed:  # [1, total]: the sequences one after the other, then a few that are none's
            row_places = concatenate(rows, q_lens, spare=3)
            key_places = concatenate(keys, capacity, spare=2)
        if self.page_size:
            key_places, page_table = paginate(keys, self.page_size, draw)

        kv_heads, v_dim = self.kv_heads or self.heads, self.v_dim or self.head_dim
        q = normal(draw, row_places, self.heads, self.head_dim)
        k = normal(draw, key_places, kv_heads, self.head_dim)
        v = normal(draw, key_places, kv_heads, v_dim)
        q, k, v = LAYOUTS[self.layout](*(x.to(dtype) for x in (q, k, v)))

        pairs = rows[:, :, None] & keys[:, None, :]  # [N, q, kv]
        document_ids = None
        if self.documents:
            document_ids = ids_of_documents(self.documents, self.batch)
            pairs = pairs & (document_ids[:, :, None] == document_ids[:, None, :])
        mask = MASKS[self.mask](shape, draw) if self.mask else None
        bias = None
        if self.bias:
            bias = BIASES[self.bias](shape, draw).to(torch.float32 if self.bias_fp32 else dtype)
            for dim in (dim for dim, n in ((0, 0), (1, 2), (2, 3)) if bias.shape[n] == 1):
                pairs = pairs.any(dim, keepdim=True)
            if self.bias != "expanded":
                bias.masked_fill_(~pairs[:, None], torch.nan)
        slopes = None
        if self.alibi:
            by_entry = (self.entries,) if self.alibi == "batch" else ()
            slopes = 0.1 * torch.randn(*by_entry, self.heads, generator=draw)
        key_begin = key_end = None
        if self.ranges:
            ends = RANGES[self.ranges](shape, torch.Generator().manual_seed(seed + 5))
            key_begin, key_end = (x.int() for x in ends)
        seeds = (-(2**40) - 3 - seed, 2**33 + 5)
        operands = Operands(
            mask=mask,
            bias=bias,
            alibi_slopes=slopes,
            sinks=torch.randn(self.heads, generator=draw).to(dtype) if self.sinks else None,
            kv_lens=int32(self.kv_lens) if self.kv_lens else None,
            kv_starts=int32(self.kv_starts) if self.kv_starts else None,
            document_ids=document_ids,
            key_begin=key_begin,
            key_end=key_end,
            cu_seqlens_q=int32([0, *accumulate(q_lens)]) if self.packed else None,
            cu_seqlens_k=int32([0, *accumulate(capacity)]) if self.packed else None,
            page_table=page_table,
            dropout_seed=torch.tensor(seeds) if self.dropout else None,
        )
        operands = Operands(*(x if x is None else x.to(device) for x in operands.tensors()))
        return Problem(q.to(device), k.to(device), v.to(device), self.spec(), operands)

    def call(self, problem: Problem) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
        """What the public function (see `function`) takes: (q, k, v) and the keyword arguments."""
        q, k, v, _, operands = problem
        kwargs = self.call_kwargs(operands)
        if not self.packed:
            return (q, k, v), kwargs
        k, v = (x.transpose(1, 2) if self.page_size else x[0].transpose(0, 1) for x in (k, v))
        return (q[0].transpose(0, 1), k, v), kwargs

    def call_kwargs(self, operands: Operands) -> dict:
        """The keyword arguments alone, with the tensors of a Problem's operands."""
        kwargs = {
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "align": self.align,
            "mask": operands.mask,
            "bias": operands.bias,
            "alibi_slopes": operands.alibi_slopes,
            "softcap": self.softcap,
            "sinks": operands.sinks,
            "dropout_p": self.dropout,
        }
        if operands.key_begin is not None:
            kwargs["key_ranges"] = (operands.key_begin[..., 0], operands.key_end[..., 0])
        if self.dropout:
            kwargs["dropout_seed"] = tuple(operands.dropout_seed.tolist())
        if self.function == "attention":
            return kwargs | {"kv_lens": operands.kv_lens, "document_ids": operands.document_ids}
        if self.function == "decode_attention":
            return kwargs | {
                "cache_lens": operands.kv_lens if self.kv_lens else self.kv_len,
                "cache_leftpad": operands.kv_starts,
                "page_table": operands.page_table,
            }
        if self.function == "varlen_attention":
            return kwargs | {
                "cu_seqlens_q": operands.cu_seqlens_q,
                "cu_seqlens_k": operands.cu_seqlens_k,
                "max_seqlen_q": max(n for n, _ in self.packed),
                "max_seqlen_k": max(n for _, n in self.packed),
                "kv_lens": operands.kv_lens,
                "page_table": operands.page_table,
            }
        raise ValueError(f"no public function takes the case {self.name}")


# ---- the list -----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal_start": {"causal": True, "align": "start"},
    "window": {"window": (40, 9)},
    "mask": {"mask": "full"},
    "padding": {"mask": "padding"},
    "bias": {"bias": "full"},
    "bias_t5": {"bias": "t5"},
    "alibi": {"alibi": "heads"},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "kv_lens": {"kv_lens": (131, 30)},
    "kv_starts": {"kv_starts": (17, 40)},
    "documents": {"documents": (1, 50, 17, 64, 7), "q_len": 139},
    "key_ranges": {"ranges": "banded"},
    "dropout": {"dropout": 0.3},
    "gqa": {"heads": 4, "kv_heads": 2},
    "v_dim": {"v_dim": 40},
    "bshd": {"layout": "bshd"},
    "packed": {"packed": ((45, 139), (1, 5), (20, 20), (0, 7), (9, 0), (70, 33))},
    "paged": {"page_size": 16, "kv_lens": (131, 30)},
    "long_q": {"q_len": 160},
    "scale": {"scale": -0.4},
}

SIZES = (1, 2, 15, 16, 17, 63, 65, 97, 130, 200, 257)
HEAD_DIMS = (1, 2, 3, 8, 20, 31, 32, 40, 63, 64, 80, 96, 112, 128, 192, 256, 512)
DIM_PAIRS = ((64, 128), (192, 128), (1, 512), (512, 1), (80, 33))
EVERYTHING = {
    "causal": True,
    "window": (70, None),
    "mask": "entries",
    "bias": "heads",
    "alibi": "batch",
    "softcap": 2.0,
    "sinks": True,
    "dropout": 0.2,
    "heads": 6,
    "kv_heads": 2,
    "v_dim": 40,
    "layout": "bshd",
}


def combine(name: str, *options: dict) -> Case | None:
    """The case with all those options; None where they contradict each other."""
    settings = {key: value for option in options for key, value in option.items()}
    packed = settings.get("packed")
    if len(settings) < sum(map(len, options)):
        return None
    if "documents" in settings and (packed or "page_size" in settings):
        return None
    if settings.get("causal") and "window" in settings:
        settings["window"] = (settings["window"][0], None)
    if packed:  # one length for each sequence
        if "kv_lens" in settings:
            settings["kv_lens"] = tuple(max(0, n - 6) for _, n in packed)
        if "kv_starts" in settings:
            settings["kv_starts"] = tuple(n // 3 for _, n in packed)
    return Case(name, **settings)


def _cases():
    for name, option in OPTIONS.items():
        yield combine(f"alone/{name}", option)
    for (a, first), (b, second) in combinations(list(OPTIONS.items())[1:], 2):
        yield combine(f"pair/{a}+{b}", first, second)
    for mask in MASKS:
        yield Case(f"mask/{mask}", mask=mask)
    for bias in BIASES:
        yield Case(f"bias/{bias}", bias=bias)
    for ranges in RANGES:
        yield Case(f"ranges/{ranges}", ranges=ranges)
    yield Case("bias/fp32", bias="heads", bias_fp32=True)
    for layout in LAYOUTS:
        yield Case(f"layout/{layout}", layout=layout, q_len=139, causal=True)
    for n, other in zip(SIZES, SIZES[5:] + SIZES[:5], strict=True):
        yield Case(f"size/{n}", batch=1, q_len=n, kv_len=n, head_dim=64, causal=True)
        yield Case(f"size/{n}x{other}", batch=1, q_len=n, kv_len=other, head_dim=32)
        yield Case(f"size/{n}x{other}_causal", q_len=n, kv_len=other, heads=1, causal=True)
    for head_dim in HEAD_DIMS:
        yield Case(f"dim/{head_dim}", q_len=70, head_dim=head_dim, batch=1, causal=True)
    for head_dim, v_dim in DIM_PAIRS:
        yield Case(f"dim/{head_dim},{v_dim}", head_dim=head_dim, v_dim=v_dim, batch=1)
    for groups in (2, 3, 8):
        gqa = {"heads": 2 * groups, "kv_heads": 2, "head_dim": 32}
        yield Case(f"gqa/{groups}", causal=True, **gqa)
        yield Case(f"gqa/{groups}_decode", q_len=1, kv_len=300, kv_lens=(300, 211), **gqa)
        yield Case(f"gqa/{groups}_few_rows", q_len=5, kv_len=97, sinks=True, causal=True, **gqa)
    yield from _edges()
    yield from _long()
    lens = {"kv_lens": (120, 77)}
    yield Case("everything/dense", **lens, **EVERYTHING)
    yield Case("everything/paged", **lens, page_size=8, **EVERYTHING)
    yield Case("everything/packed", **{**EVERYTHING, **OPTIONS["packed"]})
    yield Case("everything/key_ranges", ranges="banded", **lens, **EVERYTHING)
    documents = {**EVERYTHING, **OPTIONS["documents"], "bias": "entries", "mask": "padding"}
    yield Case("everything/documents", **lens, **documents)


def _edges():
    """Where there is little or nothing to see, with and without a sink."""
    nothing = {
        "no_rows": {"q_len": 0},
        "no_keys": {"kv_len": 0},
        "no_rows_no_keys": {"q_len": 0, "kv_len": 0},
        "no_keys_bias": {"kv_len": 0, "bias": "full"},
        "no_batch": {"batch": 0},
        "kv_lens_zero": {"kv_lens": (0, 0)},
        "kv_lens_one": {"kv_lens": (1, 139), "causal": True},
        "starts_past_lens": {"kv_lens": (20, 60), "kv_starts": (20, 99)},
        "first_rows_dead": {"q_len": 257, "kv_len": 63, "causal": True},
        "last_rows_dead": {"q_len": 200, "kv_len": 20, "window": (2, 2), "align": "start"},
        "one_key_each": {"q_len": 139, "window": (0, 0)},
        "masked_by_all": {"mask": "dead_rows", "bias": "minus_inf", "window": (30, 0)},
        "packed_nothing": {"packed": ((0, 0), (3, 0), (0, 4))},
        "packed_one_each": {"packed": ((1, 1),) * 7, "causal": True},
        "scale_zero": {"scale": 0.0, "causal": True},
        "scale_large": {"scale": 30.0, "window": (None, 3)},
        "single_document": {"documents": (139,), "q_len": 139, "causal": True},
        "tiny_documents": {"documents": (1,) * 65, "q_len": 65, "kv_len": 65},
        "dropout_almost_all": {"dropout": 0.9999},
        "window_wider_than_keys": {"window": (10**6, 10**6)},
        "window_right_only": {"window": (None, 30), "align": "start"},
        "window_left_only": {"window": (30, None)},
    }
    for name, settings in nothing.items():
        yield Case(f"edge/{name}", **settings)
        yield Case(f"edge/{name}+sinks", sinks=True, **settings)


def _long():
    """Enough rows for a backward cut into parts, and enough keys for a forward cut into splits."""
    rows = {"q_len": 420, "kv_len": 100, "heads": 2, "kv_heads": 1, "head_dim": 16}
    yield Case("long/rows", causal=True, sinks=True, **rows)
    for bias in ("heads", "entries", "plane", "keys", "rows", "scalar"):
        yield Case(f"long/rows+bias_{bias}", bias=bias, **rows)
    yield Case("long/packed+bias_heads", bias="heads", packed=((300, 40), (230, 90), (7, 9)))
    keys = {"batch": 1, "q_len": 1, "kv_len": 3000, "heads": 4, "kv_heads": 2, "head_dim": 16}
    yield Case("long/keys", **keys)
    yield Case("long/keys+window", window=(1700, None), softcap=3.0, **keys)
    yield Case("long/keys+mask", mask="padding", bias="keys", sinks=True, dropout=0.4, **keys)
    yield Case("long/keys+alibi", alibi="heads", v_dim=40, kv_lens=(2900,), **keys)
    yield Case("long/keys+paged", page_size=64, kv_lens=(2900,), kv_starts=(70,), **keys)
    yield Case("long/keys+few_rows", causal=True, **{**keys, "q_len": 7})


CASES = [case for case in _cases() if case is not None]


def select(*groups: str) -> list[Case]:
    """The cases of the named groups: alone, pair, mask, ranges, size, dim, gqa, edge, ..."""
    return [case for case in CASES if case.name.split("/")[0] in groups]

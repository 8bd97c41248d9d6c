"""Which cells there are: the suite, model shapes, sweeps; and which to measure first when time is
short."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from fastattn.core.work import MODES

from .cases import DTYPES, Row
from .end_to_end import WORKLOADS


class Cell(Protocol):
    """What a suite lists: a Row, or a whole model's Workload (end_to_end.py)."""

    group: str
    floor: float
    dtype: str
    mode: str

    @property
    def name(self) -> str: ...


# ---- the suite of attention rows ----------------------------------------------------------------


def _rows() -> Iterator[Row]:
    for q_len in (512, 1024, 2048, 4096):
        for causal in (False, True):
            yield Row("dense", 1.5 if causal else 1.25, q_len=q_len, causal=causal)
    for q_len in (1024, 2048, 4096):
        yield Row("dense", 1.0, q_len=q_len, dim=128)
    for q_len in (512, 1024, 2048):
        for causal in (False, True):
            floor = 1.6 if causal else 1.3
            yield Row("train", floor, q_len=q_len, causal=causal, mode="fwdbwd")
    for dtype in ("bf16", "fp16"):
        for q_len in (512, 1024):
            yield Row("half", 1.3, dtype, q_len=q_len)
            yield Row("half", 1.3, dtype, q_len=q_len, causal=True)
            yield Row("half", 5.0, dtype, q_len=q_len, mode="fwdbwd")
    for dtype, floor in (("fp32", 3.0), ("bf16", 8.0)):
        for kv_len in (2048, 4096, 8192, 16384):
            yield Row("decode", floor, dtype, 1, 32, 8, q_len=1, kv_len=kv_len, dim=128)
    for q_len in (512, 1024, 2048):
        for group, options in (("dropout", {"dropout": 0.1}), ("bias", {"bias": True})):
            yield Row(group, 3.0, q_len=q_len, mode="fwdbwd", **options)
            if q_len < 2048:
                yield Row(group, 3.0, "bf16", q_len=q_len, mode="fwdbwd", **options)
    yield Row("dropout", 3.0, q_len=512, causal=True, dropout=0.1, mode="fwdbwd")
    yield Row("bias", 3.0, batch=4, q_len=512, bias=True, mode="fwdbwd")  # one for the batch
    yield Row("window", 6.0, q_len=4096, window=256)
    for mode in ("fwd", "fwdbwd"):
        yield Row("padding", 1.8, batch=4, q_len=512, padding=True, mode=mode)
    for q_len in (16, 32, 64):
        for mode in ("fwd", "fwdbwd"):
            yield Row("short", 1.0, batch=64, q_len=q_len, mode=mode)
    for q_len in (512, 1024):
        yield Row("alibi", q_len=q_len, causal=True, alibi=True)
        yield Row("documents", q_len=q_len, documents=4, causal=True, mode="fwdbwd")
    yield Row("chunk", q_len=8192, chunk=1024, causal=True)


ROWS = tuple(_rows())

# ---- a GPU's: 16384 tokens of bf16 in 2048 channels, then what rivals lack, then decoding -------


def _gpu_rows() -> Iterator[Row]:
    for dim in (128, 64, 256):
        for q_len in (512, 1024, 2048, 4096, 8192, 16384):
            shape = {"batch": 16384 // q_len, "heads": 2048 // dim, "kv_heads": 2048 // dim}
            for mode in ("fwd", "bwd"):
                for causal in (False, True):
                    yield Row("gpu", 1.1, "bf16", q_len=q_len, dim=dim, causal=causal, mode=mode,
                              **shape)  # fmt: skip
    shape = {"batch": 4, "heads": 16, "kv_heads": 16, "q_len": 4096, "dim": 128}
    for options in ({"bias": True}, {"dropout": 0.1}, {"documents": 4, "causal": True},
                    {"window": 1024}, {"chunk": 1024, "causal": True}):  # fmt: skip
        for mode in ("fwd", "bwd"):
            yield Row("gpu-variants", 2.0, "bf16", mode=mode, **shape, **options)
    for batch, kv_len in ((64, 8192), (8, 65536), (1, 131072)):
        yield Row("gpu-decode", 0.0, "bf16", batch, 32, 8, q_len=1, kv_len=kv_len, dim=128)


GPU_ROWS = tuple(_gpu_rows())

# ---- the attention of known models, at lengths they are used with -------------------------------

_BERT = {"batch": 8, "heads": 12, "kv_heads": 12}
_LLAMA = {"heads": 32, "kv_heads": 8, "dim": 128}
_T5 = {"batch": 4, "heads": 12, "kv_heads": 12}
_WHISPER = {"heads": 12, "kv_heads": 12}
MODELS = {
    "bert-base": (
        Row("bert-base", q_len=128, padding=True, **_BERT),
        Row("bert-base", q_len=512, padding=True, **_BERT),
        Row("bert-base", q_len=128, dropout=0.1, mode="fwdbwd", **_BERT),
    ),
    "gpt2": (
        Row("gpt2", q_len=1024, heads=12, kv_heads=12, causal=True),
        Row("gpt2", q_len=1024, heads=12, kv_heads=12, causal=True, mode="fwdbwd"),
        Row("gpt2", q_len=1, kv_len=1024, heads=12, kv_heads=12),
    ),
    "llama3-8b": (
        Row("llama3-8b", 0.0, "bf16", q_len=2048, causal=True, **_LLAMA),
        Row("llama3-8b", 0.0, "bf16", q_len=1024, causal=True, mode="fwdbwd", **_LLAMA),
        Row("llama3-8b", 0.0, "bf16", q_len=1, kv_len=8192, **_LLAMA),
    ),
    "t5-base": (  # its learned bias by relative position, one for the batch
        Row("t5-base", q_len=512, bias=True, mode="fwdbwd", **_T5),
        Row("t5-base", q_len=128, kv_len=512, **_T5),
        Row("t5-base", q_len=512, bias=True, **_T5),
    ),
    "vit-l": (  # 14 x 14 patches and a class token
        Row("vit-l", batch=8, q_len=197, heads=16, kv_heads=16),
        Row("vit-l", batch=8, q_len=197, heads=16, kv_heads=16, mode="fwdbwd"),
    ),
    "whisper-small": (  # 30 s of sound are 1500 frames
        Row("whisper-small", q_len=1500, **_WHISPER),
        Row("whisper-small", q_len=448, kv_len=1500, **_WHISPER),
        Row("whisper-small", q_len=1, kv_len=1500, **_WHISPER),
    ),
}

# ---- sweeps: one thing changes, the rest is the base row's --------------------------------------

BASE = Row("sweep", q_len=1024)


def _lengths(base: Row) -> list[Row]:
    if base.q_len == 1:
        return [replace(base, kv_len=n) for n in (512, 1024, 2048, 4096, 8192, 16384)]
    return [replace(base, q_len=n, kv_len=0) for n in (64, 128, 256, 512, 1024, 2048, 4096)]


def _masks(base: Row) -> list[Row]:
    plain = replace(base, causal=False, window=0, padding=False, bias=False, dropout=0.0)
    variants = [{}, {"causal": True}, {"window": max(1, base.keys // 4)}, {"padding": True},
                {"bias": True}, {"alibi": True, "causal": True}, {"documents": 4},
                {"softcap": 30.0}, {"dropout": 0.1}]  # fmt: skip
    return [replace(plain, **variant) for variant in variants]


SWEEPS: dict[str, Callable[[Row], list[Row]]] = {
    "seqlen": _lengths,
    "head_dim": lambda base: [replace(base, dim=n) for n in (32, 40, 64, 80, 96, 128, 192, 256)],
    "mask": _masks,
    "dtype": lambda base: [replace(base, dtype=name) for name in DTYPES],
    "batch": lambda base: [replace(base, batch=n) for n in (1, 2, 4, 8, 16, 32)],
}

# ---- choosing -----------------------------------------------------------------------------------

SUITES = {
    "all": lambda: (*ROWS, *WORKLOADS),
    "attention": lambda: ROWS,
    "endtoend": lambda: WORKLOADS,
    "gpu": lambda: GPU_ROWS,
}


def groups() -> list[str]:
    """The names that stand for one kind of row."""
    return list(dict.fromkeys(cell.group for cell in SUITES["all"]()))


def select(
    what: str | None = None,
    *,
    model: str | None = None,
    sweep: str | None = None,
    modes: Sequence[str] = (),
    pattern: re.Pattern | str = "",
) -> list[Cell]:
    """The cells that a command line asks for, in the table's order.

    what     a suite or a group, default "all"
    model    instead: the attention shapes of that model; with `sweep`, of its first row
    modes    the rows' own where empty
    pattern  of names: only those that match
    """
    if what and (model or sweep):
        other = f"--model {model}" if model else f"--sweep {sweep}"
        raise ValueError(f"{what!r} and {other} both choose rows; give one of them")
    if sweep:
        base = MODELS[model][0] if model else BASE
        chosen: Iterable[Cell] = SWEEPS[sweep](replace(base, group=f"{base.group}-{sweep}"))
        chosen = [replace(row, group=row.group.replace("sweep-", "")) for row in chosen]
    elif model:
        chosen = MODELS[model]
    elif what is None or what in SUITES:
        chosen = SUITES[what or "all"]()
    elif what in groups():
        chosen = [cell for cell in SUITES["all"]() if cell.group == what]
    else:
        known = ", ".join(dict.fromkeys([*SUITES, *groups()]))
        raise ValueError(f"suite: {what!r} is not known; accepted are {known}")
    if modes:
        for mode in modes:
            if mode not in MODES:
                raise ValueError(f"--modes: {mode!r} is not known; accepted are {', '.join(MODES)}")
        chosen = [  # a whole model's step is what it is
            replace(cell, mode=mode, floor=cell.floor if cell.mode == mode else 0.0)
            for cell in chosen
            if isinstance(cell, Row)
            for mode in modes
        ]
    found = {cell.name: cell for cell in chosen if re.search(pattern, cell.name)}
    return list(found.values())


def by_information(cells: Sequence[Cell], weak: Iterable[str] = ()) -> list[Cell]:
    """The order to measure in when time may run out: cells named in `weak` (slower than torch last
    time) first, then in turn one of each variant, its middle length before its ends."""
    weak, variants = set(weak), {}
    for cell in cells:
        variants.setdefault(variant(cell), []).append(cell)
    ranked = []
    for place, members in enumerate(variants.values()):
        middle = (len(members) - 1) // 2
        order = sorted(range(len(members)), key=lambda i: (abs(i - middle), i))
        for turn, index in enumerate(order):
            cell = members[index]
            ranked.append((cell.name not in weak, turn, place, cell))
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:3])]


def variant(cell: Cell) -> tuple:
    """What stays the same along a line of the report: everything but the length."""
    if isinstance(cell, Row):
        options = tuple(o for o in cell.options if not o.startswith("window"))
        heads = (cell.batch, cell.heads, cell.kv_heads)
        return (cell.group, cell.dtype, cell.mode, cell.dim, options, heads)
    return (cell.name,)

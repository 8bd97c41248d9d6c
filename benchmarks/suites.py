"""The lists of benchmark cases: suites, attention shapes of known models, and sweeps. Also the
order in which to measure them when time is short."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from fastattn.core.work import MODES

from .cases import DTYPES, AttentionCase
from .end_to_end import WORKLOADS


class Case(Protocol):
    """What a suite lists: an AttentionCase, or a whole model's Workload (end_to_end.py)."""

    group: str
    floor: float
    dtype: str
    mode: str

    @property
    def name(self) -> str: ...


# The statistics that the forward's own pass computes.
FIRST_PASS = "max_logit,entropy,max,argmax,sink_mass,diagonal_mass"

# ---- the suite of attention cases ---------------------------------------------------------------


def _cases() -> Iterator[AttentionCase]:
    for q_len in (512, 1024, 2048, 4096):
        for causal in (False, True):
            yield AttentionCase("dense", 1.5 if causal else 1.25, q_len=q_len, causal=causal)
    for q_len in (1024, 2048, 4096):
        yield AttentionCase("dense", 1.0, q_len=q_len, dim=128)
    for q_len in (512, 1024, 2048):
        for causal in (False, True):
            floor = 1.6 if causal else 1.3
            yield AttentionCase("train", floor, q_len=q_len, causal=causal, mode="fwdbwd")
    for dtype in ("bf16", "fp16"):
        for q_len in (512, 1024):
            yield AttentionCase("half", 1.3, dtype, q_len=q_len)
            yield AttentionCase("half", 1.3, dtype, q_len=q_len, causal=True)
            yield AttentionCase("half", 5.0, dtype, q_len=q_len, mode="fwdbwd")
    for dtype, floor in (("fp32", 3.0), ("bf16", 8.0)):
        for kv_len in (2048, 4096, 8192, 16384):
            yield AttentionCase("decode", floor, dtype, 1, 32, 8, q_len=1, kv_len=kv_len, dim=128)
    for q_len in (512, 1024, 2048):
        for group, options in (("dropout", {"dropout": 0.1}), ("bias", {"bias": True})):
            yield AttentionCase(group, 3.0, q_len=q_len, mode="fwdbwd", **options)
            if q_len < 2048:
                yield AttentionCase(group, 3.0, "bf16", q_len=q_len, mode="fwdbwd", **options)
    yield AttentionCase("dropout", 3.0, q_len=512, causal=True, dropout=0.1, mode="fwdbwd")
    yield AttentionCase(
        "bias", 3.0, batch=4, q_len=512, bias=True, mode="fwdbwd"
    )  # shared by the batch
    yield AttentionCase("window", 6.0, q_len=4096, window=256)
    for mode in ("fwd", "fwdbwd"):
        yield AttentionCase("padding", 1.8, batch=4, q_len=512, padding=True, mode=mode)
    for q_len in (16, 32, 64):
        for mode in ("fwd", "fwdbwd"):
            yield AttentionCase("short", 1.0, batch=64, q_len=q_len, mode=mode)
    for q_len in (512, 1024):
        yield AttentionCase("alibi", q_len=q_len, causal=True, alibi=True)
        yield AttentionCase("documents", q_len=q_len, documents=4, causal=True, mode="fwdbwd")
    yield AttentionCase("chunk", q_len=8192, chunk=1024, causal=True)
    for q_len in (512, 1024, 2048):
        for mode in ("jvp", "double"):
            yield AttentionCase("derivatives", q_len=q_len, mode=mode)
    for stats in ("max_logit,entropy", FIRST_PASS, "col_mass"):
        yield AttentionCase("statistics", q_len=1024, stats=stats)


CASES = tuple(_cases())

# ---- for GPUs: 16384 tokens of bf16 in 2048 channels; options that others lack; decoding ---------


def _gpu_cases() -> Iterator[AttentionCase]:
    for dim in (128, 64, 256):
        for q_len in (512, 1024, 2048, 4096, 8192, 16384):
            shape = {"batch": 16384 // q_len, "heads": 2048 // dim, "kv_heads": 2048 // dim}
            for mode in ("fwd", "bwd"):
                for causal in (False, True):
                    yield AttentionCase("gpu", 1.1, "bf16", q_len=q_len, dim=dim, causal=causal,
                                        mode=mode, **shape)  # fmt: skip
    shape = {"batch": 4, "heads": 16, "kv_heads": 16, "q_len": 4096, "dim": 128}
    for options in ({"bias": True}, {"dropout": 0.1}, {"documents": 4, "causal": True},
                    {"window": 1024}, {"chunk": 1024, "causal": True}):  # fmt: skip
        for mode in ("fwd", "bwd"):
            yield AttentionCase("gpu-variants", 2.0, "bf16", mode=mode, **shape, **options)
    for batch, kv_len in ((64, 8192), (8, 65536), (1, 131072)):
        yield AttentionCase(
            "gpu-decode", 0.0, "bf16", batch, 32, 8, q_len=1, kv_len=kv_len, dim=128
        )


GPU_CASES = tuple(_gpu_cases())

# ---- the attention of known models, at typical lengths ------------------------------------------

_BERT = {"batch": 8, "heads": 12, "kv_heads": 12}
_LLAMA = {"heads": 32, "kv_heads": 8, "dim": 128}
_T5 = {"batch": 4, "heads": 12, "kv_heads": 12}
_WHISPER = {"heads": 12, "kv_heads": 12}
MODELS = {
    "bert-base": (
        AttentionCase("bert-base", q_len=128, padding=True, **_BERT),
        AttentionCase("bert-base", q_len=512, padding=True, **_BERT),
        AttentionCase("bert-base", q_len=128, dropout=0.1, mode="fwdbwd", **_BERT),
    ),
    "gpt2": (
        AttentionCase("gpt2", q_len=1024, heads=12, kv_heads=12, causal=True),
        AttentionCase("gpt2", q_len=1024, heads=12, kv_heads=12, causal=True, mode="fwdbwd"),
        AttentionCase("gpt2", q_len=1, kv_len=1024, heads=12, kv_heads=12),
    ),
    "llama3-8b": (
        AttentionCase("llama3-8b", 0.0, "bf16", q_len=2048, causal=True, **_LLAMA),
        AttentionCase("llama3-8b", 0.0, "bf16", q_len=1024, causal=True, mode="fwdbwd", **_LLAMA),
        AttentionCase("llama3-8b", 0.0, "bf16", q_len=1, kv_len=8192, **_LLAMA),
    ),
    "t5-base": (  # a learned bias by relative position, shared by the batch
        AttentionCase("t5-base", q_len=512, bias=True, mode="fwdbwd", **_T5),
        AttentionCase("t5-base", q_len=128, kv_len=512, **_T5),
        AttentionCase("t5-base", q_len=512, bias=True, **_T5),
    ),
    "vit-l": (  # 14 x 14 patches and a class token
        AttentionCase("vit-l", batch=8, q_len=197, heads=16, kv_heads=16),
        AttentionCase("vit-l", batch=8, q_len=197, heads=16, kv_heads=16, mode="fwdbwd"),
    ),
    "whisper-small": (  # 30 s of audio are 1500 frames
        AttentionCase("whisper-small", q_len=1500, **_WHISPER),
        AttentionCase("whisper-small", q_len=448, kv_len=1500, **_WHISPER),
        AttentionCase("whisper-small", q_len=1, kv_len=1500, **_WHISPER),
    ),
}

# ---- sweeps: one property varies, the others are the base case's --------------------------------

BASE = AttentionCase("sweep", q_len=1024)


def _lengths(base: AttentionCase) -> list[AttentionCase]:
    if base.q_len == 1:
        return [replace(base, kv_len=n) for n in (512, 1024, 2048, 4096, 8192, 16384)]
    return [replace(base, q_len=n, kv_len=0) for n in (64, 128, 256, 512, 1024, 2048, 4096)]


def _masks(base: AttentionCase) -> list[AttentionCase]:
    plain = replace(base, causal=False, window=0, padding=False, bias=False, dropout=0.0)
    variants = [{}, {"causal": True}, {"window": max(1, base.keys // 4)}, {"padding": True},
                {"bias": True}, {"alibi": True, "causal": True}, {"documents": 4},
                {"softcap": 30.0}, {"dropout": 0.1}]  # fmt: skip
    return [replace(plain, **variant) for variant in variants]


SWEEPS: dict[str, Callable[[AttentionCase], list[AttentionCase]]] = {
    "seqlen": _lengths,
    "head_dim": lambda base: [replace(base, dim=n) for n in (32, 40, 64, 80, 96, 128, 192, 256)],
    "mask": _masks,
    "dtype": lambda base: [replace(base, dtype=name) for name in DTYPES],
    "batch": lambda base: [replace(base, batch=n) for n in (1, 2, 4, 8, 16, 32)],
}

# ---- selecting ----------------------------------------------------------------------------------

SUITES = {
    "all": lambda: (*CASES, *WORKLOADS),
    "attention": lambda: CASES,
    "endtoend": lambda: WORKLOADS,
    "gpu": lambda: GPU_CASES,
}


def groups() -> list[str]:
    """The names of the groups of cases."""
    return list(dict.fromkeys(case.group for case in SUITES["all"]()))


def select(
    what: str | None = None,
    *,
    model: str | None = None,
    sweep: str | None = None,
    modes: Sequence[str] = (),
    pattern: re.Pattern | str = "",
) -> list[Case]:
    """The cases that a command line asks for, in the table's order.

    what     a suite or a group, default "all"
    model    the attention shapes of that model instead; with `sweep`, the base is its first case
    modes    which passes to time; each case's own mode if empty
    pattern  a regular expression: only cases whose name matches
    """
    if what and (model or sweep):
        other = f"--model {model}" if model else f"--sweep {sweep}"
        raise ValueError(f"{what!r} and {other} both choose cases; give one of them")
    if sweep:
        base = MODELS[model][0] if model else BASE
        chosen: Iterable[Case] = SWEEPS[sweep](replace(base, group=f"{base.group}-{sweep}"))
        chosen = [replace(case, group=case.group.replace("sweep-", "")) for case in chosen]
    elif model:
        chosen = MODELS[model]
    elif what is None or what in SUITES:
        chosen = SUITES[what or "all"]()
    elif what in groups():
        chosen = [case for case in SUITES["all"]() if case.group == what]
    else:
        known = ", ".join(dict.fromkeys([*SUITES, *groups()]))
        raise ValueError(f"suite: {what!r} is not known; accepted are {known}")
    if modes:
        for mode in modes:
            if mode not in MODES:
                raise ValueError(f"--modes: {mode!r} is not known; accepted are {', '.join(MODES)}")
        chosen = [  # a whole model has only its own mode
            replace(case, mode=mode, floor=case.floor if case.mode == mode else 0.0)
            for case in chosen
            if isinstance(case, AttentionCase)
            for mode in modes
        ]
    found = {case.name: case for case in chosen if re.search(pattern, case.name)}
    return list(found.values())


def by_information(cases: Sequence[Case], weak: Iterable[str] = ()) -> list[Case]:
    """The order to measure in when time may run out. Cases named in `weak` (slower than torch in
    the previous run) come first, then one case of each variant in turn, its middle length first."""
    weak, variants = set(weak), {}
    for case in cases:
        variants.setdefault(variant(case), []).append(case)
    ranked = []
    for place, members in enumerate(variants.values()):
        middle = (len(members) - 1) // 2
        order = sorted(range(len(members)), key=lambda i: (abs(i - middle), i))
        for rank, index in enumerate(order):
            case = members[index]
            ranked.append((case.name not in weak, rank, place, case))
    return [item[-1] for item in sorted(ranked, key=lambda item: item[:3])]


def variant(case: Case) -> tuple:
    """Everything that identifies a case but its length: one line of the report's figures."""
    if isinstance(case, AttentionCase):
        options = tuple(o for o in case.options if not o.startswith("window"))
        heads = (case.batch, case.heads, case.kv_heads)
        return (case.group, case.dtype, case.mode, case.dim, options, heads)
    return (case.name,)

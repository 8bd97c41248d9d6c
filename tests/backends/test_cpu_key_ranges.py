"""Key ranges on the C++ kernels: forward and every gradient against float64, and what is skipped.

The reference results come from an equivalent mask, independently of key ranges.
"""

from __future__ import annotations

from dataclasses import replace

import cpu_calls
import pytest
import torch
from case_tensors import RANGES
from cases import Problem
from cpu_calls import backward, forward, run_kernels
from operator_calls import cotangents_of, name_of
from ranged_cases import Ranged

from fastattn.backends import isa as cpu_isa

pytestmark = pytest.mark.native

ISAS = cpu_isa.supported()


def check(case: Ranged, dtype: torch.dtype, num_splits: int = 0) -> None:
    cpu_calls.check(case, dtype, num_splits, truth=replace(case, as_mask=True))


LONG = {"q_len": 260, "kv_len": 300}
GQA = {"heads": 4, "kv_heads": 2}
PACKED = ((45, 139), (1, 5), (100, 100), (0, 7), (9, 0), (70, 33))
OPTIONS = {
    "causal": {"causal": True, "align": "start"},
    "window": {"window": (60, 9)},
    "mask": {"mask": "full"},
    "gqa": GQA,
    "lengths": {"kv_lens": (290, 111), "kv_starts": (17, 60)},
    "documents": {"documents": (100, 7, 150, 3), "kv_len": 260, "causal": True},
    "bias": {"bias": "full", **GQA},
    "bias_of_all": {"bias": "plane", "batch": 3},
    "dropout": {"dropout": 0.3, **GQA},
    "scores": {"softcap": 5.0, "sinks": True, "alibi": "batch"},
    "strides": {"layout": "bshd", "expanded": True},
    "packed": {"packed": PACKED, **GQA},
    "packed_lengths": {"packed": PACKED, "kv_lens": (130, 5, 60, 7, 0, 1), "causal": True},
}
DECODING = {
    "decode": {"q_len": 1, "kv_len": 1500, "heads": 8, "kv_heads": 2},
    "few_rows": {"q_len": 5, "kv_len": 1500, "heads": 8, "kv_heads": 2, "causal": True},
    "lengths": {"q_len": 1, "kv_len": 1500, "kv_lens": (1400, 30), "kv_starts": (200, 0)},
    "paged": {"q_len": 3, "kv_len": 1400, "page_size": 16, "kv_lens": (1390, 33)},
    "paged_rows": {"q_len": 150, "kv_len": 400, "page_size": 64, "kv_lens": (380, 33), **GQA},
    "one_of_long": {"batch": 1, "heads": 1, "q_len": 1, "kv_len": 4000},
}
KINDS = [Ranged(kind, **LONG, ranges=kind) for kind in RANGES]
COMBINED = [
    Ranged(f"{kind}+{name}", **(LONG | settings), ranges=kind)
    for kind in ("chunks", "random_by_head", "prefix")
    for name, settings in OPTIONS.items()
]
SPLIT = [
    Ranged(f"{kind}+{name}", **settings, ranges=kind)
    for kind in ("one_for_all", "random_by_head", "banded", "prefix")
    for name, settings in DECODING.items()
]


# ---- equal to the mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*KINDS, *COMBINED], ids=name_of)
def test_single_precision(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("case", [*KINDS, *COMBINED[:4]], ids=name_of)
def test_other_dtypes(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("num_splits", [0, 1, 3, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", SPLIT, ids=name_of)
def test_decoding_and_splits(case, dtype, num_splits):
    check(case, dtype, num_splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != cpu_isa.selected()])
@pytest.mark.parametrize("case", [*KINDS, *SPLIT[::5]], ids=name_of)
def test_other_instruction_sets(case, isa, dtype, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    check(case, dtype)


@pytest.mark.parametrize("case", [*KINDS, *COMBINED[:4], *SPLIT[:3]], ids=name_of)
def test_same_bits_for_any_number_of_threads(case):
    problem = case.make(torch.float32)
    cotangents = cotangents_of(case, problem, True)
    torch.set_num_threads(2)
    two = run_kernels(problem, cotangents)
    torch.set_num_threads(1)
    one = run_kernels(problem, cotangents)
    for name, result in two.items():
        assert torch.equal(result, one[name]), name


def test_large_lse_in_the_backward():
    """Logits beyond 2^12 use the pass that recomputes each row's sum, which also skips keys."""
    for kind in ("far_gaps", "random_by_head"):
        check(Ranged("", **LONG, ranges=kind, scale=2000.0), torch.float64)


# ---- what is outside -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("q_len", [1, 4, 260])
@pytest.mark.parametrize("kind", ["gaps", "far_gaps", "random_by_head", "one_for_all", "banded"])
def test_nan_in_keys_that_no_row_sees_changes_nothing(kind, q_len, dtype):
    """The same bits, also where the ranges of a tile's rows leave a gap."""
    case = Ranged("", q_len=q_len, kv_len=600, **GQA, ranges=kind)
    clean = case.make(dtype)
    seen = replace(case, as_mask=True).make(dtype).operands.mask.any(2)  # [1 or 2, 1 or 4, keys]
    seen = seen.expand(2, 4, -1).unflatten(1, (2, 2)).any(2)  # of either head that shares a kv head
    spoiled = (x.masked_fill(~seen[..., None], torch.nan) for x in (clean.k, clean.v))
    spoiled = Problem(clean.q, *spoiled, *clean[3:])
    for num_splits in (0, 3):
        cotangents = cotangents_of(case, clean, True)
        got, want = (run_kernels(p, cotangents, num_splits) for p in (spoiled, clean))
        for name, x in got.items():
            assert torch.equal(x, want[name]), name


def test_rows_that_see_nothing():
    case = Ranged("", **LONG, ranges="nothing", sinks=True, bias="full")
    problem = case.make(torch.float32)
    results = run_kernels(problem, cotangents_of(case, problem, True))
    assert (results.pop("lse") == -torch.inf).all()
    for name, x in results.items():
        assert not x.any(), name


def test_a_bias_gradient_is_zero_outside():
    """Tiles that no item covers are zeroed too: memory from the allocator is not zero."""
    case = Ranged("", q_len=400, kv_len=400, ranges="chunks", bias="plane")
    problem = case.make(torch.float32)
    dbias = run_kernels(problem, cotangents_of(case, problem, False))["dbias"]
    outside = ~replace(case, as_mask=True).make(torch.float32).operands.mask
    assert dbias.any() and not dbias[outside].any()


def test_rows_past_a_packed_sequence_are_not_looked_at():
    """The tensors have rows for the longest sequence; the rest of a shorter one may hold
    anything."""
    case = Ranged("", packed=((5, 30), (20, 30)), ranges="random_by_head")
    problem = case.make(torch.float32)
    want = run_kernels(problem, cotangents_of(case, problem, True))
    for end in (problem.operands.key_begin, problem.operands.key_end):
        end[0, :, 5:] = torch.tensor([7, -(2**31), 2**31 - 1]).int().repeat(5).view(15, 1)
    got = run_kernels(problem, cotangents_of(case, problem, True))
    for name, x in got.items():
        assert torch.equal(x[:, :, :25], want[name][:, :, :25]), name


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key_begin", "key_end"])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_decrease_is_named(name, heads):
    problem = Ranged("", ranges="random_by_head" if heads == 2 else "chunks").make(torch.float32)
    ends = getattr(problem.operands, name)
    ends[-1, -1, 20:] = ends[-1, -1, 19] - 1
    where = f"{name} must not decrease along the rows, and does at row 20 of entry"
    with pytest.raises(RuntimeError, match=where):
        forward(problem)
    out, lse = torch.zeros_like(problem.q), torch.zeros(problem.q.shape[:3])
    with pytest.raises(RuntimeError, match=where):
        backward(problem, out, None, out, lse)

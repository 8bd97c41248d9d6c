"""The CUDA forward kernels for float8_e4m3fn, on the emulator, against float64 of the descaled
values."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import emulated
import pytest
import torch
from cases import Case, Problem
from cuda_cases import DIMS, MASKS, OPTIONS, PACKED, SHAPES, check_problem
from pairwise import thinned

from fastattn.backends import schema
from fastattn.core.quantization import E4M3
from fastattn.core.spec import Descales

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)

# Descales of q, k and v: none, one for each head, or one for each sequence and head; of any sign.
SCALES = {
    "none": lambda one, each: Descales(),
    "heads": lambda one, each: Descales(one(), one(), one()),
    "sequences": lambda one, each: Descales(each(), None, each()),
    "mixed": lambda one, each: Descales(each(), one(), None),
    "signs": lambda one, each: Descales(-one(), one(), -each()),
}


def make(case: Case, scales: str, seed: int) -> Problem:
    """The case in float8; the standard deviation of its values is 1 after descaling."""
    q, k, v, spec, x = case.make(torch.float32, seed)
    draw = torch.Generator().manual_seed(seed)
    one, each = (
        lambda shape=shape: torch.rand(shape, generator=draw) + 0.4
        for shape in ((k.shape[1],), (case.entries, k.shape[1]))
    )
    tensors = (y.to(E4M3) for y in (q, k, v))
    return Problem(*tensors, spec, replace(x, descales=SCALES[scales](one, each)))


@pytest.mark.parametrize(
    "dim, shape, mask", thinned(DIMS, ["key", "tile", "odd", "long"], ["full", "causal", "window"])
)
def test_masks(dim, shape, mask):
    seed = DIMS.index(dim) + list(SHAPES).index(shape) + list(MASKS).index(mask)
    case = Case(f"fp8/{shape}-{mask}", head_dim=dim, **SHAPES[shape], **MASKS[mask])
    check_problem(make(case, "none", seed), seed, grid=1 + seed % 2)


@pytest.mark.parametrize("option, scales", thinned(OPTIONS, SCALES))
def test_options(option, scales):
    seed = list(SCALES).index(scales) + list(OPTIONS).index(option)
    case = Case(f"fp8/{option}", head_dim=DIMS[seed % 3], **OPTIONS[option])
    check_problem(make(case, scales, seed), seed)


def test_scores_all_alike_where_a_scale_is_zero():
    problem = make(Case("fp8/zero", q_len=70, kv_len=90, head_dim=64), "none", 0)
    zero = Descales(torch.tensor([0.0, 1.0]), None, None)
    check_problem(problem._replace(operands=replace(problem.operands, descales=zero)), 0)


def test_nan_stays_where_it_is():
    """NaN in a key reaches the rows that see it, and NaN in a value its channel, but no others."""
    case = Case("fp8/nan", batch=1, q_len=130, kv_len=130, causal=True, head_dim=64)
    problem = make(case, "none", 1)
    nan = 0x7F
    problem.k.view(torch.uint8)[0, 0, 100] = nan
    problem.v.view(torch.uint8)[0, 1, 50, 7] = nan
    out, _ = emulated.forward(problem)
    assert out[0, 0].isnan().any(-1).tolist() == [row >= 100 for row in range(130)]
    assert out[0, 1, 50:, 7].isnan().all()
    assert not out[0, 1, :, :7].isnan().any() and not out[0, 1, :, 8:].isnan().any()


@pytest.mark.parametrize("name", [name for name, case in PACKED.items() if "documents" in case])
def test_documents(name):
    seed = list(PACKED).index(name)
    case = Case(f"fp8/{name}", head_dim=DIMS[seed % 3], **PACKED[name])
    check_problem(make(case, "sequences", seed), seed)


@pytest.mark.parametrize("name", [name for name, case in PACKED.items() if "packed" in case])
@pytest.mark.parametrize("dim", DIMS)
def test_packed_sequences_are_the_same_alone(dim, name):
    """Bit for bit, each sequence with its own scales."""
    seed = DIMS.index(dim) + list(PACKED).index(name)
    case = Case("fp8/packed", head_dim=dim, **PACKED[name])
    problem = make(case, "sequences", seed)
    q, k, v, spec, x = problem
    out, lse = emulated.forward(problem, seed, grid=1 + seed % 2)
    ends = [[0, *accumulate(lengths)] for lengths in zip(*case.packed)]
    for i, ((a, b), (c, d)) in enumerate(zip(*map(pairwise, ends))):
        if a == b or c == d:
            assert out[:, :, a:b].eq(0).all() and lse[:, :, a:b].eq(-torch.inf).all()
            continue
        lens, *own = (y if y is None else y[i : i + 1] for y in (x.kv_lens, *x.descales))
        own = {"kv_lens": lens, "descales": Descales(*own)}
        rest = replace(x, cu_seqlens_q=None, cu_seqlens_k=None, **own)
        alone = Problem(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], spec, rest)
        one, one_lse = emulated.forward(alone, seed)
        assert torch.equal(out[:, :, a:b], one) and torch.equal(lse[:, :, a:b], one_lse)
    assert out[:, :, ends[0][-1] :].eq(0).all()


@pytest.mark.parametrize("dim", DIMS)
def test_every_schedule_gives_the_same_bits(dim):
    """Neither the timing of asynchronous work nor the number of CTAs changes a bit."""
    problem = make(Case("fp8/bits", q_len=200, kv_len=600, head_dim=dim, causal=True), "heads", 2)
    schedules = ((0, 1), (1, 1), (2, 1), (1, 3), (2, 99))
    results = [emulated.forward(problem, seed, grid) for seed, grid in schedules]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


# ---- the operator ------------------------------------------------------------------------------


def test_operator_says_what_comes_and_has_no_gradient():
    q = torch.empty(2, 50, 4, 64, dtype=E4M3, device="meta").transpose(1, 2)
    k = torch.empty(2, 2, 90, 64, dtype=E4M3, device="meta")
    numbers = (0.1, 0.0, -1, -1, True, 0.0, 0)
    out, lse = schema.forward_float8(q, k, k, *(None,) * 13, *numbers)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape and out.stride() == q.stride()
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    with pytest.raises(NotImplementedError, match="no gradient"):
        schema.forward_float8(q.requires_grad_(), k, k, *(None,) * 13, *numbers)

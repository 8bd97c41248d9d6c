"""The CUDA forward kernels on the emulator, against float64: masks, shapes, layouts, schedules.

Each case runs with one of the emulator's three timings of asynchronous work, and with one or two
multiprocessors, so that a CTA takes one tile or many.
"""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from cases import Case
from cuda_cases import (
    DIMS,
    MASKS,
    OPTIONS,
    PACKED,
    SHAPES,
    check_forward,
    check_problem,
)
from pairwise import thinned

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)


ARCHS = ["sm90", "sm80"]


def cases(*axes):
    """For parametrize: all combinations of an architecture, a head dimension and the values of the
    axes, of which only a third run without --long."""
    return thinned(ARCHS, DIMS, *axes)


@pytest.mark.parametrize("arch, dim, shape, mask", cases(SHAPES, MASKS))
def test_masks(arch, dim, shape, mask):
    seed = DIMS.index(dim) + list(SHAPES).index(shape) + list(MASKS).index(mask)
    case = Case(f"cuda/{shape}-{mask}", head_dim=dim, **SHAPES[shape], **MASKS[mask])
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    check_forward(case, dtype, seed, grid=1 + seed % 2, arch=arch)


@pytest.mark.parametrize("arch, dim, option", cases(OPTIONS))
def test_options(arch, dim, option):
    seed = DIMS.index(dim) + list(OPTIONS).index(option)
    case = Case(f"cuda/{option}", head_dim=dim, **OPTIONS[option])
    check_forward(case, torch.float16 if seed % 2 else torch.bfloat16, seed, arch=arch)


@pytest.mark.parametrize("arch, dim, name", cases(PACKED))
def test_packed_sequences(arch, dim, name):
    seed = DIMS.index(dim) + list(PACKED).index(name)
    case = Case("cuda/packed", head_dim=dim, **PACKED[name])
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    check_forward(case, dtype, seed, grid=1 + seed % 2, arch=arch)


@pytest.mark.parametrize("arch, dim, seed", cases(range(12)))
def test_moments_of_asynchronous_work(arch, dim, seed):
    case = Case("cuda/seeds", batch=1, q_len=260, kv_len=390, head_dim=dim, causal=True)
    case = replace(case, window=(200, 0) if seed % 2 else None)
    check_forward(case, torch.bfloat16, seed, grid=1, arch=arch)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_schedule_gives_the_same_bits(arch, dim):
    """Neither the timing of asynchronous work nor the number of CTAs changes a bit."""
    case = Case("cuda/bits", q_len=200, kv_len=300, head_dim=dim, causal=True)
    problem = case.make(torch.float16)
    grids = (1, 3, 99) if arch == "sm90" else (1, 2, 4)  # with more, another plan may be better
    results = [emulated.forward(problem, seed, grid, arch) for seed, grid in enumerate(grids)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("arch", ARCHS)
def test_what_no_copy_can_read_is_named(arch):
    q = torch.randn(1, 1, 64, 72).half()[..., :64]
    k = torch.randn(1, 1, 64, 68).half()[..., :64]
    problem = Case("cuda/strides", q_len=64, kv_len=64, head_dim=64).make(torch.float16)
    with pytest.raises(emulated.Fault, match="k has a stride of 68 elements"):
        emulated.forward(problem._replace(q=q, k=k, v=q), arch=arch)
    odd = torch.randn(64 * 64 + 8).half()[1 : 64 * 64 + 1].view(1, 1, 64, 64)
    with pytest.raises(emulated.Fault, match="v does not start at a multiple of 16 bytes"):
        emulated.forward(problem._replace(q=q, k=q, v=odd), arch=arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_expanded_tensors_reach_no_tensor_map(arch):
    """One kv head that was expanded becomes one head again. Other expanded tensors must be copied
    first for sm_90, and are refused if they were not; sm_80's kernels use no tensor maps."""
    shape = {"batch": 2, "heads": 2, "kv_heads": 2, "q_len": 70, "kv_len": 90}
    case = Case("cuda/expanded", head_dim=64, causal=True, **shape)
    problem = case.make(torch.float16)
    q, k, v = problem[:3]
    one = problem._replace(k=k[:, :1].expand_as(k), v=v[:, :1].expand_as(v))
    check_problem(one, seed=1, arch=arch)
    alone = problem._replace(k=k[:, :1], v=v[:, :1])
    for x, y in zip(emulated.forward(one, arch=arch), emulated.forward(alone, arch=arch)):
        assert torch.equal(x, y)
    for changed in (
        {"k": k[:, :1].expand_as(k)},  # and not v
        {"k": k[:1].expand_as(k), "v": v[:1].expand_as(v)},
        {"k": k[:1, :1].expand_as(k), "v": v[:1, :1].expand_as(v)},
        {"v": v[:, :, :1].expand_as(v)},
        {"q": q[:, :, :1].expand_as(q)},
    ):
        if arch == "sm80":
            check_problem(problem._replace(**changed), seed=1, arch=arch)
        else:
            with pytest.raises(emulated.Fault, match="of an expanded tensor"):
                emulated.forward(problem._replace(**changed), arch=arch)

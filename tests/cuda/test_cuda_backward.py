"""The CUDA backward kernels, on the emulator, against the reference's gradients in float64."""

from __future__ import annotations

import emulated
import pytest
import torch
from cases import Case
from cuda_backward import Kernel, check, same_bits, sequences_are_apart
from cuda_cases import DIMS, MASKS, OPTIONS, PACKED, SHAPES
from pairwise import thinned

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)


@pytest.mark.parametrize("dim, shape, mask", thinned(DIMS, SHAPES, MASKS))
def test_masks(dim, shape, mask):
    seed = DIMS.index(dim) + list(SHAPES).index(shape) + list(MASKS).index(mask)
    case = Case(f"cuda/{shape}-{mask}", **SHAPES[shape], **MASKS[mask])
    check(
        Kernel("sm90", dim),
        case,
        torch.bfloat16 if seed % 2 else torch.float16,
        seed,
        with_dlse=seed % 3 > 0,
    )


@pytest.mark.parametrize("dim, option", thinned(DIMS, OPTIONS))
def test_options(dim, option):
    seed = DIMS.index(dim) + list(OPTIONS).index(option)
    case = Case(f"cuda/{option}", **OPTIONS[option])
    check(Kernel("sm90", dim), case, torch.float16 if seed % 2 else torch.bfloat16, seed)


@pytest.mark.parametrize("dim, name, deterministic", thinned(DIMS, PACKED, (True, False)))
def test_packed_sequences(dim, name, deterministic):
    seed = DIMS.index(dim) + list(PACKED).index(name) + deterministic
    case = Case("cuda/packed", **PACKED[name])
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    check(Kernel("sm90", dim), case, dtype, seed, deterministic=deterministic)


@pytest.mark.parametrize("dim", DIMS)
def test_packed_sequences_do_not_see_each_other(dim):
    sequences_are_apart(Kernel("sm90", dim))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", DIMS)
def test_in_any_order(dim, seed):
    case = Case("cuda/any-order", batch=1, q_len=260, kv_len=390, causal=True)
    check(Kernel("sm90", dim), case, torch.bfloat16, seed, deterministic=False)


@pytest.mark.parametrize("dim, seed", thinned(DIMS, range(6)))
def test_moments_of_asynchronous_work(dim, seed):
    mask = {"window": (200, 0)} if seed % 2 else {"causal": True}
    case = Case("cuda/seeds", batch=1, q_len=260, kv_len=390, **mask)
    check(Kernel("sm90", dim), case, torch.bfloat16, seed)


@pytest.mark.parametrize("packed", ((), ((90, 200), (110, 100))), ids=("batch", "packed"))
@pytest.mark.parametrize("dim", DIMS)
def test_every_schedule_gives_the_same_bits(dim, packed):
    same_bits(Kernel("sm90", dim), packed)

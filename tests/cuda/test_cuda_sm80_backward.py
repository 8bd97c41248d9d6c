"""The backward kernels of sm_80, on the emulator, against the reference's gradients in float64."""

from __future__ import annotations

import ctypes

import emulated
import pytest
import torch
from cases import Case
from cuda_backward import Kernel, check, same_bits, sequences_are_apart
from cuda_cases import MASKS, OPTIONS, PACKED, SHAPES
from pairwise import thinned

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)

# By head dimension and available shared memory.
KERNELS = {
    f"{dim}-{'small' if small else 'large'}": Kernel("sm80", dim, (ctypes.c_bool(small),))
    for dim, small in [(64, False), (64, True), (128, False), (128, True), (256, False)]
}
NUMBERS = {
    name: number for number, name in enumerate([*KERNELS, *SHAPES, *MASKS, *OPTIONS, *PACKED])
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


# Every shape with the two most used kernels; with all others, the one that ends within tiles.
@pytest.mark.parametrize(
    "kernel_and_shape, mask",
    thinned(
        [
            f"{k} {s}"
            for k in KERNELS
            for s in SHAPES
            if k in ("64-large", "128-large") or s == "odd"
        ],
        MASKS,
    ),
)
def test_masks(kernel_and_shape, mask):
    kernel, shape = kernel_and_shape.split()
    seed = NUMBERS[kernel] + NUMBERS[shape] + NUMBERS[mask]
    case = Case(f"cuda/{shape}-{mask}", **SHAPES[shape], **MASKS[mask])
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    check(KERNELS[kernel], case, dtype, seed, with_dlse=seed % 3 > 0)


@pytest.mark.parametrize("kernel, option", thinned(KERNELS, OPTIONS))
def test_options(kernel, option):
    seed = NUMBERS[kernel] + NUMBERS[option]
    case = Case(f"cuda/{option}", **OPTIONS[option])
    check(KERNELS[kernel], case, torch.float16 if seed % 2 else torch.bfloat16, seed)


@pytest.mark.parametrize("kernel, name", thinned(KERNELS, PACKED))
def test_packed_sequences(kernel, name):
    seed = NUMBERS[kernel] + NUMBERS[name]
    case = Case("cuda/packed", **PACKED[name])
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    check(KERNELS[kernel], case, dtype, seed, deterministic=seed % 4 < 2)


@every_kernel
def test_packed_sequences_do_not_see_each_other(kernel):
    sequences_are_apart(KERNELS[kernel])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deterministic", [True, False])
@every_kernel
def test_moments_of_copies(kernel, deterministic, seed):
    case = Case("cuda/seeds", batch=1, heads=1, q_len=260, kv_len=390, causal=True)
    check(KERNELS[kernel], case, torch.bfloat16, seed, deterministic=deterministic)


@every_kernel
def test_every_schedule_gives_the_same_bits(kernel):
    same_bits(KERNELS[kernel])

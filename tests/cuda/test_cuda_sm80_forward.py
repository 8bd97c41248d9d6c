"""What only the sm_80 forward kernels do, on the emulator: they split keys, read them from pages,
and pack query heads into one tile. What all forward kernels do is in test_cuda_forward.py.
"""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from cases import Case
from cuda_cases import DIMS, check_forward
from pairwise import thinned

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)

LENS = {"batch": 3, "kv_lens": (0, 300, 135)}
DECODE = {
    "plain": {},
    "lens": LENS,
    "starts": {"batch": 2, "kv_lens": (290, 140), "kv_starts": (3, 139)},
    "window": {"window": (150, 0), **LENS},
    "causal": {"causal": True, "q_len": 4},
    "causal-more-rows-than-keys": {"causal": True, "q_len": 4, "kv_lens": (300, 2)},
    "softcap": {"softcap": 4.0, "scale": 0.5},
    "sinks": {"sinks": True, "causal": True, "q_len": 4, **LENS},
    "scale-negative": {"scale": -0.3},
    "many-rows": {"q_len": 90, "causal": True},
    "bshd": {"layout": "bshd", "causal": True, "q_len": 4},
    "one-kv-head": {"layout": "one_kv_head"},
}
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (5, 1)}


def decode(dim: int, option: str, heads: str = "mha", **more) -> Case:
    many, few = HEADS[heads]
    shape = {"q_len": 1, "kv_len": 300, "heads": many, "kv_heads": few, "head_dim": dim}
    return Case(f"cuda/{option}", **{**shape, **DECODE[option], **more})


@pytest.mark.parametrize("dim, option, splits", thinned(DIMS, DECODE, [1, 3, 99]))
def test_few_rows(dim, option, splits):
    seed = DIMS.index(dim) + list(DECODE).index(option) + splits
    heads = list(HEADS)[seed % 3] if option != "one-kv-head" else "mha"
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    check_forward(decode(dim, option, heads), dtype, seed, arch="sm80", num_splits=splits)


@pytest.mark.parametrize(
    "dim, option, page_size",
    thinned(DIMS, [n for n in DECODE if n not in ("bshd", "one-kv-head")], [1, 16, 24, 256]),
)
def test_pages(dim, option, page_size):
    """Unused pages, and the unused part of a page, contain NaN."""
    seed = DIMS.index(dim) + list(DECODE).index(option) + page_size
    case = decode(dim, option, list(HEADS)[seed % 3], page_size=page_size)
    case = case if case.kv_lens else replace(case, kv_lens=(300, 177))
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    check_forward(case, dtype, seed, arch="sm80", num_splits=seed % 4)


@pytest.mark.parametrize("dim", DIMS)
def test_pages_for_many_rows(dim):
    case = Case("cuda/pages", q_len=200, kv_len=300, kv_lens=(300, 211), head_dim=dim, page_size=16)
    check_forward(replace(case, causal=True), torch.bfloat16, dim, grid=1, arch="sm80")


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("dim", DIMS)
def test_packed_sequences_of_few_rows(dim, splits, page_size):
    packed = ((1, 300), (0, 70), (4, 4), (70, 150), (3, 0))
    shape = {"heads": 6, "kv_heads": 2, "head_dim": dim, "page_size": page_size}
    if page_size:  # every sequence has room for the longest
        shape |= {"kv_len": 300, "kv_lens": tuple(n for _, n in packed)}
    case = Case("cuda/packed", packed=packed, causal=True, sinks=True, **shape)
    check_forward(case, torch.float16, dim + splits, arch="sm80", num_splits=splits)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dim", DIMS)
def test_moments_of_asynchronous_work(dim, seed):
    case = decode(dim, "causal", "gqa", kv_lens=(300, 211), page_size=16 * (seed % 2))
    check_forward(case, torch.bfloat16, seed, arch="sm80", num_splits=1 + seed % 3)


def test_page_numbers_that_no_key_needs_are_not_read():
    problem = decode(64, "lens", "gqa", page_size=16).make(torch.float16)
    expected = emulated.forward(problem, arch="sm80", num_splits=2)
    table = problem.operands.page_table
    for row, keys in zip(table, problem.operands.kv_lens.tolist()):
        row[-(-keys // 16) :] = 2**30
    for one, other in zip(emulated.forward(problem, arch="sm80", num_splits=2), expected):
        assert torch.equal(one, other)


def test_a_gpu_is_filled():
    """By default, keys are split if the rows leave multiprocessors idle."""
    case = decode(64, "plain", "gqa", kv_len=2100, batch=1)
    check_forward(case, torch.float16, 1, grid=100, arch="sm80")


FEW, MANY = {"few": 1, "pack_gqa": 1, "splits": 1}, {"few": 0, "pack_gqa": 1, "splits": 1}


@pytest.mark.parametrize(
    "shape, expected",
    [
        ({"q_len": 1, "kv_len": 200}, FEW),
        ({"q_len": 1, "kv_len": 9000}, {**FEW, "splits": 35}),
        ({"q_len": 1, "kv_len": 9000, "batch": 33}, {**FEW, "splits": 4}),
        ({"q_len": 1, "kv_len": 9000, "batch": 500}, FEW),
        ({"q_len": 1, "kv_len": 9000, "heads": 16}, {**FEW, "pack_gqa": 8, "splits": 35}),
        ({"q_len": 1, "kv_len": 9000, "window": (600, 0)}, {**FEW, "splits": 2}),
        ({"q_len": 1, "kv_len": 512, "page_size": 16}, {**FEW, "splits": 2}),
        ({"q_len": 64, "kv_len": 300, "heads": 4, "batch": 99}, FEW),  # packing saves no tile
        ({"q_len": 65, "kv_len": 300, "batch": 99}, MANY),
        ({"q_len": 2000, "kv_len": 2000}, {**FEW, "splits": 4}),  # 32 tiles of 128
        ({"q_len": 5000, "kv_len": 2000}, MANY),
        ({"packed": ((1, 300), (3, 70)), "heads": 8}, {**FEW, "pack_gqa": 4}),
        ({"packed": ((3000, 300), (3000, 70))}, MANY),
    ],
)
def test_plans(shape, expected):
    """With 132 multiprocessors: 264 CTAs with few rows fit. D does not matter and is small."""
    case = Case("cuda/plan", **{"batch": 1, "heads": 2, "kv_heads": 2, "head_dim": 1, **shape})
    assert emulated.plan(case.make(torch.float16), 132) == expected


def test_splits_that_are_asked_for():
    problem = Case("cuda/plan", q_len=300, kv_len=300, head_dim=64).make(torch.float16)
    assert emulated.plan(problem, 1) == MANY
    assert emulated.plan(problem, 1, num_splits=3) == {**FEW, "splits": 3}
    assert emulated.plan(problem, 1, num_splits=99) == {**FEW, "splits": 10}  # 32 keys each
    assert emulated.plan(problem, 132, num_splits=1) == FEW


def test_hopper_has_another_choice():
    problem = Case("cuda/plan", q_len=900, kv_len=9, head_dim=64, heads=6).make(torch.float16)
    assert emulated.plan(problem, 200, hopper=False) == FEW
    assert emulated.plan(problem, 200, hopper=True) == MANY

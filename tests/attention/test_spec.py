"""A mask as intervals: fastattn/core/spec.py, its C++ twin, and the definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastattn.core.spec import Spec

_C = pytest.importorskip("fastattn._C", reason="fastattn._C is not built")

LEFT_RIGHT = list(product((-1, 0, 1, 3), repeat=2))
SIZES = list(product((1, 2, 4, 6), (0, 1, 3, 4, 7)))
CASES = [
    pytest.param(left, right, align_end, id=f"left {left} right {right} end {align_end}")
    for (left, right), align_end in product(LEFT_RIGHT, (True, False))
]


def sees(i: int, j: int, left: int, right: int, offset: int) -> bool:
    """The definition: i + o - left <= j <= i + o + right, -1 being no bound."""
    return (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)


def tiles(length: int):
    """Every non-empty half-open interval in range(length)."""
    return ((a, b) for a in range(length) for b in range(a + 1, length + 1))


@pytest.mark.parametrize("left, right, align_end", CASES)
def test_intervals_are_the_definition(left, right, align_end):
    """Python's lo and hi, on ints and on tensors, for every row and key."""
    spec = Spec(1.0, left=left, right=right, align_end=align_end)
    for q_len, kv_len in SIZES:
        offset = kv_len - q_len if align_end else 0
        rows = torch.arange(q_len)
        lows = spec.lo(rows, q_len, kv_len).expand(q_len).tolist()
        highs = spec.hi(rows, q_len, kv_len).expand(q_len).tolist()
        for i in range(q_len):
            lo, hi = spec.lo(i, q_len, kv_len), spec.hi(i, q_len, kv_len)
            assert (lo, hi) == (lows[i], highs[i])
            seen = [j for j in range(kv_len) if sees(i, j, left, right, offset)]
            assert list(range(lo, hi)) == seen
        assert lows == sorted(lows) and highs == sorted(highs), "the ends never decrease"


@pytest.mark.parametrize("left, right, align_end", CASES)
def test_tiles_of_keys_are_the_definition(left, right, align_end):
    """C++'s kv_range: nothing is visible outside of it, and everything inside its full part."""
    spec = Spec(1.0, left=left, right=right, align_end=align_end)
    for q_len, kv_len in SIZES:
        offset = kv_len - q_len if align_end else 0
        for q0, q1 in tiles(q_len):
            begin, full_begin, full_end, end = _C.kv_range(
                left, right, align_end, q_len, kv_len, q0, q1
            )
            ends = [(spec.lo(i, q_len, kv_len), spec.hi(i, q_len, kv_len)) for i in (q0, q1 - 1)]
            assert [(begin, full_end), (full_begin, end)] == ends, "the twins agree"
            for j in range(kv_len):
                seen = [sees(i, j, left, right, offset) for i in range(q0, q1)]
                assert begin <= j < end or not any(seen)
                assert not full_begin <= j < full_end or all(seen)


@pytest.mark.parametrize("left, right, align_end", CASES)
def test_tiles_of_rows_are_the_definition(left, right, align_end):
    """C++'s q_range, the same for a tile of keys."""
    for q_len, kv_len in SIZES:
        offset = kv_len - q_len if align_end else 0
        for k0, k1 in tiles(kv_len):
            begin, full_begin, full_end, end = _C.q_range(
                left, right, align_end, q_len, kv_len, k0, k1
            )
            for i in range(q_len):
                seen = [sees(i, j, left, right, offset) for j in range(k0, k1)]
                assert begin <= i < end or not any(seen)
                assert not full_begin <= i < full_end or all(seen)


@pytest.mark.parametrize(
    "arguments",
    [
        (-2, 0, True, 4, 4, 0, 1),
        (0, 2**30, True, 4, 4, 0, 1),
        (0, 0, True, -1, 4, 0, 1),
        (0, 0, True, 4, 2**30, 0, 1),
        (0, 0, True, 4, 4, 2, 2),
        (0, 0, True, 4, 4, -1, 2),
        (0, 0, True, 4, 4, 0, 5),
    ],
)
def test_nonsense_is_refused(arguments):
    for function in (_C.kv_range, _C.q_range):
        with pytest.raises(ValueError, match="must be"):
            function(*arguments)


def test_largest_lengths_do_not_overflow():
    top = 2**30 - 1
    assert _C.kv_range(top, 0, True, 1, top, 0, 1) == (0, 0, top, top)
    assert _C.kv_range(-1, top, False, top, top, top - 1, top) == (0, 0, top, top)
    assert _C.kv_range(0, 0, False, top, 1, top - 1, top) == (1, 1, 1, 1)
    assert _C.q_range(0, 0, True, top, 1, 0, 1) == (top - 1, top - 1, top, top)


def test_module_facts():
    """The source of what `info` shows."""
    assert {"compiler", "cxx_standard", "pybind11"} <= _C.build_info().keys()

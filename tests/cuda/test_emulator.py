"""The emulator in tests/emulator: single instructions, and faults planted in a small kernel."""

from __future__ import annotations

import ctypes

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)

SEEDS = range(3)  # asynchronous work completes at once, as late as allowed, or in between


def call(name: str, *arguments, **tensors: torch.Tensor) -> str:
    """The report of the C function `name`, which may access only these tensors."""
    emulated.register(**tensors)
    function = getattr(emulated.library(), name)
    function.restype = ctypes.c_char_p
    values = [ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments]
    return function(*values).decode()


# ---- faults ------------------------------------------------------------------------------------

# In the order of Fault in self_test.cpp: the expected report; "" if only the result is wrong; and
# "or" if it depends on the moment at which asynchronous work completes.
FAULTS = {
    "none": None,
    "no wait for data": "nobody has written it|a wgmma reads what a tensor load wrote",
    "wrong phase": "deadlock|nobody has written it|race",
    "wrong swizzle": "",
    "no proxy fence": "no fence.proxy.async",
    "no wgmma fence": "no wgmma.fence",
    "no wgmma wait": "race|in flight|no wgmma.fence|numbers",
    "early release": "race|deadlock",
    "too few bytes": "nobody has written it|race|more bytes|deadlock",
    "too many bytes": "deadlock",
    "no barrier before the store": "no fence.proxy.async|race",
    "no wait for the store": "exits before it waited",
    "no commit": "never committed",
    "barrier with a wrong count": "deadlock",
    "divergence": "diverge",
    "shared memory overrun": "outside of shared memory",
    "misaligned": "must be a multiple of 4",
    "global memory overrun": "bytes into numbers, which has 512",
    "unwritten memory": "nobody has written it",
    "race": "race",
    "no fence after mbarrier.init": "no fence.mbarrier_init",
    "no barrier after mbarrier.init": "there is no mbarrier|not ordered before",
    "registers": "deadlock",
    "accumulator touched": "was written while it ran|numbers",
    "misplaced tile": "must be a multiple of 1024",
    "extra arrival": "one arrival more|deadlock",
    "a flag that nobody sets": "deadlock: this thread waits for a change of global memory",
}


@pytest.fixture(scope="module")
def matrices():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(64, 256, generator=draw).bfloat16() for _ in range(2)]


def run(fault: int, seed: int, matrices) -> tuple[str, bool]:
    """The report, and whether the numbers are right."""
    a, b = matrices
    out = torch.full((64, 64), torch.nan, dtype=torch.bfloat16)
    numbers = torch.zeros(128)
    arguments = (fault, ctypes.c_uint64(seed), a, b, out, numbers)
    report = call("emulated_self_test", *arguments, a=a, b=b, out=out, numbers=numbers)
    expected = a.double() @ b.double().T
    return report, bool(((out.double() - expected).abs() <= 1e-2 * expected.abs() + 0.1).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_reported(fault, seed, matrices):
    report, right = run(list(FAULTS).index(fault), seed, matrices)
    judge(FAULTS[fault], report, right)


def judge(expected: str | None, report: str, right: bool) -> None:
    if expected is None:
        assert report == "" and right
    elif report == "":
        assert expected == "" or "numbers" in expected
        assert not right, "nothing was reported and the numbers are right"
    else:
        assert any(part and part in report for part in expected.split("|")), report


@pytest.mark.parametrize("fault", ["no proxy fence", "early release", "shared memory overrun"])
def test_report_names_the_lines(fault, matrices):
    report, _ = run(list(FAULTS).index(fault), 0, matrices)
    assert "self_test.cpp:" in report


def test_deadlock_says_who_waits_where(matrices):
    report, _ = run(list(FAULTS).index("too many bytes"), 1, matrices)
    assert "128 threads (128 to 255) wait in mbarrier.try_wait" in report
    assert "16 bytes missing" in report and "pipeline.cuh:" in report
    report, _ = run(list(FAULTS).index("barrier with a wrong count"), 1, matrices)
    assert "bar.sync of barrier 1, 256 threads" in report


def test_a_race_names_both_sides(matrices):
    report, _ = run(list(FAULTS).index("no wait for data"), 0, matrices)
    assert "a wgmma reads what a tensor load wrote" in report
    before, after = report.split("and this is")
    assert "self_test.cpp:" in before and "self_test.cpp:" in after


# ---- instructions ------------------------------------------------------------------------------


def swizzled(address: int, swizzle: int) -> int:
    """The swizzle of 0: none, 1: 32, 2: 64, 3: 128 bytes, of a byte address."""
    rows = {0: 0, 1: 1, 2: 3, 3: 7}[swizzle]
    return address ^ (((address >> 7) & rows) << 4)


@pytest.mark.parametrize("column, row", [(0, 0), (48, 30), (-8, -3), (16, 5)])
@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize("dtype", [torch.int16, torch.int8])
def test_tma_box(dtype, swizzle, column, row):
    """A box is swizzled in shared memory, with zeros where it exceeds the tensor."""
    size = dtype.itemsize
    columns, rows, box_rows, box_columns = 80, 40, 16, (16 << swizzle) // size
    data = torch.arange(1, columns * rows + 1).to(dtype).view(rows, columns)
    out = torch.zeros(box_rows * box_columns, dtype=dtype)
    numbers = (size, columns, rows, swizzle, box_columns, box_rows, column, row)
    arguments = (data, *numbers, out, ctypes.c_uint64(swizzle))
    assert call("emulated_box", *arguments, data=data, out=out) == ""
    for i in range(box_rows):
        for j in range(box_columns):
            inside = 0 <= row + i < rows and 0 <= column + j < columns
            expected = int(data[row + i, column + j]) if inside else 0
            assert out[swizzled(size * (i * box_columns + j), swizzle) // size] == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_wgmma_reads_operands_along_their_rows(seed):
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 128).bfloat16()
    out = torch.full((64, 128), torch.nan)
    assert call("emulated_transposed", a, b, out, ctypes.c_uint64(seed), a=a, b=b, out=out) == ""
    torch.testing.assert_close(out, a.float().T @ b.float(), atol=1e-4, rtol=1e-4)


# In the order of Fault8 in self_test.cpp, as FAULTS.
FAULTS8 = {
    "none": None,
    "no wait for the transpose": "nobody has written it|race|no fence.proxy.async|numbers",
    "no proxy fence": "no fence.proxy.async",
    "no wait for data": "nobody has written it|race",
    "MN-major bytes": "8-bit operands of wgmma are K-major",
    "not transposed": "",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS8)
def test_products_of_bytes(fault, seed):
    """e4m3 from memory and registers, values transposed in place, and one planted fault at a
    time."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 128, generator=draw).to(torch.float8_e4m3fn) for n in (64, 128))
    out = torch.full((64, 128), torch.nan)
    arguments = (list(FAULTS8).index(fault), ctypes.c_uint64(seed), a, b, out)
    report = call("emulated_self_test8", *arguments, a=a, b=b, out=out)
    scores = a.double() @ b.double().T
    expected = scores.clamp(-448, 448).to(torch.float8_e4m3fn).double() @ b.double()
    right = bool(((out.double() - expected).abs() <= 0.01 * expected.abs() + 2).all())
    judge(FAULTS8[fault], report, right)


def test_bytes_of_e4m3():
    """To nearest, ties to even, at most 448; and exact in the other direction, as in torch."""
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = exact[exact.isfinite()].sort().values
    x = torch.cat([x, (x[1:] + x[:-1]) / 2, 60 * torch.randn(2000), torch.tensor([1e9, -449.0])])
    x = x[: len(x) // 4 * 4]
    out, back = torch.zeros(len(x), dtype=torch.float8_e4m3fn), torch.zeros(len(x))
    function = emulated.library().emulated_e4m3
    function(*(ctypes.c_void_p(y.data_ptr()) for y in (x, out, back)), len(x))
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(back, expected.float())


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_instructions(seed):
    a, b = torch.randn(16, 16).half(), torch.randn(16, 16).half()
    out, transposed = torch.full((16, 16), torch.nan), torch.zeros(16, 16).half()
    arguments = (a, b, out, transposed, ctypes.c_uint64(seed))
    assert call("emulated_warp", *arguments, a=a, b=b, out=out, at=transposed) == ""
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(transposed, a.T)


@pytest.mark.parametrize("rows", [(0, 64), (3, 60), (40, 20)])
@pytest.mark.parametrize("b_major", ["k", "mn"])
@pytest.mark.parametrize("a_major", ["k", "mn"])
def test_products_of_a_warp(a_major, b_major, rows):
    """Operands in both orders, copied with zeros outside of the existing rows."""
    stored_a, stored_b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    out = torch.full((3, 64, 64), torch.nan)
    majors = 2 * (a_major == "mn") + (b_major == "mn")
    arguments = (stored_a, stored_b, out, majors, *rows, ctypes.c_uint64(majors))
    assert call("emulated_product", *arguments, a=stored_a, b=stored_b, out=out) == ""
    at = torch.arange(64)[:, None]
    a = stored_a.float().masked_fill((at < rows[0]) | (at >= rows[1]), 0)
    a, b = a.T if a_major == "mn" else a, stored_b.float()
    b = b if b_major == "mn" else b.T
    torch.testing.assert_close(out[0], a @ b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[1], out[0].bfloat16().float() @ b, atol=1e-3, rtol=1e-3)
    assert torch.equal(out[1], out[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_reduction(seed):
    terms, sums = torch.randn(256), torch.randn(256)
    expected = sums + terms + terms
    arguments = (terms, sums, 256, ctypes.c_uint64(seed))
    assert call("emulated_reduce", *arguments, terms=terms, sums=sums) == ""
    torch.testing.assert_close(sums, expected)


# ---- the structs of calls ----------------------------------------------------------------------


def drifted(*, without=(), **types):
    """BackwardCall with fields of another type, or without one."""
    fields = [x for base in emulated.BackwardCall.__mro__[1::-1] for x in base._fields_]
    fields = [(name, types.get(name, kind)) for name, kind in fields if name not in without]
    return type("BackwardCall", (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(
    "structure, field",
    [
        (drifted(sequences=ctypes.c_int64), "BackwardCall.sequences"),
        (drifted(align_end=ctypes.c_int), "BackwardCall.align_end"),
        (drifted(without=("softcap",)), "BackwardCall.softcap"),
        (drifted(without=("dsinks",)), "BackwardCall.dsinks"),
        (drifted(scale=ctypes.c_float), "BackwardCall.scale"),
    ],
)
def test_a_field_that_moved_is_named(structure, field):
    """The ctypes copies are compared with the C++ structs when the library is loaded."""
    text = emulated.library().emulated_layouts().decode()
    emulated.check_layouts(text, emulated.STRUCTURES)
    others = [x for x in emulated.STRUCTURES if x is not emulated.BackwardCall]
    with pytest.raises(RuntimeError, match=rf"{field} is at .* in csrc/cuda"):
        emulated.check_layouts(text, [*others, structure])

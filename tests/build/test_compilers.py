"""The CPU kernels with clang, for aarch64 and in the tuning program; and what an object file must
not leak.

Tests that compile are skipped if their compiler is missing.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kernels_alone
import pytest
import torch

from fastattn.backends import isa, library
from fastattn.core.reference import reference
from fastattn.core.spec import Operands, Spec
from fastattn.core.tolerance import Tolerance

ROOT = Path(__file__).resolve().parents[2]
X86 = platform.machine() == "x86_64"
CLANG, GXX = shutil.which("clang++"), shutil.which("g++")
AARCH64 = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def program(folder: Path, kind: str) -> kernels_alone.Program:
    if kind == "aarch64":
        if AARCH64 is None or QEMU is None:
            pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
        return kernels_alone.build(folder, [AARCH64], "portable", "-static", emulator=QEMU)
    if CLANG is None:
        pytest.skip("needs clang++")
    if "avx2" not in isa.supported():
        pytest.skip("needs a CPU with AVX2, and the library that tells")
    return kernels_alone.build(folder, [CLANG], "avx2", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """program(), each compiled once."""
    return functools.cache(lambda kind: program(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module", params=["clang", "aarch64"])
def alone(request, made) -> kernels_alone.Program:
    return made(request.param)


# ---- right results -----------------------------------------------------------------------------

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
CALLS = {  # changes to Spec, and operands
    "window and bias": ({"left": 40, "right": 3}, {"bias": lambda: torch.randn(1, 4, 70, 101)}),
    "softcap, ALiBi and dropout": (
        {"right": 0, "softcap": 2.0, "dropout_p": 0.3},
        {"alibi_slopes": lambda: SLOPES, "dropout_seed": lambda: torch.tensor([7, 1 << 40])},
    ),
}


def by_reference(q, k, v, dout, spec: Spec, operands: Operands, dtype: torch.dtype):
    """[out, lse, dq, dk, dv] of the reference in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    if operands.bias is not None:
        operands = replace(operands, bias=operands.bias.to(dtype))
    out, lse = reference(q, k, v, spec, operands)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


@pytest.mark.parametrize("dtype", kernels_alone.DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_attention(alone, name, dtype):
    """Grouped heads and sizes that fill no vector, forward and backward, in every dtype."""
    torch.manual_seed(3)
    numbers, tensors = CALLS[name]
    made = {operand: make() for operand, make in tensors.items()}
    if "bias" in made:
        made["bias"] = made["bias"].to(dtype)
    spec, operands = Spec(scale=0.3, **numbers), Operands(**made)
    shapes = ((4, 70, 24), (2, 101, 24), (2, 101, 17), (4, 70, 17))
    q, k, v, dout = (torch.randn(1, *shape).to(dtype) for shape in shapes)
    got = alone.attention(q, k, v, dout, spec, operands)
    want = by_reference(q, k, v, dout, spec, operands, torch.float64)
    compute = torch.promote_types(dtype, torch.float32)
    plain = by_reference(q, k, v, dout, spec, operands, compute)
    tolerance = Tolerance(q, k, v, spec.scale, want[1], dout)
    for what, *three in zip(("out", "lse", "dq", "dk", "dv"), got, want, plain, strict=True):
        three[2] = three[2] if what == "lse" else three[2].to(dtype)
        comparison = tolerance.compare(what, *three)
        assert comparison.passed, f"{what}: {comparison}"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", kernels_alone.DTYPES, ids=str)
def test_rotation(alone, dtype, interleaved):
    """Its vector shuffles use the compiler's own builtin."""
    x = torch.randn(5, 74).to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    angle = torch.randn(5, 37, dtype=torch.float64)
    cos, sin = angle.cos().to(compute), angle.sin().to(compute)
    a, b = (x[:, ::2], x[:, 1::2]) if interleaved else x.split(37, 1)
    a, b, c, s = (t.double() for t in (a, b, cos, sin))
    want = torch.stack((a * c - b * s, a * s + b * c), 2 if interleaved else 1).reshape(5, 74)
    error = (alone.rotate(x, cos, sin, interleaved).double() - want).abs().max().item()
    assert error <= 4 * torch.finfo(dtype).eps * want.abs().max().item()


def test_facts(alone):
    """The library's own report: as in a GCC build here, and only portable on other platforms."""
    facts, selected = alone.facts()
    supported = [row["name"] for row in facts["isas"] if not row["lacking"]]
    if len(alone.command) > 1:
        assert facts["features"] == {} and selected == "portable"
        assert supported == ["portable", "portable_bf16"]
    else:
        assert facts["features"] == isa.features() and supported == isa.supported()


# ---- code of one instruction set stays with it ---------------------------------------------------


def vector_code_outside(binary: Path) -> dict[str, str]:
    """Functions outside of the instruction sets' namespaces -> an AVX instruction in each."""
    command = ["objdump", "-dC", "--no-show-raw-insn", binary]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    own, name, found = re.compile(r"fastattn::cpu::(avx\w+)::"), "", {}
    if not own.search(run.stdout):
        pytest.skip(f"{binary.name} is stripped of its functions' names")
    for line in run.stdout.splitlines():
        if title := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = title[1]
        elif (code := re.match(r"\s+[0-9a-f]+:\s+(v\w+)", line)) and not own.search(name):
            found.setdefault(name, code[1])
    return found


@pytest.mark.skipif(not (X86 and shutil.which("objdump")), reason="needs objdump, on x86-64")
@pytest.mark.parametrize("kind", ["library", "clang"])
def test_no_other_code_has_an_instruction_set(kind, made):
    """A library has one copy of each inline function and std template. The linker may keep an
    object file's copy, and a CPU without that file's instruction set would run it."""
    if kind == "library" and library.NATIVE is None:
        pytest.skip(str(library.NATIVE_MISSING))
    binary = library.NATIVE._name if kind == "library" else made(kind).command[0]
    assert vector_code_outside(Path(binary)) == {}


# ---- which compilers are taken -------------------------------------------------------------------


def plan(folder: Path, **settings: str) -> subprocess.CompletedProcess:
    """setup.py plans the build but compiles nothing; it copies the Python files."""
    settings = {**os.environ, "FASTATTN_BUILD": "cpu", **settings}
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(folder / "lib")]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)


def fake(path: Path, macros: str) -> Path:
    """A compiler that only prints its version."""
    path.write_text(f"#!/bin/sh\necho '{macros}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("macros", ["#define __GNUC__ 12", "#define __clang_major__ 14"])
def test_compilers_that_will_do(macros, tmp_path):
    run = plan(tmp_path, CXX=str(fake(tmp_path / "c++", macros)))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name, macro", [("GCC 11", "__GNUC__"), ("clang 13", "__clang_major__")])
def test_an_old_compiler_is_refused(name, macro, tmp_path):
    old = fake(tmp_path / "c++", f"#define {macro} {name.split()[1]}")
    run = plan(tmp_path, CXX=str(old))
    accepted = "accepted are GCC 12 or newer and clang 14 or newer (CXX names another)"
    assert run.returncode != 0 and f"{old} is {name}; {accepted}" in run.stderr


def test_a_newer_compiler_is_found_beside_an_old_one(tmp_path):
    fake(tmp_path / "g++", "#define __GNUC__ 11")
    fake(tmp_path / "c++", "#define __GNUC__ 11")
    fake(tmp_path / "clang++", "#define __GNUC__ 4\n#define __clang_major__ 14")
    settings = {"CXX": "", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = plan(tmp_path, **settings)
    assert run.returncode == 0, run.stderr


@pytest.mark.long
@pytest.mark.native
@pytest.mark.skipif(CLANG is None, reason="needs clang++")
def test_the_whole_library_by_clang(tmp_path):
    """setup.py builds with it, and the CPU kernels' tests pass."""
    for name in ("csrc", "kernels", "benchmarks", "fastattn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "build_tools.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    settings = {**os.environ, "CXX": CLANG, "FASTATTN_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=settings, check=True)
    settings["FASTATTN_CPU_LIBRARY"] = str(tmp_path / "fastattn/_cpu.abi3.so")
    files = ("tests/backends/test_cpu.py", "tests/fused/test_fused.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    subprocess.run(command, cwd=ROOT, env=settings, check=True)


# ---- the tuning program --------------------------------------------------------------------------


@pytest.mark.skipif(
    GXX is None or "avx2" not in isa.supported(), reason="needs g++, and a CPU with AVX2"
)
def test_the_tuning_program_runs():
    command = [sys.executable, "benchmarks/ladder/tune.py", "all", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["forward", "backward", "jvp", "jvp_bwd"]
    assert all("% of peak" in line for line in lines)

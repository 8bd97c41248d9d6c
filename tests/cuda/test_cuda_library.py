"""The CUDA library without a GPU: it loads wherever torch does, and reports what is missing.

Tests that need the built library are in tests/build/test_wheel.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import elf
import pytest
import torch

from fastattn.backends import cuda, library, proof, registry

ROOT = Path(__file__).resolve().parents[2]
# Looked up by csrc/cuda/ops.cu at run time, in libraries that it is not linked to.
LOOKED_UP = {"aoti_torch_get_current_cuda_stream"}


needs_tools = pytest.mark.skipif(
    elf.why_not() is not None or not shutil.which("g++"), reason="needs g++ and binutils"
)


def library_of(folder: Path, text: str) -> Path:
    source, target = folder / "x.cpp", folder / "_cuda.abi3.so"
    source.write_text(text)
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(target), f"-L{elf.TORCH}"]
    subprocess.run([*command, "-Wl,--no-as-needed", "-ltorch_cpu"], check=True)
    return target


@needs_tools
def test_a_symbol_of_libtorch_cuda_is_found_missing(tmp_path, monkeypatch):
    """The error that kept this library from loading anywhere is reported in full."""
    code = 'extern "C" int {0}(int, void**); int use() {{ return {0}(0, nullptr); }}'
    path = library_of(tmp_path, code.format("aoti_torch_get_current_cuda_stream"))
    assert elf.not_provided(path) == LOOKED_UP
    monkeypatch.setattr(library, "_native_path", lambda kind: path)
    loaded, reason = library._load("CUDA")
    assert loaded is None and str(path) in reason
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in reason


def test_the_reason_is_said_once_and_with_its_causes():
    try:
        try:
            raise OSError("libx.so: undefined symbol: y")
        except OSError as error:
            raise RuntimeError("Could not load this library: libx.so") from error
    except RuntimeError as error:
        said = library._causes(error)
    assert said == "Could not load this library: libx.so: libx.so: undefined symbol: y"


def test_links_fail_where_a_symbol_is_missing():
    """`-z defs` is among the link flags of both libraries on the stable ABI."""
    text = (ROOT / "setup.py").read_text()
    assert '"-Wl,-z,defs"' in text
    ninja = ROOT / "build/native/build.ninja"
    if ninja.exists():
        links = [
            x for x in ninja.read_text().splitlines() if x.startswith("  links = ") and "torch" in x
        ]
        assert links and all("-z,defs" in line for line in links)


def test_a_built_library_that_does_not_load_is_a_fault(monkeypatch):
    """For `verify` and tests/backends/test_gpu.py, which skip only if it was never built."""
    reason = "the native CUDA library x.so does not load: undefined symbol: y"
    monkeypatch.setattr(library, "CUDA_MISSING", reason)
    monkeypatch.setattr(library, "CUDA", None)
    monkeypatch.setattr(library, "_native_path", lambda kind: Path("x.so"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert library.cuda_fault() == reason
    found = proof.prove(lambda text: None)
    assert found.failures == [f"CUDA kernels: {reason}"] and not found.hangs
    monkeypatch.setattr(library, "_native_path", lambda kind: None)
    assert library.cuda_fault() is None and proof.prove(lambda text: None).failures == []
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library.cuda_fault() is None


def test_a_driver_that_does_not_serve_the_library_is_named(monkeypatch):
    """By explain() and by backend="cuda"; the operators ask again themselves."""
    from fastattn.core.call import Call
    from fastattn.core.spec import Operands, Spec

    class Old:
        @staticmethod
        def fastattn_cuda_problem(index):
            return b"the NVIDIA driver serves CUDA up to 12.2, and this library needs 13.0"

    class Q:
        device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (1, 1, 64, 64)

    monkeypatch.setattr(library, "CUDA", Old)
    monkeypatch.setattr(library, "CUDA_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    library.cuda_problem.cache_clear()
    try:
        said = registry.BY_NAME["cuda"].why_not(Call(Q, Q, Q, Spec(1.0), Operands()))
    finally:
        library.cuda_problem.cache_clear()
    assert "serves CUDA up to 12.2" in said


def test_its_questions_are_the_ones_that_python_asks():
    """Names of C functions, which no compiler checks."""
    asked = {"fastattn_torch_problem", "fastattn_cuda_problem", "fastattn_cuda_tensor_map"}
    source = (ROOT / "csrc/cuda/ops.cu").read_text()
    folder = ROOT / "fastattn/backends"
    texts = "".join((folder / f"{n}.py").read_text() for n in ("library", "proof_device"))
    for name in asked:
        assert f"QUESTION {name}(" in source and f'"{name}"' in texts
    assert source.count("\nQUESTION ") == len(asked)


def test_the_operators_take_what_the_backend_says():
    """The lists in csrc/cuda/ops.cu are the backend's: Python makes sequences of document_ids, and
    descales are arguments of their own."""
    source = (ROOT / "csrc/cuda/ops.cu").read_text()
    lists = {"TAKEN_FORWARD": cuda.OPERANDS, "TAKEN": cuda.FLOAT8_OPERANDS}
    for name, accepted in lists.items():
        names = re.search(rf"{name}\[\] = \{{(.*?)\}}", source, re.DOTALL).group(1)
        assert set(re.findall(r'"(\w+)"', names)) == set(accepted) - {"document_ids", "descales"}


@pytest.mark.parametrize("release, word", [("11.8", "nvcc is 11.8"), ("", "nvcc is unknown")])
def test_a_toolkit_that_cannot_build_it_is_named(tmp_path, release, word):
    nvcc = tmp_path / "nvcc"
    text = f"Cuda compilation tools, release {release}, V11" if release else "no toolkit"
    nvcc.write_text(f"#!/bin/sh\necho nvcc: NVIDIA\necho '{text}'\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "NVCC": str(nvcc), "FASTATTN_BUILD": "cuda"}
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and f"{word}; accepted is 12.0 or newer" in run.stderr

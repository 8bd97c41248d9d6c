"""The wheel of `make wheel`: one for every CPython and torch, installed into a clean environment.

That environment has the torch of this one or, if FASTATTN_OTHER_TORCH names a Python, that
Python's: a wheel built against one torch has to work with another.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import elf
import pytest
import torch

from fastattn.backends import library

ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get("FASTATTN_OTHER_TORCH")

pytestmark = pytest.mark.skipif(
    library.NATIVE_MISSING is not None,
    reason=f"nothing native is built here: {library.NATIVE_MISSING}",
)

USE = """
import json, torch, fastattn
from fastattn.backends import library
q, k, v = (torch.randn(2, 4, 70, 64, requires_grad=True) for _ in range(3))
out = fastattn.attention(q, k, v, causal=True, backend="cpu")
plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
grads = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v))
error = max((x - y).abs().max().item() for x, y in zip((out, *grads[0]), (plain, *grads[1])))
print(json.dumps([fastattn.__file__, torch.__version__, error, library.NATIVE_MISSING]))
"""


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "FASTATTN_BUILD": "wheel"}
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "-w", folder, ROOT, env=environment)  # fmt: skip
    (made,) = folder.glob("*.whl")
    return made


def test_it_serves_every_cpython(wheel):
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        facts = json.loads(files.read("fastattn/_build.json"))
    libraries = ["_cpu", "_cuda"] if facts["nvcc"] else ["_cpu"]
    assert facts["mode"] == "wheel" and facts["built"] == libraries
    assert sorted(n for n in names if n.endswith(".so")) == [
        f"fastattn/{library}.abi3.so" for library in libraries
    ]
    assert {"fastattn/py.typed", "fastattn/kernels/forward.py"} <= set(names)
    tests = ("test_", "conftest")
    assert not [n for n in names if n.startswith("csrc/") or n.split("/")[-1].startswith(tests)]


def site_packages_of(python: str) -> str:
    code = "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
    return run(python, "-c", code, cwd="/").strip()


@pytest.mark.parametrize("python", [sys.executable, OTHER], ids=["this-torch", "other-torch"])
def test_a_clean_environment(wheel, tmp_path, python):
    if python is None:
        pytest.skip("FASTATTN_OTHER_TORCH does not name a Python that has another torch")
    # The environment's own Python, because torch is built for one version.
    base = run(python, "-c", "import sys; print(sys._base_executable)").strip()
    run(base, "-m", "venv", "--without-pip", tmp_path / "env")
    clean = tmp_path / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", clean, "install", "-q", "--no-deps", wheel)
    own = run(clean, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(own, "torch.pth").write_text(site_packages_of(python) + "\n")
    settings = {k: x for k, x in os.environ.items() if not k.startswith(("FASTATTN", "PYTHON"))}
    out = run(clean, "-c", USE, cwd=tmp_path, env=settings)
    where, version, error, missing = json.loads(out.strip().splitlines()[-1])
    assert where.startswith(own) and missing is None
    assert error < 1e-4, version
    assert wheel.name.split("-")[1] in run(
        clean, "-m", "fastattn", "info", cwd=tmp_path, env=settings
    )


# ---- the libraries in it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def libraries(wheel, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as files:
        names = [n for n in files.namelist() if n.endswith(".so")]
        return {n.split("_")[-1].split(".")[0]: Path(files.extract(n, folder)) for n in names}


def library_of(libraries, kind: str) -> Path:
    if kind not in libraries:
        pytest.skip(f"the {kind} library is not in the wheel: there is no nvcc")
    return libraries[kind]


@pytest.mark.skipif(elf.why_not() is not None, reason=str(elf.why_not()))
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_a_library_needs_of_torch_is_in_the_libraries_that_it_names(libraries, kind):
    """It also names no library that a torch without CUDA lacks."""
    path = library_of(libraries, kind)
    torchs = {name for name in elf.needed(path) if "torch" in name or "c10" in name}
    assert torchs == {"libtorch_cpu.so"} and elf.not_provided(path) == set()


MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.mark.skipif(elf.why_not() is not None, reason=str(elf.why_not()))
@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed: make wheel does"
)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_library_needs_no_newer_glibc_than_torch_does(libraries, kind):
    """It also has no symbols of its own functions: it is stripped."""
    path = library_of(libraries, kind)
    newest = elf.newest_versions(path)
    too_new = {x: v for x, v in newest.items() if v > MANYLINUX_2_28[x]}
    assert "GLIBC" in newest and too_new == {}
    assert subprocess.run(["nm", path], capture_output=True, text=True).stdout == ""


LOAD = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
import fastattn
library = ctypes.CDLL(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
for name in ("flash_attn_fwd", "flash_attn_bwd", "flash_attn_fwd_float8"):
    assert has(f"fastattn::{name}", "CUDA"), name
for name, arguments in (("torch_problem", ()), ("cuda_problem", (0,))):
    question = getattr(library, f"fastattn_{name}")
    question.restype = ctypes.c_char_p
    print(question(*arguments).decode())
"""


def test_the_cuda_library_loads_and_says_what_is_not_here(libraries):
    """With any torch: a CPU build has no streams; without a driver there is no GPU."""
    path = library_of(libraries, "cuda")
    run = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    torch_problem, cuda_problem = (run.stdout + "\n").split("\n")[:2]
    if torch.version.cuda is None:
        assert "aoti_torch_get_current_cuda_stream, as builds with CUDA do" in torch_problem
    else:
        assert torch_problem == ""
    if not Path("/proc/driver/nvidia").exists():
        assert "there is no NVIDIA driver here" in cuda_problem


def test_a_tensor_map_is_asked_for_by_ctypes(libraries):
    """Without a driver the answer is that there is none, which shows that the arguments arrive."""
    path = library_of(libraries, "cuda")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver, which may well make the map")
    library = ctypes.CDLL(str(path))
    function = library.fastattn_cuda_tensor_map
    function.restype = ctypes.c_char_p
    x = torch.zeros(2, 3, 5, 64, dtype=torch.bfloat16)

    def ask(x):
        shape, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 3)(*x.stride()[:3])
        data, size = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.element_size())
        return function(data, shape, strides, size, 128).decode()

    assert "cuTensorMapEncodeTiled" in ask(x)
    assert "of an expanded tensor" in ask(x[:, :1].expand_as(x))

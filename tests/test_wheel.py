"""`make wheel`: one wheel for every CPython and torch, installed into a clean environment.

The environment's torch is the one here; and the one of the Python that FASTATTN_OTHER_TORCH names,
where it is set: a wheel built against one torch has to serve another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastattn import ops

ROOT = Path(__file__).resolve().parents[1]
OTHER = os.environ.get("FASTATTN_OTHER_TORCH")

pytestmark = pytest.mark.skipif(
    ops.NATIVE_MISSING is not None, reason=f"nothing native is built here: {ops.NATIVE_MISSING}"
)

USE = """
import json, torch, fastattn
from fastattn import ops
q, k, v = (torch.randn(2, 4, 70, 64, requires_grad=True) for _ in range(3))
out = fastattn.attention(q, k, v, causal=True, backend="cpu")
plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
grads = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v))
error = max((x - y).abs().max().item() for x, y in zip((out, *grads[0]), (plain, *grads[1])))
print(json.dumps([fastattn.__file__, torch.__version__, error, ops.NATIVE_MISSING]))
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
    assert not [n for n in names if n.startswith(("tests/", "csrc/"))]


def site_packages_of(python: str) -> str:
    code = "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
    return run(python, "-c", code, cwd="/").strip()


@pytest.mark.parametrize("python", [sys.executable, OTHER], ids=["this-torch", "other-torch"])
def test_a_clean_environment(wheel, tmp_path, python):
    if python is None:
        pytest.skip("FASTATTN_OTHER_TORCH does not name a Python that has another torch")
    # Of the environment's own Python: torch is built for one.
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

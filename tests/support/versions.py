"""`make versions`: the wheel beside the oldest and the newest of what it runs with.

    python tests/support/versions.py --wheel dist/fastattn-....whl [--keep] [TEXT ...]

Each row of ROWS is an environment of its own below build/versions, removed once it has passed: a
call with its gradients against torch's, and a quick choice of the tests. TEXT chooses the rows that
have one of them in their names. Exits with 1 where a row fails or none could be tried. A row whose
packages are not to be had here says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/versions"


@dataclass(frozen=True)
class Row:
    """One set of versions."""

    torch: str
    triton: str
    transformers: str
    numpy: str

    @property
    def name(self) -> str:
        return f"torch-{self.torch}-triton-{self.triton}"


# Triton before 3.7 needs numpy before 2.4 in its interpreter, so each row sets both.
ROWS = (
    Row("2.13.0", "3.5.1", "5.4.0", "1.26.4"),
    Row("2.13.0", "3.6.0", "5.10.4", "2.2.6"),
    Row("2.13.0", "3.7.1", "5.24.0", "2.4.6"),
    Row("2.13.0", "3.8.0", "5.24.0", "2.4.6"),
    Row("2.13.0", "3.9.0", "5.24.0", "2.4.6"),
    Row("2.10.0", "3.5.1", "5.4.0", "1.26.4"),
    Row("2.14.1", "3.8.0", "5.24.0", "2.4.6"),
)
TOOLS = ("pytest>=8", "hypothesis>=6.100", "accelerate", "expecttest", "rich")

CALL = """
import torch, fastattn
from fastattn.backends import library
assert library.NATIVE_MISSING is None, library.NATIVE_MISSING
assert "site-packages" in fastattn.__file__, fastattn.__file__
for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
    q, k, v = (torch.randn(2, 4, 70, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, causal=True, backend="cpu")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), exact)
    for x, y in zip((out, *grads[0]), (plain, *grads[1])):
        assert (x - y).abs().max() <= allowed * y.abs().max(), (dtype, (x - y).abs().max())
"""
TESTS = (
    "tests/attention/test_functional.py", "tests/attention/test_spec.py",
    "tests/attention/test_sdpa.py", "tests/hf/test_hf_interface.py",
    "tests/backends/test_triton.py::test_dropout_keeps_what_the_reference_keeps",
    "tests/backends/test_triton.py::test_operators",
)  # fmt: skip


class CannotBeHad(Exception):
    """pip cannot find such a package here."""


def run(*command, **settings) -> subprocess.CompletedProcess:
    """A command in this process's environment, without what would import from the checkout."""
    environment = {k: x for k, x in os.environ.items() if not k.startswith(("FASTATTN", "PYTHON"))}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, env=environment, **settings
    )


def install(python: Path, *packages: str) -> None:
    done = run(python, "-m", "pip", "install", "-q", *packages)
    if done.returncode:
        said = [x for x in done.stderr.strip().splitlines() if x.startswith("ERROR")]
        raise CannotBeHad((said or done.stderr.strip().splitlines() or ["pip failed"])[-1])


def prepare(row: Row, folder: Path, wheel: Path) -> Path:
    """The Python of an environment with the row's versions and the wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    made = run(sys.executable, "-m", "venv", folder)
    if made.returncode:
        raise CannotBeHad(made.stdout.strip() or made.stderr.strip())
    python = folder / "bin/python"
    numpy, torch = f"numpy=={row.numpy}", f"torch=={row.torch}"
    install(python, torch, numpy, f"transformers=={row.transformers}", *TOOLS)
    # torch names the Triton that it compiles with; the kernels take others as well.
    install(python, "--no-deps", f"triton=={row.triton}", wheel)
    return python


def check(python: Path, folder: Path) -> str | None:
    """The failure there, in a line, or None. Run from `folder`, which has no checkout."""
    call = run(python, "-c", CALL, cwd=folder)
    if call.returncode:
        return f"a call with its gradients: {(call.stderr.strip().splitlines() or ['died'])[-1]}"
    tests = [ROOT / name for name in TESTS]
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder)
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return f"{(done.stdout.strip().splitlines() or ['pytest died'])[-1]}: {folder}/tests.log"
    print(done.stdout.strip().splitlines()[-1], flush=True)
    return None


def outcome(row: Row, wheel: Path, keep: bool) -> str:
    """ "passed", "FAILED: ..." or "not tried: ..."."""
    folder = FOLDER / row.name
    print(f"== {row.name}", flush=True)
    try:
        problem = check(prepare(row, folder, wheel), folder)
    except CannotBeHad as reason:
        problem, found = None, f"not tried: {reason}"
    else:
        found = f"FAILED: {problem}" if problem else "passed"
    if not problem and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def table(results: dict[Row, str]) -> str:
    head = f"{'torch':<9}{'triton':<9}{'transformers':<14}{'numpy':<9}result"
    widths = (9, 9, 14, 9)
    lines = [
        "".join(f"{x:<{w}}" for x, w in zip(astuple(row), widths)) + result
        for row, result in results.items()
    ]
    return "\n".join([head, *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="what make wheel left in dist")
    parser.add_argument("--keep", action="store_true", help="environments stay, 6 GB with CUDA")
    parser.add_argument("text", nargs="*", help="of the rows' names; all without")
    chosen = parser.parse_args(argv)
    rows = [x for x in ROWS if not chosen.text or any(text in x.name for text in chosen.text)]
    if not rows:
        parser.error(f"no row has it; there are {', '.join(row.name for row in ROWS)}")
    if not chosen.wheel.is_file():
        parser.error(f"there is no {chosen.wheel} (make wheel)")
    began, results = time.monotonic(), {}
    for row in rows:
        results[row] = outcome(row, chosen.wheel.resolve(), chosen.keep)
    print(f"\n{table(results)}\n{len(rows)} rows in {time.monotonic() - began:.0f} s")
    failed = any(x.startswith("FAILED") for x in results.values())
    return 1 if failed or "passed" not in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())

"""setup.py, the build backend, and the reasons why nothing is built, on trees of a few lines."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TREE = (
    "setup.py", "build_backend.py", "build_tools.py", "pyproject.toml", "README.md", "LICENSE",
)  # fmt: skip
ODD = "a b 'y' #1"  # characters that a shell, ninja or make would interpret


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree with one function in C++."""
    tree = tmp_path / ODD
    modules = (
        p for top in ("fastattn", "kernels", "benchmarks") for p in (ROOT / top).rglob("*.py")
    )
    for folder in {p.parent.relative_to(ROOT) for p in modules} | {Path("csrc/cpu")}:
        (tree / folder).mkdir(parents=True, exist_ok=True)
    for name in TREE:
        shutil.copy(ROOT / name, tree)
    (tree / "csrc/answer.h").write_text("#define ANSWER 42\n")
    answer = '#include "answer.h"\nextern "C" __attribute__((visibility("default")))\n'
    (tree / "csrc/cpu/answer.cpp").write_text(f"{answer}int answer() {{ return ANSWER; }}\n")
    return tree


def python(tree: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    settings = {k: x for k, x in os.environ.items() if not k.startswith(("FASTATTN", "PYTHON"))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=tree, env={**settings, **environment}, capture_output=True, text=True
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
def test_it_builds_below_a_path_that_a_shell_would_take_apart(tree):
    """The tree's own library, linked to torch; compiled files are not compiled again."""
    site = tree.parent / "site $packages"
    site.mkdir()
    (site / "torch").symlink_to(Path(torch.__file__).parent)
    settings = {"FASTATTN_BUILD": "cpu", "PYTHONPATH": str(site)}
    runs = [python(tree, "setup.py", "build_ext", "--inplace", **settings) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stdout + runs[0].stderr
    assert "answer.cpp" in runs[0].stdout and "no work to do" in runs[1].stdout
    links = (tree / "build/native/build.ninja").read_text()
    assert "site $$packages" in links
    assert ctypes.CDLL(str(tree / "fastattn/_cpu.abi3.so")).answer() == 42


def test_a_path_that_setuptools_cannot_have_is_refused(tree):
    run = python(tree.rename(tree.parent / "a$x"), "setup.py", "--version")
    assert run.returncode == 1 and "a$x: move it to a path without $" in run.stderr


def test_a_tree_that_cannot_be_written_is_refused_before_anything_is_done(tree):
    code = "import os, runpy; os.access = lambda *_: False; runpy.run_path('setup.py')"
    run = python(tree, "-c", code)
    assert run.returncode == 1 and "cannot be written" in run.stderr
    assert "Traceback" not in run.stderr


def test_modules_of_tests_are_not_packed(tree):
    for name in ("__init__.py", "conftest.py", "speed.py", "test_speed.py"):
        (tree / "benchmarks" / name).touch()
    run = python(tree, "setup.py", "build_py", FASTATTN_BUILD="none")
    assert run.returncode == 0, run.stderr
    packed = sorted(x.name for x in (tree / "build/lib/fastattn/benchmarks").iterdir())
    assert packed == ["__init__.py", "speed.py"]


def requires(tree: Path, what: str, **environment) -> list[str]:
    code = f"import build_backend, json; x = build_backend.get_requires_for_build_{what}(); "
    run = python(tree, "-c", f"{code}print(json.dumps(x))", PYTHONPATH=str(tree), **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_only_what_compiles_asks_for_torch(tree):
    assert requires(tree, "sdist") == []
    for what in ("wheel", "editable"):
        assert "torch>=2.10" in requires(tree, what)
    assert requires(tree, "wheel", FASTATTN_BUILD="none") == []
    assert "torch>=2.10" in requires(tree, "wheel", FASTATTN_BUILD="cpu", CXX="no-such-compiler")


# ---- why nothing is built ----------------------------------------------------------------------


def load(package: Path):
    """The module build_facts of a package that lies elsewhere."""
    folder = package / "backends"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "fastattn/backends/build_facts.py", folder)
    spec = importlib.util.spec_from_file_location("facts_of_a_copy", folder / "build_facts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/setup.py").touch()
    return load(tmp_path / "clone/fastattn")


def installed(site: Path, monkeypatch, **facts) -> Path:
    """A copy in a site-packages folder, as pip leaves it."""
    (site / "fastattn").mkdir(parents=True)
    (site / "fastattn-1.dist-info").mkdir()
    (site / "fastattn-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: fastattn\n")
    (site / "fastattn/_build.json").write_text(json.dumps(facts))
    found = importlib.metadata.distributions
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda **x: found(path=[str(site)], **x)
    )
    return site / "fastattn"


def test_a_source_tree_says_where_the_built_copy_is(clone, tmp_path, monkeypatch):
    other = installed(tmp_path / "site", monkeypatch, built=["_cpu"], missing={}, mode="auto")
    said = clone.why_missing("_cpu")
    assert f"this is the source tree {tmp_path / 'clone'}, in which nothing is built" in said
    assert f"the built copy is {other}" in said and clone.BUILD in said


def test_a_source_tree_alone_says_how_to_build(clone, tmp_path, monkeypatch):
    installed(tmp_path / "site", monkeypatch, built=[], missing={}, mode="none")
    said = clone.why_missing("_cpu")
    assert clone.BUILD in said and "built copy" not in said


def test_an_installed_copy_says_how_pip_builds_again(tmp_path):
    facts = {"missing": {"_cpu": "no C++ compiler (g++) was found"}, "mode": "auto"}
    copy = load(tmp_path / "site/fastattn")
    (tmp_path / "site/fastattn/_build.json").write_text(json.dumps(facts))
    said = copy.why_missing("_cpu")
    assert said.startswith("no C++ compiler (g++) was found; once that is fixed, ")
    assert "pip install --no-cache-dir --force-reinstall" in said

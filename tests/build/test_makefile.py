"""The Makefile's environment: which folders it makes and which it removes. Nothing is installed: a
script that makes a folder replaces Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/bin/sh
test "$1" != -m || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make was not found")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with the Makefile and the script, with a path that is hard to quote in a shell."""
    folder = tmp_path / "a b 'y' \"z\" #1"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    for name in ("fastattn", "kernels", "benchmarks", "tests"):
        (folder / name).mkdir()
    return folder


def make(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {k: x for k, x in os.environ.items() if k not in ("VENV", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "-s", "PYTHON=./python", *arguments],
        cwd=tree, env={**settings, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def made(tree: Path, *arguments: str, venv: str = ".venv", **environment: str) -> Path:
    run = make(tree, f"{venv}/.venv", *arguments, **environment)
    assert run.returncode == 0, run.stderr
    return tree / venv


def test_what_make_made_is_removed(tree):
    folder = made(tree)
    assert (folder / "bin/python").exists()
    run = make(tree, "distclean")
    assert run.returncode == 0 and not folder.exists()
    assert make(tree, "distclean").returncode == 0  # twice


def test_an_environment_named_to_make_is_removed_where_make_made_it(tree):
    folder = made(tree, "VENV=mine", venv="mine")
    assert make(tree, "distclean").returncode == 0 and folder.exists()  # a different one is named
    assert make(tree, "distclean", "VENV=mine").returncode == 0 and not folder.exists()


@pytest.mark.parametrize("where", ["the default", "named", "exported"])
def test_an_environment_that_was_there_is_left(tree, where):
    venv = ".venv" if where == "the default" else "theirs"
    folder = tree / venv
    (folder / "bin").mkdir(parents=True)
    shutil.copy(tree / "python", folder / "bin/python")
    (folder / "precious").touch()
    arguments = ["VENV=theirs"] if where == "named" else []
    environment = {"VENV": "theirs"} if where == "exported" else {}
    made(tree, *arguments, venv=venv, **environment)
    run = make(tree, "distclean", *arguments, **environment)
    assert run.returncode == 0 and f"{venv} is left" in run.stdout
    assert sorted(x.name for x in folder.iterdir()) == ["bin", "precious"]


def test_an_exported_environment_is_left_even_where_make_made_it(tree):
    folder = made(tree, venv="theirs", VENV="theirs")
    run = make(tree, "distclean", VENV="theirs")
    assert run.returncode == 0 and "the environment names it" in run.stdout and folder.exists()


def test_a_copy_of_what_make_made_is_left(tree):
    """It contains the stamp of another place."""
    shutil.copytree(made(tree), tree / "copy")
    assert make(tree, "distclean", "VENV=copy").returncode == 0 and (tree / "copy/bin").exists()


def test_a_link_to_somebodys_environment_is_left(tree, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "bin").mkdir(parents=True)
    (tree / ".venv").symlink_to(theirs)
    assert make(tree, "distclean").returncode == 0 and (theirs / "bin").exists()


@pytest.mark.parametrize("venv", [".", "full"])
def test_no_environment_is_made_in_a_folder_with_something_in_it(tree, venv):
    (tree / "full").mkdir()
    (tree / "full/precious").touch()
    run = make(tree, f"VENV={venv}", f"{venv}/.venv")
    assert run.returncode != 0 and "no environment of Python's" in run.stderr
    make(tree, f"VENV={venv}", "distclean")
    assert (tree / "Makefile").exists() and (tree / "full/precious").exists()


@pytest.mark.parametrize("goal", ["distclean", "clean", "build", "help"])
@pytest.mark.parametrize("venv, said", [("", "VENV is empty"), (" ", "VENV is empty"),
                                        ("a b", "spaces"), ("a$$b", "accepted are")])  # fmt: skip
def test_a_name_that_cannot_be_is_refused(tree, goal, venv, said):
    for arguments, environment in (([f"VENV={venv}"], {}), ([], {"VENV": venv})):
        run = make(tree, goal, *arguments, **environment)
        assert run.returncode != 0 and said in run.stderr


@pytest.mark.parametrize("name", ["a$x", "a:b"])
def test_a_path_that_setuptools_or_venv_cannot_have_is_refused_at_the_start(tree, name):
    run = make(tree.rename(tree.parent / name), ".venv/.venv")
    assert run.returncode != 0 and f"{name} has a $ or a : in it" in run.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_tree_that_is_read_only_is_refused(tree):
    tree.chmod(0o555)
    run = make(tree, ".venv/.venv")
    tree.chmod(0o755)
    assert run.returncode != 0 and "is read-only, and make writes into it" in run.stderr

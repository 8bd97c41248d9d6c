"""The keys of stored audits: they change with what a compiler sees, and with nothing else."""

from __future__ import annotations

import importlib.util
import runpy
import sys

import pytest
from fastattn.benchmarks.compile import source_keys

HELPERS = """
LIMIT = 3

def inner(x):
    return x + LIMIT
"""
KERNEL = """
import math, re
import made_helpers as helpers

STEP = 2
WORD = re.compile("a|b")
TABLE = {"a": (1, 2.0)}

class Pair:
    first: int = 1

def outer(x):
    return helpers.inner(x) * STEP

def kernel(x):
    y = outer(x) + TABLE["a"][0]
    return math.sqrt(y) if WORD.match("a") else Pair.first
"""


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The key of the kernel after a replacement in the text of the two modules."""
    made = []

    def of(old: str = "", new: str = "") -> str:
        for name, text in (("made_helpers", HELPERS), ("made_kernel", KERNEL)):
            assert old in HELPERS + KERNEL
            path = tmp_path / f"{name}_{len(made)}.py"
            path.write_text(text.replace(old, new) if old else text)
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            made.append(module)
        return source_keys.of_function(made[-1].kernel)

    return of


@pytest.mark.parametrize(
    "old, new",
    [
        ("def inner", "# more\n\n\ndef inner"),
        ("def outer(x):", 'def outer(x):\n    """What it does."""'),
        ("* STEP", "  *  STEP  # twice"),
        ("STEP = 2", "STEP = 2\nUNUSED = 5"),
    ],
)
def test_what_no_compiler_sees(key, old, new):
    assert key(old, new) == key()


@pytest.mark.parametrize(
    "old, new",
    [
        ("x + LIMIT", "x - LIMIT"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("STEP = 2", "STEP = 2.0"),
        ("a|b", "a|c"),
        ("2.0)", "2.5)"),
        ("first: int = 1", "first: int = 2"),
        ("math.sqrt", "math.exp"),
    ],
)
def test_what_a_compiler_sees(key, old, new):
    assert key(old, new) != key()


def test_code_in_a_table_is_refused(key):
    with pytest.raises(TypeError, match="kernel takes code from TABLE, which a key does not see"):
        key("(1, 2.0)", "(1, lambda x: x)")


def test_values_hold_functions(key):
    first = key()
    assert source_keys.of_value(sys.modules["made_kernel"].kernel) == first
    assert first in source_keys.of_value((1, [sys.modules["made_kernel"].kernel]))
    assert source_keys.of_value((1, "a")) != source_keys.of_value((1, "b"))


def test_an_address_is_refused():
    with pytest.raises(ValueError, match="an address would be part of a key"):
        source_keys.digest(object())


def test_files_with_what_they_include(tmp_path):
    files = {
        "a.cu": '#include "b.h"  // first\n#include <vector>\n/* one\ntwo */ auto s = "//";\n',
        "b.h": '#include "../c.h"\n#include "not_there.h"\n#define B 1\n',
        "../c.h": "int c;\n",
        "d.h": "int d;\n",
    }
    folder = tmp_path / "inner"
    folder.mkdir()

    def key(**changes) -> str:
        for name, text in {**files, **changes}.items():
            (folder / name).write_text(text)
        return source_keys.of_file(folder / "a.cu")

    first = key()
    assert key(**{"d.h": "int e;"}) == first
    assert key(**{"a.cu": files["a.cu"].replace("// first", "//  second, not first")}) == first
    assert key(**{"../c.h": "int  c; // a number\n\n"}) == first
    changed = [
        key(**{"../c.h": "long c;"}),
        key(**{"b.h": files["b.h"].replace("1", "2")}),
        key(**{"a.cu": files["a.cu"].replace('"//"', '"/"')}),
    ]
    assert len({first, *changed}) == 4


def test_a_module_that_is_run_has_the_keys_of_one_imported(tmp_path, monkeypatch):
    (tmp_path / "made_main.py").write_text(
        "from fastattn.benchmarks.compile import source_keys\n\ndef kernel(x):\n    return x\n\n"
        "KEY = source_keys.of_function(kernel)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = runpy.run_module("made_main", run_name="__main__", alter_sys=True)
    assert run["KEY"] == importlib.import_module("made_main").KEY

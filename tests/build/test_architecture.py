"""docs/architecture.md names what exists, and follows each argument to every backend."""

from __future__ import annotations

import ast
import re

import pytest
from fresh_python import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/.]+\.\w+):(\w+)`", PAGE)))  # `path:function`


def defines(text: str, name: str, suffix: str) -> bool:
    """Does a source file define this function, method or class, and not merely use it?"""
    if suffix == ".py":
        kinds = (ast.FunctionDef, ast.ClassDef)
        return any(isinstance(x, kinds) and x.name == name for x in ast.walk(ast.parse(text)))
    function = rf"^(?!.*\b(?:return|else|throw)\b)[^/\n]*[\w>&*\])] (?:\w+::)?{name}\("
    return (
        re.search(rf"{function}|^\s*(?:template.*)?struct {name}\b", text, re.MULTILINE) is not None
    )


@pytest.mark.parametrize("path, name", PLACES, ids=":".join)
def test_a_named_place_exists(path, name):
    assert defines((ROOT / path).read_text(), name, (ROOT / path).suffix)


def test_the_walk_reaches_every_backend():
    """The arguments that it follows, and enough places for each backend."""
    for argument in ("q", "window", "mask", "dropout_p", "key_ranges"):
        assert f"\n**{argument}**" in PAGE
    for folder in ("fastattn/core/", "csrc/cpu/", "kernels/", "csrc/cuda/"):
        assert sum(path.startswith(folder) for path, _ in PLACES) > 8


def test_what_is_only_used_is_not_a_definition():
    assert not defines("    return scale(x);\nfoo.scale(y);\n// scale(", "scale", ".h")
    assert defines("inline float scale(int x) {", "scale", ".h")
    assert defines("inline void Call::prepare() {", "prepare", ".h")
    assert not defines("print(scale(1))", "scale", ".py")

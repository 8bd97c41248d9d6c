"""Keys of stored audits: short hashes of what a row was made from. If the key differs, it is stale.

A key changes with the code that is compiled, but not with comments, docstrings, blank lines or the
position of a function, so that stored tables are out of date only if a compiler sees a difference.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

NOT_OURS = {
    "triton",
    "torch",
    "numpy",
    *sys.stdlib_module_names,
}  # their versions are compared instead
C_TOKENS = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
INCLUDE = re.compile(r'#\s*include\s*"([^"]+)"')


def digest(*parts) -> str:
    """A short hash of the parts' repr."""
    text = repr(parts)
    if " at 0x" in text:
        raise ValueError(f"an address would be part of a key: {text}")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- Python: a function and what it refers to ---------------------------------------------------


@functools.cache
def of_function(function) -> str:
    """The key of a function, possibly one of Triton's: its code, the code of all functions and
    classes of ours that it refers to, directly or not, and the values of all such constants."""
    parts: dict[str, str] = {}
    _collect(function, parts)
    return digest(sorted(parts.items()))


def of_value(value) -> str:
    """of_function() for a function, also inside tuples; repr() for anything else."""
    value = getattr(value, "value", value)  # what a tl.constexpr holds
    if isinstance(value, list | tuple):
        return repr([of_value(x) for x in value])
    return of_function(value) if _is_code(value) else repr(value)


def _collect(thing, parts: dict[str, str]) -> None:
    plain = getattr(thing, "fn", thing)  # what @triton.jit wraps, compiled or interpreted
    spec = sys.modules[plain.__module__].__spec__  # which python -m leaves to a module it runs
    name = f"{spec.name if spec else plain.__module__}.{plain.__qualname__}"
    if name in parts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    parts[name] = ast.unparse(tree)
    scope = getattr(plain, "__globals__", None) or vars(sys.modules[plain.__module__])
    if inspect.isfunction(plain):
        scope = {**scope, **inspect.getclosurevars(plain).nonlocals}
    for label, value in _reached(tree, scope):
        if not _is_code(value):
            if any(map(_is_code, _leaves(value))):
                raise TypeError(f"{name} takes code from {label}, which a key does not see")
            parts[f"{name}: {label}"] = _constant(value)
        elif getattr(value, "fn", value).__module__.split(".")[0] not in NOT_OURS:
            _collect(value, parts)


def _is_code(value) -> bool:
    plain = getattr(value, "fn", value)
    return inspect.isfunction(plain) or inspect.isclass(plain)


def _leaves(value) -> Iterator:
    if isinstance(value, dict | list | tuple | set):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _leaves(x)
    else:
        yield value


def _reached(tree: ast.AST, scope: dict) -> Iterator[tuple[str, object]]:
    """The global names that a function uses and their values; of modules, the attributes used."""

    def resolve(node):
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Attribute):
            base = resolve(node.value)
            ours = isinstance(base, ModuleType) and base.__name__.split(".")[0] not in NOT_OURS
            return getattr(base, node.attr, None) if ours else None
        return None

    for node in ast.walk(tree):
        value = resolve(node)
        if value is not None and not isinstance(value, ModuleType):
            yield ast.unparse(node), value


def _constant(value) -> str:
    return repr((value.pattern, value.flags)) if isinstance(value, re.Pattern) else repr(value)


# ---- C++: a file and its includes ---------------------------------------------------------------


def of_file(source: Path) -> str:
    """The key of a file and its quoted includes, without comments and whitespace."""
    found: dict[str, str] = {}

    def collect(path: Path) -> None:
        if path.name in found or not path.exists():  # emulator.h is not for compilers
            return
        text = C_TOKENS.sub(lambda m: m[0] if m[0][0] == '"' else " ", path.read_text())
        found[path.name] = " ".join(text.split())
        for name in INCLUDE.findall(text):
            collect(path.parent / name)

    collect(source)
    return digest(sorted(found.items()))

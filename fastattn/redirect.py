"""Copies of methods in which calls of certain functions are replaced by calls of others.
swapping.py puts the copies into classes.

A function's bytecode shows how it refers to another one: by a global name or a variable of the
enclosing function, perhaps through modules (torch.nn.functional.x), or as a default. Names are
resolved to their values, so that spelling does not matter. The functions that a method calls are
followed into any module, and those that lead to a replaced function are copied too; the copies call
each other. The originals do not change.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

_NOTHING = object()
_LIBRARIES = {"torch", *sys.stdlib_module_names}  # their functions are not copied
_DOTS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_CELLS = ("LOAD_DEREF", "LOAD_CLASSDEREF")


@dataclass(frozen=True)
class Redirected:
    """The result of redirect()."""

    methods: dict[tuple[type, str], Any]  # copies by (class that defines the original, name)
    reached: tuple[Callable, ...]  # the functions to replace that the originals call
    names: frozenset[str]  # global names and attributes that the originals mention
    lost: tuple[str, ...]  # sentences about calls that a copy cannot redirect


@dataclass(frozen=True)
class Way:
    """How a function refers to another: names[0] in `space`, and from there by attributes."""

    space: str  # "global", "cell" (a variable of the enclosing function) or "default"
    names: tuple
    value: Any
    open: bool = True  # whether a copy can be given another value there


@dataclass
class Scan:
    """What was found in the bytecode of one function."""

    ways: list[Way] = field(default_factory=list)  # references to functions
    names: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)


def redirect(cls: type, entries: Iterable[str], instead: dict[Callable, Callable]) -> Redirected:
    """Copies those methods of cls that lead to a key of `instead`; the copies call its value.

    It starts from the methods named `entries` and follows every name that they mention as if it
    were a method of cls, whatever the object: it may copy too many methods, but never too few. A
    base's method that is overridden counts where super() may reach it. Methods of torch's own
    classes are left out.
    """
    methods: dict[tuple[type, str], FunctionType] = {}
    scans: dict[FunctionType, Scan] = {}
    copied, reached = {}, {}
    # (name, class whose bases are searched for it; None: cls and its bases)
    todo, seen = [(name, None) for name in entries], set()
    while todo:
        name, below = todo.pop()
        owner = next((x for x in _behind(cls, below) if name in vars(x)), None)
        if (owner, name) in seen or owner is None or _library(owner.__module__) in _LIBRARIES:
            continue
        seen.add((owner, name))
        method = _plain(vars(owner)[name])
        if _is_function(method, instead) and method in instead:
            copied[owner, name] = staticmethod(instead[method])
            reached[method] = None
        elif isinstance(method, FunctionType):
            methods[owner, name] = method
            for function in (method, *_follow(method, scans, instead)):
                names = scans[function].names
                starts = (None, owner) if "super" in names else (None,)
                todo += [(x, start) for x in names for start in starts]
    leading = _leading(scans, instead)
    copies = _copies(leading, scans, instead)
    for (owner, name), method in methods.items():
        if method in copies:
            kind = type(vars(owner)[name])
            copied[owner, name] = copies[method] if kind is FunctionType else kind(copies[method])
    ways = [(function, way) for function, x in scans.items() for way in x.ways]
    lost = [f"{_name(function)} {what}" for function, x in scans.items() for what in x.lost]
    lost += [
        f"{_name(function)} calls {'.'.join(way.names)} by its class"
        for function, way in ways
        if not way.open and _leads(way, leading, instead)
    ]
    lost += [
        f"{_name(function)} assigns global names"
        for function in leading
        if any(x.opname == "STORE_GLOBAL" for x in dis.get_instructions(function))
    ]
    reached |= dict.fromkeys(way.value for _, way in ways if way.value in instead)
    names = frozenset().union(*(x.names for x in scans.values()))
    return Redirected(copied, tuple(reached), names, tuple(dict.fromkeys(lost)))


def _behind(cls: type, owner: type | None) -> tuple[type, ...]:
    order = cls.__mro__
    return order if owner is None else order[order.index(owner) + 1 :]


def leads(function: Any, instead: dict[Callable, Callable]) -> bool:
    """Is this a function that calls a key of `instead`, directly or through others?"""
    if not _is_function(function, instead):
        return False
    scans: dict[FunctionType, Scan] = {}
    if _is_followed(function, instead):
        _follow(function, scans, instead)
    return function in instead or function in _leading(scans, instead)


def _leading(scans: dict[FunctionType, Scan], instead: dict) -> set[FunctionType]:
    leading: set[FunctionType] = set()
    while True:
        found = {f for f, x in scans.items() if any(_leads(w, leading, instead) for w in x.ways)}
        if found == leading:
            return leading
        leading = found


def _follow(function: FunctionType, scans: dict, instead: dict) -> list[FunctionType]:
    """Scans the function and those that it leads to; returns the ones that had no scan yet."""
    new, todo = [], [function]
    while todo:
        function = todo.pop()
        if function not in scans:
            scans[function] = _scan(function, instead)
            new.append(function)
            todo += [way.value for way in scans[function].ways if _is_followed(way.value, instead)]
    return new


def _is_followed(value: Any, instead: dict) -> bool:
    """Is it a Python function of no library in _LIBRARIES, or one that wraps another function?"""
    if not isinstance(value, FunctionType) or value in instead:
        return False
    return _library(value.__globals__.get("__name__")) not in _LIBRARIES or hasattr(
        value, "__wrapped__"
    )


def _leads(way: Way, leading: set, instead: dict) -> bool:
    return way.value in instead or way.value in leading


def _plain(method: Any) -> Any:
    return method.__func__ if isinstance(method, (staticmethod, classmethod)) else method


def _library(module: str | None) -> str:
    return str(module).partition(".")[0]


def _name(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"


# ---- bytecode ------------------------------------------------------------------------------------


def _scan(function: FunctionType, instead: dict) -> Scan:
    found, wanted = Scan(), {x.__name__ for x in instead}
    for code in _codes(function.__code__):
        found.names.update(code.co_names)
        for step, way, of_self in _steps(function, code):
            value = _NOTHING if way is None else way.value
            if _is_function(value, instead):
                found.ways.append(way)
                inside = getattr(value, "__code__", None)
                if inside and _library(value.__module__) == "torch":
                    found.lost += [f"calls {_name(value)}" for _ in wanted & {*inside.co_names}]
            elif value is _NOTHING and step.opname in (*_DOTS, "IMPORT_FROM") and not of_self:
                what = f"takes {step.argval} from what is known only when it runs"
                found.lost += [what for _ in wanted & {step.argval}]
    defaults = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    found.ways += [Way("default", (n,), x) for n, x in defaults if _is_function(x, instead)]
    return found


def _is_function(value: Any, instead: dict) -> bool:
    known = isinstance(value, BuiltinFunctionType) and value in instead
    return known or isinstance(value, FunctionType)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code and that of the functions defined in it, which share its globals."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _steps(function: FunctionType, code: CodeType):
    """(instruction, the Way to what it loads or None if that is known only at run time, whether it
    is an attribute of the function's first argument) for each instruction."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    way, before = None, None
    for step in dis.get_instructions(code):
        if step.opname in ("EXTENDED_ARG", "CACHE", "PUSH_NULL"):
            continue
        name = step.argval
        if step.opname == "LOAD_GLOBAL":
            way = Way("global", (name,), function.__globals__.get(name, _NOTHING))
        elif step.opname in _CELLS and name in cells and name in code.co_freevars:
            way = Way("cell", (name,), _content(cells[name]))
        elif step.opname in _DOTS and way is not None:
            way = _attribute(way, name)
        else:
            way = None
        yield step, way, before in (code.co_varnames[:1], ("self",))
        loaded = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        before = (name[-1] if isinstance(name, tuple) else name,) if loaded else None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _NOTHING


def _attribute(way: Way, name: str) -> Way | None:
    """The Way to a module's or class's attribute. Lazy modules are not made to load."""
    if isinstance(way.value, ModuleType):
        value, is_open = vars(way.value).get(name, _NOTHING), way.open
    elif isinstance(way.value, type):
        value, is_open = _plain(inspect.getattr_static(way.value, name, _NOTHING)), False
    else:
        return None
    return Way(way.space, (*way.names, name), value, is_open)


# ---- copies --------------------------------------------------------------------------------------


class _View(ModuleType):
    """A live view of a module in which some names have other values."""

    def __init__(self, module: ModuleType, names: dict[str, Any]):
        super().__init__(module.__name__, module.__doc__)
        vars(self).update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


def _copies(leading: set, scans: dict, instead: dict) -> dict[FunctionType, FunctionType]:
    spaces: dict[int, dict] = {}  # copies of globals, by the id of the originals
    trees: dict[int, dict] = {}  # the values that differ in them
    copies, closures = {}, {}
    for function in leading:
        names = spaces.setdefault(id(function.__globals__), dict(function.__globals__))
        names.pop("__name__", None)  # torch.compile would look names up in that module
        ways = [x for x in scans[function].ways if x.open and _leads(x, leading, instead)]
        closures[function] = _cells(function, {x.names[0] for x in ways if x.space == "cell"})
        copies[function] = _copy(function, names, tuple(closures[function].values()))
    for function, copy in copies.items():
        shared = trees.setdefault(id(function.__globals__), {})
        own: dict[str, dict] = {"global": shared, "cell": {}, "default": {}}
        for way in scans[function].ways:
            if way.open and _leads(way, leading, instead):
                tree = own[way.space]
                for name in way.names[:-1]:
                    tree = tree.setdefault(name, {})
                tree[way.names[-1]] = instead.get(way.value) or copies[way.value]
        for name, value in own["cell"].items():
            original = dict(zip(function.__code__.co_freevars, function.__closure__))[name]
            closures[function][name].cell_contents = _seen(original.cell_contents, value)
        defaults = enumerate(function.__defaults__ or ())
        copy.__defaults__ = tuple(own["default"].get(n, x) for n, x in defaults) or None
        defaults = (function.__kwdefaults__ or {}).items()
        copy.__kwdefaults__ = {n: own["default"].get(n, x) for n, x in defaults} or None
    for key, names in spaces.items():
        names.update({name: _seen(names[name], value) for name, value in trees[key].items()})
    return copies


def _cells(function: FunctionType, others: set[str]) -> dict[str, CellType]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    return {name: CellType() if name in others else cell for name, cell in cells}


def _copy(function: FunctionType, names: dict, cells: tuple[CellType, ...]) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, None, cells or None)
    vars(copy).update(vars(function))
    lazy = hasattr(function, "__annotate__")  # Python 3.14 computes annotations lazily
    annotations = "__annotate__" if lazy else "__annotations__"
    for attribute in (annotations, "__doc__", "__module__", "__qualname__"):
        setattr(copy, attribute, getattr(function, attribute))
    return copy


def _seen(value: Any, tree: Any) -> Any:
    """What the copies see: the replacing function, or a view of the module with replacements."""
    if not isinstance(tree, dict):
        return tree
    return _View(value, {name: _seen(vars(value)[name], x) for name, x in tree.items()})

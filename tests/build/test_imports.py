"""The rooms of the house: which folder may import which. docs/architecture.md draws the picture."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fresh_python import ROOT

import fastattn

# A room may import its own and lower floors. What is imported inside a function counts too, but for
# the exceptions below, each with its reason.
FLOORS = (
    {"core"},
    {"backends"},
    {"fused"},
    {"functional", "decoding", "forms", "options", "habits", "context_parallel", "sdpa", "masks",
     "weights", "override", "redirect", "explanation", "capturing", "records",
     "pictures"},
    {"nn", "hf", "flash_attn", "diffusers", "swapping", "distillation", "pruning", "projections",
     "signals"},
    {"models"},
    {"cli", "audit"},
    {"__init__", "__main__", "benchmarks"},
)  # fmt: skip
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
KERNELS = {"core"}  # what kernels/ may import: they are imported lazily
EXCEPTIONS = {
    ("decoding", "kernels"): "merge_states() of GPU tensors is a Triton kernel",
}


def room_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return rest[0] if folder == "fastattn" else folder


def imported(path: Path):
    """(room, names) of every import of the package in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level:
                inside = (
                    ["fastattn", *path.relative_to(ROOT / "fastattn").parts[:-1]]
                    if (path.is_relative_to(ROOT / "fastattn"))
                    else ["fastattn", *path.relative_to(ROOT).parts[:-1]]
                )
                module = [*inside[: len(inside) - node.level + 1], *filter(None, module)]
            names = [alias.name for alias in node.names]
            if module[0] == "fastattn" and module[1:]:
                yield module[1], names
            elif module[0] == "fastattn":
                yield from ((name, []) for name in names if name in FLOOR or name == "kernels")
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from ((p[1], []) for p in parts if p[0] == "fastattn" and p[1:])


SOURCES = [*(ROOT / "fastattn").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]


def test_imports_lead_downwards():
    wrong = []
    for path in SOURCES:
        room = room_of(path)
        for target, _ in imported(path):
            if target == room or (room, target) in EXCEPTIONS:
                continue
            allowed = target in KERNELS if room == "kernels" else FLOOR[target] <= FLOOR[room]
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, wrong


def test_private_names_stay_in_their_folder():
    wrong = [
        f"{path.relative_to(ROOT)} takes {name} from {target}"
        for path in SOURCES
        for target, names in imported(path)
        if target != room_of(path)
        for name in names
        if name.startswith("_") and name != "_C"
    ]
    assert not wrong, wrong


def test_no_module_bears_the_name_of_an_exported_function():
    """`import fastattn.swap` and `fastattn.swap` would be two things."""
    modules = {path.stem for path in (ROOT / "fastattn").glob("*.py")}
    functions = {name for name in fastattn.__all__ if callable(getattr(fastattn, name))}
    assert not modules & functions


def test_no_test_imports_another():
    """What tests share lies in tests/support. The exception runs another's tests on a GPU."""
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in (ROOT / "tests").rglob("*.py")
        if path.name != "test_triton_fused.py"
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) test_", line)
    ]
    assert not wrong, wrong


def test_the_page_shows_these_floors():
    """docs/architecture.md's table: a floor's number, then its rooms."""
    page = (ROOT / "docs/architecture.md").read_text()
    shown = [set() for _ in FLOORS]
    for height, rooms in re.findall(r"^\| (\d) \| ((?:`\w+` ?)+)\|", page, re.MULTILINE):
        shown[int(height)] |= set(re.findall(r"`(\w+)`", rooms))
    assert tuple(shown) == tuple(floor - {"benchmarks"} for floor in FLOORS)

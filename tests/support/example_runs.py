"""Fills a folder with small Python files and labelled texts, the same on every machine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

TINY = [
    *("--steps", "6", "--batch", "4", "--save-every", "2", "--eval-every", "3"),
    *("--warmup", "2", "--compare", "0", "--threads", "1"),
]
BERT_SIZE = "--layers 1 --dim 32 --vocabulary 300 --length 24"
SIZES = {
    "pretrain_gpt": "--layers 1 --dim 32 --vocabulary 300 --length 32 --sample 4 --lr 1e-3",
    "pretrain_bert": BERT_SIZE,
    "finetune_bert": "--model small --length 16 --examples 60",
    "translate": "--layers 1 --dim 32 --digits 4 --tested 8",
    "distill": "--layers 1 --dim 32 --length 16 --examples 60 --teacher-steps 3",
}
SOURCE = '''"""Module {n}. It says what it is. Then it says more about the number {n}."""


def function_{n}(argument):
    """Return the argument plus {n}. The argument is a number. Nothing else is accepted."""
    # this comment explains why {n} is added here
    return argument + {n}  # and so does this other one


class Thing{n}:
    """A thing with a name. Its name is {n}."""
'''


def write_sources(folder: Path) -> Path:
    """Fills a folder with Python files and labelled texts, small, the same on every machine."""
    for n in range(24):
        (folder / f"module_{n}.py").write_text(SOURCE.format(n=n))
    rows = [
        {"text": f"number {n} is here" + " again" * (n % 9), "label": "odd" if n % 2 else "even"}
        for n in range(60)
    ]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(name: str, out: Path, sources: Path, *more: str) -> list[str]:
    """A command line that trains an example in a second."""
    data = {"translate": []}.get(name, ["--data", str(sources)])
    if name in ("finetune_bert", "distill"):
        data = ["--data", str(sources / "labelled.jsonl")]
    return [*TINY, "--out", str(out), *data, *SIZES[name].split(), *more]


def run(name: str, *arguments_):
    """main() of an example: (Result, Cost or None)."""
    if name == "finetune_bert":
        pytest.importorskip("transformers")
    return importlib.import_module(name).main(arguments(name, *arguments_))

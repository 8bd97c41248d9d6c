"""The demo's texts: docstrings of Python's standard library, read from its sources."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules of the standard library that are written in Python and have many docstrings.
MODULES = """
argparse ast asyncio/queues asyncio/streams bisect calendar cmd codecs configparser contextlib
copy csv dataclasses datetime difflib doctest email/message enum fileinput fractions functools
glob gzip heapq html/parser http/client http/cookiejar http/server imaplib inspect ipaddress
json/encoder logging/__init__ mailbox multiprocessing/pool ntpath os pdb pickle platform plistlib
poplib posixpath pprint profile queue random sched selectors shelve shlex shutil smtplib socket
ssl statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace
traceback turtle types typing unittest/case unittest/mock urllib/parse urllib/request uuid
warnings wave weakref webbrowser xml/dom/minidom xml/etree/ElementTree zipapp
"""


@dataclass(frozen=True, slots=True)
class Text:
    name: str  # module.Class.method
    summary: str
    body: str

    @property
    def whole(self) -> str:
        return f"{self.summary} {self.body}".strip()


def docstrings() -> Iterator[Text]:
    """Docstrings of the standard library, read from its sources: nothing is imported."""
    library, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    for module in MODULES.split():
        path = library / f"{module}.py"
        if not path.exists():  # not in this Python version
            continue
        name = module.removesuffix("/__init__").replace("/", ".")
        for text in _docstrings(ast.parse(path.read_bytes()), name):
            if len(text.whole.split()) >= 5 and text.whole not in seen:
                seen.add(text.whole)
                yield text


def _docstrings(node: ast.AST, name: str) -> Iterator[Text]:
    doc = ast.get_docstring(node)
    if doc:
        summary, _, body = doc.partition("\n\n")
        yield Text(name, " ".join(summary.split()), " ".join(body.split()))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spaced, so the same ones every time."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]

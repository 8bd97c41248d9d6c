"""Data that every machine has: Python's standard library, its code and the English inside it.

Everything here is deterministic: the same files give the same tokens, pairs and batches.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import random
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import first_process_first
from files import started, writing
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from fastattn.core.files import replace_file

Batch = dict[str, Tensor]
SUFFIXES = (".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp", ".rs", ".js", ".json")

# ---- texts ------------------------------------------------------------------------------------


def read_folder(folder: str, megabytes: float, seed: int = 0) -> list[str]:
    """The texts of a folder's files, in a shuffled order, until there are so many megabytes.

    "" is Python's standard library without its tests. Raises ValueError when nothing is found.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"--data is {folder}, which is no folder")
    skip = set() if folder else {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    suffixes = SUFFIXES if folder else (".py",)
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix in suffixes and not skip & set(path.relative_to(root).parts)
    ]
    random.Random(seed).shuffle(paths)
    texts, size = [], 0.0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if size >= megabytes * 1e6:
            break
        if text.strip():
            texts.append(text)
            size += len(text)
    if not texts:
        names = ", ".join(suffixes)
        raise ValueError(f"--data is {root}, which has no file with text in it ({names})")
    return texts


def fingerprint(*parts: Iterable[object]) -> str:
    """Eight hexadecimal digits that change with any of the parts."""
    crc = 0
    for part in parts:
        for x in part:
            crc = zlib.crc32(str(x).encode(), crc)
    return f"{crc:08x}"


def _trees(texts: Sequence[str]) -> Iterable[tuple[str, ast.AST]]:
    for text in texts:
        try:
            yield text, ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # a file of another Python


def docstrings(texts: Sequence[str]) -> list[list[str]]:
    """The sentences of every docstring of Python sources, each docstring a list."""
    documents = []
    for _, tree in _trees(texts):
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
                found = [s for s in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", text) if len(s) > 12]
                if found:
                    documents.append(found)
    return documents


def comments(texts: Sequence[str]) -> list[str]:
    """Every comment of Python sources with at least three words."""
    found = []
    for text, _ in _trees(texts):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            words = token.string.strip("#!-=: \t")
            if token.type == tokenize.COMMENT and len(words) > 12 and words.count(" ") >= 2:
                found.append(words)
    return found


# ---- tokens -----------------------------------------------------------------------------------


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's
PAD, UNK, CLS, SEP, MASK = range(5)


def run_tokenizer(
    out: str, texts: Sequence[str], size: int, special: Sequence[str], lower: bool = False
) -> Tokenizer:
    """A byte-level BPE of `size` tokens, the special ones first, in out/tokenizer.json.

    One that is there is kept where a run goes on with it; else it may be of other texts or another
    size. Not WordPiece, whose training in tokenizers 0.23 depends on the order of a hash table.
    """
    path = Path(out) / "tokenizer.json"
    with first_process_first() as first:
        if not path.exists() or (first and not started(Path(out))):
            _train_tokenizer(texts, size, path, special, lower)
    return read_tokenizer(path)


def _train_tokenizer(
    texts: Sequence[str], size: int, path: Path, special: Sequence[str], lower: bool
) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(special):
        raise ValueError(f"--vocabulary is {size}; accepted is at least "
                         f"{len(alphabet) + len(special)}, for single bytes")  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=lower)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(alphabet),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: tokenizer.save(str(temporary)))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file. Raises ValueError if there is none in it."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is no tokenizer: {error}; delete it to make it anew") from error


# ---- batches ----------------------------------------------------------------------------------


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), a different one in each epoch."""
    generator = torch.Generator().manual_seed(seed * 7919 + epoch)
    return torch.randperm(count, generator=generator)


def pick(count: int, step: int, batch: int, seed: int) -> Tensor:
    """The `batch` items of a step, out of `count`. An epoch visits each item once, in its own
    order."""
    parts, first = [], step * batch
    while batch:
        epoch, at = divmod(first, count)
        part = shuffled(count, seed, epoch)[at : at + batch]
        parts.append(part)
        first, batch = first + len(part), batch - len(part)
    return torch.cat(parts)


@dataclass
class Packed:
    """Documents of any length, one after the other, in rows of `length` tokens.

    An epoch shuffles the documents, joins them, cuts the line into rows and shuffles those, so that
    a batch is not one long document; what a cut takes from a document is a document of its own.
    """

    documents: list[Tensor]  # int64 [tokens of it]
    length: int
    seed: int

    def __post_init__(self) -> None:
        self.rows = sum(map(len, self.documents)) // self.length
        if self.rows < 1:
            raise ValueError(
                f"the data have {sum(map(len, self.documents))} tokens, too few for one row of "
                f"--length {self.length}"
            )
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """(tokens, document numbers), each [rows, length]; the last epoch is kept."""
        if epoch not in self._epochs:
            order = shuffled(len(self.documents), self.seed, epoch).tolist()
            line = torch.cat([self.documents[i] for i in order])
            lengths = torch.tensor([len(self.documents[i]) for i in order])
            numbers = torch.arange(len(order), dtype=torch.int32).repeat_interleave(lengths)
            whole = self.rows * self.length
            mixed = shuffled(self.rows, self.seed + 1, epoch)
            cut = (x[:whole].view(-1, self.length)[mixed] for x in (line, numbers))
            self._epochs = {epoch: tuple(cut)}
        return self._epochs[epoch]

    def batch(self, step: int, rows: int) -> Batch:
        """input_ids int64, labels (the same) and document_ids int32, each [rows, length]."""
        parts, first = [], step * rows
        while rows:
            epoch, at = divmod(first, self.rows)
            tokens, numbers = (x[at : at + rows] for x in self._epoch(epoch))
            parts.append((tokens, numbers))
            first, rows = first + len(tokens), rows - len(tokens)
        ids, numbers = (torch.cat(x) for x in zip(*parts))
        numbers = numbers - numbers[:, :1]
        return {"input_ids": ids, "labels": ids, "document_ids": numbers}


def pad(rows: Sequence[Sequence[int]], value: int = PAD, length: int = 0) -> Tensor:
    """int64 [rows, longest], or as long as `length` says."""
    padded = [torch.tensor(row, dtype=torch.int64) for row in rows]
    if length:
        padded.append(torch.zeros(length, dtype=torch.int64))
    ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=value)
    return ids[: len(rows)]


# ---- labelled texts ---------------------------------------------------------------------------


@dataclass
class Labelled:
    """Texts with the number of each one's label; most texts are for training."""

    names: list[str]  # of the labels
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]

    @classmethod
    def split(cls, pairs: Sequence[tuple[str, str]], seed: int, count: int = 0) -> Labelled:
        """A fifth is for testing, at most 500; count: how many pairs to take, 0 for all."""
        pairs = [pairs[i] for i in shuffled(len(pairs), seed, 0).tolist()][: count or None]
        names = sorted({label for _, label in pairs})
        if len(names) < 2:
            raise ValueError(f"the data have the label {names[0]!r} only" if names else "the data "
                             "have no labelled text")  # fmt: skip
        rows = [(text, names.index(label)) for text, label in pairs]
        cut = max(1, min(500, len(rows) // 5))
        return cls(names, rows[cut:], rows[:cut])


def docstring_or_comment(megabytes: float) -> list[tuple[str, str]]:
    """Sentences of the standard library's docstrings and comments, equally many, labelled so."""
    texts = read_folder("", megabytes)
    written = {
        "docstring": sorted({s for document in docstrings(texts) for s in document}),
        "comment": sorted(set(comments(texts))),
    }
    count = min(map(len, written.values()))
    chosen = {name: shuffled(len(x), 0, 0)[:count].tolist() for name, x in written.items()}
    return [(written[name][i], name) for name, order in chosen.items() for i in order]


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """(text, label) of a .csv or .jsonl file with the columns "text" and "label"."""
    if not path.is_file():
        raise ValueError(f"--data is {path}, which is no file")
    try:
        lines = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    if path.suffix == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(lines)))
        except csv.Error as error:
            raise ValueError(f"{path} is no table: {error}") from error
    elif path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in lines.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} has a line that is not JSON: {error}") from error
    else:
        raise ValueError(f"--data is {path}; accepted are .csv and .jsonl files")
    for number, row in enumerate(rows, 1):
        missing = [n for n in ("text", "label") if not isinstance(row, dict) or row.get(n) is None]
        if missing:
            raise ValueError(f"row {number} of {path} has no {missing[0]!r}; accepted are the "
                             'columns "text" and "label"')  # fmt: skip
    return [(str(row["text"]), str(row["label"])) for row in rows]


def scores(guesses: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Accuracy, and the mean over classes of F1 = 2 TP / (2 TP + FP + FN), 0 for an absent one."""
    table = torch.bincount(labels * classes + guesses, minlength=classes**2).view(classes, -1)
    right = table.diag().double()
    f1 = 2 * right / (table.sum(0) + table.sum(1)).clamp(min=1)
    return {"accuracy": (right.sum() / table.sum()).item(), "f1": f1.mean().item()}

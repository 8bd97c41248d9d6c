"""Choosing tokens: greedy, sampled and beam search, over any model that can take one step.

A step is a function of tokens [B, 1] to logits [B, V] that moves the model's caches on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn import KVCache
from .inputs import padding

Step = Callable[[Tensor], Tensor]


@dataclass
class Decoding:
    """A model that has read its prompts: the step, and the caches that it moves on."""

    prefix: Tensor  # int64 [B, P], what the result begins with
    logits: Tensor  # [B, V] after the prompts
    step: Step
    caches: list[KVCache]  # of what has been written, for beams to reorder
    shared: list[KVCache] = field(default_factory=list)  # the same for all beams of an entry
    repeat: Callable[[int], object] = lambda beams: None  # for what is in no cache


class Generates:
    """generate() and stream() for a model with start(input_ids, attention_mask, room)."""

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 20,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        streamer: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Tokens int64 [B, P + new], new at most max_new_tokens; the first P are input_ids, or the
        start token where there is an encoder.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S], 1 for a real token. A decoder's prompts may be padded on the
                left or on the right; new tokens come after column S in both cases.
            do_sample, temperature, top_k, top_p, generator: see Choice. Without any, the likeliest
                token is taken.
            num_beams, length_penalty, early_stopping: above 1, see beam_search.
            eos_token_id: ends a row; None: the configuration's.
            pad_token_id: follows it; None: the configuration's.
            streamer: called with the new tokens int64 [B] of every step. An object with put(), as
                transformers' streamers are, has put() called, and end() at the end.
        """
        choice = Choice(do_sample, temperature, top_k, top_p, generator)
        eos, pad = self._ends(eos_token_id, pad_token_id)
        if num_beams < 1 or max_new_tokens < 1:
            name = "num_beams" if num_beams < 1 else "max_new_tokens"
            raise ValueError(f"{name} is {min(num_beams, max_new_tokens)}; accepted is 1 or more")
        if num_beams > 1 and (choice.samples or streamer is not None):
            what = "sampling" if choice.samples else "a streamer"
            raise ValueError(
                f"{what} came with num_beams={num_beams}; beam search has no use for it"
            )
        if num_beams == 1 and (length_penalty != 1.0 or early_stopping):
            raise ValueError("length_penalty or early_stopping came without beams; set num_beams")
        with evaluating(self):
            run = self.start(input_ids, attention_mask, max_new_tokens)
            if num_beams > 1:
                new, _ = beam_search(
                    *widened(run, num_beams), num_beams, max_new_tokens, eos, pad,
                    length_penalty, early_stopping,
                )  # fmt: skip
                return torch.cat((run.prefix, new), dim=1)
            send = getattr(streamer, "put", streamer) or (lambda column: None)
            columns = []
            for column in one_by_one(run.step, run.logits, choice, max_new_tokens, eos, pad):
                columns.append(column)
                send(column)
        if hasattr(streamer, "end"):
            streamer.end()
        return torch.cat((run.prefix, torch.stack(columns, dim=1)), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 20,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> Iterator[Tensor]:
        """generate(), step by step: yields the new tokens int64 [B] as they are chosen."""
        choice = Choice(do_sample, temperature, top_k, top_p, generator)
        eos, pad = self._ends(eos_token_id, pad_token_id)
        with evaluating(self):
            run = self.start(input_ids, attention_mask, max_new_tokens)

        def step(new: Tensor) -> Tensor:  # the mode holds within a step, not between two
            with evaluating(self):
                return run.step(new)

        yield from one_by_one(step, run.logits, choice, max_new_tokens, eos, pad)

    def _ends(self, eos: int | None, pad: int | None) -> tuple[int | None, int]:
        eos = self.config.eos_token_id if eos is None else eos
        return eos, self.config.pad_token_id if pad is None else pad


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; the mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def prompts(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, lens): prompts padded on either side, moved to the left, and their lengths [B]."""
    batch, length = input_ids.shape
    padding("attention_mask", attention_mask, input_ids)  # for its checks
    if attention_mask is None:
        lens = torch.full((batch,), length, dtype=torch.int32, device=input_ids.device)
        real, first = None, lens - length
    else:
        real = attention_mask != 0
        lens = real.sum(1, dtype=torch.int32)
        first = real.int().argmax(1)
    if length == 0 or int(lens.min()) == 0:
        raise ValueError("a prompt is empty; every row of input_ids needs one real token")
    at = torch.arange(length, device=input_ids.device)
    if real is not None:
        inside = (at >= first[:, None]) & (at < (first + lens)[:, None])
        if not torch.equal(inside, real):
            raise ValueError("attention_mask has padding between real tokens; accepted is padding "
                             "on one side of each row")  # fmt: skip
    return input_ids.gather(1, (at + first[:, None]) % length), lens


def widened(run: Decoding, beams: int) -> tuple[Step, Callable[[Tensor], None], Tensor]:
    """(step, reorder, logits) with every entry repeated `beams` times."""
    rows = torch.arange(run.logits.shape[0], device=run.logits.device).repeat_interleave(beams)
    for cache in run.caches + run.shared:
        cache.reorder(rows)
    run.repeat(beams)

    def reorder(index: Tensor) -> None:
        for cache in run.caches:
            cache.reorder(index)

    return run.step, reorder, run.logits[rows]


# ---- choosing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen; transformers' names. Sampling when any of the first four asks.

    Args:
        do_sample: True samples, False takes the likeliest; None: samples when another is given.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the top_k likeliest tokens are drawn from.
        top_p: only the likeliest tokens whose probabilities together reach top_p.
        generator: torch's default one when None.

    Sources: top-k in Fan et al., arXiv:1805.04833; top-p in Holtzman et al., arXiv:1904.09751.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("temperature", "top_k", "top_p") if getattr(self, n) is not None]
        if self.do_sample is False and given and self.temperature != 0:
            raise ValueError(f"{given[0]} came with do_sample=False, which does not sample")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; accepted is 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; accepted is 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; accepted is more than 0 and at most 1")

    @property
    def samples(self) -> bool:
        if self.temperature == 0 or self.do_sample is False:
            return False
        return self.do_sample or any(
            x is not None for x in (self.temperature, self.top_k, self.top_p)
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> tokens int64 [B]."""
        if not self.samples:
            return logits.argmax(-1)
        logits = logits.float() / (self.temperature or 1.0)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # a token stays when those before it fall short
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)


def one_by_one(
    step: Step, logits: Tensor, choice: Choice, max_new_tokens: int, eos: int | None, pad: int
) -> Iterator[Tensor]:
    """Yields tokens int64 [B], max_new_tokens times or until every row has given eos.

    A row that has ended gives pad. `logits` [B, V] are the prompt's last.
    """
    ended = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    for n in range(max_new_tokens):
        tokens = choice(logits).masked_fill(ended, pad)
        yield tokens
        if eos is not None:
            ended = ended | (tokens == eos)
            if ended.all():
                return
        if n + 1 < max_new_tokens:
            logits = step(tokens[:, None])


def beam_search(
    step: Step,
    reorder: Callable[[Tensor], object],
    logits: Tensor,
    beams: int,
    max_new_tokens: int,
    eos: int | None,
    pad: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best sequence found of each entry, by sum(log p) / length ** length_penalty.

    Args:
        step: tokens [B * beams, 1] to logits [B * beams, V].
        reorder: called with int64 [B * beams], the row that each row goes on from.
        logits: [B * beams, V], the prompts' last, every prompt repeated `beams` times.
        early_stopping: True ends an entry with its first `beams` ended sequences; False goes on
            until no running beam can still overtake them.

    Returns:
        (tokens int64 [B, <= max_new_tokens], eos included and padded with pad, scores [B]).
    """
    batch, vocabulary = logits.shape[0] // beams, logits.shape[1]
    device = logits.device
    found: list[list[tuple[float, Tensor]]] = [[] for _ in range(batch)]
    total = torch.full((batch, beams), -torch.inf, device=device)
    total[:, 0] = 0.0  # the beams start equal: one of them stands for all
    tokens = torch.zeros(batch, beams, 0, dtype=torch.int64, device=device)
    first_row = torch.arange(batch, device=device)[:, None] * beams
    for length in range(1, max_new_tokens + 1):
        scores = logits.float().log_softmax(-1).view(batch, beams, -1) + total[..., None]
        # at most `beams` of the best 2 * beams end here, so enough go on
        best, index = scores.flatten(1).topk(min(2 * beams, beams * vocabulary))
        beam, token = index // vocabulary, index % vocabulary
        grown = torch.cat((tokens.gather(1, _like(beam, tokens)), token[..., None]), dim=-1)
        if eos is not None:
            ended = (token == eos) & best.isfinite()
            for b, rank in ended[:, :beams].nonzero().tolist():
                found[b].append((best[b, rank].item() / length**length_penalty, grown[b, rank]))
            best = best.masked_fill(token == eos, -torch.inf)
        total, rank = best.topk(beams)
        tokens = grown.gather(1, _like(rank, grown))
        farthest = max_new_tokens if length_penalty > 0 else length
        hopes = (total.max(1).values / farthest**length_penalty).tolist()
        if length == max_new_tokens or all(
            _settled(ends, hope, beams, early_stopping) for ends, hope in zip(found, hopes)
        ):
            break
        reorder((first_row + beam.gather(1, rank)).flatten())
        logits = step(tokens[..., -1].reshape(-1, 1))
    for b, ends in enumerate(found):
        if len(ends) < beams or not early_stopping:  # the best running beam competes as it is
            ends.append((total[b, 0].item() / length**length_penalty, tokens[b, 0]))
    winners = [max(ends, key=lambda end: end[0]) for ends in found]
    rows = [row for _, row in winners]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return padded, torch.tensor([score for score, _ in winners], device=device)


def _like(index: Tensor, rows: Tensor) -> Tensor:
    """index [B, n] repeated over the last dimension of rows [B, beams, length], for gather."""
    return index[..., None].expand(-1, -1, rows.shape[-1])


def _settled(ends: list, hope: float, beams: int, early_stopping: bool) -> bool:
    if early_stopping or hope == -float("inf"):
        return len(ends) >= beams or hope == -float("inf")
    return bool(ends) and max(score for score, _ in ends) >= hope

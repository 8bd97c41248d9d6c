"""Generation of tokens: greedy, sampling and beam search, for any model with a step function.

A step takes tokens [B, 1], appends them to the model's caches and returns logits [B, V].
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
    """The state of a model that has read its prompts: its step function and caches."""

    prefix: Tensor  # int64 [B, P], the beginning of the result
    logits: Tensor  # [B, V] after the prompts
    step: Step
    caches: list[KVCache]  # of the generated tokens; beam search reorders them
    shared: list[KVCache] = field(default_factory=list)  # equal for all beams of a sequence
    repeat: Callable[[int], object] = lambda beams: None  # repeats state outside of the caches


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
        """Generates tokens: int64 [B, P + new] with new <= max_new_tokens. The first P are
        input_ids, or the start token of a model with an encoder.

        Args:
            input_ids: integers [B, S].
            max_new_tokens: the most tokens to generate, default 20.
            attention_mask: [B, S], 1 for a real token. A decoder's prompts may be padded on the
                left or on the right; new tokens come after column S in both cases.
            do_sample, temperature, top_k, top_p, generator: see Choice. Without any of them,
                decoding is greedy.
            num_beams, length_penalty, early_stopping: for num_beams above 1, see beam_search.
            eos_token_id: the token that ends a sequence; None: the configuration's.
            pad_token_id: the token after the end; None: the configuration's.
            streamer: called with the new tokens int64 [B] of every step. For an object with put(),
                such as transformers' streamers, put() is called instead, and end() at the end.

        Raises:
            ValueError: an argument, which is named, is not accepted.
        """
        choice = Choice(do_sample, temperature, top_k, top_p, generator)
        eos, pad = self._ends(eos_token_id, pad_token_id)
        if num_beams < 1 or max_new_tokens < 1:
            name = "num_beams" if num_beams < 1 else "max_new_tokens"
            raise ValueError(f"{name} is {min(num_beams, max_new_tokens)}; accepted is 1 or more")
        if num_beams > 1 and (choice.samples or streamer is not None):
            what = "sampling" if choice.samples else "a streamer"
            raise ValueError(
                f"{what} came with num_beams={num_beams}; beam search accepts neither sampling nor "
                "a streamer"
            )
        if num_beams == 1 and (length_penalty != 1.0 or early_stopping):
            raise ValueError("length_penalty or early_stopping came without beams; pass num_beams "
                             "above 1")  # fmt: skip
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

        def step(new: Tensor) -> Tensor:  # eval mode within a step only, not between steps
            with evaluating(self):
                return run.step(new)

        yield from one_by_one(step, run.logits, choice, max_new_tokens, eos, pad)

    def _ends(self, eos: int | None, pad: int | None) -> tuple[int | None, int]:
        eos = self.config.eos_token_id if eos is None else eos
        return eos, self.config.pad_token_id if pad is None else pad


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the previous mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def prompts(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, lens): prompts that were padded on either side, moved to the left, and lengths [B]."""
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
    """(step, reorder, logits) with every sequence repeated `beams` times."""
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
    """How the next token is chosen, with transformers' names.

    Args:
        do_sample: True samples, False is greedy; None samples if another option is given.
        temperature: logits are divided by it; 0 is greedy.
        top_k: sample only from the top_k most likely tokens.
        top_p: sample only from the most likely tokens whose probabilities add up to top_p.
        generator: of torch's; None: the default one.

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
            before = ordered.cumsum(-1) - ordered  # a token stays if this is below top_p
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)


def one_by_one(
    step: Step, logits: Tensor, choice: Choice, max_new_tokens: int, eos: int | None, pad: int
) -> Iterator[Tensor]:
    """Yields tokens int64 [B], max_new_tokens times or until every sequence has ended with eos.

    A sequence that has ended yields pad. `logits` [B, V] are those after the prompt.
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
    """The best sequence for each prompt, by sum(log p) / length ** length_penalty.

    Args:
        step: takes tokens [B * beams, 1] and returns logits [B * beams, V].
        reorder: called with int64 [B * beams]: the row that each row continues.
        logits: [B * beams, V] after the prompts, every prompt repeated `beams` times.
        early_stopping: True stops a prompt once `beams` sequences have ended; False continues until
            no running beam can score higher than the best of those.

    Returns:
        (tokens int64 [B, <= max_new_tokens], with eos and padded with pad; scores [B]).
    """
    batch, vocabulary = logits.shape[0] // beams, logits.shape[1]
    device = logits.device
    found: list[list[tuple[float, Tensor]]] = [[] for _ in range(batch)]
    total = torch.full((batch, beams), -torch.inf, device=device)
    total[:, 0] = 0.0  # beams start equal, so only one is expanded at first
    tokens = torch.zeros(batch, beams, 0, dtype=torch.int64, device=device)
    first_row = torch.arange(batch, device=device)[:, None] * beams
    for length in range(1, max_new_tokens + 1):
        scores = logits.float().log_softmax(-1).view(batch, beams, -1) + total[..., None]
        # At most `beams` of the best 2 * beams end at this step, so at least `beams` continue.
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
        if len(ends) < beams or not early_stopping:  # the best running beam competes too
            ends.append((total[b, 0].item() / length**length_penalty, tokens[b, 0]))
    winners = [max(ends, key=lambda end: end[0]) for ends in found]
    sequences = [sequence for _, sequence in winners]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    return padded, torch.tensor([score for score, _ in winners], device=device)


def _like(index: Tensor, tokens: Tensor) -> Tensor:
    """index [B, n] repeated over the last dimension of tokens [B, beams, length], for gather."""
    return index[..., None].expand(-1, -1, tokens.shape[-1])


def _settled(ends: list, hope: float, beams: int, early_stopping: bool) -> bool:
    if early_stopping or hope == -float("inf"):
        return len(ends) >= beams or hope == -float("inf")
    return bool(ends) and max(score for score, _ in ends) >= hope

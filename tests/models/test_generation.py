"""generate() against full forward passes, sampling against probabilities, beams against all
sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from model_cases import HOLES, LEFT, RIGHT, SMALL, gpt, ids, mask_of

from fastattn.models import EncoderDecoder
from fastattn.models.generation import Choice, beam_search


def greedy(model, x, count):
    """Without a cache, with one full forward pass per token."""
    for _ in range(count):
        x = torch.cat((x, model(x).logits[:, -1:].argmax(-1)), dim=1)
    return x


def sharp(model):
    """Larger weights, so that no two logits are nearly equal and tokens vary."""
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    return model.eval()


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
@pytest.mark.parametrize("more", [{}, {"window": 4}], ids=["full", "window"])
def test_generate_equals_recomputation(attention, more):
    model, x = sharp(gpt(attention=attention, **more)), ids(3, 6)
    assert torch.equal(model.generate(x, 10), greedy(model, x, 10))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_generate_from_padded_prompts(left, attention):
    model, x = sharp(gpt(attention=attention)), ids(3, 6)
    mask = mask_of(6, 4, 1, total=6, left=left)
    out = model.generate(x, 8, attention_mask=mask)
    assert torch.equal(out[:, :6], x)
    for row, real, new in zip(x, mask.bool(), out[:, 6:]):
        assert torch.equal(new, greedy(model, row[real][None], 8)[0, -8:])


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
@pytest.mark.parametrize("mask", [None, RIGHT, HOLES], ids=["none", "right", "holes"])
def test_encoder_decoder_generates_as_recomputed(attention, mask):
    torch.manual_seed(1)
    model = sharp(EncoderDecoder(**SMALL, attention=attention, eos_token_id=0))
    model.config.eos_token_id = None
    x = ids(3, 12)
    out = model.generate(x, 8, attention_mask=mask)
    wanted = torch.ones(3, 1, dtype=torch.int64)
    for _ in range(8):
        logits = model(x, mask, decoder_input_ids=wanted).logits
        wanted = torch.cat((wanted, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, wanted)


def test_eos_ends_a_row_and_pads_it():
    model, x = sharp(gpt()), ids(3, 6)
    whole = model.generate(x, 10)
    eos = int(whole[0, 8])
    out = model.generate(x, 10, eos_token_id=eos, pad_token_id=39)
    for row, free in zip(out[:, 6:], whole[:, 6:]):
        at = (free == eos).nonzero()
        end = int(at[0]) + 1 if len(at) else out.shape[1] - 6
        assert torch.equal(row[:end], free[: len(row)][:end])
        assert (row[end:] == 39).all()
    short = model.generate(x[:1], 10, eos_token_id=int(whole[0, 6]))
    assert short.shape == (1, 7)


def test_streaming_gives_the_same_tokens():
    model, x = sharp(gpt()), ids(2, 6)
    model.train()
    seen = []

    class Streamer:
        ended = False

        def put(self, column):
            seen.append(column)

        def end(self):
            self.ended = True

    streamer = Streamer()
    out = model.generate(x, 5, streamer=streamer)
    assert model.training and streamer.ended
    assert torch.equal(torch.stack(seen, 1), out[:, 6:])
    called = []
    model.generate(x, 5, streamer=called.append)
    assert torch.equal(torch.stack(called, 1), out[:, 6:])
    assert torch.equal(torch.stack(list(model.stream(x, 5)), 1), out[:, 6:])
    assert model.training


def test_sampling_follows_the_distribution():
    """Frequencies against the exact probabilities that temperature, top_k and top_p leave."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    draws = 20000
    rows = logits.expand(draws, -1)
    for options, kept in (
        ({"do_sample": True}, 5),
        ({"temperature": 2.0}, 5),
        ({"top_k": 2}, 2),
        ({"top_p": 0.8}, 2),  # 0.64, 0.87
        ({"top_p": 0.6}, 1),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.99}, 3),  # 0.864, 0.981, 0.997
    ):
        generator = torch.Generator().manual_seed(0)
        tokens = Choice(**options, generator=generator)(rows)
        wanted = (logits / options.get("temperature", 1.0)).softmax(0)
        wanted[kept:] = 0
        found = tokens.bincount(minlength=5) / draws
        torch.testing.assert_close(found, wanted / wanted.sum(), rtol=0, atol=0.015)
    assert Choice()(rows[:2]).tolist() == [0, 0] == Choice(temperature=0)(rows[:2]).tolist()


def test_sampling_repeats_with_a_generator():
    model, x = gpt(), ids(2, 6)
    a, b, c = (
        model.generate(x, 8, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


class Chain:
    """A language model as a table: the next token's logits are a function of the last two."""

    def __init__(self, vocabulary: int, batch: int, beams: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits = torch.randn(vocabulary, vocabulary, vocabulary, generator=generator) * 2
        self.state = torch.stack((torch.arange(batch) % vocabulary, torch.zeros(batch).long()), 1)
        self.state = self.state.repeat_interleave(beams, 0)

    def now(self) -> torch.Tensor:
        return self.logits[self.state[:, 0], self.state[:, 1]]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.state = torch.cat((self.state[:, 1:], tokens), 1)
        return self.now()

    def reorder(self, index: torch.Tensor) -> None:
        self.state = self.state[index]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_beams_find_the_best_sequence_of_all(penalty):
    """With as many beams as prefixes the result is the best of all sequences, finished or not."""
    vocabulary, length, eos = 4, 4, 2
    beams = vocabulary**length
    chain = Chain(vocabulary, 3, beams)
    found, scores = beam_search(
        chain.step, chain.reorder, chain.now(), beams, length, eos, 9, penalty
    )
    for entry in range(3):
        best = (-float("inf"), ())
        for tokens in itertools.product(range(vocabulary), repeat=length):
            cut = tokens.index(eos) + 1 if eos in tokens else length
            alone, total = Chain(vocabulary, 3, 1), 0.0
            alone.state = alone.state[entry : entry + 1]
            for token in tokens[:cut]:
                total += alone.now().log_softmax(-1)[0, token].item()
                alone.step(torch.tensor([[token]]))
            best = max(best, (total / cut**penalty, tokens[:cut]))
        row = [t for t in found[entry].tolist() if t != 9]
        assert tuple(row) == best[1]
        assert scores[entry].item() == pytest.approx(best[0], abs=1e-5)


def test_one_beam_is_greedy_and_more_are_no_worse():
    model = sharp(EncoderDecoder(**SMALL))
    model.config.eos_token_id = None
    x = ids(3, 12)
    alone = model.generate(x, 8, attention_mask=RIGHT)
    with torch.no_grad():
        run = model.start(x, RIGHT, 8)
        one, score = beam_search(run.step, lambda _: None, run.logits, 1, 8, None, 0)
    assert torch.equal(one, alone[:, 1:])
    wide = model.generate(x, 8, attention_mask=RIGHT, num_beams=4)
    logits = model(x, RIGHT, decoder_input_ids=wide[:, :-1]).logits.log_softmax(-1)
    total = logits.gather(-1, wide[:, 1:, None]).sum((1, 2)) / 8
    assert (total >= score - 1e-5).all() and (total > score + 1e-4).any()


def test_beams_with_padded_prompts_and_masks():
    """Entries are independent: a batch gives what each entry gives alone."""
    for model, masks in ((sharp(gpt()), (LEFT, RIGHT)), (sharp(EncoderDecoder(**SMALL)), (HOLES,))):
        for mask in masks:
            x = ids(3, 12)
            whole = model.generate(x, 6, attention_mask=mask, num_beams=3)
            for b in range(3):
                one = model.generate(x[b : b + 1], 6, attention_mask=mask[b : b + 1], num_beams=3)
                assert torch.equal(whole[b, : one.shape[1]], one[0])


def test_early_stopping_ends_sooner():
    chain = Chain(4, 2, 3)
    steps = []
    for early in (True, False):
        chain = Chain(4, 2, 3)
        count = itertools.count()

        def step(tokens, chain=chain, count=count):
            next(count)
            return chain.step(tokens)

        beam_search(step, chain.reorder, chain.now(), 3, 20, 2, 0, early_stopping=early)
        steps.append(next(count))
    assert steps[0] < steps[1]

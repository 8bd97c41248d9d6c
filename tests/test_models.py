"""fastattn.models: results against torch's attention, generation, heads, folders, bad input."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastattn.models import (
    BERT,
    GPT,
    BERTConfig,
    CheckpointError,
    EncoderDecoder,
    FusionEncoder,
    GPTConfig,
)
from fastattn.models import checkpoint as folders
from fastattn.models.generation import Choice, beam_search

SMALL = {"vocab_size": 40, "max_len": 32, "dim": 32, "heads": 4, "layers": 2}


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


def mask_of(*lengths: int, total: int = 12, left: bool = False) -> torch.Tensor:
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


HOLES = torch.tensor([[1, 1, 0, 1] * 3, [1] * 12, [0, 1] * 6])
RIGHT = mask_of(12, 7, 3)
LEFT = mask_of(12, 7, 3, left=True)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4]]).int()


def gpt(**more) -> GPT:
    torch.manual_seed(0)
    return GPT(**{**SMALL, "kv_heads": 2, **more})


def labels_of(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x % 3 == 0, x, -100)


CALLS = {  # name: (model, inputs)
    "gpt": (gpt, {"labels": ids(3, 12)}),
    "gpt window": (lambda: gpt(window=3, qk_norm=True), {"labels": ids(3, 12)}),
    "gpt untied": (lambda: gpt(tie_embeddings=False, mlp="gelu", norm="layer"), {}),
    "gpt right": (gpt, {"attention_mask": RIGHT, "labels": ids(3, 12)}),
    "gpt left": (gpt, {"attention_mask": LEFT}),
    "gpt documents": (gpt, {"document_ids": DOCUMENTS, "labels": ids(3, 12)}),
    "bert": (
        lambda: BERT(**SMALL),
        {"labels": labels_of(ids(3, 12)), "next_sentence_label": torch.tensor([0, 1, -100])},
    ),
    "bert holes": (
        lambda: BERT(**SMALL, kv_heads=1),
        {"attention_mask": HOLES, "token_type_ids": ids(3, 12) % 2},
    ),
    "classification": (
        lambda: BERT(**SMALL, head="classification", num_labels=3),
        {"attention_mask": RIGHT, "labels": torch.tensor([0, 2, 1])},
    ),
    "question": (
        lambda: BERT(**SMALL, head="question_answering"),
        {"start_positions": torch.tensor([0, 5, -100]), "end_positions": torch.tensor([3, 5, 1])},
    ),
    "encoder-decoder": (
        lambda: EncoderDecoder(**SMALL, decoder_layers=1),
        {"attention_mask": RIGHT, "labels": labels_of(ids(3, 7, seed=1))},
    ),
    "encoder-decoder holes": (
        lambda: EncoderDecoder(**SMALL),
        {"attention_mask": HOLES, "decoder_input_ids": ids(3, 7, seed=1)},
    ),
    "fusion": (
        lambda: FusionEncoder(**SMALL, feature_dim=5, max_features=9, num_labels=1),
        {
            "attention_mask": RIGHT,
            "features": torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(1)),
            "features_mask": mask_of(9, 2, 4, total=9),
            "labels": torch.tensor([0.5, 1.0, -1.0]),
        },
    ),
}


def outputs(model, inputs):
    """Every tensor of the output, and the gradients of their sum."""
    model.zero_grad()
    out = [x for x in model(ids(3, 12), **inputs) if x is not None]
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in out]
    sum((x * w.to(x.dtype)).sum() for x, w in zip(out, weights)).backward()
    return out, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", CALLS)
def test_torch_attention_gives_the_same(name):
    """float64: results and every gradient with fastattn's and with torch's attention."""
    make, inputs = CALLS[name]
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    model = make().double()
    mine, my_gradients = outputs(model, inputs)
    model.set_attention("torch")
    theirs, their_gradients = outputs(model, inputs)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(my_gradients, their_gradients, rtol=1e-8, atol=1e-8)
    assert len(my_gradients) >= sum(1 for _ in model.parameters()) - 4  # a head's unused parts
    if "labels" in inputs or "start_positions" in inputs:
        assert model(ids(3, 12), **inputs).loss.dim() == 0


@pytest.mark.parametrize("name", ["gpt", "gpt documents", "bert", "encoder-decoder"])
def test_skip_logits_gives_the_same_loss_and_gradients(name):
    make, inputs = CALLS[name]
    model, found = make().double(), []
    for skip in (False, True):
        model.zero_grad()
        out = model(ids(3, 12), **inputs, skip_logits=skip)
        assert (out.logits is None) == skip
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


# ---- what the losses are ----------------------------------------------------------------------


def test_gpt_loss_is_the_shifted_cross_entropy():
    model, x = gpt(), ids(3, 12)
    labels = x.masked_fill(x % 5 == 0, -100)
    out = model(x, labels=labels)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    assert model(x, labels=torch.full_like(x, -100)).loss == 0


def test_packed_documents_are_as_if_alone():
    """A document's logits do not depend on its neighbours, and its first token is no target."""
    model, x = gpt().eval(), ids(1, 12)
    out = model(x, labels=x, document_ids=DOCUMENTS[:1])
    alone = [model(x[:, part], labels=x[:, part]) for part in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(out.logits, torch.cat([a.logits for a in alone], dim=1))
    wanted = (alone[0].loss * 4 + alone[1].loss * 6) / 10
    torch.testing.assert_close(out.loss, wanted)
    same = model(x, labels=x, document_ids=DOCUMENTS[0])  # [S] stands for every row
    torch.testing.assert_close(same.loss, out.loss)


def test_bert_losses_add_up():
    model, x = BERT(**SMALL), ids(3, 12)
    labels, label = labels_of(x), torch.tensor([0, 1, 1])
    both = model(x, labels=labels, next_sentence_label=label)
    words = F.cross_entropy(both.logits.flatten(0, 1), labels.flatten())
    follows = F.cross_entropy(both.seq_relationship_logits, label)
    torch.testing.assert_close(both.loss, words + follows)
    torch.testing.assert_close(model(x, labels=labels).loss, words)


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_classifier_takes_floating_labels(kind):
    labels = torch.rand(3, 4) if kind == "multi-label" else torch.rand(3)
    size = labels.shape[1] if kind == "multi-label" else 1
    model = BERT(**SMALL, head="classification", num_labels=size)
    out = model(ids(3, 12), labels=labels)
    if kind == "regression":
        wanted = F.mse_loss(out.logits[:, 0], labels)
    else:
        wanted = F.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, wanted)


@pytest.mark.parametrize("name", ["bert", "encoder-decoder", "fusion", "gpt right"])
def test_padding_does_not_matter(name):
    """What stands in masked places changes no real token's result."""
    make, inputs = CALLS[name]
    model = make().eval()
    inputs = {k: x for k, x in inputs.items() if k in ("features", "features_mask")}
    decoder = {"decoder_input_ids": ids(3, 4)} if name == "encoder-decoder" else {}
    x, other = ids(3, 12), ids(3, 12, seed=9)
    mixed = torch.where(RIGHT == 1, x, other)
    a, b = (model(y, attention_mask=RIGHT, **inputs, **decoder) for y in (x, mixed))
    keep = slice(None) if decoder else RIGHT.bool()
    torch.testing.assert_close(a.last_hidden_state[keep], b.last_hidden_state[keep])
    if "features" in inputs:
        features = inputs["features"].masked_fill(inputs["features_mask"][..., None] == 0, 1e3)
        c = model(x, attention_mask=RIGHT, **{**inputs, "features": features})
        torch.testing.assert_close(a.logits, c.logits)


def test_fusion_looks_at_the_features():
    model = FusionEncoder(**SMALL, feature_dim=5)
    features = torch.randn(3, 4, 5)
    out = model(ids(3, 12), features=features)
    assert out.logits is None and out.last_hidden_state.shape == (3, 12, 32)
    other = model(ids(3, 12), features=features.flip(0))
    apart = (out.last_hidden_state - other.last_hidden_state).abs().amax(dim=(1, 2))
    assert apart[0] > 0 and apart[1] == 0 and apart[2] > 0


# ---- generating -------------------------------------------------------------------------------


def greedy(model, x, count):
    """Without a cache, one whole forward pass a token."""
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
    """A language model on paper: the next token's logits are a function of the last two."""

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
    """Beams as many as prefixes: the result is the best of every sequence, ended or not."""
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
    """Entries do not see each other: a batch gives what each entry gives alone."""
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


# ---- the module as torch's tools see it -------------------------------------------------------

MODELS = {
    "GPT": gpt,
    "BERT": lambda: BERT(**SMALL),
    "EncoderDecoder": lambda: EncoderDecoder(**SMALL),
    "FusionEncoder": lambda: FusionEncoder(**SMALL, feature_dim=5, num_labels=2),
}
INPUTS = {
    "GPT": {"labels": ids(3, 12)},
    "BERT": {"labels": ids(3, 12)},
    "EncoderDecoder": {"labels": ids(3, 5)},
    "FusionEncoder": {"features": torch.ones(3, 4, 5), "labels": torch.tensor([0, 1, 1])},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_copies_and_pickles(name, attention):
    model = MODELS[name]().eval()
    model.set_attention(attention)
    wanted = model(ids(3, 12), **INPUTS[name]).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(ids(3, 12), **INPUTS[name]).loss, wanted)
        assert twin.config == model.config


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_a_break(name):
    model = MODELS[name]()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    a, b = (f(ids(3, 12), **INPUTS[name]) for f in (model, compiled))
    torch.testing.assert_close(a.loss, b.loss)
    b.loss.backward()
    assert all(p.grad is not None for p in model.blocks.parameters()) if name == "GPT" else True


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_bfloat16(name, dtype):
    model = MODELS[name]()
    wanted = model(ids(3, 12), **INPUTS[name]).loss
    inputs = dict(INPUTS[name])
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids(3, 12), **inputs).loss
    else:
        inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        loss = model.to(dtype)(ids(3, 12), **inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_drawn_from_torchs_generator(name):
    model = MODELS[name]()
    model = type(model)(model.config, dropout=0.3)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(ids(3, 12), **INPUTS[name]).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert model.blocks[0].attn.dropout == 0.3 if hasattr(model, "blocks") else True


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_dynamic_int8():
    model = gpt().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    a, b = model(ids(2, 8)).logits, quantised(ids(2, 8)).logits
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_configuration():
    by_names, by_config = gpt(), GPT(GPTConfig(**SMALL, kv_heads=2))
    assert by_names.config == by_config.config
    assert GPT(GPTConfig(**SMALL), layers=1).config.layers == 1
    assert by_names.num_parameters() == sum(p.numel() for p in by_names.parameters())


# ---- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "a")
    twin = type(model).from_pretrained(tmp_path / "a")
    assert twin.config == model.config and not twin.training
    for (n, x), (m, y) in zip(model.state_dict().items(), twin.state_dict().items()):
        assert n == m and torch.equal(x, y)
    assert json.loads((tmp_path / "a/config.json").read_text())["model"] == name
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a", attention="torch", dropout=0.5)
    assert next(again.parameters()).dtype == torch.bfloat16
    assert (again.config.attention, again.config.dropout) == ("torch", 0.5)


def test_another_head_starts_anew(tmp_path):
    model = BERT(**SMALL)
    model.save_pretrained(tmp_path)
    tuned = BERT.from_pretrained(tmp_path, head="classification", num_labels=5)
    assert torch.equal(tuned.words.weight, model.words.weight)
    assert tuned(ids(2, 8)).logits.shape == (2, 5)


def test_an_interrupted_save_leaves_the_last_good_one(tmp_path, monkeypatch):
    """Stopped at each of its file operations in turn, a save leaves a folder that loads."""
    first, second = gpt(), gpt()
    torch.nn.init.ones_(second.embed.weight)
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    for stop in range(4):
        folder = tmp_path / str(stop)
        first.save_pretrained(folder)
        count = itertools.count()

        def interrupted(name, count=count, stop=stop):
            def operation(*arguments):
                if next(count) == stop:
                    raise KeyboardInterrupt
                return real[name](*arguments)

            return operation

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(folders.os, name, interrupted(name))
            with pytest.raises(KeyboardInterrupt):
                second.save_pretrained(folder)
        loaded = GPT.from_pretrained(folder)
        wanted = first if stop < 2 else second  # the rename of the weights is the second
        assert torch.equal(loaded.embed.weight, wanted.embed.weight)
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[-100] ^= 255
    elif how == "header":
        content[:8] = b"\xff" * 8
    else:
        content = b""
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut", "flipped", "header", "empty"])
def test_corrupted_weights_are_refused(how, tmp_path):
    model = gpt()
    model.save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors", how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="corrupted"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="corrupted"):
        model.load_pretrained(tmp_path)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_weights_that_do_not_fit_leave_the_model_untouched(tmp_path):
    gpt().save_pretrained(tmp_path / "gpt")
    BERT(**SMALL).save_pretrained(tmp_path / "bert")
    wide = gpt(vocab_size=50)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(CheckpointError, match=r"embed.weight is \[40, 32\] and the model's \[50"):
        wide.load_pretrained(tmp_path / "gpt")
    with pytest.raises(CheckpointError, match=r"lacks .*blocks.2.* 5 more"):
        gpt(layers=3).load_pretrained(tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="has besides"):
        gpt(layers=1).load_pretrained(tmp_path / "gpt")
    assert all(torch.equal(x, before[n]) for n, x in wide.state_dict().items())
    with pytest.raises(CheckpointError, match=r"holds a BERT; GPT\.from_pretrained accepts"):
        GPT.from_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        GPT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        gpt().save_pretrained(tmp_path / "gpt/config.json")


def test_config_json_beside_the_weights(tmp_path):
    """The weights' own configuration wins, and a difference is said; without one, the file's."""
    model = gpt()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"dropout": 0.0', '"dropout": 0.5'))
    with pytest.warns(UserWarning, match=r"dropout = 0.5, saved 0.0"):
        assert GPT.from_pretrained(tmp_path).config.dropout == 0.0
    path.unlink()
    assert GPT.from_pretrained(tmp_path).config == model.config
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert GPT.from_pretrained(tmp_path).config == model.config
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        GPT.from_pretrained(tmp_path)


# ---- bad input --------------------------------------------------------------------------------

X = ids(3, 12)
BAD = {  # what: (call, words of the sentence)
    "unknown option": (lambda: gpt(width=3), "no option 'width'"),
    "no vocabulary": (lambda: GPT(dim=32), "needs vocab_size"),
    "other config": (lambda: GPT(BERTConfig(**SMALL)), "accepted is GPTConfig"),
    "float layers": (lambda: gpt(layers=2.0), "layers"),
    "no layers": (lambda: gpt(layers=0), "layers is 0"),
    "heads": (lambda: BERT(**{**SMALL, "heads": 5}), "dim must be a multiple"),
    "attention": (lambda: gpt(attention="flash"), "'fastattn' and 'torch'"),
    "head": (lambda: BERT(**SMALL, head="ner"), "head is 'ner'"),
    "rank": (lambda: gpt()(X[0]), "input_ids"),
    "dtype": (lambda: gpt()(X.float()), "accepted are integers"),
    "too long": (lambda: gpt()(ids(1, 33)), "at most max_len 32"),
    "range": (lambda: gpt()(X + 30), "accepted are tokens in [0, 40)"),
    "mask shape": (lambda: gpt()(X, torch.ones(3, 11)), "attention_mask has shape [3, 11]"),
    "mask values": (lambda: gpt()(X, torch.full((3, 12), -1e9)), "other numbers than 0 and 1"),
    "label range": (lambda: gpt()(X, labels=X + 30), "labels holds"),
    "label shape": (lambda: gpt()(X, labels=X[:, 1:]), "accepted are integers [3, 12]"),
    "nothing asked": (lambda: gpt()(X, skip_logits=True), "without labels"),
    "labels and cache": (lambda: gpt()(X, labels=X, cache=gpt().make_caches(3)), "with a cache"),
    "left and cache": (lambda: gpt()(X, LEFT, cache=gpt().make_caches(3)), "on the left"),
    "documents back": (lambda: gpt()(X, document_ids=DOCUMENTS.flip(1)), "document_ids"),
    "types": (lambda: BERT(**SMALL)(X, token_type_ids=X), "token_type_ids"),
    "wrong labels": (lambda: BERT(**SMALL)(X, start_positions=X[:, 0]), "takes labels, next_"),
    "one position": (
        lambda: BERT(**SMALL, head="question_answering")(X, start_positions=X[:, 0] % 12),
        "come together",
    ),
    "no target": (lambda: EncoderDecoder(**SMALL)(X), "decoder_input_ids or labels"),
    "decoder rows": (
        lambda: EncoderDecoder(**SMALL)(X, decoder_input_ids=X[:2]),
        "decoder_input_ids has shape [2, 12] and input_ids has 3 rows",
    ),
    "no features": (lambda: FusionEncoder(**SMALL, feature_dim=5)(X), "features is None"),
    "feature size": (
        lambda: FusionEncoder(**SMALL, feature_dim=5)(X, features=torch.ones(3, 2, 4)),
        "accepted are floats [3, F, 5]",
    ),
    "feature mask": (
        lambda: FusionEncoder(**SMALL, feature_dim=5)(
            X, features=torch.ones(3, 2, 5), features_mask=RIGHT
        ),
        "features_mask has shape [3, 12]",
    ),
    "no head": (
        lambda: FusionEncoder(**SMALL, feature_dim=5)(
            X, features=torch.ones(3, 2, 5), labels=X[:, 0]
        ),
        "num_labels=0",
    ),
    "holes": (lambda: gpt().generate(X, attention_mask=HOLES), "padding between real tokens"),
    "empty prompt": (lambda: gpt().generate(X, attention_mask=RIGHT * 0), "a prompt is empty"),
    "no room": (lambda: gpt().generate(X, 21), "make 33; accepted is at most max_len = 32"),
    "contradiction": (lambda: gpt().generate(X, 2, do_sample=False, top_k=3), "do_sample=False"),
    "beams sample": (lambda: gpt().generate(X, 2, num_beams=2, top_k=3), "sampling came with"),
    "beamless": (lambda: gpt().generate(X, 2, length_penalty=2.0), "without beams"),
    "temperature": (lambda: gpt().generate(X, 2, temperature=-1), "temperature is -1"),
    "top_p": (lambda: gpt().generate(X, 2, top_p=0), "top_p is 0"),
    "no tokens": (lambda: gpt().generate(X, 0), "max_new_tokens is 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_sentence(what):
    call, words = BAD[what]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)


def test_torch_attention_refuses_what_sdpa_has_not():
    from fastattn.models.torch_attention import torch_attention

    q = torch.randn(1, 2, 3, 4)
    for option in ({"softcap": 1.0}, {"sinks": torch.zeros(2)}):
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            torch_attention(q, q, q, **option)

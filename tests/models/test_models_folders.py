"""Models in folders: round trips, interruptions, corruption; and messages for invalid input."""

from __future__ import annotations

import copy
import itertools
import json
import os

import pytest
import torch
from model_cases import DOCUMENTS, HOLES, LEFT, MODELS, RIGHT, SMALL, gpt, ids
from safetensors.torch import load_file, save_file

from fastattn.models import BERT, GPT, BERTConfig, CheckpointError, EncoderDecoder, FusionEncoder
from fastattn.models import checkpoint as folders


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
    """A save that stops at any of its file operations leaves a folder that loads."""
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
        wanted = first if stop < 2 else second  # the weights are renamed second
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
    with pytest.raises(CheckpointError, match="also has"):
        gpt(layers=1).load_pretrained(tmp_path / "gpt")
    assert all(torch.equal(x, before[n]) for n, x in wide.state_dict().items())
    with pytest.raises(CheckpointError, match=r"holds a BERT; GPT\.from_pretrained accepts"):
        GPT.from_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        GPT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        gpt().save_pretrained(tmp_path / "gpt/config.json")


def test_config_json_beside_the_weights(tmp_path):
    """The weights' own configuration wins, and a difference is reported; without one, the
    file's."""
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
        "came alone",
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

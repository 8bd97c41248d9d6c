"""fastattn.models: results and gradients against torch's attention, losses, torch's tools."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from model_cases import DOCUMENTS, HOLES, LEFT, MODELS, RIGHT, SMALL, gpt, ids, mask_of

from fastattn.models import (
    BERT,
    GPT,
    EncoderDecoder,
    FusionEncoder,
    GPTConfig,
)


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
    out = list(model(ids(3, 12), **inputs).values())
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
    assert len(my_gradients) >= sum(1 for _ in model.parameters()) - 4  # the unused parts of a head
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
    """A document's logits do not depend on its neighbours, and its first token is not a target."""
    model, x = gpt().eval(), ids(1, 12)
    out = model(x, labels=x, document_ids=DOCUMENTS[:1])
    alone = [model(x[:, part], labels=x[:, part]) for part in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(out.logits, torch.cat([a.logits for a in alone], dim=1))
    wanted = (alone[0].loss * 4 + alone[1].loss * 6) / 10
    torch.testing.assert_close(out.loss, wanted)
    same = model(x, labels=x, document_ids=DOCUMENTS[0])  # [S] applies to every row
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
    """The content of masked positions does not change any real token's result."""
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


# ---- the module as torch's tools see it -------------------------------------------------------

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


def test_output_is_a_dict_with_attributes():
    out = gpt()(ids(2, 5), labels=ids(2, 5))
    assert list(out) == ["loss", "logits", "last_hidden_state"]
    assert out["loss"] is out.loss is out[0] and out[1:] == (out.logits, out.last_hidden_state)
    assert out.start_logits is None and "start_logits" not in out
    with pytest.raises(AttributeError, match="a ModelOutput has no 'logit'; it has loss"):
        out.logit  # noqa: B018
    twin = torch.utils._pytree.tree_map(torch.zeros_like, out)
    assert type(twin) is type(out) and twin.logits.abs().sum() == 0
    detached = copy.deepcopy(torch.utils._pytree.tree_map(torch.Tensor.detach, out))
    assert torch.equal(detached.loss, out.loss)


def test_configuration():
    by_names, by_config = gpt(), GPT(GPTConfig(**SMALL, kv_heads=2))
    assert by_names.config == by_config.config
    assert GPT(GPTConfig(**SMALL), layers=1).config.layers == 1
    every = sum(p.numel() for p in by_names.parameters())
    assert by_names.num_parameters() == every
    assert by_names.num_parameters(exclude_embeddings=True) == every - 40 * 32
    by_names.requires_grad_(False)
    assert by_names.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("name", ["GPT", "classification"])
def test_transformers_trainer_takes_a_model(name, tmp_path):
    """Training, evaluation with metrics, and a checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if name == "GPT":
        model, labels = gpt(), list(ids(8, 12))
    else:
        model = BERT(**SMALL, head="classification")
        labels = list(torch.arange(8) % 2)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(ids(8, 12), labels)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_steps=2, logging_steps=1, log_level="error",
        label_names=["labels"],  # BERT.forward also has other labels
    )  # fmt: skip
    before = model.num_parameters(), model.norm.weight.clone()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda found: {"rows": len(found.label_ids)},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_rows"] == 8 and 0 < found["eval_loss"] < 5
    assert not torch.equal(model.norm.weight, before[1])
    assert (tmp_path / "checkpoint-2").is_dir()

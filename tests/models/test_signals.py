"""AttentionSignals, its warnings, QK-clip, and the callback of transformers' Trainer."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from two_processes import assert_right

import fastattn
from fastattn.signals import AttentionSignals, largest_logits, qk_clip

S = 9


class Log(dict):
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self[tag, step] = value


class Blocks(nn.Module):
    def __init__(self, kv_heads: int = 4, **options) -> None:
        super().__init__()
        self.attn = nn.ModuleList(
            fastattn.nn.Attention(16, 4, kv_heads, bias=True, **options) for _ in range(2)
        )

    def forward(self, x):
        for attn in self.attn:
            x = x + attn(x)
        return x


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    fastattn.swap(model)
    return model


def test_every_nth_training_step_is_logged():
    torch.manual_seed(0)
    model, log, x = Blocks(sinks=True), Log(), torch.randn(2, S, 16)
    with AttentionSignals(model, log, every=2) as signals:
        for _ in range(4):
            model(x).sum().backward()
        with torch.no_grad():
            model(x)  # no training step
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert signals.step == 4 and {step for _, step in log} == {0, 2}
    with fastattn.capture(stats=("entropy", "max_logit", "sink_mass", "col_mass")) as rec:
        model(x)
    for n, record in enumerate(rec):
        wanted = {
            "max_logit": record.max_logit.max(), "entropy": record.entropy.mean(),
            "least_entropy": record.entropy.mean((0, 2)).min(),
            "first_mass": record.col_mass[..., 0].mean() / S, "sink_mass": record.sink_mass.mean(),
        }  # fmt: skip
        for kind, value in wanted.items():
            assert log[f"attention/attn.{n}/{kind}", 2] == pytest.approx(float(value), rel=1e-5)
    assert signals.last.keys() == {tag for tag, _ in log}
    assert signals.max_logits == {}  # step 3 was not recorded


def test_it_warns_of_collapse_and_growth_once():
    model, x = Blocks(), torch.randn(2, S, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AttentionSignals(model):
            model(x)
    with torch.no_grad():
        model.attn[1].q_proj.weight.mul_(1e4)
    with pytest.warns(UserWarning) as caught, AttentionSignals(model, every=1):
        for _ in range(2):
            model(x)
    sentences = [str(w.message) for w in caught]
    assert len(sentences) == 2
    assert sentences[0].startswith("fastattn: entropy collapse in attn.1 at step 0: its mean")
    assert sentences[1].startswith("fastattn: logit growth in attn.1 at step 0: its largest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AttentionSignals(model, least_entropy=0, largest_logit=math.inf):
            model(x)


def test_an_exception_leaves_nothing_open():
    model = Blocks()
    with AttentionSignals(model) as signals:
        with pytest.raises(ValueError, match="x has"):
            model(torch.randn(2, S, 15))
        assert not fastattn.capturing.watched and not signals.last
        model(torch.randn(2, S, 16))
    with pytest.raises(ValueError, match="every is 0"):
        AttentionSignals(model, every=0)
    with pytest.raises(TypeError, match=r"writer is a list without add_scalar\(\)"):
        AttentionSignals(model, [])


MODELS = {"own keys": Blocks, "grouped": lambda: Blocks(2), "torch": encoder}


@pytest.mark.parametrize("kind", MODELS)
def test_clipped_logits_are_the_threshold(kind):
    torch.manual_seed(0)
    model, x = MODELS[kind](), torch.randn(2, S, 16)

    def first_logits():
        with fastattn.capture(stats=("max_logit",), layers=[0]) as rec:
            model(x)
        return largest_logits(rec)

    ((name, before),) = first_logits().items()
    threshold = float(before.sort().values[1:3].mean())  # two heads are over it
    over = before > threshold
    clipped = qk_clip(model, {name: before}, threshold)
    torch.testing.assert_close(clipped[name], torch.where(over, threshold / before, 1.0))
    after = first_logits()[name]
    torch.testing.assert_close(after, before.clamp(max=threshold), atol=1e-5, rtol=1e-4)
    assert qk_clip(model, {name: after}, threshold * 1.01) == {}


def test_copies_of_a_model_are_clipped_alike():
    assert_right("signals_cases.py")


def test_what_cannot_be_clipped_is_refused():
    model = Blocks(qk_norm=True)
    with pytest.raises(ValueError, match=r"attn\.0 normalises its queries and keys"):
        qk_clip(model, {"attn.0": torch.full((4,), 200.0)})
    with pytest.raises(ValueError, match="whose projections are not where"):
        qk_clip(nn.Sequential(nn.Linear(2, 2)), {"0": torch.tensor([200.0])})


def test_trainer_callback(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import fastattn.hf
    from fastattn.hf.signals import SignalsCallback

    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=S,
    )  # fmt: skip
    model = fastattn.hf.enable(transformers.BertForSequenceClassification(config))
    rows = [{"input_ids": torch.randint(16, (S,)), "labels": n % 2} for n in range(16)]
    log = Log()
    callback = SignalsCallback(log, every=2, clip=1e-3)

    def train(**options):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
            gradient_accumulation_steps=2, report_to=[], save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, **options,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()

    train()
    assert {step for _, step in log} == {0, 2}
    tag = "attention/bert.encoder.layer.1.attention.self/max_logit"
    assert log[tag, 2] < log[tag, 0] / 5  # clipped after step 0
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(NotImplementedError, match="torch_compile=True"):
        callback.on_train_begin(
            transformers.TrainingArguments(str(tmp_path), torch_compile=True, use_cpu=True),
            None,
            None,
        )

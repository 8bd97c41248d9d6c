"""fastattn.hf in training and under torch.compile: dropout, checkpoints, Trainer, static caches."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import CACHE, Counter, build, inputs_of
from torch.utils.data import Dataset
from transformers import StaticCache, Trainer, TrainingArguments

import fastattn.hf

DROPOUT = {
    "bert": {"attention_probs_dropout_prob": 0.4},
    "llama": {"attention_dropout": 0.4},
    "t5": {"dropout_rate": 0.4},
    "gpt2": {"attn_pdrop": 0.4},
}


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def gradients(model, inputs, seed=7):
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**inputs, use_cache=False).logits
    out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


@pytest.mark.parametrize("name", DROPOUT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_weights(name, reentrant, counter):
    model = fastattn.hf.enable(build(name, **DROPOUT[name])).train()
    inputs = inputs_of(name, "right")
    out, grads = gradients(model, inputs)
    calls = counter.take()
    assert not torch.equal(out, gradients(model, inputs, seed=8)[0])
    counter.take()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, again_grads = gradients(model, inputs)
    assert counter.take() == 2 * calls  # the forward, and again for the backward
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)
    largest = max(x.abs().max() for x in grads.values())
    for key in grads:
        assert (again_grads[key] - grads[key]).abs().max() <= 1e-6 * largest, key


def test_dropout_is_off_in_eval_and_unbiased_in_training():
    model = fastattn.hf.enable(build("llama", attention_dropout=0.3, num_hidden_layers=1))
    inputs = inputs_of("llama")
    model.eval()
    want = model(**inputs, output_hidden_states=True)
    assert torch.equal(model(**inputs).logits, want.logits)
    module = model.model.layers[0].self_attn
    seen = []
    handle = module.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(**inputs)
    model.train()
    with torch.no_grad():
        for _ in range(400):
            model(**inputs)
    handle.remove()
    exact, *dropped = seen
    mean = torch.stack(dropped).mean(0)
    assert (mean - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert (dropped[0] - exact).abs().mean() > 0.2 * exact.abs().mean()


class Sentences(Dataset):
    """Eight rows of a repeated pattern, some of them padded."""

    def __len__(self):
        return 8

    def __getitem__(self, n):
        ids = torch.arange(10).remainder(3) + 3 + n % 4
        mask = torch.ones(10, dtype=torch.long)
        mask[10 - n % 3 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_trainer(name, tmp_path, counter):
    """Every loss equals eager's, with accumulation and checkpointing, and training learns."""
    pytest.importorskip("accelerate")
    losses = {}
    for implementation in ("eager", "fastattn"):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, use_cpu=True,
            learning_rate=3e-3, logging_steps=1, report_to=[], save_strategy="no", seed=1,
            gradient_accumulation_steps=2, gradient_checkpointing=True, disable_tqdm=True,
        )  # fmt: skip
        model = build(name)
        model.set_attn_implementation(implementation)
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
        trainer.train()
        losses[implementation] = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert counter.take() == 8 * 2 * 2 * 2  # steps, accumulated, layers, and recomputed
    torch.testing.assert_close(losses["fastattn"], losses["eager"], rtol=1e-3, atol=1e-3)
    assert losses["fastattn"][-1] < losses["fastattn"][0]


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_compiled_decoding_with_a_static_cache(name):
    """One graph for prefill and one for every later step, its position a tensor."""
    torch._dynamo.reset()
    model, ids = build(name), inputs_of(name)["input_ids"]
    want = model(input_ids=ids).logits
    fastattn.hf.enable(model)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = [model(input_ids=ids[:, :4], **{CACHE: cache}).logits]
        for n in range(4, ids.shape[1]):
            got.append(step(input_ids=ids[:, n : n + 1], **{CACHE: cache}).logits)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, padding", [("bert", "right"), ("llama", "left"), ("t5", "right")])
def test_compiled_training_step(name, padding):
    torch._dynamo.reset()
    fewer = {"num_layers": 1, "num_decoder_layers": 1} if name == "t5" else {}
    model, inputs = fastattn.hf.enable(build(name, **fewer)).train(), inputs_of(name, padding)
    want, want_grads = gradients(model, inputs)
    step = torch.compile(model, backend="aot_eager")
    step.zero_grad = model.zero_grad
    got, got_grads = gradients(step, inputs)
    torch._dynamo.reset()
    if name == "llama":
        rows = inputs["attention_mask"].bool()
        want, got = want[rows], got[rows]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if name != "llama":  # whose loss counts padded rows too in this version
        assert want_grads.keys() == {n.removeprefix("_orig_mod.") for n in got_grads}
        for n, grad in got_grads.items():
            want = want_grads[n.removeprefix("_orig_mod.")]
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4, msg=n)


def test_compiled_layers_take_masks_made_outside():
    """Compiling layer by layer: the mask is made in eager mode and passed into the graph."""
    torch._dynamo.reset()
    model, inputs = fastattn.hf.enable(build("llama")), inputs_of("llama", "left")
    want = model(**inputs).logits
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    got = model(**inputs).logits
    torch._dynamo.reset()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_deepcopy_keeps_it(counter):
    model = copy.deepcopy(fastattn.hf.enable(build("bert")))
    model(**inputs_of("bert", "right"))
    assert counter.take() == 2

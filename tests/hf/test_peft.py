"""peft's wrappers: LoRA on swapped modules, and around transformers models."""

from __future__ import annotations

import pytest
import torch
from swap_models import Block, model, x_of

import fastattn

peft = pytest.importorskip("peft")
SETTINGS = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def lora(m, *targets):
    torch.manual_seed(0)
    return peft.get_peft_model(m, peft.LoraConfig(target_modules=list(targets), **SETTINGS)).eval()


def with_gradients(m, *x):
    m.zero_grad()
    out = m(*x)
    out = out if torch.is_tensor(out) else out.last_hidden_state
    out.sin().sum().backward()
    return [out.detach(), *(p.grad for p in m.parameters() if p.grad is not None)]


@pytest.mark.parametrize("first", ["swap", "lora"])
def test_lora_on_a_swapped_block(first):
    m, plain = model(Block), lora(model(Block), "qkv", "proj")
    if first == "swap":
        fastattn.swap(m)
    m = lora(m, "qkv", "proj")
    if first == "lora":
        assert [name for name, *_ in fastattn.swap(m).swapped] == ["base_model.model"]
    want = with_gradients(plain, x_of())
    assert len(want) == 5
    torch.testing.assert_close(with_gradients(m, x_of()), want, rtol=1e-4, atol=1e-5)
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(m, change)()
        torch.testing.assert_close(m(x_of()), want[0], rtol=1e-4, atol=1e-5)
    merged = m.merge_and_unload()
    assert isinstance(merged, Block) and not fastattn.swap(merged).swapped
    torch.testing.assert_close(merged(x_of()), want[0], rtol=1e-4, atol=1e-5)
    fastattn.unswap(merged)
    torch.testing.assert_close(merged(x_of()), want[0], rtol=1e-4, atol=1e-5)


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize("depth", [1, 2])
def test_enable_takes_wrappers(depth):
    from fastattn import hf

    inner, tokens = bert(), torch.arange(12).view(2, 6)
    m = inner
    for _ in range(depth):
        m = lora(m, "query", "value")
    want = with_gradients(m, tokens)
    assert hf.enable(m) is m and inner.config._attn_implementation == "fastattn"
    torch.testing.assert_close(with_gradients(m, tokens), want, rtol=1e-4, atol=1e-5)
    m.set_attn_implementation("eager")
    assert inner.config._attn_implementation == "eager"
    (row,) = fastattn.swap(m).swapped
    assert row[1:] == ("BertModel", "fastattn.hf.enable()")
    assert inner.config._attn_implementation == "fastattn"
    torch.testing.assert_close(with_gradients(m, tokens), want, rtol=1e-4, atol=1e-5)
    fastattn.unswap(m)
    assert inner.config._attn_implementation == "eager"


def test_enable_refuses_wrappers_of_nothing():
    from fastattn import hf

    with pytest.raises(TypeError, match=r"model is of type PeftModel.*or a module that holds one"):
        hf.enable(lora(model(Block), "qkv"))

"""Models whose masks become key ranges equal eager: Llama 4's chunks, PaliGemma's prefix and Gemma
3's images, which see all of themselves.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_models import DECODER, VOCABULARY, Counter

import fastattn.hf  # noqa: F401

VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "projection_dim": 32,
}  # fmt: skip


def llama4(implementation):
    config = transformers.Llama4TextConfig(
        **DECODER, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
    )
    return transformers.Llama4ForCausalLM._from_config(config, attn_implementation=implementation)


def paligemma(implementation):
    text = {"model_type": "gemma", "head_dim": 8, **DECODER}
    config = transformers.PaliGemmaConfig(
        vision_config=VISION, text_config=text, image_token_index=98, projection_dim=32
    )
    family = transformers.PaliGemmaForConditionalGeneration
    return family._from_config(config, attn_implementation=implementation)


def gemma3(implementation):
    layers = ["full_attention", "sliding_attention"]
    text = {"head_dim": 8, "layer_types": layers, "sliding_window": 4, **DECODER}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, image_token_index=98, mm_tokens_per_image=4
    )
    family = transformers.Gemma3ForConditionalGeneration
    return family._from_config(config, attn_implementation=implementation)


def built(make, implementation):
    torch.manual_seed(0)
    model = make(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def inputs(padding: bool) -> dict:
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, : 3 * padding] = 0
    return {
        "input_ids": torch.randint(3, VOCABULARY - 2, (2, 11), generator=draw),
        "attention_mask": mask,
    }


def check(make, given: dict, counter) -> list[dict]:
    """Logits of visible rows, and a gradient, equal eager's; the options of each attention call."""
    results = []
    for implementation in ("eager", "fastattn"):
        model = built(make, implementation)
        logits = model(**given, use_cache=False).logits[given["attention_mask"].bool()]
        logits.square().sum().backward()
        name, gradient = next(
            (n, x.grad) for n, x in model.named_parameters() if "q_proj" in n and x.grad is not None
        )
        results.append((logits.detach(), gradient))
    for x, y in zip(*results):
        torch.testing.assert_close(y, x, rtol=2e-4, atol=2e-4)
    return counter.options


@pytest.mark.parametrize("padding", [False, True])
def test_llama4_chunks(padding, counter):
    options = check(llama4, inputs(padding), counter)
    assert [x.get("key_ranges") is not None for x in options] == [True, True]
    assert all(x.get("mask") is None or x["mask"].shape[2] == 1 for x in options)


@pytest.mark.parametrize("padding", [False, True])
def test_paligemma_prefix(padding, counter):
    given = inputs(padding)
    given["token_type_ids"] = torch.tensor([[0] * 6 + [1] * 5] * 2)
    options = check(paligemma, given, counter)
    assert len(options) == 2 and all(x["key_ranges"] is not None for x in options)


def test_gemma3_images(counter):
    given = inputs(False)
    given["token_type_ids"] = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]] * 2)
    options = check(gemma3, given, counter)
    assert options[0]["key_ranges"] is not None
    assert options[1].get("mask") is not None  # made by an or_mask_function, which may be anyone's


def test_llama4_generates_as_eager_does(counter):
    """Past a chunk's end, one token after the other beside a cache, and a padded row."""
    texts = []
    for implementation in ("eager", "fastattn"):
        model = built(llama4, implementation)
        texts.append(model.generate(**inputs(True), max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)
    assert any(x.get("key_ranges") is not None for x in counter.options)

"""The initial weights of a model: the same distribution from the constructor, from
reset_parameters(), and from the reset_parameters() of every submodule after the meta device."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from model_cases import MODELS
from torch import nn

from fastattn.models import GPT
from fastattn.nn import (
    Attention,
    GeGLU,
    LayerNorm,
    LearnedPositionalEncoding,
    RMSNorm,
    TransformerBlock,
)

BLOCKS = {
    "attention": lambda: Attention(64, 4, 2, bias=True, qk_norm=True, sinks=True, rotary=True),
    "block": lambda: TransformerBlock(64, 4, context_dim=24, mlp="gelu", norm="layer", sinks=True),
    "geglu": lambda: GeGLU(64, 96, bias=True),
    "layer norm": lambda: LayerNorm(64),
    "rms norm": lambda: RMSNorm(64),
    "learned positions": lambda: LearnedPositionalEncoding(64, 32),
}


def part_by_part(make) -> nn.Module:
    """make()'s module, initialised as in sharded training."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for x in [*model.parameters(), *model.buffers()]:
        nn.init.constant_(x, float("nan"))  # what uninitialised memory may hold
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def assert_same_distribution(found: nn.Module, wanted: nn.Module) -> None:
    """Means and deviations of each tensor, to within five of their own deviations."""
    for (name, a), (_, b) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        a, b = a.detach(), b.detach()
        std, few = b.std(correction=0), b.numel() ** 0.5
        assert (a.mean() - b.mean()).abs() <= 7 * std / few, name
        assert (a.std(correction=0) - std).abs() <= 5 * std / few, name
    with torch.no_grad():
        for a, b in zip(found.buffers(), wanted.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [*MODELS, *BLOCKS])
def test_part_by_part(name):
    torch.manual_seed(0)
    make = MODELS.get(name) or BLOCKS[name]
    found, wanted = part_by_part(make), make()
    assert_same_distribution(found, wanted)
    if name in MODELS:
        found.reset_parameters()
        assert_same_distribution(found, wanted)


def test_the_loss_at_the_start_is_that_of_guessing():
    torch.manual_seed(0)
    model = part_by_part(lambda: GPT(vocab_size=100, dim=64, heads=4, layers=3, max_len=64))
    ids = torch.randint(0, 100, (4, 32))
    assert abs(model(ids, labels=ids).loss.item() - 4.605) < 0.1
    assert model.num_parameters() == len(nn.utils.parameters_to_vector(model.parameters()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_starts_itself(how):
    model = MODELS["GPT"]()
    before = model.embed.weight.clone()
    copied = how(model)
    copied.embed.reset_parameters()
    assert torch.equal(model.embed.weight, before)
    assert not torch.equal(copied.embed.weight, before)
    assert type(copied.embed) is nn.Embedding  # torch's tools require exactly that


def test_the_start_keeps_no_module_alive():
    model = MODELS["GPT"]()
    embed = weakref.ref(model.embed)
    gc.disable()
    try:
        del model
        assert embed() is None
    finally:
        gc.enable()


def test_every_layer_has_a_rotary_of_its_own_and_one_table():
    model = MODELS["GPT"]()
    first, second = (block.attn.rotary for block in model.blocks[:2])
    assert first is not second and first.table is second.table
    assert not any("rotary" in name for name in model.state_dict())
    copied = copy.deepcopy(model)
    assert copied.blocks[0].attn.rotary.table is copied.blocks[1].attn.rotary.table

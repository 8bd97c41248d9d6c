"""torch's fast paths compute attention from the parameters of a MultiheadAttention without calling
its forward. They must not be used for ours, which must still report its attributes truthfully."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastattn
from fastattn import nn as fnn

pytestmark = pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
E, H, B, L = 12, 2, 3, 5
HIDDEN = torch.arange(L) >= torch.tensor([[L], [3], [1]])


@pytest.fixture
def calls(monkeypatch):
    """For each call of our MultiheadAttention's forward, whether the query was nested."""
    calls, original = [], fnn.MultiheadAttention.forward

    def counting(self, query, *args, **kwargs):
        calls.append(query.is_nested)
        return original(self, query, *args, **kwargs)

    monkeypatch.setattr(fnn.MultiheadAttention, "forward", counting)
    return calls


def layers():
    """torch's layer, and a copy with our attention, in evaluation mode."""
    theirs = nn.TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
    around = copy.deepcopy(theirs)
    around.self_attn.__class__ = fnn.MultiheadAttention
    return theirs, around


@pytest.mark.parametrize("kdim, vdim", [(None, None), (E, E), (7, None), (None, 7)])
def test_same_embed_dim_is_truthful(kdim, vdim):
    made = [
        cls(E, H, kdim=kdim, vdim=vdim)
        for cls in (nn.MultiheadAttention, *[fnn.MultiheadAttention] * 2)
    ]
    made[2] = copy.deepcopy(made[1])
    swapped = copy.deepcopy(made[0])
    fastattn.swap(swapped)
    want = made[0]._qkv_same_embed_dim
    assert want is (kdim in (None, E) and vdim in (None, E))
    assert all(x._qkv_same_embed_dim is want for x in (*made, swapped))
    assert (made[1].in_proj_weight is not None) is want


@torch.no_grad()
def test_torchs_encoder_layer_cannot_bypass_it(calls):
    theirs, around = layers()
    x = torch.randn(B, L, E)
    torch.testing.assert_close(around(x), theirs(x))
    out, want = (m(x, src_key_padding_mask=HIDDEN) for m in (around, theirs))
    torch.testing.assert_close(out[~HIDDEN], want[~HIDDEN])
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    for got, alone in zip(around(nested).unbind(), (x[0], x[1, :3])):
        torch.testing.assert_close(got, theirs(alone[None])[0])
    assert calls == [False, False, True]


class Own(nn.TransformerEncoderLayer):
    """If a layer has its own forward, swap() leaves the layer, but swaps the attention inside."""

    def forward(self, src, *args, **kwargs):
        return super().forward(src, *args, **kwargs)


class Wrapper(nn.Module):
    """A wrapper around a module, like peft's, that forwards attribute access."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def _qkv_same_embed_dim(self):
        return self.inner._qkv_same_embed_dim

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@torch.no_grad()
def test_nor_can_a_subclass_or_a_wrapped_one(calls):
    layer = Own(E, H, 16, batch_first=True).eval()
    x = torch.randn(B, L, E)
    want = layer(x)
    fastattn.swap(layer)
    assert type(layer) is Own
    torch.testing.assert_close(layer(x), want)
    layer.self_attn = Wrapper(layer.self_attn)
    torch.testing.assert_close(layer(x), want)
    assert calls == [False, False]


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_encoder_with_and_without_nested_tensors(calls, nested):
    """torch's encoder makes its input nested in evaluation mode; the attention inside accepts
    it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's warning about a layer that takes no nested tensors
        encoders = [nn.TransformerEncoder(x, 2, enable_nested_tensor=nested) for x in layers()]
    x = torch.randn(B, L, E)
    want, out = (m.eval()(x, src_key_padding_mask=HIDDEN) for m in encoders)
    torch.testing.assert_close(out[~HIDDEN], want[~HIDDEN])
    assert calls == [nested, nested]
    if nested:
        assert not out[HIDDEN].any()


@torch.no_grad()
@pytest.mark.parametrize("how", ["compile", "export"])
def test_nor_while_torch_traces(how):
    theirs, around = layers()
    x, traced = torch.randn(B, L, E), []

    def backend(graph, _):
        traced.append(str(graph.graph))
        return graph

    if how == "compile":
        out = torch.compile(around, fullgraph=True, backend=backend)(x)
    else:
        program = torch.export.export(around, (x,))
        traced.append(str(program.graph))
        out = program.module()(x)
    torch.testing.assert_close(out, theirs(x))
    assert "flash_attn_fwd" in traced[0] and "transformer_encoder_layer_fwd" not in traced[0]


# ---- peft, which asks before it adapts -----------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(E, H, batch_first=True), nn.Linear(E, E)

    def forward(self, x):
        return self.out(self.attn(x, x, x, key_padding_mask=HIDDEN)[0])[~HIDDEN]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x, src_key_padding_mask=HIDDEN)[~HIDDEN]


def adapted(model, targets, swap, folder):
    """Outputs and gradients of a model before, with and after a LoRA adapter."""
    import peft

    torch.manual_seed(0)
    base, x = model().double(), torch.randn(B, L, E, dtype=torch.float64)
    fresh = copy.deepcopy(base)
    if swap == "before":
        fastattn.swap(base), fastattn.swap(fresh)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    lora = peft.get_peft_model(base, config)
    if swap == "after":
        assert fastattn.swap(lora).swapped
    out = lora.train()(x)
    adapters = [p for p in lora.parameters() if p.requires_grad]
    found = [out, *torch.autograd.grad(out.sin().sum(), adapters, materialize_grads=True)]
    with torch.no_grad():
        found.append(lora.eval()(x))
        with lora.disable_adapter():
            found.append(lora(x))
        for change in (lora.merge_adapter, lora.unmerge_adapter):
            change()
            found.append(lora(x))
        lora.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(fresh, folder).eval()
        if swap == "after":
            fastattn.swap(loaded)
        found.append(loaded(x))
        plain = lora.merge_and_unload()
        found.append(plain(x))
        fastattn.unswap(plain)
        found.append(plain(x))
    return found


@pytest.mark.parametrize("swap", ["before", "after"])
@pytest.mark.parametrize("model, targets", [
    (Block, ["attn"]), (Block, ["attn", "out"]), (Encoder, ["self_attn", "linear1"]),
])  # fmt: skip
def test_lora(model, targets, swap, tmp_path, monkeypatch):
    """Equal to the unswapped model without its fast path, which ignores adapters."""
    pytest.importorskip("peft")
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        want = adapted(model, targets, None, tmp_path / "torch")
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    got = adapted(model, targets, swap, tmp_path / "fastattn")
    torch.testing.assert_close(got, want)
    assert not torch.allclose(want[-6], want[-5])  # the adapter has an effect

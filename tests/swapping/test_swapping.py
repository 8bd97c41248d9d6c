"""swap() and unswap(): what changes, what stays the same, and what is left alone."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from swap_models import Block, D, H, HiddenAttention, ImportedAttention, S, model, x_of
from torch import nn

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:.*(enable_nested_tensor|prototype|quantization)")


def calls_in(function):
    """(its result, how often fastattn's kernel ran, how often anything of torch's ran)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    counts = {e.key: e.count for e in profile.key_averages()}
    torchs = ("aten::_scaled_dot_product", "aten::_native_multi_head", "aten::_transformer_encoder",
              "aten::scaled_dot_product")  # fmt: skip
    others = sum(n for name, n in counts.items() if name.startswith(torchs))
    return result, counts.get("fastattn::flash_attn_fwd", 0), others


# ---- what changes -------------------------------------------------------------------------------

WHY = {
    "doubled": "Doubled has a forward of its own",
    "own": "OwnLayer has a forward of its own",
}


def test_report():
    report = fastattn.swap(model())
    swapped = {name: what for name, _, what in report.swapped}
    assert set(swapped) == {
        "encoder", "encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.1",
        "encoder.layers.1.self_attn", "decoder", "decoder.layers.0", "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn", "named", "own.self_attn", "block",
    }  # fmt: skip
    assert swapped["named"] == "fastattn.nn.MultiheadAttention"
    assert swapped["encoder"] == "fastattn.nn.TransformerEncoder"
    assert swapped["block"] == "its scaled_dot_product_attention is fastattn's"
    assert {name: why for name, _, why in report.left} == WHY
    lines = str(report).splitlines()
    assert lines[0] == "swapped: 12" and "left alone: 2" in lines
    (line,) = (x for x in lines if x.startswith("  named "))
    assert line.split() == ["named", "Named", "fastattn.nn.MultiheadAttention"]
    assert str(fastattn.swap(nn.Linear(2, 2))) == "swapped: none\nleft alone: none"


@pytest.mark.native
def test_every_swapped_module_runs_on_fastattn():
    """In evaluation without gradients, where torch uses its fast paths."""
    m, x = model(), x_of()
    with torch.no_grad():
        want, ours, theirs = calls_in(lambda: m(x))
        assert ours == 0 and theirs > 0
        fastattn.swap(m)
        got, ours, theirs = calls_in(lambda: m(x))
        assert ours == 7  # 2 encoder, 2 decoder, named, own, block
        m.doubled = nn.MultiheadAttention(D, H, batch_first=True)
        fastattn.swap(m)
        _, ours, theirs = calls_in(lambda: m(x))
        assert (ours, theirs) == (8, 0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_and_training():
    m, x = model().train(), x_of()
    m.block.attn_drop.p = m.block.proj_drop.p = 0.0
    found = []
    for _ in range(2):
        m.zero_grad()
        out = m(x)
        out.sin().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in m.parameters())])
        fastattn.swap(m)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_attention_dropout_of_a_block_is_fastattns():
    m = model(Block).train()
    m.proj_drop.p = 0.0
    fastattn.swap(m)
    x = x_of()
    assert not torch.equal(m(x), m(x))
    torch.manual_seed(2)
    first = m(x)
    torch.manual_seed(2)
    assert torch.equal(m(x), first)


# ---- what stays ---------------------------------------------------------------------------------


def snapshot(m):
    """Everything that identifies a model, except classes."""
    return {
        name: (id(x), x.training, {k: id(v) for k, v in vars(x).items() if k[0] != "_"},
               {k: id(v) for k, v in x._parameters.items()}, list(x._forward_hooks.values()),
               list(x._forward_pre_hooks.values()), list(x._buffers.items()))
        for name, x in m.named_modules()
    }  # fmt: skip


def test_identity_hooks_and_flags_stay_and_unswap_restores_exactly():
    m, x, seen = model(), x_of(), []
    hook = m.encoder.layers[0].self_attn.register_forward_hook(lambda *_: seen.append("after"))
    m.named.register_forward_pre_hook(lambda *_: seen.append("before"))
    m.named.register_buffer("extra", torch.ones(1))
    m.decoder.requires_grad_(False)
    m.encoder.layers[1].train()
    m.double().encoder.float().double()
    before, classes = snapshot(m), {n: type(y) for n, y in m.named_modules()}
    want, written = m(x.double()), repr(m)
    seen.clear()
    fastattn.swap(m)
    assert snapshot(m) == before
    for name, y in m.named_modules():
        assert isinstance(y, classes[name]) and type(y).__name__ == classes[name].__name__
    got = m(x.double())
    assert got.dtype == torch.float64 and seen == ["after", "before"]
    assert m.named.describe() == "2 heads"
    assert "fastattn.nn.TransformerEncoder(" in repr(m) and "fastattn" not in written
    torch.testing.assert_close(got, want)
    hook.remove()
    report = fastattn.unswap(m)
    assert len(report.swapped) == 12 and str(report).startswith("swapped back: 12")
    assert {n: type(y) for n, y in m.named_modules()} == classes and repr(m) == written
    assert torch.equal(m(x.double()), want)
    assert fastattn.unswap(m).swapped == ()


def test_what_is_printed_names_fastattn():
    """The repr of a model names its swapped classes; a report is a table at a console or in a
    notebook."""
    m = model()
    report = fastattn.swap(m)
    assert repr(report) == str(report) and repr(report).startswith("swapped: 12\n")
    shown = {str(name): x._get_name() for name, x in m.named_children()}
    assert shown["encoder"] == "fastattn.nn.TransformerEncoder"
    assert shown["named"] == "Named[fastattn.nn.MultiheadAttention]"
    assert shown["block"] == "Block[fastattn]" and shown["doubled"] == "Doubled"
    assert all(f"({name}): {what}(" in repr(m) for name, what in shown.items())
    assert type(m.named).__name__ == type(copy.deepcopy(m).named).__name__ == "Named"


def test_swapping_twice_is_harmless():
    m = model()
    fastattn.swap(m)
    classes = [type(y) for y in m.modules()]
    again = fastattn.swap(m)
    assert again.swapped == () and [type(y) for y in m.modules()] == classes
    assert sum(why == "is fastattn's already" for *_, why in again.left) == 12
    fastattn.unswap(m)
    assert type(m.encoder) is nn.TransformerEncoder and type(m.block) is Block


def test_fastattns_own_modules_stay_through_both():
    m = nn.Sequential(fastattn.nn.MultiheadAttention(D, H))
    assert fastattn.swap(m).left == (("0", "MultiheadAttention", "is fastattn's already"),)
    fastattn.unswap(m)
    assert type(m[0]) is fastattn.nn.MultiheadAttention


def test_a_shared_module_is_swapped_once():
    attention = nn.MultiheadAttention(D, H)
    m = nn.ModuleList([attention, attention])
    assert len(fastattn.swap(m).swapped) == 1 and m[0] is m[1]
    m.load_state_dict(nn.ModuleList([nn.MultiheadAttention(D, H)] * 2).state_dict(), strict=True)


def test_fused_attn_flag_comes_back():
    m = model(Block)
    x, bias = x_of(), torch.randn(S, S)
    m.fused_attn = False
    want = m(x, bias)
    fastattn.swap(m)
    assert m.fused_attn is True
    torch.testing.assert_close(m(x, bias), want, rtol=1e-4, atol=1e-5)
    fastattn.unswap(m)
    assert m.fused_attn is False


# ---- left alone, each with its sentence ---------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("cls", [ImportedAttention, HiddenAttention])
def test_other_ways_to_call_attention(cls):
    m, x = model(cls), x_of()
    want = m(x)
    fastattn.swap(m)
    got, ours, theirs = calls_in(lambda: m(x))
    assert (ours, theirs) == (1, 0)
    torch.testing.assert_close(got, want)


def test_replaced_forwards_and_torchscript_are_left():
    attention = nn.MultiheadAttention(D, H)
    attention.forward = types.MethodType(lambda self, x: x, attention)
    (row,) = fastattn.swap(attention).left
    assert row[2] == "its forward is replaced on the instance"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.MultiheadAttention(D, H))
    (row,) = fastattn.swap(scripted).left
    assert row[2] == "is compiled by TorchScript; swap before compiling"


def test_only_modules():
    for function in (fastattn.swap, fastattn.unswap):
        with pytest.raises(TypeError, match=r"model is of type int; accepted is a torch.nn.Module"):
            function(3)

"""nn.Transformer and its four parts, the drop-ins, against torch's."""

from __future__ import annotations

import copy
import inspect
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastattn import nn as fnn
from fastattn.core import checks
from fastattn.fused.norm import drop_reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(prototype stage|mismatched|enable_nested_tensor is True):UserWarning"
)
NAMES = (
    "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
    "TransformerDecoder", "Transformer",
)  # fmt: skip
D, H, B, L, S = 8, 2, 2, 5, 6


def layer(lib, part, **options):
    options = {"dim_feedforward": 16, "batch_first": True, "dropout": 0.0, **options}
    return getattr(lib, f"Transformer{part}Layer")(D, H, **options)


def make(lib, name, **options):
    """One of the five modules, from torch or ours, all from one seed."""
    torch.manual_seed(0)
    if name.endswith("Layer"):
        return layer(lib, name[len("Transformer") : -len("Layer")], **options)
    if name == "Transformer":
        options = {"dim_feedforward": 16, "batch_first": True, "dropout": 0.0, **options}
        return lib.Transformer(D, H, 2, 2, **options)
    part = name.removeprefix("Transformer")
    return getattr(lib, name)(layer(lib, part, **options), 2, nn.LayerNorm(D))


def call_of(name):
    """forward's inputs: src, or tgt and memory (or src and tgt)."""
    torch.manual_seed(1)
    src, tgt = torch.randn(B, S, D), torch.randn(B, L, D)
    return {"Transformer": (src, tgt), "TransformerEncoder": (src,),
            "TransformerEncoderLayer": (src,)}.get(name, (tgt, src))  # fmt: skip


def results(module, inputs, **kwargs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*inputs, **kwargs)
    loss = (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sin().sum()
    return [out, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]


# ---- torch's own samples, constructors, states --------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "TransformerDecoder"])
@pytest.mark.parametrize("training", [False, True])
def test_torchs_samples(name, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    (info,) = (i for i in module_db if i.module_cls is getattr(nn, name))
    found = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    assert len(found) >= 35
    for sample in found:
        made, call, both = sample.constructor_input, sample.forward_input, []
        for lib in (nn, fnn):
            torch.manual_seed(0)
            module = getattr(lib, name)(*made.args, **made.kwargs).double().train(training)
            for x in module.modules():
                if isinstance(x, nn.Dropout):
                    x.p = 0.0
                elif isinstance(x, nn.MultiheadAttention):
                    x.dropout = 0.0
                    assert lib is nn or type(x) is fnn.MultiheadAttention
            both.append(results(module, call.args, **call.kwargs))
        torch.testing.assert_close(both[1], both[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"norm_first": True}], ids=str)
def test_initialisation_and_state_dict(name, options):
    theirs, ours = (make(lib, name, **options) for lib in (nn, fnn))
    assert isinstance(ours, getattr(nn, name))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in ours.modules():
        assert type(module) not in {getattr(nn, n) for n in (*NAMES, "MultiheadAttention")}


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name):
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(getattr(lib, name), method)).parameters for lib in (fnn, nn)
        )
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


# ---- masks and modes ----------------------------------------------------------------------------

HIDDEN = torch.arange(S) >= torch.tensor([[4], [6]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask
MASKS = {
    "TransformerEncoderLayer": {"src_key_padding_mask": HIDDEN, "src_mask": CAUSAL(S)},
    "TransformerEncoder": {"src_key_padding_mask": HIDDEN, "mask": CAUSAL(S).bool()},
    "TransformerDecoderLayer": {
        "tgt_mask": CAUSAL(L), "memory_key_padding_mask": HIDDEN, "tgt_is_causal": True},
    "TransformerDecoder": {"tgt_mask": CAUSAL(L), "memory_key_padding_mask": HIDDEN},
    "Transformer": {
        "src_mask": torch.eye(S).bool(), "tgt_mask": CAUSAL(L), "memory_key_padding_mask": HIDDEN},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True, "activation": "gelu"}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_gradients(name, options, masked, training):
    theirs, ours = (make(lib, name, **options).train(training) for lib in (nn, fnn))
    masks = MASKS[name] if masked else {}
    want, got = (results(m, call_of(name), **masks) for m in (theirs, ours))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_batch_second_and_unbatched():
    for name in ("TransformerEncoder", "Transformer"):
        theirs, ours = (make(lib, name, batch_first=False) for lib in (nn, fnn))
        for inputs in ([x.transpose(0, 1) for x in call_of(name)], [x[0] for x in call_of(name)]):
            torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)


def test_a_causal_mask_needs_no_hint_and_the_hint_no_mask():
    ours = make(fnn, "TransformerEncoder")
    (src,) = call_of("TransformerEncoder")
    want = ours(src, CAUSAL(S))
    for call in ({"mask": CAUSAL(S), "is_causal": True}, {"is_causal": True}):
        torch.testing.assert_close(ours(src, **call), want)
    decoder, inputs = make(fnn, "TransformerDecoder"), call_of("TransformerDecoder")
    torch.testing.assert_close(
        decoder(*inputs, tgt_is_causal=True), decoder(*inputs, tgt_mask=CAUSAL(L))
    )


def test_evaluation_computes_what_training_does():
    """No fast path: with no_grad and padding, torch's gives 0 at padded positions."""
    (src,) = call_of("TransformerEncoder")
    theirs, ours = (make(lib, "TransformerEncoder") for lib in (nn, fnn))
    want = ours(src, src_key_padding_mask=HIDDEN)
    with torch.no_grad():
        got = ours.eval()(src, src_key_padding_mask=HIDDEN)
        torchs = theirs.eval()(src, src_key_padding_mask=HIDDEN)
    torch.testing.assert_close(got, want)
    assert got[HIDDEN].ne(0).all()
    torch.testing.assert_close(got[~HIDDEN], torchs[~HIDDEN], rtol=1e-4, atol=1e-5)


def test_an_entry_that_is_all_padding_gives_numbers():
    (src,) = call_of("TransformerEncoder")
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1] = True
    found = results(make(fnn, "TransformerEncoder"), (src,), src_key_padding_mask=hidden)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerEncoder"])
def test_nested_input(layout, name):
    ours = make(fnn, name)
    torch.manual_seed(2)
    rows = [torch.randn(n, D, requires_grad=True) for n in (3, 6, 1)]
    want = [ours(x[None])[0] for x in rows]
    leaves = [*rows, *ours.parameters()]
    grads = torch.autograd.grad(torch.cat(want).sin().sum(), leaves)
    out = ours(torch.nested.as_nested_tensor(rows, layout=layout))
    torch.testing.assert_close(list(out.unbind()), want)
    got = torch.autograd.grad(torch.cat(out.unbind()).sin().sum(), leaves)
    torch.testing.assert_close(got, grads, rtol=1e-4, atol=1e-5)
    if layout == torch.strided:  # torch accepts it too, in evaluation mode
        with torch.no_grad():
            x = torch.nested.as_nested_tensor(rows, layout=layout)
            torchs = make(nn, name).eval()(x)
            torch.testing.assert_close(list(torchs.unbind()), want, rtol=1e-4, atol=1e-5)


# ---- parts of other make ------------------------------------------------------------------------


def test_torchs_layers_in_our_stacks_become_ours():
    theirs = layer(nn, "Encoder")
    stack = fnn.TransformerEncoder(theirs, 2)
    assert type(theirs) is nn.TransformerEncoderLayer
    assert all(type(x) is fnn.TransformerEncoderLayer for x in stack.layers)
    assert all(type(x.self_attn) is fnn.MultiheadAttention for x in stack.layers)
    decoder = fnn.TransformerDecoder(layer(nn, "Decoder"), 1)
    assert type(decoder.layers[0].multihead_attn) is fnn.MultiheadAttention


class AddsMask(nn.Module):
    """A custom layer that relies on torch's stack passing float masks."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, src, src_mask=None, is_causal=False, src_key_padding_mask=None):
        assert src_mask.dtype == src_key_padding_mask.dtype == torch.float32
        return src + src_mask.exp().sum() + src_key_padding_mask.exp().sum()


def test_layers_of_other_classes_get_what_torch_gives():
    (src,) = call_of("TransformerEncoder")
    masks = {"mask": CAUSAL(S).isinf(), "src_key_padding_mask": HIDDEN}
    found = [lib.TransformerEncoder(AddsMask(), 2, enable_nested_tensor=False)(src, **masks)
             for lib in (nn, fnn)]  # fmt: skip
    assert torch.equal(*found)


def test_custom_encoder_and_decoder_stay():
    encoder, decoder = make(nn, "TransformerEncoder"), make(nn, "TransformerDecoder")
    ours = fnn.Transformer(D, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    assert ours.encoder is encoder and type(encoder.layers[0]) is nn.TransformerEncoderLayer
    assert ours.decoder is decoder and type(decoder.layers[0]) is nn.TransformerDecoderLayer
    src, tgt = call_of("Transformer")
    assert ours(src, tgt).shape == tgt.shape


def test_a_subclass_keeps_its_blocks():
    class Quiet(fnn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x * 0.0

    torch.manual_seed(0)
    quiet = Quiet(D, H, 16, batch_first=True, dropout=0.0)
    (src,) = call_of("TransformerEncoderLayer")
    assert torch.equal(quiet(src), quiet.norm2(quiet.norm1(src + quiet._sa_block(src, None, None))))


# ---- fused steps --------------------------------------------------------------------------------


class Replayed(nn.Module):
    """A dropout that drops what a recorded key dropped."""

    def __init__(self, p, keys):
        super().__init__()
        self.p, self.keys = p, keys

    def forward(self, x):
        return drop_reference(x, self.keys.pop(0), self.p)


@pytest.mark.native
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True, "activation": nn.GELU()}, {"bias": False}], ids=str
)
def test_fused_dropout_is_torchs_with_the_same_mask(name, options, monkeypatch):
    keys, draw = [], checks.dropout_key

    def record(seed, device):
        keys.append(draw(seed, device))
        return keys[-1]

    ours = make(fnn, name, dropout=0.3, **options)
    theirs = make(nn, name, dropout=0.3, **options)
    for x in (*ours.modules(), *theirs.modules()):
        if isinstance(x, nn.MultiheadAttention):
            x.dropout = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(checks, "dropout_key", record)
        got = results(ours, call_of(name))
    assert len(keys) == (3 if "Encoder" in name else 4)
    for child, x in list(theirs.named_children()):
        if isinstance(x, nn.Dropout):
            setattr(theirs, child, Replayed(0.3, keys))
    torch.testing.assert_close(got, results(theirs, call_of(name)), rtol=1e-4, atol=1e-5)
    assert not keys


def keys_drawn(module, monkeypatch):
    """How many fused dropouts run in a forward pass of an encoder layer."""
    drawn, draw = [], checks.dropout_key
    with monkeypatch.context() as patch:
        patch.setattr(checks, "dropout_key", lambda *a: drawn.append(1) or draw(*a))
        module.self_attn.dropout = 0.0
        module(*call_of("TransformerEncoderLayer"))
    return len(drawn)


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.native
def test_what_is_not_plainly_torchs_is_called(monkeypatch):
    """Hooks of each kind, replacements, patched instances, other devices."""
    new = partial(make, fnn, "TransformerEncoderLayer", dropout=0.3)
    assert keys_drawn(new(), monkeypatch) == 3
    assert keys_drawn(new().eval(), monkeypatch) == 0
    for name, fused_steps in (
        ("dropout", 2), ("linear1", 2), ("dropout1", 2), ("norm1", 3), ("linear2", 3)
    ):  # fmt: skip
        for hook in ("register_forward_hook", "register_forward_pre_hook"):
            ours, seen = new(), []
            getattr(getattr(ours, name), hook)(lambda *_, to=seen: to.append(1))
            assert (keys_drawn(ours, monkeypatch), seen) == (fused_steps, [1])
        ours, seen = new(), []
        getattr(ours, name).register_full_backward_hook(lambda *_, to=seen: to.append(1))
        results(ours, call_of("TransformerEncoderLayer"))
        assert seen == [1], name
    ours, seen = new(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert keys_drawn(ours, monkeypatch) == 0
    finally:
        handle.remove()
    assert ours.dropout in seen and ours.norm2 in seen and ours.linear1 in seen
    ours = new()
    ours.dropout, ours.dropout1 = nn.Identity(), nn.Dropout1d(0.3)
    assert keys_drawn(ours, monkeypatch) == 1
    ours = new()
    ours.dropout.forward = lambda x: x * 0
    assert keys_drawn(ours, monkeypatch) == 2
    assert keys_drawn(new(dropout=1.0), monkeypatch) == 0
    with torch.autograd.forward_ad.dual_level():
        assert keys_drawn(new(), monkeypatch) == 0
    ours = new()
    ours.norm2 = Doubled(D)
    want = new().eval()(*call_of("TransformerEncoderLayer")) * 2
    torch.testing.assert_close(ours.eval()(*call_of("TransformerEncoderLayer")), want)


def test_blocks_of_a_subclass_or_an_instance_are_called():
    for name in ("_sa_block", "_mha_block", "_ff_block"):
        ours = make(fnn, "TransformerDecoderLayer")
        inputs = call_of("TransformerDecoderLayer")
        before, original = ours(*inputs), getattr(ours, name)
        setattr(ours, name, lambda *a, original=original: original(*a) * 0.5)
        assert not torch.allclose(ours(*inputs), before)
        setattr(ours, name, lambda *a, original=original: original(*a))
        torch.testing.assert_close(ours(*inputs), before)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_means_are_those_without_dropout(p):
    """In a layer that is linear in its dropouts: norms and activation are replaced."""
    ours = make(fnn, "TransformerEncoderLayer", dropout=p, activation=lambda x: x)
    ours.norm1, ours.norm2, ours.self_attn.dropout = nn.Identity(), nn.Identity(), 0.0
    x = call_of("TransformerEncoderLayer")[0][:1].expand(2000, -1, -1)
    with torch.no_grad():
        branch = ours.linear2(ours.linear1(x[:1]))
        want = x[:1] + branch
        ours.self_attn.out_proj.weight.zero_()
        got = ours(x)
    spread = got.std(0) / 2000**0.5
    assert ((got.mean(0) - want[0]).abs() <= 5 * spread + 1e-6).all()


# ---- dropout, checkpoints, autocast, compilation ------------------------------------------------


def test_dropout_and_checkpointing():
    ours = make(fnn, "TransformerEncoder", dropout=0.3)
    (src,) = call_of("TransformerEncoder")
    found = []
    for run in (ours, ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        torch.manual_seed(3)
        x = src.clone().requires_grad_()
        out = run(x)
        found.append([out, *torch.autograd.grad(out.sin().sum(), x)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0])
    assert not torch.equal(ours(src), ours(src))
    assert torch.equal(ours.eval()(src), ours(src))


def test_autocast():
    theirs, ours = (make(lib, "Transformer") for lib in (nn, fnn))
    inputs = call_of("Transformer")
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (m(*inputs, **MASKS["Transformer"]) for m in (theirs, ours))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_compiles_whole(name):
    """With a causal mask and no hint too, where torch's own module breaks the graph."""
    ours = make(fnn, name)
    inputs, masks = call_of(name), MASKS[name]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want, got = (results(m, inputs, **masks) for m in (ours, compiled))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_copies():
    ours = make(fnn, "Transformer").eval()
    inputs = call_of("Transformer")
    assert torch.equal(copy.deepcopy(ours)(*inputs), ours(*inputs))


def test_activations():
    for activation in ("relu", "gelu", F.silu, nn.GELU("tanh")):
        theirs, ours = (make(lib, "TransformerEncoderLayer", activation=activation)
                        for lib in (nn, fnn))  # fmt: skip
        want, got = (results(m, call_of("TransformerEncoderLayer")) for m in (theirs, ours))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

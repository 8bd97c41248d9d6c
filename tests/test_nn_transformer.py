"""nn.Transformer and its four parts, the drop-ins, against torch's."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastattn import nn as fnn
from fastattn.nn.feedforward import ReluDropout
from fastattn.philox import keep_probability

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
    """One of the five, of the libraries' own parts, all from one seed."""
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
    """No fast path: with no_grad and padding, torch's gives 0 at padded places."""
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
    if layout == torch.strided:  # torch takes it too, in evaluation
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
    """A layer of one's own, which counts on torch's stack giving it float masks."""

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


# ---- the feed-forward block ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_relu_dropout(dtype):
    p, x = 0.3, torch.randn(40, 501, dtype=dtype, requires_grad=True)
    out = ReluDropout.apply(x, p)
    kept = out != 0
    assert not (kept & (x <= 0)).any()
    share = kept.sum() / (x > 0).sum()
    assert abs(share - (1 - p)) < 0.02
    want = torch.where(kept, x / keep_probability(p), 0.0)
    grad = torch.randn_like(x)
    torch.testing.assert_close(out, want.to(dtype))
    (got,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(got, torch.where(kept, grad / keep_probability(p), 0.0).to(dtype))
    four = (ReluDropout.apply(torch.ones(20000, 4), p) != 0).float().T  # of one draw each
    assert (four.mean(1) - (1 - p)).abs().max() < 0.02
    assert (four.corrcoef() - torch.eye(4)).abs().max() < 0.04  # independent


def test_relu_dropout_has_second_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(4)
        return ReluDropout.apply(x.sin(), 0.4)

    assert torch.autograd.gradcheck(seeded, (x,)) and torch.autograd.gradgradcheck(seeded, (x,))


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_feed_forward_keeps_torchs_way_where_it_must(name, monkeypatch):
    """Once for plain ReLU and dropout in training, and not for anything else."""
    ran = []
    original = ReluDropout.apply
    monkeypatch.setattr(ReluDropout, "apply", lambda *a: ran.append(1) or original(*a))
    inputs = call_of(name)
    plain = make(fnn, name, dropout=0.2)
    plain(*inputs)
    assert ran == [1]
    plain.eval()(*inputs)
    hooked = make(fnn, name, dropout=0.2)
    seen = []
    hooked.dropout.register_forward_hook(lambda *_: seen.append(1))
    hooked(*inputs)
    make(fnn, name, dropout=0.2, activation="gelu")(*inputs)
    make(fnn, name, dropout=0.0)(*inputs)
    make(fnn, name, dropout=1.0)(*inputs)
    with torch.autograd.forward_ad.dual_level():
        make(fnn, name, dropout=0.2)(*inputs)
    assert ran == [1] and seen == [1]


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
    """With the causal mask given and no hint, too, where torch's own breaks the graph."""
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

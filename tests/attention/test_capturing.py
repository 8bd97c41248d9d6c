"""capture(): what it records, that it changes nothing, and that nothing of it stays."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import capturing
from fastattn.flash_attn import flash_attn_func

S = 9


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not capturing.watched and not capturing._watches.get() and capturing._stance is None
    assert not torch_hooks._global_forward_hooks and not torch_hooks._global_forward_pre_hooks


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def entropy_of(q, k, causal: bool = False):
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
    p = scores.softmax(-1)
    return -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)


class Sdpa(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            q, k, v = block(x).unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, -1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out.transpose(1, 2).flatten(2)
        return x


class FlashAttn(Sdpa):
    def forward(self, x):
        for block in self.blocks:
            q, k, v = block(x).unflatten(-1, (2, 24)).chunk(3, -1)
            x = x + flash_attn_func(q, k, v, causal=True).flatten(2)
        return x


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        make = partial(fastattn.nn.Attention, 16, 4, 2, causal=True, rotary=True)
        self.attn = nn.ModuleList(make() for _ in range(2))

    def forward(self, x):
        for attn in self.attn:
            x = x + attn(x)
        return x


def bert() -> nn.Module:
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    import fastattn.hf

    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=S,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = fastattn.hf.enable(model)

        def forward(self, x):
            return self.bert(inputs_embeds=x).last_hidden_state

    return Wrapped()


def swapped() -> nn.Module:
    model = encoder()
    fastattn.swap(model)
    return model


MODELS = {  # what makes the model, and the names of its records
    "swap": (swapped, ["layers.0.self_attn", "layers.1.self_attn"]),
    "sdpa": (Sdpa, ["", ""]),
    "nn": (Blocks, ["attn.0", "attn.1"]),
    "hf": (bert, [f"bert.encoder.layer.{n}.attention.self" for n in (0, 1)]),
    "flash_attn": (FlashAttn, ["", ""]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_runs_as_without_it(kind):
    make, names = MODELS[kind]
    torch.manual_seed(1)
    model, x = make(), torch.randn(2, S, 16, requires_grad=True)

    def run():
        out = model(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()],
                                         allow_unused=True)  # fmt: skip

    with fastattn.override_sdpa():
        plain = run()
        with fastattn.capture(stats=("entropy", "col_mass")) as rec:
            seen = run()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert [r.name for r in rec] == names
    assert [r.layer for r in rec] == [None if name == "" else n for n, name in enumerate(names)]
    for r in rec:
        heads = 4 if kind == "nn" else 2
        assert r.entropy.shape == (2, heads, S) and r["col_mass"].shape == (2, heads, S)
        assert not r.entropy.requires_grad and r.call is None
        assert torch.allclose(r.col_mass.sum(-1), torch.full((2, heads), float(S)), atol=1e-4)


def test_numbers_are_those_of_the_probabilities():
    q, k, v = (torch.randn(2, 3, S, 8) for _ in range(3))
    with fastattn.capture(stats=("entropy", "max_logit", "pooled:3")) as rec:
        fastattn.attention(q, k, v, causal=True)
        fastattn.attention(q, k, v, dropout_p=0.5, dropout_seed=(1, 2))  # statistics: before it
    for r, causal in zip(rec, (True, False), strict=True):
        torch.testing.assert_close(r.entropy.double(), entropy_of(q, k, causal), atol=1e-5, rtol=0)
        assert r.pooled.shape == (2, 3, 3, 3) and r["pooled:3"] is r.pooled is r["pooled"]
    top = (q @ k.mT / 8**0.5).amax(-1)
    torch.testing.assert_close(rec[1].max_logit, top, atol=1e-5, rtol=0)


def test_heads_layers_device_and_inputs():
    model, x = swapped(), torch.randn(2, S, 16)
    with fastattn.capture(layers=[1], heads=[1], device="cpu", inputs=True) as rec:
        model(x)
    (record,) = rec
    assert record.layer == 1 and record.entropy.shape == (2, 1, S)
    whole = entropy_of(record.call.q, record.call.k)
    torch.testing.assert_close(record.entropy.double(), whole[:, 1:], atol=1e-5, rtol=0)
    with fastattn.capture(heads=slice(0, 1), stats=("topk:2",)) as rec:
        model(x)
    assert rec[0].topk.probs.shape == (2, 1, S, 2) and rec[0].topk.keys.dtype == torch.int64
    with pytest.raises(AttributeError, match="no 'entropy'; it has topk:2"):
        _ = rec[0].entropy
    sentence = r"heads is \[7\], and the call of layers.0.self_attn has 2 heads"
    with pytest.raises(ValueError, match=sentence), fastattn.capture(heads=[7]):
        model(x)


def test_grad_keeps_the_graph():
    q = torch.randn(1, 2, S, 8, requires_grad=True)
    k = torch.randn(1, 2, S, 8)
    with fastattn.capture(stats=("entropy",), grad=True) as rec:
        fastattn.attention(q, k, k)
    (dq,) = torch.autograd.grad(rec[0].entropy.sum(), q)
    (true,) = torch.autograd.grad(entropy_of(q, k).sum(), q)
    torch.testing.assert_close(dq, true, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_recorded_once(reentrant):
    model = swapped().train()
    x = torch.randn(2, S, 16, requires_grad=True)
    with fastattn.capture(grad=not reentrant) as rec:
        y = x
        for layer in model.layers:
            y = checkpoint(layer, y, use_reentrant=reentrant)
        y.sum().backward()
    assert [r.name for r in rec] == ["self_attn", "self_attn"]
    assert x.grad is not None


def test_nested_captures_each_record():
    q = torch.randn(1, 1, S, 8)
    with fastattn.capture() as outer:
        fastattn.attention(q, q, q)
        with fastattn.capture(stats=("max_logit",)) as inner:
            fastattn.attention(q, q, q, causal=True)
        fastattn.attention(q, q, q)
    assert (len(outer), len(inner)) == (3, 1) and list(inner[0]) == ["max_logit"]


def test_an_exception_leaves_nothing_behind():
    class Broken(Blocks):
        def forward(self, x):
            super().forward(x)
            raise KeyError("broken")

    model, x = Broken(), torch.randn(1, S, 16)
    with fastattn.capture() as rec:
        with pytest.raises(KeyError):
            model(x)
        model.attn[1](x)  # the outermost module now
    assert [r.name for r in rec] == ["attn.0", "attn.1", ""]
    with warnings.catch_warnings(), pytest.raises(KeyError, match="mine"):
        warnings.simplefilter("error")  # no warning on top of an exception
        with fastattn.capture():
            raise KeyError("mine")


def test_only_the_thread_that_opened_it_is_seen():
    model, x = Blocks(), torch.randn(1, S, 16)
    other: list = []

    def run():
        model(x)
        with fastattn.capture() as rec:
            model(x)
        other.extend(rec)

    with fastattn.capture() as rec:
        thread = threading.Thread(target=run)
        thread.start()
        model(x)
        thread.join()
    assert len(rec) == len(other) == 2


def test_compiled_models_run_eagerly():
    model, x = Blocks().eval(), torch.randn(1, S, 16)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        with fastattn.capture() as rec:
            compiled(x)
    assert [r.name for r in rec] == ["attn.0", "attn.1"]

    @torch.compile(backend="eager")
    def inside(x):
        with fastattn.capture():
            return model(x)

    with pytest.raises(RuntimeError, match="is opened in compiled code, which it cannot watch"):
        inside(x)
    with pytest.raises(RuntimeError, match="sees eager calls only"), fastattn.capture():
        torch.jit.trace(lambda q: fastattn.attention(q, q, q), torch.randn(1, 1, 4, 8))


def test_seeing_nothing_warns():
    saw_none = pytest.warns(UserWarning, match=r"saw no attention call .* fastattn.swap\(model\)")
    with saw_none, fastattn.capture():
        encoder()(torch.randn(1, S, 16))
    other_layers = pytest.warns(UserWarning, match=r"none of 2 calls: layers=\[5\]")
    with other_layers, fastattn.capture(layers=[5]):
        swapped()(torch.randn(1, S, 16))


def test_transforms():
    q = torch.randn(2, 1, 2, S, 8)

    def loss(q):
        return fastattn.attention(q, q, q).square().sum()

    true = torch.func.grad(loss)(q[0])
    with fastattn.capture() as rec:
        assert torch.equal(torch.func.grad(loss)(q[0]), true)
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(loss)(q)
    assert len(rec) == 1
    assert type(rec[0].entropy) is torch.Tensor and not rec[0].entropy.requires_grad
    assert not torch._C._functorch.is_functorch_wrapped_tensor(rec[0].entropy)
    with pytest.raises(NotImplementedError, match="grad=True"), fastattn.capture(grad=True):
        torch.func.grad(loss)(q[0])


def test_own_calls_are_not_recorded():
    """S_dmask and the weights of dropout are computed by attention."""
    q = torch.randn(1, S, 2, 8)
    module = fastattn.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(1, S, 16)
    with fastattn.capture() as rec:
        flash_attn_func(q, q, q, 0.5, return_attn_probs=True)
        module(x, x, x, need_weights=True)
    assert len(rec) == 2


def test_packed_and_cached_calls():
    q, cu = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    cache = torch.randn(1, 2, 6, 8)
    with fastattn.capture(stats=("entropy",)) as rec:
        fastattn.varlen_attention(q, q, q, cu, cu, 4, 4)
        fastattn.decode_attention(
            torch.randn(1, 2, 1, 8), cache, cache.clone(), cache_lens=3,
            k=torch.randn(1, 2, 1, 8), v=torch.randn(1, 2, 1, 8),
        )  # fmt: skip
    assert rec[0].entropy.shape == (1, 2, 7) and rec[1].entropy.shape == (1, 2, 1)
    x = q[:3].transpose(0, 1)
    torch.testing.assert_close(
        rec[0].entropy[0, :, :3].double(), entropy_of(x, x), atol=1e-5, rtol=0
    )
    with (
        pytest.raises(
            NotImplementedError,
            match=r"capture\(\), at the call of \(model\): stats has 'pooled:2' for",
        ),
        fastattn.capture(stats=("pooled:2",)),
    ):
        fastattn.varlen_attention(q, q, q, cu, cu, 4, 4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="entropi"):
        fastattn.capture(stats=("entropi",))
    with pytest.raises(ValueError, match="layers has -1"):
        fastattn.capture(layers=[-1])
    q, used = torch.randn(1, 1, S, 8), fastattn.capture()
    with used:
        fastattn.attention(q, q, q)
    with pytest.raises(RuntimeError, match="was opened before"), used:
        pass


def test_modules_are_not_kept():
    model = Blocks()
    with fastattn.capture() as rec:
        model(torch.randn(1, S, 16))
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None and len(rec) == 2

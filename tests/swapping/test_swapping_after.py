"""What happens to swapped models: copies, pickles, quantisation, pruning, compilation."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from swap_models import Block, D, Everything, H, Named, model, x_of
from torch import nn

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:.*(enable_nested_tensor|prototype|quantization)")


def saved_and_loaded(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": saved_and_loaded,
          "pickle": lambda m: pickle.loads(pickle.dumps(m)),
          "old pickle": lambda m: pickle.loads(pickle.dumps(m, 0))}  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_swapped_and_swap_back(how):
    m, x = model(), x_of()
    want = m(x)
    fastattn.swap(m)
    made = COPIES[how](m)
    assert [type(y) for y in made.modules()] == [type(y) for y in m.modules()]
    assert made.encoder is not m.encoder
    assert torch.equal(made(x), m(x))
    assert len(fastattn.unswap(made).swapped) == 12
    assert torch.equal(made(x), want) and type(made.named) is Named
    assert type(m.named) is not Named


def test_pickles_load_in_a_program_that_has_swapped_nothing():
    from fastattn import swap as _  # noqa: F401  the module below, which has the function's name

    m = model()
    fastattn.swap(m)
    data = pickle.dumps(m)
    fastattn.unswap(m)
    del m
    gc.collect()
    sys.modules["fastattn.swapping"]._made.clear()
    loaded = pickle.loads(data)
    assert isinstance(loaded.encoder, fastattn.nn.TransformerEncoder)
    assert loaded(x_of()).isfinite().all()


def test_dynamic_quantisation():
    m, x = model(), x_of()
    want = m(x)
    fastattn.swap(m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
    layer = small.encoder.layers[0]
    assert type(layer.linear1).__module__.startswith("torch.ao.nn.quantized")
    assert type(layer.self_attn.out_proj) is type(m.named.out_proj)  # torch's leaves it alone
    small.own = nn.Identity()  # torch's own layer does not survive it in evaluation mode
    m.own = nn.Identity()
    with torch.no_grad():
        got = small(x)
    torch.testing.assert_close(got, m(x), rtol=0.1, atol=0.1)
    assert not torch.equal(got, want)
    assert fastattn.unswap(small).swapped


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruning(when):
    m, x = model(), x_of()
    if when == "after":
        fastattn.swap(m)
    for module, name in ((m.named, "in_proj_weight"), (m.named.out_proj, "weight")):
        prune.l1_unstructured(module, name, amount=0.5)
    fastattn.swap(m)
    pruned = m(x)
    assert (m.named.in_proj_weight == 0).float().mean() == 0.5
    for module, name in ((m.named, "in_proj_weight"), (m.named.out_proj, "weight")):
        prune.remove(module, name)
    torch.testing.assert_close(m(x), pruned)
    fastattn.unswap(m)
    torch.testing.assert_close(m(x), pruned, rtol=1e-4, atol=1e-5)


def test_heads_of_a_block_can_be_removed():
    """Removes head 0 of 2 from a swapped module, as transformers' pruning did: sizes change."""
    m, x = model(Block), x_of()
    fastattn.swap(m)
    kept = torch.arange(D // H, D)
    rows = torch.cat([kept + n * D for n in range(3)])
    m.qkv.weight, m.qkv.bias = (nn.Parameter(p[rows]) for p in (m.qkv.weight, m.qkv.bias))
    m.proj.weight, m.num_heads = nn.Parameter(m.proj.weight[:, kept]), 1
    got = m(x)
    fastattn.unswap(m)
    torch.testing.assert_close(got, m(x), rtol=1e-4, atol=1e-5)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("registered", ["before", "after"])
@pytest.mark.parametrize("removed", ["before", "after"])
def test_parametrizations(registered, removed):
    """Registered and removed before and after the switch."""
    m, x = model(), x_of()
    plain = m(x)

    def register():
        parametrize.register_parametrization(m.named, "in_proj_weight", Halved())
        parametrize.register_parametrization(m.named.out_proj, "weight", Halved())

    if registered == "before":
        register()
        want = m(x)
        fastattn.swap(m)
    else:
        fastattn.swap(m)
        register()
        want = copy.deepcopy(m)
        fastattn.unswap(want)
        want = want(x)
    assert isinstance(m.named, fastattn.nn.MultiheadAttention)
    assert parametrize.is_parametrized(m.named) and isinstance(m.named, Named)
    torch.testing.assert_close(m(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(m)(x), want, rtol=1e-4, atol=1e-5)
    assert fastattn.swap(m).swapped == ()
    if removed == "before":
        parametrize.remove_parametrizations(m.named, "in_proj_weight")
        assert isinstance(m.named, fastattn.nn.MultiheadAttention)
    fastattn.unswap(m)
    assert not isinstance(m.named, fastattn.nn.MultiheadAttention)
    torch.testing.assert_close(m(x), want, rtol=1e-4, atol=1e-5)
    if removed == "after":
        parametrize.remove_parametrizations(m.named, "in_proj_weight")
    assert type(m.named) is Named
    assert not torch.equal(m(x), plain)


def test_swapping_one_of_two_copies_leaves_the_other():
    """Copies of a parametrized module share torch's class."""
    m = model()
    parametrize.register_parametrization(m.named, "in_proj_weight", Halved())
    other = copy.deepcopy(m)
    fastattn.swap(m)
    assert isinstance(m.named, fastattn.nn.MultiheadAttention)
    assert not isinstance(other.named, fastattn.nn.MultiheadAttention)


def test_a_class_wrapped_after_the_swap_is_named():
    m = model()
    fastattn.swap(m)
    m.named.__class__ = type("Sharded", (type(m.named),), {})
    (row,) = fastattn.unswap(m).left
    assert row[0] == "named" and "its class became Sharded after swap()" in row[2]


@pytest.mark.parametrize("cls", [Everything, Block])
def test_compiles_after_the_swap(cls):
    """The compiled graph runs fastattn's operator, and none of torch's."""
    m, x, graphs = model(cls), x_of(), []
    if cls is Everything:
        m.own = m.doubled = nn.MultiheadAttention(D, H, batch_first=True)
        m.own = nn.Identity()
    want = m(x)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(m, backend=backend)(x)
    fastattn.swap(m)
    graphs.clear()
    got = torch.compile(m, backend=backend, fullgraph=cls is Block)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("flash_attn_fwd" in t for t in targets) == (1 if cls is Block else 7)
    assert not any("scaled_dot_product" in t for t in targets)


# ---- transformers -------------------------------------------------------------------------------


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    wrapper = nn.Module()
    wrapper.encoder = transformers.BertModel(config).eval()
    return wrapper


def enabled_by(monkeypatch, enable):
    hf = types.ModuleType("fastattn.hf")
    hf.enable = enable
    monkeypatch.setitem(sys.modules, "fastattn.hf", hf)
    monkeypatch.setattr(fastattn, "hf", hf, raising=False)


def test_transformers_models_go_through_hf_enable(bert, monkeypatch):
    enabled_by(monkeypatch, lambda m: m.set_attn_implementation("sdpa"))  # in place of fastattn's
    report = fastattn.swap(bert)
    assert report.swapped == (("encoder", "BertModel", "fastattn.hf.enable()"),)
    assert report.left == () and bert.encoder.config._attn_implementation == "sdpa"
    again = fastattn.swap(bert)
    assert again.swapped == ()
    assert again.left == (("encoder", "BertModel", "is fastattn's already"),)
    assert fastattn.unswap(bert).swapped[0][2] == "set_attn_implementation()"
    assert bert.encoder.config._attn_implementation == "eager"
    assert fastattn.unswap(bert).swapped == ()


def test_transformers_models_that_cannot_be_served_are_named(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastattn.hf", None)
    monkeypatch.delattr(fastattn, "hf", raising=False)
    left = {name: why for name, _, why in fastattn.swap(bert).left}
    assert "fastattn.hf cannot be imported" in left["encoder"]
    assert "not a class that swap knows" in left["encoder.encoder.layer.0.attention.self"]

    def refuse(m):
        raise NotImplementedError("no interface")

    enabled_by(monkeypatch, refuse)
    left = {name: why for name, _, why in fastattn.swap(bert).left}
    assert left["encoder"] == "fastattn.hf.enable() refused: no interface"
    assert fastattn.unswap(bert).swapped == ()

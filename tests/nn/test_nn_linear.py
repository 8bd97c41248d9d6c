"""Products by oneDNN against torch's: values, derivatives, and when each of the two runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.backends import isa as cpu_isa
from fastattn.nn import linear as module
from fastattn.nn.linear import call_linear, linear

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(
        not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
    ),
]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Uses oneDNN at every size and on every machine, and counts its calls."""
    made = []
    operator = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(module, "_ONEDNN", lambda *a: made.append(1) or operator(*a))
    monkeypatch.setattr(module, "SMALL_PRODUCT", 1)
    return made


VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "part": lambda x: x[..., 3:12],
    "columns apart": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(view, with_bias, calls):
    x = VIEWS[view](torch.randn(4, 6, 20))
    leaves = [x, torch.randn(7, x.shape[-1]), *([torch.randn(7)] if with_bias else [])]
    found = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = function(*inputs, *([] if with_bias else [None]))
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        flat = torch.autograd.grad(out.sum(), inputs, retain_graph=True)  # of stride 0
        found.append([out, *flat, *torch.autograd.grad(out, inputs, cotangent)])
    assert len(calls) == 3
    torch.testing.assert_close(found[0], [t.float() for t in found[1]])


WEIGHT = torch.ops.fastattn.linear_bwd_weight
ISAS = cpu_isa.supported()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 255, 258, 4100])  # 4100: packed in two blocks
def test_weight_gradients(isa, dtype, rows, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    for n_out, n_in in ((1, 1), (6, 32), (97, 257), (203, 31)):
        dout = torch.randn(rows, 2 * n_out, dtype=dtype)[:, n_out:]
        x = torch.randn(n_in, rows, dtype=dtype).t()
        dweight, dbias = WEIGHT(dout, x, True)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * rows**0.5
        for found, expected, size in (
            (dweight, dout.double().t() @ x.double(), 30),
            (dbias, dout.double().sum(0), 30),
        ):
            assert found.dtype == dtype
            assert (found - expected).abs().max() < size * tolerance
        alone, nothing = WEIGHT(dout, x, False)
        assert torch.equal(alone, dweight) and nothing.numel() == 0


def test_weight_gradients_of_no_rows():
    dweight, dbias = WEIGHT(torch.randn(0, 5), torch.randn(0, 7), True)
    assert torch.equal(dweight, torch.zeros(5, 7)) and torch.equal(dbias, torch.zeros(5))


def test_weight_gradients_have_the_same_bits_with_any_number_of_threads():
    dout, x = torch.randn(700, 200), torch.randn(700, 300)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(WEIGHT(dout, x, True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_weight_gradients_as_an_operator():
    for need_dbias in (False, True):
        dout, x = torch.randn(9, 5, requires_grad=True), torch.randn(9, 7, requires_grad=True)
        torch.library.opcheck(WEIGHT.default, (dout, x, need_dbias))
    for dout, x in (
        (torch.randn(9, 5), torch.randn(8, 7)),
        (torch.randn(9, 5), torch.randn(9, 7).double()),
        (torch.randn(9, 5, 1), torch.randn(9, 7, 1)),
        (torch.randn(9, 5).half(), torch.randn(9, 7).half()),
    ):
        with pytest.raises(RuntimeError, match="fastattn: "):
            WEIGHT(dout, x, True)


def test_batched_gradients(calls):
    x, weight = torch.randn(4, 8), torch.randn(7, 8, requires_grad=True)
    out, cotangents = linear(x, weight, None), torch.randn(3, 4, 7)
    (found,) = torch.autograd.grad(out, weight, cotangents, is_grads_batched=True)
    torch.testing.assert_close(found, torch.einsum("bro,ri->boi", cotangents, x))
    assert len(calls) == 1


def test_frozen_weight():
    x, weight, bias = torch.randn(4, 8), torch.randn(7, 8), torch.randn(7, requires_grad=True)
    (dbias,) = torch.autograd.grad(linear(x, weight, bias).sum(), bias)
    assert torch.equal(dbias, torch.full((7,), 4.0))


def test_second_derivatives():
    found = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        torch.manual_seed(1)
        inputs = [torch.randn(s).to(dtype).requires_grad_() for s in ((3, 5, 8), (7, 8), (7,))]
        grads = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    torch.testing.assert_close(found[0], tuple(t.float() for t in found[1]), rtol=1e-4, atol=1e-4)


def test_only_needed_gradients(calls):
    x, weight = torch.randn(4, 8), torch.randn(7, 8, requires_grad=True)
    (dweight,) = torch.autograd.grad(linear(x, weight, None).sum(), weight)
    torch.testing.assert_close(dweight, x.sum(0).expand(7, 8))
    assert len(calls) == 1


def test_torchs_own_runs_for_the_rest(calls, monkeypatch):
    x, weight = torch.randn(2, 5, 8), torch.randn(7, 8)
    for dtype in (torch.float64, torch.bfloat16):
        inputs = x.to(dtype), weight.to(dtype), None
        assert torch.equal(linear(*inputs), F.linear(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16
    torch.func.vmap(lambda x: linear(x, weight, None))(x)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, None)
    assert linear(x[:0], weight, None).shape == (0, 5, 7)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[..., 1:], weight, None)
    monkeypatch.setattr(module, "SMALL_PRODUCT", 1000)
    linear(x, weight, None)
    monkeypatch.setattr(module, "SMALL_PRODUCT", 1)
    monkeypatch.setattr(module, "_ONEDNN", None)
    linear(x, weight, None)
    assert not calls


def test_modules_with_something_attached_are_called(calls):
    x, layer, seen = torch.randn(3, 8), nn.Linear(8, 7), []
    torch.testing.assert_close(call_linear(layer, x), layer(x))
    assert len(calls) == 1
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    call_linear(layer, x)
    handle.remove()
    layer.forward = lambda x: x
    assert torch.equal(call_linear(layer, x), x)
    assert len(calls) == 1 and seen == [1]

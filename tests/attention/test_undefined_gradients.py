"""Undefined gradients: a later function may return none, and often only one of several results is
used. An undefined gradient counts as zero: nothing crashes, and the other gradients are right."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.fused import activation, gate, linear_cross_entropy, rope
from fastattn.fused import norm as fused
from fastattn.nn.linear import linear


@pytest.fixture(autouse=True)
def torch_again():
    yield
    fastattn.disable()


class GivesNone(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


def qkv(*shape):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def varlen(q, k, v, **options):
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    cu = torch.tensor([0, 4, q.shape[0]], dtype=torch.int32)
    return fastattn.varlen_attention(q, k, v, cu, cu, q.shape[0], q.shape[0], **options)


MASK = torch.ones(7, 7, dtype=torch.bool).tril()
ATTENTIONS = {
    "attention": fastattn.attention,
    "varlen": varlen,
    "with operands": lambda q, k, v, **options: fastattn.attention(
        q, k, v, bias=q[:, :, :, :1] * k[:, :, :1, :1], sinks=q[0, :, 0, 0], **options
    ),
}
SDPAS = {
    "sdpa": fastattn.scaled_dot_product_attention,
    "enable()": F.scaled_dot_product_attention,
    "enable() with a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK),
    "enable() with dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
}
COMPILED = {"compiled " + name: torch.compile(f, backend="aot_eager") for name, f in SDPAS.items()}


@pytest.mark.native
@pytest.mark.parametrize("name", [*ATTENTIONS, *SDPAS, *COMPILED])
def test_no_gradient_of_the_output(name):
    call = (ATTENTIONS | SDPAS | COMPILED)[name]
    q, k, v = qkv(1, 2, 7, 4)
    with fastattn.override_sdpa():
        out = call(q, k, v)
        (GivesNone.apply(out).sum() + (2 * q).sum() + 0 * k.sum() + 0 * v.sum()).backward()
    assert torch.equal(q.grad, torch.full_like(q, 2))
    assert not k.grad.any() and not v.grad.any()
    with fastattn.override_sdpa():
        out = call(q, k, v)
        grads = torch.autograd.grad(GivesNone.apply(out).sum(), (q, k, v), allow_unused=True)
    assert all(x is None or not x.any() for x in grads)


@pytest.mark.native
@pytest.mark.parametrize("used", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_of_out_and_lse(name, used):
    """The unused result, dropped or behind a function without a gradient, counts as zero."""
    inputs = qkv(1, 2, 7, 4)
    grads = []
    for drop in (lambda x: 0 * x.sum(), lambda x: GivesNone.apply(x).sum(), None):
        out, lse = ATTENTIONS[name](*inputs, return_lse=True)
        loss = sum(x.sum() * 0 for x in inputs)
        for x, use in zip((out, lse), used):
            if use:
                loss = loss + x.sin().sum()
            elif drop is not None:
                loss = loss + drop(x)
        grads.append(torch.autograd.grad(loss, inputs))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=1e-12)


@pytest.mark.native
@pytest.mark.parametrize("name", ATTENTIONS)
def test_second_order_with_undefined_parts(name):
    """Only some of the backward's own results are used."""
    inputs = qkv(1, 2, 7, 4)
    out = ATTENTIONS[name](*inputs)
    grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    whole = torch.autograd.grad(
        grads[0].square().sum() + 0 * sum(x.sum() for x in grads), inputs, retain_graph=True
    )
    loss = grads[0].square().sum() + GivesNone.apply(grads[1]).sum() + 0 * inputs[0].sum()
    got = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(got, whole)


def fused_calls():
    """{name: (function, inputs)}; each function returns one result or several."""
    x, y = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    table = torch.randn(11, 8, requires_grad=True)
    cos, sin = torch.randn(3, 4), torch.randn(3, 4)
    labels = torch.tensor([1, 2, 3])
    loss = linear_cross_entropy.linear_cross_entropy

    def norm(x, y, weight, bias, dropout_p=0.0):
        torch.manual_seed(1)
        return fused.norm(x, y, weight, bias, 1e-5, True, dropout_p)

    return {
        "norm": (norm, (x, y, weight, bias)),
        "norm with dropout": (lambda *args: norm(*args, 0.5), (x, y, weight, bias)),
        "norm alone": (lambda x, w: fused.norm(x, None, w, None, 1e-5, False)[0], (x, weight)),
        "rotate": (lambda x: rope.rotate(x, cos, sin, None, True), (x,)),
        "gate": (lambda x, y: gate.gate(x, y, "silu"), (x, y)),
        "activate": (lambda x, b: activation.activate(x, b, 0.0, "gelu"), (x, bias)),
        "loss": (lambda x, w: loss(x, w, labels), (x, table)),
        "losses": (lambda x, w: loss(x, w, labels, reduction="none"), (x, table)),
        "linear": (linear, (x, table, None)),
    }


@pytest.mark.native
@pytest.mark.parametrize("name", fused_calls())
def test_fused_operators(name):
    function, inputs = fused_calls()[name]
    wanted = [x for x in inputs if x is not None]
    count = len(results_of(function(*inputs)))
    for used in itertools.product((True, False), repeat=count):
        grads = []
        for drop in (lambda x: 0 * x.sum(), lambda x: GivesNone.apply(x).sum(), lambda x: 0):
            loss = sum(x.sum() * 0 for x in wanted)
            for x, use in zip(results_of(function(*inputs)), used):
                loss = loss + (x.sin().sum() if use else drop(x))
            grads.append(torch.autograd.grad(loss, wanted))
        for other in grads[1:]:
            torch.testing.assert_close(other, grads[0], rtol=0, atol=1e-6)


def results_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.native
def test_direct_calls_name_what_is_missing():
    """torch turns None into an undefined tensor; where a tensor is required, it is refused by
    name."""
    q = torch.randn(1, 1, 4, 4)
    out, lse = q, torch.zeros(1, 1, 4)
    nothing = (None,) * 13
    numbers = (1.0, 0.0, -1, -1, False, 0.0)
    for missing in range(7):
        if missing == 1:  # dlse may be absent
            continue
        tensors = [q, None, out, lse, q, q, q]
        tensors[missing] = None
        with pytest.raises(RuntimeError, match="is undefined, and a tensor is needed"):
            torch.ops.fastattn.flash_attn_bwd(*tensors, *nothing, *numbers, False, False)

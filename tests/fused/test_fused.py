"""The operators around attention against float64, their references, and torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused_cases import (
    DTYPES,
    ISAS,
    LAYOUTS,
    LOSSES,
    check,
    double,
    exact_norm,
    ours_gate,
    ours_norm,
    ours_rotate,
    randn,
    table,
    torch_gate,
    torch_norm,
    torch_rotate,
)

from fastattn.fused import gate, norm, rope
from fastattn.fused.linear_cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    monkeypatch.setattr(norm, "SMALL_LAYER_NORM", 0)


# ---- what each operator computes: ours, and torch's own way -------------------------------------


def ours_loss(hidden, weight, bias, labels=None, **options):
    return (linear_cross_entropy(hidden, weight, labels, bias, **options),)


def torch_loss(hidden, weight, bias, labels=None, z_loss=0.0, softcap=0.0, **options):
    logits = F.linear(hidden, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = F.cross_entropy(logits, labels, **options)
    if z_loss:
        kept = labels != options.get("ignore_index", -100)
        loss = loss + z_loss * logits[kept].logsumexp(-1).square().mean()
    return (loss,)


# ---- against float64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 63, 65, 1000])
def test_norm(dtype, dim):
    for rows in ((), (5,), (3, 4)):
        x, residual = randn(*rows, dim, dtype=dtype), randn(*rows, dim, dtype=dtype)
        weight, bias = randn(dim, dtype=dtype), randn(dim, dtype=dtype)
        check(ours_norm, torch_norm, (x, residual, weight, bias), dtype, exact_norm)
        check(ours_norm, torch_norm, (x + 3, None, weight, bias), dtype, exact_norm)
        check(ours_norm, torch_norm, (x, residual, weight, None), dtype, exact_norm, center=False)
        check(ours_norm, torch_norm, (x, None, None, None), dtype, exact_norm, center=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(dtype, interleaved):
    for dim in (2, 7, 33, 64, 130):
        x = randn(2, 5, 3, dim, dtype=dtype)
        check(ours_rotate, torch_rotate, (x,), dtype, interleaved=interleaved)
        check(ours_rotate, torch_rotate, (x.transpose(1, 2),), dtype, interleaved=interleaved)
        check(ours_rotate, torch_rotate, (x[0, 0],), dtype, interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(gate.GATES))
def test_gate(dtype, activation):
    for shape in ((1,), (3, 7), (2, 3, 65), (5, 1000)):
        gate, up = (4 * randn(*shape, dtype=dtype) for _ in range(2))
        check(ours_gate, torch_gate, (gate, up), dtype, activation=activation)


def test_gate_over_the_whole_range():
    """No overflow, no NaN, and at most 2 ulp of the larger operand everywhere."""
    x = torch.cat((torch.linspace(-200, 200, 40001), torch.tensor([-3e38, 3e38, -1e-30, 0.0])))
    x.requires_grad_()
    for activation, function in gate.GATES.items():
        out = gate.gate(x, torch.ones_like(x), activation)
        (slope,) = torch.autograd.grad(out.sum(), x)
        exact = x.detach().double().requires_grad_()
        right = function(exact)
        (right_slope,) = torch.autograd.grad(right.sum(), exact)
        assert ((out - right).abs() <= 2.4e-7 * exact.abs().clamp(min=1e-3)).all(), activation
        assert (slope - right_slope).abs().nan_to_num(nan=1.0).max() < 2e-6, activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(LOSSES))
def test_linear_cross_entropy(dtype, name):
    for rows, dim, vocab in ((1, 3, 2), (13, 5, 37), (40, 33, 130)):
        hidden, weight = randn(rows, dim, dtype=dtype), randn(vocab, dim, dtype=dtype)
        bias, labels = randn(vocab, dtype=dtype), torch.randint(0, vocab, (rows,))
        labels[1::4] = LOSSES[name].get("ignore_index", -100)
        for b in (None, bias):
            inputs = (hidden / 2, weight, b)
            check(ours_loss, torch_loss, inputs, dtype, labels=labels, **LOSSES[name])


def test_half_weight_gradient_is_summed_in_fp32():
    """256 chunks of one row each: a sum in bf16 would stop growing at 256 times the first."""
    hidden = torch.ones(512, 4, dtype=torch.bfloat16)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.long)
    linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk=1).backward()
    assert weight.grad[0].tolist() == [-256.0] * 4


# ---- every instruction set, strides, edges ------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    x, y = randn(3, 85, dtype=dtype), randn(3, 85, dtype=dtype)
    weight, bias = randn(85, dtype=dtype), randn(85, dtype=dtype)
    check(ours_norm, torch_norm, (x, y, weight, bias), dtype, exact_norm)
    for activation in gate.GATES:
        check(ours_gate, torch_gate, (x, y), dtype, activation=activation)
    for interleaved in (False, True):
        check(ours_rotate, torch_rotate, (x,), dtype, interleaved=interleaved)
    labels = torch.tensor([4, -100, 0])
    options = {"labels": labels, "softcap": 3.0, "label_smoothing": 0.1}
    check(ours_loss, torch_loss, (x, randn(77, 85, dtype=dtype) / 9, None), dtype, **options)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_strides(layout):
    """Every layout gives what its contiguous copy gives, gradients included, and mixed layouts
    too."""
    view = LAYOUTS[layout]
    x = view(torch.randn(4, 6, 20))
    y = torch.randn(x.shape)
    weight = torch.randn(x.shape[-1])

    def results(x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        outs = (*norm.norm(x, y, weight, None, 1e-5, True), gate.gate(x, y, "gelu"))
        outs += (gate.gate(y, x, "silu"), rope.rotate(x, *table(x), None, False))
        return [*outs, *torch.autograd.grad(outs, (x, y), [torch.ones_like(o) * o for o in outs])]

    for a, b in zip(results(x, y), results(x.contiguous(), y)):
        torch.testing.assert_close(a, b)


@pytest.mark.native
def test_dense_inputs_are_read_in_place_and_keep_their_order():
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    for out in (norm.norm(x, None, None, None, 1e-5, False)[0], gate.gate(x, x, "silu"),
                rope.rotate(x, *table(x), None, False)):  # fmt: skip
        assert out.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype):
    for shape in ((0, 8), (3, 0, 8), (2, 0)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        weight = torch.ones(shape[-1], dtype=dtype, requires_grad=True)
        y, summed = norm.norm(x, x, weight, None, 1e-5, False)
        out = gate.gate(x, x, "silu")
        assert y.shape == summed.shape == out.shape == shape
        (y.sum() + out.sum()).backward()
        assert x.grad.shape == shape and weight.grad.shape == shape[-1:]
        assert (weight.grad == 0).all()
    x = torch.randn(2, 3, 0, 8, dtype=dtype, requires_grad=True)
    rope.rotate(x, *table(x), None, False).sum().backward()
    hidden = torch.randn(0, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    loss.backward()
    assert loss == 0 and (weight.grad == 0).all() and hidden.grad.shape == (0, 4)
    assert linear_cross_entropy(hidden, weight, labels).isnan()  # mean of nothing, as torch gives


@pytest.mark.native
def test_nan_and_inf_stay_in_their_row():
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(4, 33)
        x[1, 20] = bad
        y, summed = norm.norm(x, torch.ones(4, 33), torch.ones(33), None, 1e-5, True)
        assert not y[1].isfinite().any() and y[[0, 2, 3]].isfinite().all()
        assert not summed[1, 20].isfinite() and summed.isfinite().sum() == 131
        rotated = rope.rotate(x, *table(x), None, False)
        assert not rotated[1].isfinite().all() and rotated[[0, 2, 3]].isfinite().all()
        for activation, function in gate.GATES.items():
            out = gate.gate(x, x.abs(), activation)
            right = function(x.double()) * x.abs()  # in float32 torch's gelu(inf) is NaN
            assert torch.equal(out.isnan(), right.isnan()), (activation, bad)
            assert torch.equal(out.isinf(), right.isinf()), (activation, bad)
        loss = linear_cross_entropy(
            x, torch.eye(33), torch.zeros(4, dtype=torch.long), reduction="none"
        )
        assert not loss[1].isfinite() and loss[[0, 2, 3]].isfinite().all()


def test_ignored_rows_are_never_read():
    hidden = torch.randn(8, 5)
    hidden[2:4] = float("nan")
    labels = torch.tensor([1, 2, -100, -100, 0, 3, -100, 1])
    hidden.requires_grad_()
    weight = torch.randn(4, 5, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    kept = labels >= 0
    right = F.cross_entropy(F.linear(hidden[kept], weight), labels[kept])
    torch.testing.assert_close(loss, right)
    assert (hidden.grad[~kept] == 0).all() and weight.grad.isfinite().all()
    assert linear_cross_entropy(hidden, weight, torch.full((8,), -100)).isnan()


def test_same_bits_with_any_number_of_threads():
    x, dy = torch.randn(700, 96), torch.randn(700, 96)
    weight, bias = torch.randn(96, requires_grad=True), torch.randn(96, requires_grad=True)

    def gradients():
        y, _ = norm.norm(x, None, weight, bias, 1e-5, True)
        return torch.autograd.grad(y, (weight, bias), dy)

    one = gradients()
    torch.set_num_threads(2)
    try:
        two = gradients()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.native
def test_small_layer_norms_are_atens(monkeypatch):
    x, vector = torch.randn(3, 8, requires_grad=True), torch.randn(8, dtype=torch.bfloat16)
    assert "norm_fwd" in ours_norm(x, None, vector.float(), None)[0].grad_fn.name()
    monkeypatch.setattr(norm, "SMALL_LAYER_NORM", 25)
    for residual in (None, x):
        y, summed = ours_norm(x, residual, vector.float(), vector.float())
        assert "NativeLayerNorm" in y.grad_fn.name()
        right, total = norm.norm_reference(x, residual, vector, vector, 1e-5, True)
        torch.testing.assert_close((y, summed), (right, total))
        mixed, _ = ours_norm(x, residual, vector, vector)  # which aten refuses
        torch.testing.assert_close(mixed, right)


def test_dtypes_are_promoted():
    x, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    y, summed = norm.norm(x, residual, torch.ones(8), None, 1e-5, False)
    assert y.dtype == summed.dtype == torch.float32
    torch.testing.assert_close(summed, x + residual)
    y, _ = norm.norm(x, None, torch.ones(8), None, 1e-5, False)
    assert y.dtype == torch.bfloat16
    assert gate.gate(x, residual, "silu").dtype == torch.float32


# ---- derivatives --------------------------------------------------------------------------------


def derivative_cases():
    x, y, weight, bias = double(2, 3, 5), double(2, 3, 5), double(5), double(5)
    for center in (False, True):
        yield f"norm {center}", lambda *t, c=center: norm.norm(*t, 1e-5, c), (x, y, weight, bias)

        def one(x, w, c=center):
            return norm.norm(x, None, w, None, 1e-5, c)[0]

        yield f"norm {center} alone", one, (x, weight)
    for activation in gate.GATES:
        yield activation, lambda g, u, a=activation: gate.gate(g, u, a), (x, y)
    q = double(2, 2, 3, 6)
    for positions in (None, torch.tensor([[2, 0, 1], [1, 1, 0]])):

        def rotated(q, p=positions):
            return rope.rotate(q, *table(q), p, p is None)

        yield f"rotate {positions is None}", rotated, (q,)
    labels = torch.tensor([1, 0, -100, 5, 2, 2])
    for name in ("all", "none"):
        options = {**LOSSES[name], "ignore_index": -100, "chunk": 2}

        def loss(h, w, b, o=options):
            return linear_cross_entropy(h, w, labels, b, **o)

        yield f"loss {name}", loss, (double(6, 3), double(7, 3), double(7))


CASES = ("norm False", "norm False alone", "norm True", "norm True alone", *gate.GATES,
         "rotate False", "rotate True", "loss all", "loss none")  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    """First and second derivatives by differences; forward mode and vmap against plain torch."""
    _, function, inputs = next(case for case in derivative_cases() if case[0] == name)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    stacked = tuple(torch.stack((x, 2 * x)).detach() for x in inputs)
    mapped = torch.func.vmap(function)(*stacked)
    for n in range(2):
        single = function(*(x[n] for x in stacked))
        got = [y[n] for y in mapped] if isinstance(mapped, tuple) else mapped[n]
        torch.testing.assert_close(got, list(single) if isinstance(single, tuple) else single)


def test_gradient_twice_and_through_one_output():
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    y, summed = norm.norm(x, residual, None, None, 1e-5, False)
    (only,) = torch.autograd.grad(summed, x, torch.full((3, 8), 2.0), retain_graph=True)
    assert (only == 2).all()
    first = torch.autograd.grad(y.sum(), (x, residual), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, residual))
    assert all(torch.equal(a, b) for a, b in zip(first, second))

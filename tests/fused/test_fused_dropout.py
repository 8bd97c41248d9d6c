"""The operators with dropout, norm and activation, against their masks in plain torch and
float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused_cases import DTYPES, ISAS, LAYOUTS, OPS, check, double, randn
from torch.utils.checkpoint import checkpoint

from fastattn.core.philox import keep_probability, keep_rows, philox4x32
from fastattn.fused import activation as fused_activate
from fastattn.fused import norm
from fastattn.fused.activation import ACTIVATIONS, activate

P, SEED = 0.3, torch.tensor([2**61 + 5, 2**40 + 3])
SHAPES = ((1,), (3, 7), (5, 64), (2, 3, 65), (4, 1000))
pytestmark = pytest.mark.native


def mask(x):
    """What SEED keeps, scaled, in x's dtype."""
    kept = keep_rows(SEED, x.shape[:-1].numel(), x.shape[-1], P).view(x.shape)
    return kept.to(x.dtype) / keep_probability(P)


def ours_activate(x, bias, activation="relu", p=P):
    return (fused_activate._activate(x, bias, SEED if p else None, p, activation),)


def torch_activate(x, bias, activation="relu", p=P):
    y = ACTIVATIONS[activation](x if bias is None else x + bias)
    return (y * mask(x) if p else y,)


def ours_norm(x, residual, weight, bias):
    return norm._norm(x, residual, weight, bias, 1e-5, True, SEED, P)[:2]


def torch_norm(x, residual, weight, bias):
    summed = x * mask(x) + residual
    return F.layer_norm(summed, x.shape[-1:], weight, bias, 1e-5), summed


# ---- the mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_is_the_twins(isa, dtype, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    for shape in SHAPES:
        x = torch.ones(shape, dtype=dtype)
        torch.testing.assert_close(activate_with(SEED, x), mask(x), rtol=1e-6, atol=0)


def activate_with(seed, x, p=P, activation="identity"):
    return OPS.activate_fwd(x, None, seed, p, activation)


def test_one_element_by_hand():
    """Row 3, column 77: block 1, lane 5, the upper half of word 0."""
    seed, offset = SEED.tolist()
    key = (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32))
    words = philox4x32((1 * 8 + 5, 3, 0, offset & 0xFFFFFFFF), key)
    for p in (0.2, 0.5, 0.8):
        kept = bool(keep_rows(SEED, 5, 100, p)[3, 77])
        assert kept == (words[0] >> 16 < round((1 - p) * 65536))
        assert kept == bool(activate_with(SEED, torch.ones(5, 100), p)[3, 77])


@pytest.mark.parametrize("p", [1e-7, 0.1, 0.5, 0.9, 1 - 1e-7])
def test_share_and_scale(p):
    out = activate(torch.ones(400, 1000), dropout_p=p)
    q = keep_probability(p)
    share = (out != 0).double().mean().item()
    assert abs(share - q) <= 5 * (q * (1 - q) / out.numel()) ** 0.5
    assert torch.equal(out[out != 0], torch.full_like(out[out != 0], 1 / q))


def test_elements_are_independent():
    kept = activate(torch.ones(4000, 128), dropout_p=0.4).ne(0).float()
    for table in (kept, kept.T.reshape(128 * 50, 80)):  # columns, then rows, against each other
        correlation = table.T.corrcoef() - torch.eye(table.shape[1])
        assert correlation.abs().max() < 6 / table.shape[0] ** 0.5


def test_seeds_and_recomputation():
    x = torch.randn(6, 70, requires_grad=True)

    def function(x):
        y = activate(x, dropout_p=0.4, activation="gelu")
        return norm.norm(y, x, None, None, 1e-5, True, 0.3)[0]

    found = []
    for run in (function, function, lambda x: checkpoint(function, x, use_reentrant=False)):
        torch.manual_seed(5)
        out = run(x)
        found.append([out, *torch.autograd.grad(out.sin().sum(), x)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    assert not torch.equal(function(x), found[0][0])


def test_same_bits_with_any_number_of_threads():
    x, dout = torch.randn(700, 96), torch.randn(700, 96)
    bias = torch.randn(96)

    def results():
        y = activate_with(SEED, x, activation="gelu")
        return [y, *OPS.activate_bwd(dout, x, bias, SEED, P, "gelu", True)]

    one = results()
    torch.set_num_threads(2)
    try:
        two = results()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activate(dtype, activation):
    for shape in SHAPES:
        x, bias = 3 * randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
        for b, p in ((bias, P), (None, P), (bias, 0.0)):
            options = {"activation": activation, "p": p}
            check(ours_activate, torch_activate, (x, b), dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype):
    for shape in SHAPES[1:]:
        x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        weight, bias = randn(shape[-1], dtype=dtype), randn(shape[-1], dtype=dtype)
        check(ours_norm, torch_norm, (x, residual, weight, bias), dtype)
        check(ours_norm, torch_norm, (x, residual, None, None), dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    for dtype in DTYPES:
        x, y = randn(3, 85, dtype=dtype), randn(3, 85, dtype=dtype)
        weight, bias = randn(85, dtype=dtype), randn(85, dtype=dtype)
        check(ours_norm, torch_norm, (x, y, weight, bias), dtype)
        for activation in ("identity", "relu", "gelu"):
            check(ours_activate, torch_activate, (x, bias), dtype, activation=activation)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_strides(layout):
    """The mask follows logical rows: every layout gives what its contiguous copy gives."""
    x = LAYOUTS[layout](torch.randn(4, 6, 20))
    y, bias = torch.randn(x.shape), torch.randn(x.shape[-1])

    def results(x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        outs = [*ours_norm(x, y, None, bias), *ours_norm(y, x, bias, None)]
        for activation in ("relu", "gelu"):
            outs += [*ours_activate(x, bias, activation), *ours_activate(x, bias, activation, 0.0)]
        cotangents = [torch.ones_like(o) * o for o in outs]
        return [*outs, *torch.autograd.grad(outs, (x, y), cotangents)]

    for a, b in zip(results(x, y), results(x.contiguous(), y)):
        torch.testing.assert_close(a, b)


def test_empty():
    for shape in ((0, 8), (3, 0, 8), (2, 0)):
        x, bias = (torch.randn(s, requires_grad=True) for s in (shape, shape[-1:]))
        y, summed = norm.norm(x, x, None, bias, 1e-5, True, 0.5)
        out = activate(x, bias, 0.5, "gelu")
        assert out.shape == y.shape == summed.shape == shape
        (out.sum() + y.sum()).backward()
        assert x.grad.shape == shape and (bias.grad == 0).all()


def test_nan_stays_where_it_is():
    x = torch.randn(4, 70)
    x[1, 20] = float("nan")
    for activation in ACTIVATIONS:
        out = activate(x, None, 0.5, activation)
        assert out[1, 20].isnan() and out.isnan().sum() == 1
    y, summed = norm.norm(x, torch.ones(4, 70), None, None, 1e-5, True, 0.5)
    assert y[1].isnan().all() and y.isnan().sum() == 70 and summed.isnan().sum() == 1


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_derivatives_of_activate(activation):
    x, bias = double(2, 3, 5), double(5)
    for b in (None, bias):
        inputs = [t for t in (x, b) if t is not None]

        def function(x, b=None):
            return ours_activate(x, b, activation)[0]

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_derivatives_of_norm():
    inputs = (double(2, 3, 5), double(2, 3, 5), double(5), double(5))
    assert torch.autograd.gradcheck(ours_norm, inputs)
    assert torch.autograd.gradgradcheck(ours_norm, inputs)
    x, residual = inputs[:2]
    summed = ours_norm(*inputs)[1]  # its gradient alone
    dx, dresidual = torch.autograd.grad(summed, (x, residual), torch.ones_like(summed))
    torch.testing.assert_close(dx, mask(x))
    assert (dresidual == 1).all()


def test_transforms_take_plain_torch():
    x, bias = double(3, 5), double(5)
    assert torch.autograd.gradcheck(
        lambda x, b: activate(x, b, 0.0, "gelu"), (x, bias), check_forward_ad=True
    )
    mapped = torch.func.vmap(lambda x: activate(x, None, 0.5), randomness="different")(x)
    assert ((mapped == 0) | (mapped == 2 * x)).all()


# ---- as operators, and bad input ----------------------------------------------------------------


def test_opcheck():
    x, y = (torch.randn(2, 3, 6, requires_grad=True) for _ in range(2))
    bias = torch.randn(6, requires_grad=True)
    saved, vector = torch.randn(2, 3, 6), torch.randn(6)
    mean, rstd = torch.randn(6), torch.rand(6) + 0.5
    for operator, arguments in (
        (OPS.norm_fwd, (x, y, bias, None, 1e-5, True, SEED, P)),
        (OPS.norm_bwd, (y, saved, x, vector, mean, rstd, 1e-5, True, True, True, SEED, P)),
        (OPS.activate_fwd, (x, bias, SEED, P, "gelu")),
        (OPS.activate_fwd, (x.transpose(0, 1), None, SEED, P, "relu")),
        (OPS.activate_fwd, (x.transpose(0, 1), None, None, 0.0, "identity")),
        (OPS.activate_bwd, (y, saved, vector, SEED, P, "gelu", True)),
        (OPS.activate_bwd, (y, saved, None, SEED, P, "relu", False)),
    ):
        torch.library.opcheck(operator.default, arguments)


_X = torch.randn(4, 6)
ERRORS = {
    "bias": (lambda: activate(_X, torch.ones(5)), ValueError, r"x has shape \[4, 6\] and bias"),
    "activation": (lambda: activate(_X, None, 0.0, "elu"), ValueError, "activation is 'elu'"),
    "p": (lambda: activate(_X, None, 1.0), ValueError, r"dropout_p is 1.0; accepted is \[0, 1\)"),
    "dtype": (lambda: activate(_X.int()), TypeError, "x is torch.int32"),
    "residual": (lambda: norm.norm(_X, None, None, None, 1e-5, True, 0.1),
                 ValueError, "dropout_p is 0.1 and residual None"),
    "seed": (lambda: activate_with(None, _X), RuntimeError, "dropout needs dropout_seed"),
    "short seed": (lambda: activate_with(SEED[:1], _X), RuntimeError, r"must be int64 \[2\]"),
    "operator's p": (lambda: activate_with(SEED, _X, 1.0), RuntimeError, r"in \[0, 1\), got 1"),
    "saved": (lambda: OPS.activate_bwd(_X, None, None, SEED, P, "gelu", False),
              RuntimeError, "gelu needs what was saved"),
    "saved shape": (lambda: OPS.activate_bwd(_X, _X[:2], None, SEED, P, "gelu", False),
                    RuntimeError, "saved has shape"),
    "operator's residual": (lambda: OPS.norm_fwd(_X, None, None, None, 1e-5, True, SEED, P),
                            RuntimeError, "dropout needs a residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call()

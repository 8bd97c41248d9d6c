"""The SDPA drop-in against torch's own samples and semantics. test_override.py tests the switch."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import math, qkv
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn
from fastattn import scaled_dot_product_attention as sdpa
from fastattn.core.philox import keep_mask, keep_probability


@pytest.fixture(autouse=True)
def torch_again():
    """A test that leaves the switch on must not affect the others."""
    yield
    for _ in range(9):
        fastattn.disable()


# ---- torch's own samples ------------------------------------------------------------------------


def samples():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return list(info.sample_inputs("cpu", torch.float64, requires_grad=True))


def dropped(p, seed, query, key, value, **kwargs):
    """The math path with the dropout mask that this seed of torch's generator gives."""
    length = key.shape[-2]
    eye = torch.eye(length, dtype=key.dtype).expand(*key.shape[:-1], length)
    weights = math(query, key, eye, **kwargs)
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**63 - 1, (2,))
    kept = keep_mask(drawn, weights[..., 0, 0].numel(), *weights.shape[-2:], p)
    if kwargs.get("enable_gqa"):
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return (weights * kept.view_as(weights) / keep_probability(p)) @ value


@pytest.mark.parametrize("way", ["drop-in", "override"])
def test_torchs_samples(way):
    """Forward and gradients in fp64."""
    found = samples()
    assert len(found) >= 20 and any(s.kwargs.get("dropout_p") for s in found)
    for sample in found:
        args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
        leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        leaves = [x for x in leaves if x.requires_grad]
        p = kwargs.pop("dropout_p", 0.0)
        want = dropped(p, 1, *args, **kwargs) if p else math(*args, **kwargs)
        dout = torch.randn_like(want)
        want = [want, *torch.autograd.grad(want, leaves, dout)]
        torch.manual_seed(1)
        with contextlib.ExitStack() as stack:
            function = sdpa
            if way == "override":
                stack.enter_context(fastattn.override_sdpa())
                function = F.scaled_dot_product_attention
            out = function(*args, **kwargs, dropout_p=p)
            got = [out, *torch.autograd.grad(out, leaves, dout)]
        assert out.dtype == want[0].dtype
        torch.testing.assert_close(got, want)


SHAPES = {
    "2-D": ((4, 8), (6, 8), {}),
    "3-D": ((3, 4, 8), (3, 6, 8), {}),
    "5-D": ((5, 2, 3, 4, 8), (5, 2, 3, 6, 8), {}),
    "mixed ranks": ((2, 1, 4, 8), (5, 1, 3, 6, 8), {}),
    "query 2-D": ((4, 8), (3, 6, 8), {}),
    "batch broadcasts": ((2, 3, 4, 8), (1, 3, 6, 8), {}),
    "one kv head": ((2, 3, 4, 8), (2, 1, 6, 8), {}),
    "one query head": ((2, 1, 4, 8), (2, 3, 6, 8), {}),
    "grouped": ((2, 6, 4, 8), (2, 2, 6, 8), {"enable_gqa": True}),
    "grouped 3-D": ((6, 4, 8), (2, 6, 8), {"enable_gqa": True}),
    "grouped, batch broadcasts": ((2, 6, 4, 8), (1, 3, 6, 8), {"enable_gqa": True}),
    "scale": ((2, 3, 4, 8), (2, 3, 6, 8), {"scale": -0.3}),
    "scale 0": ((2, 3, 4, 8), (2, 3, 6, 8), {"scale": 0}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes_that_broadcast(shape, is_causal):
    q_shape, kv_shape, options = SHAPES[shape]
    if is_causal and options.get("scale", 1) <= 0:
        options = {}  # torch's own result is NaN there
    leaves = qkv(*q_shape, kv=kv_shape, grad=True, dtype=torch.float64)
    results = []
    for function in (sdpa, math):
        out = function(*leaves, is_causal=is_causal, **options)
        torch.manual_seed(0)
        results.append([out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).double())])
    torch.testing.assert_close(*results)


def test_different_heads_and_widths_of_key_and_value():
    q, k = torch.randn(2, 12, 4, 8), torch.randn(2, 4, 6, 8)
    v = torch.randn(2, 6, 6, 5)
    torch.testing.assert_close(sdpa(q, k, v, enable_gqa=True), math(q, k, v, enable_gqa=True))
    v = torch.randn(2, 1, 6, 5)
    q = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(sdpa(q, k, v), math(q, k, v))


MASKS = [(4, 6), (1, 6), (4, 1), (3, 4, 6), (1, 4, 6), (3, 1, 6), (2, 3, 4, 6), (2, 1, 1, 6),
         (5, 2, 3, 4, 6), (1, 2, 1, 4, 6), (5, 1, 1, 1, 6), (5, 2, 1, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("mask_shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "learned"])
def test_masks_of_every_rank(mask_shape, kind):
    q, k, v = qkv(5, 2, 3, 4, 8, kv=(5, 2, 3, 6, 8), grad=True, dtype=torch.float64)
    if len(mask_shape) < 5:
        q, k, v = (x.detach()[0].requires_grad_() for x in (q, k, v))
    mask = torch.randn(mask_shape, dtype=torch.float64)
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_(kind == "learned")
    leaves = [q, k, v, *([mask] if kind == "learned" else [])]
    results = []
    for function in (sdpa, math):
        out = function(q, k, v, mask)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_masks_that_torch_refuses():
    q, k, v = qkv(2, 3, 4, 8, kv=(2, 3, 6, 8))
    keys = torch.tensor([True, True, False, True, False, True])
    want = math(q, k, v, keys[None])
    torch.testing.assert_close(sdpa(q, k, v, keys), want)  # 1-D: IndexError in torch
    torch.testing.assert_close(sdpa(q, k, v, torch.tensor(0.5)), math(q, k, v))
    triangle = torch.ones(4, 6).tril().bool()
    both = sdpa(q, k, v, keys, is_causal=True)  # both apply
    torch.testing.assert_close(both, math(q, k, v, triangle & keys))


def test_causal_bias_classes():
    q, k, v = qkv(2, 3, 4, 8, kv=(2, 3, 6, 8))
    for bias in (causal_lower_right(4, 6), causal_upper_left(4, 6)):
        want = F.scaled_dot_product_attention(q, k, v, bias)
        torch.testing.assert_close(sdpa(q, k, v, bias), want)
    with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
        sdpa(q, k, v, causal_lower_right(4, 6), is_causal=True)
    with pytest.raises(RuntimeError, match="a CausalBias for 4 rows and 6 keys, but got one for 3"):
        sdpa(q, k, v, causal_lower_right(3, 6))


def test_rows_that_see_nothing_and_nan():
    q, k, v = qkv(1, 2, 4, 8, grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    out = sdpa(q, k, v, mask)
    assert (out[:, :, 1] == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()
    poisoned = q.detach().clone()
    poisoned[0, 0, 2] = torch.nan  # a short row of NaN scores, whose NaN torch's CPU kernel loses
    out = sdpa(poisoned, k, v)
    assert out[0, 0, 2].isnan().all() and out[0, 0, :2].isfinite().all()


EMPTY = {
    "no rows": ((2, 3, 0, 8), (2, 3, 5, 8)),
    "no keys": ((2, 3, 4, 8), (2, 3, 0, 8)),
    "no batch": ((0, 3, 4, 8), (0, 3, 5, 8)),
    "no heads": ((2, 0, 4, 8), (2, 0, 5, 8)),
    "no channels": ((2, 3, 4, 0), (2, 3, 5, 0)),
}


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_tensors_and_dropout_of_everything_give_connected_zeros(shape):
    q, k, v = qkv(*EMPTY[shape][0], kv=EMPTY[shape][1], grad=True)
    out = sdpa(q, k, v, is_causal=True)
    assert out.shape == q.shape and (out == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.shape == x.shape and (g == 0).all() for g, x in zip(grads, (q, k, v)))


def test_dropout_of_everything():
    q, k, v = qkv(2, 3, 4, 8, grad=True)
    bias = torch.randn(4, 4, requires_grad=True)
    out = sdpa(q, k, v, bias, dropout_p=1.0)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v, bias)):
        assert (grad == 0).all()


def test_memory_order_autocast_and_half_precision():
    q, k, v = (x.transpose(1, 2) for x in qkv(2, 5, 3, 8))
    assert sdpa(q, k, v).stride() == F.scaled_dot_product_attention(q, k, v).stride() == q.stride()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sdpa(q, k, v, torch.zeros(5, 5))
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        half = [x.to(dtype) for x in (q, k, v)]
        mask = torch.randn(5, 5)  # float32 with half-precision q
        exact = math(*(x.double() for x in half), mask.to(dtype).double())
        results = (f(*half, mask.to(dtype)).double() for f in (sdpa, math))
        error, torchs = ((x - exact).abs().max() for x in results)
        assert error <= 2 * torchs + torch.finfo(dtype).eps
        assert sdpa(*half, mask).dtype == dtype


def test_second_order_and_transforms():
    q, k, v = qkv(1, 2, 3, 2, grad=True, dtype=torch.float64)
    bias = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    check = {"fast_mode": True}
    assert gradcheck(lambda *x: sdpa(*x), (q, k, v, bias), check_forward_ad=True, **check)
    assert gradgradcheck(lambda *x: sdpa(*x), (q, k, v, bias), check_fwd_over_rev=True, **check)
    many = torch.randn(4, 1, 2, 3, 2)
    got = torch.vmap(lambda q: sdpa(q, k.detach().float(), v.detach().float()))(many)
    torch.testing.assert_close(got[1], math(many[1], k.float(), v.float()).detach())


def test_meta_tensors_have_shapes():
    q, k, v = (torch.empty(2, 3, n, 8, device="meta") for n in (4, 6, 6))
    assert sdpa(q, k, v).shape == (2, 3, 4, 8)


# ---- errors ------------------------------------------------------------------------------------

WRONG = {
    "seven positional": (TypeError, lambda q, f: f(q, q, q, None, 0.0, False, 1.0)),
    "a list": (TypeError, lambda q, f: f([1.0], q, q)),
    "a list as mask": (TypeError, lambda q, f: f(q, q, q, [[True]])),
    "is_causal=1": (TypeError, lambda q, f: f(q, q, q, is_causal=1)),
    "scale='x'": (TypeError, lambda q, f: f(q, q, q, scale="x")),
    "1-D": (RuntimeError, lambda q, f: f(*[torch.randn(8)] * 3)),
    "dtypes": (RuntimeError, lambda q, f: f(q, q.double(), q)),
    "devices": (RuntimeError, lambda q, f: f(q, q.to("meta"), q)),
    "int tensors": (RuntimeError, lambda q, f: f(*[q.long()] * 3)),
    "complex tensors": (NotImplementedError, lambda q, f: f(*[q.to(torch.complex64)] * 3)),
    "int mask": (RuntimeError, lambda q, f: f(q, q, q, torch.ones(4, 4, dtype=torch.int32))),
    "double mask": (RuntimeError, lambda q, f: f(q, q, q, torch.ones(4, 4).double())),
    "mask shape": (RuntimeError, lambda q, f: f(q, q, q, torch.ones(5, 4))),
    "mask rank": (RuntimeError, lambda q, f: f(q, q, q, torch.ones(1, 2, 3, 4, 4))),
    "mask batch": (RuntimeError, lambda q, f: f(q[:1], q[:1], q[:1], torch.ones(2, 3, 4, 4))),
    "dropout 1.1": (RuntimeError, lambda q, f: f(q, q, q, dropout_p=1.1)),
    "dropout is text": (TypeError, lambda q, f: f(q, q, q, dropout_p="0.1")),
    "dropout is None": (TypeError, lambda q, f: f(q, q, q, dropout_p=None)),
    "dropout of two": (TypeError, lambda q, f: f(q, q, q, dropout_p=torch.zeros(2))),
    "scale is text": (TypeError, lambda q, f: f(q, q, q, scale="1")),
    "heads": (RuntimeError, lambda q, f: f(q, q[:, :2], q[:, :2])),
    "gqa heads": (RuntimeError, lambda q, f: f(q, q[:, :2], q[:, :2], enable_gqa=True)),
    "gqa 2-D": (IndexError, lambda q, f: f(*[q[0, 0]] * 3, enable_gqa=True)),
    "batch": (RuntimeError, lambda q, f: f(q, *[torch.randn(3, 3, 4, 8)] * 2)),
    "channels": (RuntimeError, lambda q, f: f(q, q[..., :7], q)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_of_torchs_classes(wrong):
    kind, call = WRONG[wrong]
    q = torch.randn(2, 3, 4, 8)
    with pytest.raises(kind):
        call(q, F.scaled_dot_product_attention)
    with pytest.raises(kind) as caught:
        call(q, sdpa)
    assert "\n" not in str(caught.value) or wrong in ("int tensors", "complex tensors")
    fastattn.enable()
    with pytest.raises(kind):
        call(q, F.scaled_dot_product_attention)


def test_errors_where_torch_computes_nonsense():
    q = torch.randn(2, 3, 4, 8)
    fastattn.enable()
    for function in (sdpa, F.scaled_dot_product_attention):
        for x in (q, q[0]):  # torch reads past the end of value; of three dimensions from 2.14 on
            with pytest.raises(RuntimeError, match=r"same length|all but the last dim"):
                function(x, x, x[..., :3, :])
    fastattn.disable()
    for dropout_p in (-0.1, float("nan")):
        with pytest.raises(RuntimeError, match="between 0 and 1, but got"):
            sdpa(q, q, q, dropout_p=dropout_p)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale is (nan|inf); accepted is a finite number"):
            sdpa(q, q, q, scale=scale)


# ---- NestedTensors -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_tensors_are_packed(is_causal):
    parts = [torch.randn(n, 2, 8) for n in (3, 1, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    q = nested.transpose(1, 2)
    out = sdpa(q, q, q, is_causal=is_causal)
    assert out.shape == q.shape
    for got, x in zip(out.transpose(1, 2).unbind(), parts):
        x = x.transpose(0, 1)
        want = math(x, x, x, is_causal=is_causal)
        torch.testing.assert_close(got.transpose(0, 1), want)
    out.values().sum().backward()
    assert nested.grad.values().abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_nested_tensors_are_torchs():
    q = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    with fastattn.override_sdpa():
        outs = [sdpa(q, q, q), F.scaled_dot_product_attention(q, q, q)]
    want = F.scaled_dot_product_attention(q, q, q)
    for out in outs:
        for a, b in zip(out.unbind(), want.unbind()):
            assert torch.equal(a, b)

"""The native operators with random and with hostile arguments: a right result or a refusal, never a
crash, which would end the process and so the test run.

`make asan` runs this file with the sanitizers. A refusal is an ordinary exception with a sentence.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_calls import (
    FUZZ,
    LENIENT,
    REFUSALS,
    SPOILERS,
    Call,
    assert_close,
    calls,
    packed,
    paged,
    plain,
    refused,
)
from torch import Tensor

from fastattn.backends import isa
from fastattn.core.reference import reference

pytestmark = pytest.mark.native


@pytest.fixture(scope="module", autouse=True)
def _restore_isa():
    before = os.environ.get("FASTATTN_ISA")
    yield
    os.environ.pop("FASTATTN_ISA", None)
    if before is not None:
        os.environ["FASTATTN_ISA"] = before


def in_double(call: Call) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The call's differentiable inputs and operands, as float64 leaves with the same values."""
    q, k, v = (x.detach().double().requires_grad_() for x in (call.q, call.k, call.v))
    tensors = dict(call.tensors)
    for name in {"bias", "sinks"} & tensors.keys():
        tensors[name] = tensors[name].detach().double().requires_grad_()
    return q, k, v, tensors


def expected(call: Call, inputs) -> tuple[Tensor, Tensor]:
    q, k, v, tensors = inputs
    wide = Call(q, k, v, tensors, call.numbers)
    return reference(q, k, v, wide.spec(), wide.operands())


@FUZZ
@given(calls(), st.data())
def test_random_forward_is_right(call, data):
    os.environ["FASTATTN_ISA"] = data.draw(st.sampled_from(isa.supported()))
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    out, lse = call.forward()
    want_out, want_lse = expected(call, in_double(call))
    assert out.dtype == call.q.dtype
    assert lse.dtype == (torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    assert_close(out, want_out, call.q.dtype, "out")
    assert_close(lse, want_lse, call.q.dtype, "lse")


@FUZZ
@given(calls(paged=False), st.data())
def test_random_backward_is_right(call, data):
    os.environ["FASTATTN_ISA"] = data.draw(st.sampled_from(isa.supported()))
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    out, lse = call.forward()
    dout = torch.randn(out.shape, generator=rng).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=rng).to(lse.dtype)
    dlse = dlse if data.draw(st.booleans()) else None
    got = call.backward(dout, dlse, out, lse)

    inputs = in_double(call)
    want_out, want_lse = expected(call, inputs)
    seen = want_lse.isfinite()  # an -inf has no gradient
    loss = (want_out * dout.double()).sum() + sum(0 * x.sum() for x in inputs[:3])
    if dlse is not None:
        loss = loss + (torch.where(seen, want_lse, 0.0) * dlse.double()).sum()
    loss.backward()
    *leaves, tensors = inputs
    leaves += [tensors.get("bias"), tensors.get("sinks")]
    for name, gradient, leaf in zip(("dq", "dk", "dv", "dbias", "dsinks"), got, leaves):
        if leaf is None:
            assert gradient.numel() == 0, f"{name} was not asked for"
            continue
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if name == "dbias" and gradient.shape != want.shape:  # stride-0 dimensions may be reduced
            want = want.sum_to_size(gradient.shape)
        scale = 4 if call.q.dtype in (torch.float16, torch.bfloat16) else 1
        assert_close(gradient / scale, want / scale, call.q.dtype, name)


@pytest.mark.parametrize("name", sorted(SPOILERS))
def test_hostile_forward_is_refused(name):
    call = SPOILERS[name]()
    if refused(call.forward):
        return
    assert name in LENIENT
    out, lse = call.forward()
    want_out, want_lse = expected(call, in_double(call))
    assert_close(out, want_out, call.q.dtype, "out")
    assert_close(lse, want_lse, call.q.dtype, "lse")


@pytest.mark.parametrize("name", sorted(SPOILERS.keys() - LENIENT - {"num_splits -1"}))
def test_hostile_backward_is_refused(name):
    """The backward is a separate entry point and checks everything itself."""
    bases = {"packed": packed, "cu_seqlens": packed, "page": paged}
    good = next((make for word, make in bases.items() if name.startswith(word)), plain)()
    out, lse = good.forward()
    call = SPOILERS[name]()
    assert refused(lambda: call.backward(torch.ones_like(out), None, out, lse))


def _meta(x: Tensor) -> Tensor:
    return x.to("meta")


BACKWARD_SPOILERS = {
    "dout too short": lambda dout, dlse, out, lse: (dout[:, :, :5], dlse, out, lse),
    "dout of rank 3": lambda dout, dlse, out, lse: (dout[0], dlse, out, lse),
    "dout in another dtype": lambda dout, dlse, out, lse: (dout.double(), dlse, out, lse),
    "dout on meta": lambda dout, dlse, out, lse: (_meta(dout), dlse, out, lse),
    "dout with v's heads": lambda dout, dlse, out, lse: (dout[:, :2], dlse, out, lse),
    "dlse of rank 4": lambda dout, dlse, out, lse: (dout, dlse[..., None], out, lse),
    "dlse too short": lambda dout, dlse, out, lse: (dout, dlse[:, :, :5], out, lse),
    "dlse in bf16": lambda dout, dlse, out, lse: (dout, dlse.bfloat16(), out, lse),
    "dlse on meta": lambda dout, dlse, out, lse: (dout, _meta(dlse), out, lse),
    "out too short": lambda dout, dlse, out, lse: (dout, dlse, out[:, :, :5], lse),
    "out of another width": lambda dout, dlse, out, lse: (dout, dlse, out[..., :8], lse),
    "out in another dtype": lambda dout, dlse, out, lse: (dout, dlse, out.bfloat16(), lse),
    "out on meta": lambda dout, dlse, out, lse: (dout, dlse, _meta(out), lse),
    "lse too short": lambda dout, dlse, out, lse: (dout, dlse, out, lse[:, :, :5]),
    "lse of rank 2": lambda dout, dlse, out, lse: (dout, dlse, out, lse[0]),
    "lse in double": lambda dout, dlse, out, lse: (dout, dlse, out, lse.double()),
    "lse on meta": lambda dout, dlse, out, lse: (dout, dlse, out, _meta(lse)),
}


@pytest.mark.parametrize("name", sorted(BACKWARD_SPOILERS))
def test_backward_refuses_what_is_not_of_the_forward(name):
    call = plain()
    out, lse = call.forward()
    spoiled = BACKWARD_SPOILERS[name](torch.ones_like(out), torch.ones_like(lse), out, lse)
    assert refused(lambda: call.backward(*spoiled))


@pytest.mark.parametrize("which", ["dout", "dlse", "out", "lse"])
def test_backward_reads_any_strides_or_refuses(which):
    """A non-contiguous gradient, output or lse gives the same result as its contiguous copy."""
    call = plain()
    out, lse = call.forward()
    arguments = {"dout": torch.randn(out.shape), "dlse": torch.randn(lse.shape)}
    arguments |= {"out": out, "lse": lse}
    want = call.backward(**arguments)
    x = arguments[which]
    wide = torch.full((*x.shape[:2], 2 * x.shape[2], *x.shape[3:]), torch.nan)
    wide[:, :, ::2] = x
    for strided in (wide[:, :, ::2], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not strided.is_contiguous()
        try:
            got = call.backward(**(arguments | {which: strided}))
        except REFUSALS:
            continue
        assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_backward_of_pages_is_refused():
    call = paged()
    out, lse = call.forward()
    with pytest.raises(REFUSALS):
        call.backward(torch.ones_like(out), None, out, lse)


@pytest.mark.parametrize("missing", ["bias", "sinks"])
def test_backward_refuses_a_gradient_of_nothing(missing):
    """need_dbias without a bias, need_dsinks without sinks."""
    call = plain()
    out, lse = call.forward()
    flags = (missing == "bias", missing == "sinks")
    operator = torch.ops.fastattn.flash_attn_bwd
    numbers = (0.25, 0.0, -1, -1, True, 0.0)
    with pytest.raises(REFUSALS):
        operator(out, None, out, lse, call.q, call.k, call.v, *[None] * 13, *numbers, *flags)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "sinks", "alibi_slopes", "lse", "dout"])
def test_values_that_are_not_finite_do_no_harm(which, value):
    """NaN and Inf anywhere may give NaN, but affect no index and no loop bound."""
    call = plain()
    call.tensors = {
        "bias": torch.zeros(2, 4, 7, 33),
        "sinks": torch.zeros(4),
        "alibi_slopes": torch.ones(4),
        "dropout_seed": torch.tensor([1, 2]),
    }
    call.numbers |= {"dropout_p": 0.2, "softcap": 3.0}
    inputs = {"q": call.q, "k": call.k, "v": call.v, **call.tensors}
    if which in inputs:
        inputs[which].view(-1)[3] = value
    out, lse = call.forward()
    dout = torch.ones_like(out)
    if which == "lse":
        lse[0, 0, 0] = value
    if which == "dout":
        dout[0, 0, 0, 0] = value
    gradients = call.backward(dout, torch.ones_like(lse), out, lse)
    # Batch entry 1 shares only sinks and slopes with the first row of entry 0.
    assert out[1, 0].isfinite().all()
    assert gradients[0][1, 0].isfinite().all()


def test_large_head_dims_are_computed_or_refused():
    for dim in (512, 513, 1000, 5000):
        call = plain()
        call.q, call.k = torch.randn(2, 4, 7, dim), torch.randn(2, 2, 33, dim)
        try:
            out, _ = call.forward()
        except REFUSALS:
            assert dim > 512, "any head dim from 1 to 512 is supported"
            continue
        want, _ = expected(call, in_double(call))
        assert_close(out, want, torch.float32, f"out at D {dim}")


@pytest.mark.parametrize(
    "shape", [(0, 4, 7, 33), (2, 0, 7, 33), (2, 4, 0, 33), (2, 4, 7, 0), (2, 4, 0, 0)]
)
def test_zero_sizes(shape):
    batch, heads, q_len, kv_len = shape
    call = plain()
    call.q = torch.randn(batch, heads, q_len, 16)
    call.k, call.v = torch.randn(batch, heads, kv_len, 16), torch.randn(batch, heads, kv_len, 16)
    out, lse = call.forward()
    assert out.shape == call.q.shape and lse.shape == call.q.shape[:3]
    assert (out == 0).all() and (lse == -torch.inf).all()
    gradients = call.backward(torch.ones_like(out), None, out, lse)
    for gradient, x in zip(gradients, (call.q, call.k, call.v)):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", "sse9")
    with pytest.raises(REFUSALS, match="FASTATTN_ISA"):
        plain().forward()


def test_unsupported_instruction_set_is_refused(monkeypatch):
    lacking = [row.name for row in isa.isas() if not row.supported]
    if not lacking:
        pytest.skip("this CPU has every instruction set")
    monkeypatch.setenv("FASTATTN_ISA", lacking[0])
    with pytest.raises(REFUSALS, match="FASTATTN_ISA"):
        plain().forward()

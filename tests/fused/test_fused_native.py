"""The native operators around attention with hostile arguments: a sentence or a result, never a
crash. `make asan` runs this file under the sanitizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

OPS = torch.ops.fastattn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ODD_DTYPES = (torch.int64, torch.int32, torch.bool, torch.complex64)
NAMES = ("identity", "relu", "silu", "gelu", "gelu_tanh", "tanh", "")

pytestmark = pytest.mark.native


@st.composite
def tensors(draw, shape):
    """Mostly of that shape, in a random dtype, dense, strided, transposed or expanded."""
    shape = list(shape)
    if draw(st.integers(0, 9)) == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES if draw(st.integers(0, 9)) else ODD_DTYPES))
    layout = draw(st.sampled_from(("dense", "strided", "transposed", "expanded")))
    if layout == "strided":
        return torch.ones(*shape[:-1], 2 * (shape or [1])[-1] + 1).to(dtype)[..., 1::2]
    if layout == "transposed" and len(shape) > 1:
        return torch.ones(*shape[:-2], shape[-1], shape[-2]).to(dtype).mT
    if layout == "expanded" and shape:
        return torch.ones(1, *shape[1:]).to(dtype).expand(shape)
    return torch.ones(shape).to(dtype)


def maybe(strategy):
    return st.none() | strategy


def attempt(operator, *arguments):
    """The operator's results, completely read, or None if it refused with a sentence."""
    try:
        results = operator(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error).strip()
        return None
    for x in results if isinstance(results, tuple) else (results,):
        x.sum().item()
    return results


SIZES = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 70))
PROBABILITIES = st.sampled_from((0.0, 0.3, 1.0, -1.0, float("nan")))
SEEDS = maybe(st.just(torch.tensor([3, 5])) | st.just(torch.tensor([1])))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_norm(data):
    shape = data.draw(SIZES)
    x, dy = (data.draw(tensors(shape)) for _ in range(2))
    residual, dsummed = (data.draw(maybe(tensors(shape))) for _ in range(2))
    weight, bias = (data.draw(maybe(tensors(shape[-1:]))) for _ in range(2))
    center, seed, p = data.draw(st.booleans()), data.draw(SEEDS), data.draw(PROBABILITIES)
    found = attempt(OPS.norm_fwd, x, residual, weight, bias, 1e-5, center, seed, p)
    mean, rstd = (data.draw(tensors((shape[0] * shape[1],))) for _ in range(2))
    if found is not None and data.draw(st.booleans()):
        mean, rstd = found[2:]
    attempt(OPS.norm_bwd, dy, dsummed, x, weight, mean, rstd, 1e-5, center, True, True, seed, p)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_gate_and_activate(data):
    shape = data.draw(SIZES)
    x, y, z = (data.draw(tensors(shape)) for _ in range(3))
    name, bias = data.draw(st.sampled_from(NAMES)), data.draw(maybe(tensors(shape[-1:])))
    seed, p = data.draw(SEEDS), data.draw(PROBABILITIES)
    attempt(OPS.gate_fwd, x, y, name)
    attempt(OPS.gate_bwd, z, x, y, name)
    attempt(OPS.activate_fwd, x, bias, seed, p, name)
    saved = data.draw(maybe(st.just(y)))
    attempt(OPS.activate_bwd, z, saved, bias, seed, p, name, data.draw(st.booleans()))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_rotate(data):
    batch, heads, length, dim = data.draw(st.tuples(*[st.integers(0, 3)] * 3, st.integers(0, 40)))
    x = data.draw(tensors((batch, heads, length, dim)))
    rows, pairs = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 21))
    cos, sin = (data.draw(tensors((rows, pairs))) for _ in range(2))
    values = st.integers(-1, 6)
    positions = data.draw(maybe(st.lists(values, min_size=length, max_size=length)))
    positions = None if positions is None else torch.tensor(positions, dtype=torch.int64)
    attempt(OPS.rotate, x, cos, sin, positions, data.draw(st.booleans()), data.draw(st.booleans()))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cross_entropy(data):
    rows, vocab = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 40)))
    logits, scale = data.draw(tensors((rows, vocab))), data.draw(maybe(tensors((rows,))))
    values = st.integers(-2, vocab) | st.just(-100)
    labels = torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)))
    labels = labels.to(torch.int64) if data.draw(st.booleans()) else labels.to(torch.int32)
    numbers = (0.1, 0.2, data.draw(st.sampled_from((0.0, 3.0))))
    attempt(OPS.cross_entropy_, logits.clone(), labels, scale, -100, *numbers)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_linear_bwd_weight(data):
    rows, n_out, n_in = data.draw(st.tuples(*[st.integers(0, 300)] * 3))
    dout, x = data.draw(tensors((rows, n_out))), data.draw(tensors((rows, n_in)))
    attempt(OPS.linear_bwd_weight, dout, x, data.draw(st.booleans()))

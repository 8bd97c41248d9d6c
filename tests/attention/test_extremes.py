"""Numbers at the limits of their range, on every backend: biases down to -finfo.max, which do not
mask; common scores beyond any resolution; the largest accepted scales, caps, slopes and sinks.

Results are compared with attention written out in float64; the allowed error comes from the same in
the call's dtype.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import emulated
import pytest
import torch
import torch.nn.functional as F
from cases import Problem
from torch import Tensor

import fastattn
from fastattn.backends import isa
from fastattn.backends.gpu import triton_missing
from fastattn.backends.registry import BY_NAME as BY_BACKEND
from fastattn.core import checks
from fastattn.core.call import Call as AttentionCall
from fastattn.core.spec import Operands, Spec
from fastattn.core.tolerance import allowed_error
from fastattn.weights import attention_weights

ISAS = isa.supported()
HEADS, ROWS, KEYS, DIM = 2, 19, 110, 16
HALF = (torch.bfloat16, torch.float16)


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


# ---- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extreme:
    """One call. bias: (dtype, generator) -> a tensor that broadcasts to [1, HEADS, ROWS, KEYS]."""

    name: str
    bias: object = None
    options: dict = field(default_factory=dict)
    common: float = 0.0  # the common part of q.k


def _rows(values, every: int = 1, keys: int = 1):
    """A bias of one value for every `every`-th row and `keys`-th key, and 0 elsewhere."""

    def make(dtype, draw):
        value = values(dtype) if callable(values) else values
        bias = torch.zeros(1, 1, ROWS, KEYS, dtype=dtype)
        bias[:, :, ::every, ::keys] = value
        return bias

    return make


def _mixed(dtype, draw):
    """-inf, finfo.min and half of it: in rows of all three, of the first two, and of the first."""
    low = lowest(dtype)
    bias = torch.tensor([-math.inf, low, low / 2, low * 0.9], dtype=dtype)
    kinds = torch.randint(4, (1, 1, ROWS, KEYS), generator=draw)
    kinds[:, :, ::3] %= 2
    kinds[:, :, 5] = 0
    return bias[kinds]


def _steps(dtype, draw):
    """The largest numbers, one unit in the last place apart: float32 distinguishes them, so we
    must."""
    bias = torch.full((1, HEADS, ROWS, KEYS), lowest(dtype), dtype=dtype)
    best = torch.randint(KEYS, (1, HEADS, ROWS, 1), generator=draw)
    larger = bias * (1 - torch.finfo(dtype).eps)
    return bias.scatter(3, best, larger)


def _keys(value):
    return lambda dtype, draw: torch.full((1, 1, 1, KEYS), value, dtype=dtype)


def _padding(dtype, draw):
    """A key padding mask as models make it: the last keys and, in one head, all keys."""
    bias = torch.zeros(1, HEADS, 1, KEYS, dtype=dtype)
    bias[..., 70:] = lowest(dtype)
    bias[:, 1] = lowest(dtype)
    return bias


SLOPES = {"alibi_slopes": torch.tensor([0.3, -0.2])}
EXTREMES = [
    Extreme("min", _rows(lowest)),
    Extreme("min-some-rows", _rows(lowest, every=3)),
    Extreme("min-some-keys", _rows(lowest, keys=2)),
    Extreme("min-padding", _padding),
    Extreme("min-causal", _rows(lowest), {"causal": True}),
    Extreme("min-window", _rows(lowest, every=2), {"window": (20, 3)}),
    Extreme("min-alibi", _rows(lowest), SLOPES),
    Extreme("min-steep-alibi", _rows(lowest), {"alibi_slopes": torch.full((2,), 1e28)}),
    Extreme("min-softcap", _rows(lowest, every=2), {"softcap": 5.0}),
    Extreme("min-sinks", _rows(lowest), {"sinks": torch.tensor([0.5, -3.0])}),
    Extreme("min-and-infinity", _mixed),
    Extreme("steps", _steps),
    Extreme("max", _rows(lambda dtype: -lowest(dtype), keys=50)),
    Extreme("max-everywhere", _rows(lambda dtype: -lowest(dtype))),
    Extreme("common-1e3", _rows(-1000.0)),
    Extreme("common-1e6", _keys(1048576.0)),
    Extreme("common-6e8", _rows(-602913024.0)),
    Extreme("common-1e9", _rows(-1178097408.0, every=2)),
    Extreme("common-9e37", _rows(-9.03e37)),
    Extreme("common-min-sink", _rows(lowest), {"sinks": torch.tensor([-3e38, 0.0])}),
    Extreme("common-product", None, {"scale": 1.0}, common=2.0**10),
    Extreme("common-products", None, {"scale": -1.0}, common=2.0**15),
    Extreme("scale-large", None, {"scale": 1e30}),
    Extreme("scale-negative", None, {"scale": -1e30}),
    Extreme("scale-tiny", None, {"scale": 1e-38}),
    Extreme("scale-hard", None, {"scale": 1e7}),
    Extreme("softcap-large", None, {"softcap": 1e30}),
    Extreme("softcap-wide", None, {"softcap": 1e5, "scale": 2.0}),
    Extreme("softcap-0.01", None, {"softcap": 0.01}),
    Extreme("softcap-1000", None, {"softcap": 1000.0, "scale": 5.0}),
    Extreme("softcap-tiny", None, {"softcap": 1e-30, "scale": 1e30}),
    Extreme("alibi-steep", None, {"alibi_slopes": torch.tensor([1e28, 5.0]), "align": "start"}),
    Extreme("sink-3e38", None, {"sinks": torch.tensor([3e38, 0.0])}),
    Extreme("sink-max", None, {"sinks": torch.tensor([-lowest(torch.float32), 1e6])}),
    Extreme("sink-min", None, {"sinks": torch.tensor([lowest(torch.float32), -1e6])}),
    Extreme("sinks-scale", None, {"sinks": torch.tensor([1e30, -1e30]), "scale": 1e29}),
]
BY_NAME = {case.name: case for case in EXTREMES}
TOO_LARGE_FOR_FP16 = {  # of the bias, or of a gradient times its rounding
    *("common-1e6", "common-6e8", "common-1e9", "common-9e37"),
    *("scale-large", "scale-negative", "sinks-scale"),
}
names = pytest.mark.parametrize("name", BY_NAME)


@dataclass
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict

    @property
    def leaves(self) -> dict[str, Tensor]:
        given = {n: self.options[n] for n in ("bias", "sinks") if n in self.options}
        return {"q": self.q, "k": self.k, "v": self.v} | given


def make(case: Extreme, dtype: torch.dtype, dim: int = DIM, seed: int = 0) -> Call:
    draw = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(1, HEADS, n, dim, generator=draw, dtype=torch.float64).to(dtype)
        for n in (ROWS, KEYS, KEYS, ROWS)
    )
    options = dict(case.options)
    if case.bias is not None:
        options["bias"] = case.bias(dtype, draw)
    if "sinks" in options:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        options["sinks"] = options["sinks"].to(wide)
    if case.common:
        q[..., 0] = k[..., 0] = case.common
    return Call(q, k, v, dout, options)


# ---- the truth ----------------------------------------------------------------------------------


def plain(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and gradients, every step written out in dtype."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in call.leaves.items()}
    q, k, v, x = leaves["q"], leaves["k"], leaves["v"], call.options
    rows, keys = q.shape[2], k.shape[2]
    scores = x.get("scale", q.shape[3] ** -0.5) * (q @ k.mT)
    if x.get("softcap"):
        scores = x["softcap"] * torch.tanh(scores / x["softcap"])
    if "bias" in leaves:
        scores = scores + leaves["bias"]
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    at = i + (0 if x.get("align") == "start" else keys - rows)  # the key on the row's diagonal
    if "alibi_slopes" in x:
        scores = scores - x["alibi_slopes"].to(dtype)[:, None, None] * (at - j).abs()
    left, right = x.get("window", (None, None))
    right = 0 if x.get("causal") else right
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    hidden |= (j < at - left) if left is not None else False
    hidden |= (j > at + right) if right is not None else False
    scores = scores.masked_fill(hidden, -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    if "sinks" in leaves:
        sinks = leaves["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., :keys].masked_fill(dead, 0.0)
    lse = scores.logsumexp(-1).masked_fill(dead[..., 0], -math.inf)
    out = weights @ v
    grads = torch.autograd.grad(out, list(leaves.values()), call.dout.to(dtype))
    found = {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(leaves, grads)}
    return {name: x.detach() for name, x in found.items()}


def ours(call: Call, backend: str) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in call.leaves.items()}
    options = call.options | {n: leaves[n] for n in ("bias", "sinks") if n in leaves}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    out, lse = fastattn.attention(q, k, v, **options, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), call.dout)
    found = {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(leaves, grads)}
    return {name: x.detach() for name, x in found.items()}


def check(call: Call, got: dict[str, Tensor], rounded=False, bounded=False) -> None:
    """Whether the results are right. rounded: probs are rounded to half precision. bounded:
    where the rounding of lse is larger than a prob, gradients only need to be what probs in [0,
    1] give."""
    dtype = call.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    truth, rough = plain(call, torch.float64), plain(call, wide)
    if dtype == torch.float64:
        rough = truth
    finite = truth["lse"].isfinite()
    assert torch.equal(got["lse"] == -math.inf, ~finite)
    largest = truth["lse"][finite].abs().amax().item()
    bounded = bounded and largest > 1e6
    # A prob exp(score - lse) has the rounding error of its exponent, limited to the prob itself.
    exponent = 8 * torch.finfo(wide).eps * largest
    exponent = exponent if exponent < 8 else 0.0
    eps = torch.finfo(dtype).eps * (2 if rounded else 1) + exponent
    scale = max(1.0, abs(call.options.get("scale", 1.0)))
    inputs = max(x.abs().max().item() for x in (call.q, call.k))
    for name, want in truth.items():
        if name not in got:
            continue
        x = got[name].double()
        assert not x.isnan().any(), name
        if name == "lse":
            rtol = 8 * torch.finfo(wide).eps
            torch.testing.assert_close(x[finite], want[finite], rtol=rtol, atol=rtol)
            continue
        if bounded and name != "out":
            assert x.abs().max() <= 100 * call.dout.double().abs().sum() * scale * inputs, name
            continue
        error, plain_error = (x - want).abs().max(), (rough[name].double() - want).abs().max()
        size = want.abs().max() + 4 * (scale * inputs if name in ("dq", "dk") else 1)
        kind = "result" if name == "out" else "gradient"
        allowed = allowed_error(kind, plain_error, 8 * eps * size)
        assert error <= allowed, (name, error, allowed, plain_error)


# ---- the backends -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@names
def test_the_reference(name, dtype):
    call = make(BY_NAME[name], dtype)
    check(call, ours(call, "reference"))


@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@names
def test_the_cpu(name, isa, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    for dtype in (torch.float32, torch.float64, *HALF):
        if dtype == torch.float16 and name in TOO_LARGE_FOR_FP16:
            continue
        call = make(BY_NAME[name], dtype)
        check(call, ours(call, "cpu"))


FEW = (  # the interpreter takes seconds per case
    "min-some-rows", "min-causal", "min-and-infinity", "steps", "common-6e8", "common-products",
    "softcap-tiny", "alibi-steep", "sink-3e38", "scale-large",
)  # fmt: skip


@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of overflows that are intended
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.long) for n in BY_NAME]
)
def test_triton(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dtype = torch.bfloat16 if "min" in name else torch.float32
    call = make(BY_NAME[name], dtype)
    check(call, ours(call, "triton"), rounded=True, bounded=True)


CUDA = [
    "common-product", "common-products", "scale-large", "scale-negative", "scale-hard",
    "softcap-0.01", "softcap-1000", "sink-3e38", "sink-max", "sink-min", "sinks-scale",
]  # fmt: skip


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("name", CUDA)
def test_cuda(name, arch):
    case, dtype = BY_NAME[name], torch.bfloat16
    call = make(case, dtype, dim=64)
    spec = checks.spec_of(
        64, case.options.get("scale"), False, None, "end", case.options.get("softcap", 0.0), 0.0
    )
    operands = Operands(sinks=call.options.get("sinks"))
    problem = Problem(call.q, call.k, call.v, spec, operands)
    out, lse = emulated.forward(problem, arch=arch)
    more = (ctypes.c_bool(False),) if arch == "sm80" else ()
    grads = emulated.backward(problem, call.dout, None, out, lse, arch=arch, more=more)
    named = zip(("dq", "dk", "dv", "dsinks"), grads)
    got = {"out": out, "lse": lse} | {n: x for n, x in named if x is not None}
    check(call, got, rounded=True, bounded=True)


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("splits", [1, 2])
def test_cuda_splits(splits):
    call = make(BY_NAME["sink-3e38"], torch.float16, dim=64)
    call.q, call.dout = call.q[:, :, :1].contiguous(), call.dout[:, :, :1].contiguous()
    operands = Operands(sinks=call.options["sinks"])
    problem = Problem(
        call.q, call.k, call.v, checks.spec_of(64, None, False, None, "end", 0, 0), operands
    )
    out, lse = emulated.forward(problem, arch="sm80", num_splits=splits)
    check(call, {"out": out, "lse": lse}, rounded=True)


# ---- other ways in ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
def test_rows_of_the_lowest_number_are_the_mean_as_in_torch(backend):
    call = make(BY_NAME["min"], torch.float32)
    bias = call.options["bias"]
    mine = fastattn.attention(call.q, call.k, call.v, bias=bias, backend=backend)
    theirs = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=bias)
    for out in (mine, theirs):
        torch.testing.assert_close(out, call.v.mean(2, keepdim=True).expand_as(out))


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_bias_of_doubles_saturates(dtype):
    """-1e300 is finite, although float32 has no such number."""
    call = make(BY_NAME["min"], dtype)
    for keys in (1, KEYS):  # broadcast along the keys, or not
        bias = torch.full((1, 1, ROWS, keys), -1e300, dtype=torch.float64)
        for backend in ("cpu", "reference"):
            out, lse = fastattn.attention(
                call.q, call.k, call.v, bias=bias, backend=backend, return_lse=True
            )
            want = call.v.double().mean(2, keepdim=True).expand(out.shape).to(dtype)
            torch.testing.assert_close(out, want)
            assert lse.eq(lowest(torch.float32)).all()


@pytest.mark.native
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding_in_parts(splits):
    call = make(BY_NAME["min"], torch.float32)
    q, bias = call.q[:, :, :1].expand(1, HEADS, 1, DIM), call.options["bias"][:, :, :1]
    options = {"cache_lens": torch.tensor([KEYS], dtype=torch.int32), "num_splits": splits}
    sinks = torch.tensor([3e38, -3e38])
    out = fastattn.decode_attention(q, call.k, call.v, bias=bias, **options)
    torch.testing.assert_close(out, call.v.mean(2, keepdim=True))
    out, lse = fastattn.decode_attention(
        q, call.k, call.v, bias=bias, sinks=sinks, return_lse=True, **options
    )
    assert out[:, 0].eq(0).all() and lse[0, 0, 0].allclose(sinks[0])
    assert out[:, 1].eq(0).all() and lse[0, 1, 0].allclose(sinks[1])  # larger still than finfo.min


@pytest.mark.native
def test_packed_sequences_of_the_lowest_number():
    call = make(BY_NAME["min"], torch.float32)
    q, k, v = (x[0].transpose(0, 1) for x in (call.q, call.k[:, :, :ROWS], call.v[:, :, :ROWS]))
    cu = torch.tensor([0, 7, ROWS], dtype=torch.int32)
    bias = torch.full((1, 1, ROWS, ROWS), lowest(torch.float32))
    v = v.clone().requires_grad_()
    out = fastattn.varlen_attention(q, k, v, cu, cu, ROWS, ROWS, bias=bias)
    torch.testing.assert_close(out[:7], v[:7].mean(0).expand_as(out[:7]))
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.ones_like(dv))


@pytest.mark.parametrize("big", [3e38, lowest(torch.float32), 1e9])
def test_merging_states_of_large_lse(big):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    lse_a = torch.tensor([big, big, -math.inf])
    lse_b = torch.tensor([big, 1.0, big])
    out, lse = fastattn.merge_states(a, lse_a, b, lse_b)
    torch.testing.assert_close(out[0], (a[0] + b[0]) / 2)
    torch.testing.assert_close(out[1], a[1] if big > 0 else b[1])
    torch.testing.assert_close(out[2], b[2])
    assert torch.equal(lse, torch.tensor([big, max(big, 1.0), big]))


@names
def test_weights_are_those_of_the_truth(name):
    """Like attention_weights(), without what it does not support: rows sum to at most 1."""
    case = BY_NAME[name]
    if "alibi_slopes" in case.options:
        pytest.skip("it takes no slopes: they are a bias there")
    call = make(case, torch.float32)
    options = dict(call.options)
    sinks, causal = options.pop("sinks", None), options.pop("causal", False)
    options.setdefault("window", (None, 0) if causal else None)
    _, lse = fastattn.attention(
        call.q, call.k, call.v, sinks=sinks, **options, return_lse=True, backend="reference"
    )
    weights = attention_weights(call.q, call.k, lse, **options).double()
    want, rough = (plain(call, dtype)["out"].double() for dtype in (torch.float64, torch.float32))
    assert weights.ge(0).all() and weights.sum(-1).max() <= 1 + 1e-4
    error, plain_error = (weights @ call.v.double() - want).abs().max(), (rough - want).abs().max()
    largest = lse[lse.isfinite()].abs().max().item()
    roundings = 1e-5 + (1e-6 * largest if largest < 1e7 else 0)
    assert error <= allowed_error("result", plain_error, roundings)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
def test_forward_mode(backend):
    """The reference's derivative, for a row of finfo.min."""
    call = make(BY_NAME["min"], torch.float32)
    function = lambda v: fastattn.attention(  # noqa: E731
        call.q, call.k, v, bias=call.options["bias"], backend=backend
    )
    tangent = torch.randn_like(call.v)
    _, pushed = torch.func.jvp(function, (call.v,), (tangent,))
    torch.testing.assert_close(pushed, tangent.mean(2, keepdim=True).expand_as(pushed))


def test_what_leaves_float32_is_refused():
    q = torch.randn(1, 2, 4, 8)
    for scale in (3e38, -1.1e30):
        with pytest.raises(ValueError, match=r"scale is .*; accepted is a finite number in"):
            fastattn.attention(q, q, q, scale=scale)
        with pytest.raises(ValueError, match=r"scale is .*; accepted is a finite number in"):
            fastattn.scaled_dot_product_attention(q, q, q, scale=scale)
    spec = Spec(1.0, softcap=1e4)
    x = q[..., :1].expand(1, 2, 4, 64).bfloat16()
    assert "softcap is 10000.0" in BY_BACKEND["cuda"].unsupported_reason(
        AttentionCall(x, x, x, spec, Operands())
    )
    for softcap in (1e38, 1e-38):
        with pytest.raises(ValueError, match=r"softcap is .*; accepted are 0"):
            fastattn.attention(q, q, q, softcap=softcap)
    with pytest.raises(ValueError, match=r"alibi_slopes holds 1e\+38; accepted are slopes up to"):
        fastattn.attention(q, q, q, alibi_slopes=torch.tensor([0.0, 1e38]))


@pytest.mark.native
@pytest.mark.parametrize("scale, softcap", [(3e38, 0.0), (1.0, 1e38), (1.0, 1e-38)])
def test_the_operators_refuse_it_too(scale, softcap):
    from fastattn.backends import schema

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match=r"(scale|softcap) must be .*1e30\]"):
        schema.forward(q, q, q, *(None,) * 13, scale, softcap, -1, -1, True, 0.0, 0)

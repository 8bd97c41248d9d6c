"""The operators around attention: norm, rotate and gate. Kernels: csrc/fused_cpu.cpp, and for GPUs
kernels/norm.py, rotate.py and gate.py.
activation.py has the activation and dropout of a feed-forward block.

Each has a reference in plain torch here, float64-exact. The kernels run where they pay: in eager
mode on CPU tensors, and on GPUs that Triton has code for. Plain torch runs on other devices, under
torch.func and forward-mode derivatives, and under torch.compile: what inductor makes of it takes
0.8 to 1.6 times the CPU kernels' time alone (rotate forward the least, RMSNorm with residual and
gradients the most; 2048 x 768, two cores with AVX-512) and is joined to its neighbours' loops.
Second derivatives are the references'. All keep their input's dtype under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.autograd import _KEYS, pull_back
from ..backends.gpu import gpu_missing, launcher
from ..backends.operators import (
    _LIBRARY,
    _TAGS,
    NATIVE_MISSING,
    _accumulate,
    _unit_stride,
    is_dense,
)
from ..core import checks
from ..core.philox import keep_probability, keep_rows

# ---- references ---------------------------------------------------------------------------------


def norm_reference(x, residual, weight, bias, eps, center):
    """(y, summed): summed = x + residual, or x; y = its RMSNorm, or LayerNorm with center."""
    summed = x if residual is None else x + residual
    y = summed.to(_accumulate(summed.dtype))
    if center:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(summed.dtype), summed


def drop_reference(x, seed, dropout_p):
    """x [..., n] after dropout keyed by seed, as the kernels drop: rows count in logical order."""
    if not dropout_p:
        return x
    kept = keep_rows(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p, device=x.device)
    return x * (kept.view(x.shape).to(x.dtype) / keep_probability(dropout_p))


def rotate_reference(x, cos, sin, positions, interleaved):
    """x [..., S, D], pairs of its first 2 * cos.shape[-1] channels turned by the angles of rows
    s (or positions[s] or [b, s]) of cos and sin; those may also be [B, S, pairs]."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # over the heads
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].to(cos.dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gate_reference(gate, up, activation):
    """activation(gate) * up, rounded once."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    gate, up = (x.to(_accumulate(dtype)) for x in (gate, up))
    return (GATES[activation](gate) * up).to(dtype)


# ---- the calls ----------------------------------------------------------------------------------


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, summed) as norm_reference says. Rows are the last dimension; strides are free.

    With dropout_p, in [0, 1), x is dropped before the residual, which must be there, is added.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and checks.tensor("x", x).shape[-1:] != vector.shape:
            raise ValueError(f"x has shape {checks.show(x)} and {name} {checks.show(vector)}; "
                             f"accepted is [..., {vector.shape[0]}]")  # fmt: skip
    _floating("x", x)
    x, residual = arrived(x), arrived(residual)
    if residual is not None:
        if _floating("residual", residual).shape != x.shape:
            raise ValueError(f"residual has shape {checks.show(residual)} and x {checks.show(x)}; "
                             "they must be equal")  # fmt: skip
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    elif dropout_p:
        raise ValueError(f"dropout_p is {dropout_p} and residual None; accepted is 0 without one")
    small = center and not dropout_p and x.numel() < SMALL_LAYER_NORM
    if small or not has_kernel(x, residual, weight, bias):
        return _norm_in_torch(F.dropout(x, dropout_p), residual, weight, bias, eps, center)
    seed = checks.dropout_key(None, x.device) if dropout_p else None
    y, summed, _, _ = _norm(x, residual, weight, bias, eps, center, seed, dropout_p)
    return y, (x if residual is None else summed)


# Below, what our operator costs more than aten's (8 us, and 40 us with gradients) is more than
# its kernel saves: 64 x 256 takes 18 us and aten's 10, 2048 x 768 takes 321 and aten's 497.
SMALL_LAYER_NORM = 1 << 17


def _norm_in_torch(x, residual, weight, bias, eps, center):
    """torch's own norms, which GPUs have kernels for; what they do not take, by the reference."""
    mixed = any(vector is not None and vector.dtype != x.dtype for vector in (weight, bias))
    if mixed or (bias is not None and not center):
        return norm_reference(x, residual, weight, bias, eps, center)
    summed = x if residual is None else x + residual
    if center:
        return F.layer_norm(summed, x.shape[-1:], weight, bias, eps), summed
    return F.rms_norm(summed, x.shape[-1:], weight, eps), summed


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """x turned, as rotate_reference says, in x's memory order; nothing is copied."""
    _floating("x", x)
    if x.dim() > 4 or cos.dim() > 2 or not has_kernel(x, cos, sin, positions):
        return rotate_reference(x, cos, sin, positions, interleaved)
    shape = x.shape
    turned = _rotate(x[(None,) * (4 - x.dim())], cos, sin, positions, interleaved, False)
    return turned if x.dim() == 4 else turned.view(shape)


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, both [..., hidden] of one shape; activation is one of GATES."""
    if _floating("gate", gate).shape != _floating("up", up).shape:
        raise ValueError(f"up has shape {checks.show(up)} and gate {checks.show(gate)}; they must "
                         "be equal")  # fmt: skip
    if gate.dim() == 0 or gate.dtype != up.dtype or not has_kernel(gate, up):
        return gate_reference(gate, up, activation)
    return _gate(gate, up, activation)


def _floating(name, x) -> Tensor:
    if checks.tensor(name, x).dtype not in checks.DTYPES:
        raise TypeError(f"{name} is {x.dtype}; accepted are float32, bfloat16, float16, float64")
    return x


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.ops.aten.alias(x.trigger_wait())

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        return dout


def arrived(x: Tensor | None) -> Tensor | None:
    """x itself, or, where x is the result of a collective that may still be under way (a sum over
    tensor parallelism's ranks), a plain tensor once that has ended. Kernels take plain tensors
    alone, and so dropout draws what it draws in one process."""
    if type(x) in _PLAIN or torch.compiler.is_compiling() or not hasattr(x, "trigger_wait"):
        return x
    return _Arrive.apply(x)


def has_kernel(first: Tensor, *others: Tensor | None) -> bool:
    """Do kernels take these tensors, here and now?"""
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # first: nothing below is traced
        return False
    on_cpu = first.is_cpu
    return (
        (on_cpu or first.is_cuda)
        and all(
            type(x) in _PLAIN and (x is None or (x.is_cpu if on_cpu else x.is_cuda))
            for x in (first, *others)
        )
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and (NATIVE_MISSING if on_cpu else gpu_missing(first.get_device())) is None
    )


def on_gpu(module: str, *names: str) -> None:
    """Gives operators their kernels on GPUs, functions of kernels/<module>.py."""
    for name in names:
        _LIBRARY.impl(name, launcher(module, name), "CUDA")


# ---- schemas and fake kernels -------------------------------------------------------------------

for _schema in (
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center,"
    " Tensor? dropout_seed=None, float dropout_p=0.0)"
    " -> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)",
    "norm_bwd(Tensor dy, Tensor? dsummed, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " float eps, bool center, bool need_dweight, bool need_dbias, Tensor? dropout_seed=None,"
    " float dropout_p=0.0) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dkept)",
    "rotate(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
    " -> Tensor",
    "gate_fwd(Tensor gate, Tensor up, str activation) -> Tensor",
    "gate_bwd(Tensor dout, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
):
    _LIBRARY.define(_schema, tags=_TAGS)
for _module, *_names in (("norm", "norm_fwd", "norm_bwd"), ("rotate", "rotate"),
                         ("gate", "gate_fwd", "gate_bwd")):  # fmt: skip
    on_gpu(_module, *_names)


def _like(x: Tensor) -> Tensor:
    """A result: x's memory order where x is dense, else contiguous."""
    dense = is_dense(x) and (x.shape[-1] <= 1 or x.stride(-1) == 1)
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


@torch.library.register_fake("fastattn::norm_fwd", lib=_LIBRARY)
def _norm_fake(x, residual, weight, bias, eps, center, dropout_seed=None, dropout_p=0.0):
    x = x.contiguous() if dropout_p else x
    rows, dtype = x.shape[:-1].numel(), _accumulate(x.dtype)
    mean, rstd = (x.new_empty(n, dtype=dtype) for n in (rows if center else 0, rows))
    return _like(x), x.new_empty(0) if residual is None else _like(x), mean, rstd


@torch.library.register_fake("fastattn::norm_bwd", lib=_LIBRARY)
def _norm_backward_fake(
    dy, dsummed, x, weight, mean, rstd, eps, center, need_dweight, need_dbias,
    dropout_seed=None, dropout_p=0.0,
):  # fmt: skip
    x = x.contiguous() if dropout_p else x
    sizes = (x.shape[-1] if need else 0 for need in (need_dweight, need_dbias))
    sums = (x.new_empty(n, dtype=_accumulate(x.dtype)) for n in sizes)
    return _like(x), *sums, _like(x) if dropout_p else x.new_empty(0)


@torch.library.register_fake("fastattn::rotate", lib=_LIBRARY)
def _rotate_fake(x, cos, sin, positions, interleaved, inverse):
    return torch.empty_like(_unit_stride(x))


@torch.library.register_fake("fastattn::gate_fwd", lib=_LIBRARY)
def _gate_fake(gate, up, activation):
    return _like(gate)


@torch.library.register_fake("fastattn::gate_bwd", lib=_LIBRARY)
def _gate_backward_fake(dout, gate, up, activation):
    return _like(gate), _like(gate)


# ---- autograd -----------------------------------------------------------------------------------


def differentiable(name, setup, gradient):
    """torch.ops.fastattn.<name> as a function, and its derivative registered for every other use.

    The function is an autograd.Function around the operator, or, where no gradient is wanted, the
    operator's kernel itself: half the cost of torch.library's own way (backends/autograd.py has the
    numbers).
    """
    operator = getattr(torch.ops.fastattn, name).default
    torch.library.register_autograd(
        f"fastattn::{name}", gradient, setup_context=setup, lib=_LIBRARY
    )

    def forward(*args):
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return operator(*args)

    members = {"forward": forward, "setup_context": setup, "backward": gradient}
    members = {key: staticmethod(function) for key, function in members.items()}
    function = type(name, (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply  # as in backends/autograd.py

    def call(*args):
        if torch.compiler.is_compiling():
            return operator(*args)
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return apply(*args)
        return forward(*args)

    return call


def save_inputs(ctx, inputs, output) -> None:
    """setup_context of an operator whose derivative needs its inputs alone."""
    ctx.tensors = [n for n, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[n] for n in ctx.tensors))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def saved_inputs(ctx) -> list:
    """What save_inputs saved."""
    inputs = list(ctx.others)
    for n, x in zip(ctx.tensors, ctx.saved_tensors):
        inputs[n] = x
    return inputs


def through(function, primals):
    """A gradient for an operator's backward: function(*inputs) gives the reference's function of
    the first `primals` inputs, which is differentiated."""

    def gradient(ctx, *cotangents):
        inputs = saved_inputs(ctx)
        if all(c is None for c in cotangents):
            return (None,) * len(inputs)
        grads = pull_back(function(*inputs), inputs[:primals], cotangents)
        return (*grads, *(None,) * (len(inputs) - primals))

    return gradient


def _norm_setup(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.center, seed, ctx.dropout_p = inputs
    _, summed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    base = x if residual is None else summed
    ctx.save_for_backward(base, weight, bias, mean, rstd, seed)
    ctx.residual = residual is not None
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx, dy, dsummed, dmean, drstd):
    base, weight, bias, mean, rstd, seed = ctx.saved_tensors
    dsummed = dsummed if ctx.residual else None
    _, _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    if dy is None:
        if dsummed is None or not ctx.dropout_p:
            return dsummed, dsummed, *(None,) * 6
        dy = torch.zeros_like(dsummed)
    dx, dweight, dbias, dkept = _norm_backward(
        dy, dsummed, base, weight, mean, rstd, ctx.eps, ctx.center, need_dweight, need_dbias,
        seed, ctx.dropout_p,
    )  # fmt: skip
    dweight = dweight.to(weight.dtype) if need_dweight else None
    dbias = dbias.to(bias.dtype) if need_dbias else None
    kept = dkept if ctx.dropout_p else dx
    return kept, dx if ctx.residual else None, dweight, dbias, *(None,) * 4


def _norm_grads(
    dy, dsummed, x, weight, mean, rstd, eps, center, need_dweight, need_dbias, seed, dropout_p
):
    """(dy, dsummed, x, weight) -> norm_bwd's results, by the reference. mean and rstd are x's."""

    def gradients(dy, dsummed, x, weight):
        dtype = _accumulate(x.dtype)
        weight = None if weight is None else weight.to(dtype)

        def reference(x, weight):
            return norm_reference(x, None, weight, None, eps, center)[:1]

        dx, dweight = pull_back(reference, (x, weight), (dy,))
        dx = dx if dsummed is None else dx + dsummed
        dbias = dy.to(dtype).flatten(0, -2).sum(0) if need_dbias else x.new_empty(0, dtype=dtype)
        dkept = drop_reference(dx, seed, dropout_p) if dropout_p else x.new_empty(0)
        return dx, dweight if need_dweight else x.new_empty(0, dtype=dtype), dbias, dkept

    return gradients


def _rotate_setup(ctx, inputs, output):
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.set_materialize_grads(False)


def _rotate_gradient(ctx, dout):
    """A rotation's transpose is the rotation back. cos and sin are tables: no gradient."""
    nothing = (None,) * 5
    if dout is None:
        return None, *nothing
    return _rotate(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), *nothing


def _gate_gradient(ctx, dout):
    if dout is None:
        return None, None, None
    return *_gate_backward(dout, *saved_inputs(ctx)), None


def _gate_grads(dout, gate, up, activation):
    def gradients(dout, gate, up):
        def reference(gate, up):
            return (gate_reference(gate, up, activation),)

        return pull_back(reference, (gate, up), (dout,))

    return gradients


_norm = differentiable("norm_fwd", _norm_setup, _norm_gradient)
_norm_backward = differentiable("norm_bwd", save_inputs, through(_norm_grads, 4))
_rotate = differentiable("rotate", _rotate_setup, _rotate_gradient)
_gate = differentiable("gate_fwd", save_inputs, _gate_gradient)
_gate_backward = differentiable("gate_bwd", save_inputs, through(_gate_grads, 3))

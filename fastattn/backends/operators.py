"""What torch needs for schema.py's operators: result shapes, derivatives, vmap, autocast and
Triton's kernels. The native libraries register their own kernels: csrc/cpu/ops_attention.cpp and
csrc/cuda/ops.cu.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..core.spec import LEAVES, NUMBERS, OPERANDS, Operands
from ..core.tensors import accumulate_dtype, autocast_to, is_8_bit, is_dense, unit_stride
from ..core.transforms import one_by_one
from .gpu import launcher
from .schema import FORWARDS, JVP_PAIRS, LIBRARY, PAIRS, Arguments, forward
from .vmap import vmap_backward, vmap_forward

_N, _M = len(OPERANDS), len(NUMBERS)


# ---- fake kernels: shapes, dtypes and strides of the results -------------------------------------


_FORWARD_TENSORS = ("q", "k", "v", *OPERANDS)
_BACKWARD_TENSORS = ("dout", "dlse", "out", "lse", *_FORWARD_TENSORS)


def one_device(q: Tensor, names, tensors) -> None:
    """Also rejects CPU tensors mixed with meta tensors, for which torch runs only this check."""
    for name, x in zip(names, tensors):
        if x is not None and x.device != q.device:
            raise RuntimeError(f"fastattn: {name} is on {x.device} and q on {q.device}; one device "
                               "is accepted")  # fmt: skip


def _forward_fake(*args):
    x = Arguments.of(*args)
    one_device(x.q, _FORWARD_TENSORS, args)
    one_device(x.q, ("q_descale", "k_descale", "v_descale"), x.rest[1:])
    return results_like(x.q, x.v)


def results_like(q, v):
    """Uninitialised (out, lse)."""
    q = unit_stride(q)
    same = q.shape[3] == v.shape[3] and is_dense(q)
    dtype = torch.bfloat16 if is_8_bit(q) else q.dtype
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_like(q, dtype=dtype) if same else q.new_empty(shape, dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _backward_fake(dout, dlse, out, lse, *args):
    x = Arguments.of(*args)
    one_device(x.q, _BACKWARD_TENSORS, (dout, dlse, out, lse, *args))
    return gradients_like(x, x.rest)


def gradients_like(x: Arguments, needs):
    """Uninitialised Gradients."""
    dtype, leaves = accumulate_dtype(x.q.dtype), Operands(*x.tensors).leaves()
    own = (
        x.q.new_empty((0,) if leaf is None or not need else leaf.shape, dtype=dtype)
        for leaf, need in zip(leaves, needs)
    )
    return *(torch.empty_like(unit_stride(y)) for y in (x.q, x.k, x.v)), *own


# ---- autograd, for calls of the operators themselves (torch.compile, exported programs) ----------
# In eager mode fastattn.attention uses autograd.py instead, which is faster and has jvp.


def _forward_setup(ctx, inputs, output):
    x = Arguments.of(*inputs)
    if any(is_8_bit(y) for y in (x.q, x.k, x.v)):
        raise NotImplementedError(
            "fastattn: 8-bit q, k and v have no gradient, and an input requires grad"
        )
    ctx.save_for_backward(x.q, x.k, x.v, *x.tensors, *output)
    ctx.numbers, ctx.rest = x.numbers, len(x.rest)
    ctx.set_materialize_grads(False)


def _forward_grad(backward, ctx, dout, dlse):
    q, k, v, *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * (3 + _N + _M + ctx.rest)
    dout = torch.zeros_like(out) if dout is None else dout
    needed = dict(zip(OPERANDS, ctx.needs_input_grad[3:]))
    needs = [needed[name] for name in LEAVES]
    grads = backward(dout, dlse, out, lse, q, k, v, *tensors, *ctx.numbers, *needs)
    own = by_operand(Operands(*tensors).leaves(), grads, needs)
    return *grads[:3], *own, *(None,) * (_M + ctx.rest)


def _backward_setup(ctx, inputs, output):
    dout, dlse, _, _, *rest = inputs
    x = Arguments.of(*rest)
    *ctx.needs, dentropy = (*x.rest, None)[: len(LEAVES) + 1]
    if dentropy is not None:
        raise NotImplementedError(
            "fastattn: flash_attn_bwd came with dentropy, and its results have no derivative; "
            "attention(..., return_stats=('entropy',)) has every one"
        )
    ctx.save_for_backward(dout, dlse, x.q, x.k, x.v, *x.tensors)
    ctx.numbers, ctx.rest = x.numbers, len(x.rest)
    ctx.set_materialize_grads(False)


def _backward_grad(jvp, jvp_bwd, ctx, *cotangents):
    """By the two operators of forward mode; second_order.py says how."""
    dout, dlse, *primals = ctx.saved_tensors
    own = (x if need else None for x, need in zip(cotangents[3:], ctx.needs))
    tangents, leaves = (*cotangents[:3], *own), Operands(*primals[3:]).leaves()
    if all(x is None for x in tangents):
        return (None,) * (7 + _N + _M + ctx.rest)
    pushed = jvp(*primals, *ctx.numbers, *tangents)
    needed = dict(zip(OPERANDS, ctx.needs_input_grad[7:]))
    needs = [needed[name] for name in LEAVES]
    grads = jvp_bwd(dout, dlse, *pushed, *primals, *ctx.numbers, *tangents, *needs)
    tensors = by_operand(leaves, grads, needs)
    dlse = None if dlse is None else pushed[3]
    return pushed[2], dlse, None, None, *grads[:3], *tensors, *(None,) * (_M + ctx.rest)


def by_operand(leaves, grads, needs):
    """The gradients of OPERANDS, None where there is none, of those of q, k, v and LEAVES."""
    own = {
        name: dx.to(x.dtype)
        for name, dx, x, need in zip(LEAVES, grads[3:], leaves, needs)
        if need and x is not None
    }
    return (own.get(name) for name in OPERANDS)


# ---- vmap ----------------------------------------------------------------------------------------


def _forward_vmap(forward, info, in_dims, *args):
    x, n = Arguments.of(*args), 3 + _N
    if any(is_8_bit(y) for y in (x.q, x.k, x.v)):  # each instance has its own scales
        num_splits, *descales = x.rest
        return one_by_one(
            info.batch_size, (*in_dims[:n], *in_dims[n + _M + 1 :]),
            lambda *y: forward(*y[:n], *x.numbers, num_splits, *y[n:]), (*args[:n], *descales),
        )  # fmt: skip
    rest = (*x.numbers, *x.rest)
    return vmap_forward(info.batch_size, in_dims[:n], lambda *y: forward(*y, *rest), args[:n])


def _backward_vmap(backward, info, in_dims, *args):
    n, m = 7 + _N, 7 + _N + _M
    rest, needs = args[n:], args[m : m + len(LEAVES)]
    if (dentropy := (*args, None)[m + len(LEAVES)]) is not None:
        tensors, dims = (*args[:n], dentropy), (*in_dims[:n], in_dims[-1])
        numbers = rest[: _M + len(LEAVES)]
        return one_by_one(
            info.batch_size, dims, lambda *y: backward(*y[:n], *numbers, y[n]), tensors
        )
    return vmap_backward(
        info.batch_size, in_dims[:n], lambda *y: backward(*y, *rest), args[:n], needs
    )


# ---- autocast: q, k and v go to the autocast dtype (fp64 and 8 bits stay); operands keep theirs --


def register_autocast(name: str, operator, cast: tuple[int, ...]) -> None:
    """Makes autocast apply to the arguments of these indices."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def autocast(*args, device_type=device_type, excluded=excluded):
            args, dtype = list(args), torch.get_autocast_dtype(device_type)
            for n in cast:
                args[n] = None if args[n] is None else autocast_to(args[n], dtype)
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(*args)

        LIBRARY.impl(name, autocast, key)


# ---- flash_attn_fwd_simple: a call through the dispatcher runs the ordinary operator -------------


def _simple_forward(q, k, v, *numbers):
    return forward(q, k, v, *(None,) * _N, *numbers, 0)


LIBRARY.impl("flash_attn_fwd_simple", _simple_forward, "Autograd")


# ---- registration, for each forward and for each pair --------------------------------------------


for _end, _fwd in FORWARDS.items():
    _name, _bwd = f"fastattn::flash_attn_fwd{_end}", PAIRS.get(_end, (None, None))[1]
    torch.library.register_fake(_name, _forward_fake, lib=LIBRARY)
    torch.library.register_autograd(  # without a backward, _forward_setup raises
        _name, functools.partial(_forward_grad, _bwd), setup_context=_forward_setup, lib=LIBRARY
    )
    torch.library.register_vmap(_name, functools.partial(_forward_vmap, _fwd), lib=LIBRARY)
    register_autocast(f"flash_attn_fwd{_end}", _fwd, (0, 1, 2))

for _end, (_, _bwd) in PAIRS.items():
    _name = f"fastattn::flash_attn_bwd{_end}"
    torch.library.register_fake(_name, _backward_fake, lib=LIBRARY)
    torch.library.register_autograd(
        _name, functools.partial(_backward_grad, *JVP_PAIRS[_end]), setup_context=_backward_setup,
        lib=LIBRARY,
    )  # fmt: skip
    torch.library.register_vmap(_name, functools.partial(_backward_vmap, _bwd), lib=LIBRARY)

for _key in ("CUDA", "CPU"):  # on the CPU, Triton's interpreter
    LIBRARY.impl("flash_attn_fwd_triton", launcher("launch", "forward"), _key)
    LIBRARY.impl("flash_attn_bwd_triton", launcher("launch", "backward"), _key)

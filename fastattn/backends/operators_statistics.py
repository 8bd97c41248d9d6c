"""What torch needs for the operators of statistics and of attention weights, as operators.py has it
for the others: result shapes, derivatives, vmap, autocast, and their kernels in plain torch, which
run where no library has registered a faster one.
"""

from __future__ import annotations

import functools

import torch

from ..core import probabilities
from ..core.spec import LEAVES, NUMBERS, OPERANDS, Operands
from ..core.statistics import key_slots
from ..core.tensors import accumulate_dtype, unit_stride
from ..core.transforms import one_by_one
from . import cpu, triton
from .operators import by_operand, one_device, register_autocast, results_like
from .schema import (
    FORWARD_STATISTICS,
    LIBRARY,
    MAPS,
    PAIRS,
    Arguments,
    weights,
    weights_backward,
)
from .statistics import maps_gradient
from .vmap import vmap_forward

_N, _M = len(OPERANDS), len(NUMBERS)
_TENSORS = ("q", "k", "v", *OPERANDS)
_BACKENDS = {"": cpu.BACKEND, "_triton": triton.BACKEND}


# ---- kernels in plain torch ----------------------------------------------------------------------


def _first_pass(*args):
    x = Arguments.of(*args)
    _, need_entropy, need_argmax = x.rest
    return tuple(
        probabilities.first_pass(x.call().but(q=unit_stride(x.q)), need_entropy, need_argmax)
    )


def _maps(lse, *args):
    x = Arguments.of(*args)
    return tuple(probabilities.maps(x.call(), lse, *x.rest))


def _weights(lse, *args):
    x = Arguments.of(*args)
    return probabilities.weights(x.call(), lse, *x.rest)


def _weights_backward(dweights, lse, *args):
    x = Arguments.of(*args)
    grads = probabilities.weights_gradient(x.call(), lse, *x.rest, dweights)
    grads = [lse.new_empty(0) if dx is None else dx for dx in grads]
    return tuple(y.copy_(dx) for y, dx in zip(_weights_backward_fake(dweights, lse, *args), grads))


# ---- fake kernels --------------------------------------------------------------------------------


def _first_pass_fake(*args):
    x = Arguments.of(*args)
    one_device(x.q, _TENSORS, args)
    _, need_entropy, need_argmax = x.rest
    wide, shape = x.q.new_empty(0, dtype=accumulate_dtype(x.q.dtype)), x.q.shape[:3]
    argmax = wide.new_empty(shape if need_argmax else (0,), dtype=torch.int64)
    entropy = wide.new_empty(shape if need_entropy else (0,))
    return *results_like(x.q, x.v), wide.new_empty(shape), entropy, argmax


def _maps_fake(lse, *args):
    x = Arguments.of(*args)
    one_device(x.q, ("lse", *_TENSORS), (lse, *args))
    need_col_mass, topk, pooled = x.rest
    batch, heads, rows, _ = x.q.shape
    keys, nothing = key_slots(x.call()), (0,)
    largest = (batch, heads, rows, topk) if topk else nothing
    return (
        lse.new_empty((batch, heads, keys) if need_col_mass else nothing), lse.new_empty(largest),
        lse.new_empty(largest, dtype=torch.int64),
        lse.new_empty((batch, heads, pooled, pooled) if pooled else nothing),
    )  # fmt: skip


def _weights_fake(lse, *args):
    x = Arguments.of(*args)
    one_device(x.q, ("lse", *_TENSORS), (lse, *args))
    rows, average = x.rest
    count = x.q.shape[2] if rows is None else rows.shape[0]
    heads = () if average else (x.q.shape[1],)
    return x.q.new_empty((x.q.shape[0], *heads, count, x.k.shape[2]))


def _weights_backward_fake(dweights, lse, *args):
    x = Arguments.of(*args)
    bias = x.call().operands.bias
    own = (torch.empty_like(unit_stride(y)) for y in (x.q, x.k))
    return torch.empty_like(lse), *own, lse.new_empty(0) if bias is None else torch.empty_like(bias)


# ---- autograd ------------------------------------------------------------------------------------


def _first_pass_setup(ctx, inputs, output):
    x = Arguments.of(*inputs)
    out, lse, max_logit, entropy, argmax = output
    ctx.save_for_backward(x.q, x.k, x.v, *x.tensors, out, lse, entropy)
    ctx.numbers, ctx.rest = x.numbers, len(x.rest)
    empty = () if x.rest[1] else (entropy,)
    ctx.mark_non_differentiable(max_logit, argmax, *empty)
    ctx.set_materialize_grads(False)


def _first_pass_grad(backward, ctx, dout, dlse, _max_logit, dentropy, _argmax):
    q, k, v, *tensors, out, lse, entropy = ctx.saved_tensors
    if dout is None and dlse is None and dentropy is None:
        return (None,) * (3 + _N + _M + ctx.rest)
    dout = torch.zeros_like(out) if dout is None else dout
    if dentropy is not None:
        dlse = -dentropy * entropy if dlse is None else dlse - dentropy * entropy
    needed = dict(zip(OPERANDS, ctx.needs_input_grad[3:]))
    needs = [needed[name] for name in LEAVES]
    call = (q, k, v, *tensors, *ctx.numbers)
    grads = backward(dout, dlse, out, lse, *call, *needs, dentropy)
    own = by_operand(Operands(*tensors).leaves(), grads, needs)
    return *grads[:3], *own, *(None,) * (_M + ctx.rest)


def _maps_setup(ctx, inputs, output):
    x = Arguments.of(*inputs[1:])
    ctx.save_for_backward(x.q, x.k, *x.tensors)
    ctx.numbers, (need_col_mass, _, pooled) = x.numbers, x.rest
    empty = (output[n] for n, need in ((0, need_col_mass), (3, pooled)) if not need)
    ctx.mark_non_differentiable(*output[1:3], *empty)
    ctx.set_materialize_grads(False)


def _maps_grad(backend, ctx, dcol, _probs, _keys, dpooled):
    q, k, *tensors = ctx.saved_tensors
    nothing = (None,) * (4 + _N + _M + 3)
    if dcol is None and dpooled is None:
        return nothing
    call = Arguments(q, k, k, tuple(tensors), ctx.numbers, ()).call()
    needed = dict(zip(OPERANDS, ctx.needs_input_grad[4:]))
    needs = [needed[name] for name in LEAVES]
    dq, dk, *own = maps_gradient(call, backend, dcol, dpooled, needs)
    operands = by_operand(call.operands.leaves(), (dq, dk, None, *own), needs)
    return None, dq, dk, None, *operands, *(None,) * (_M + 3)


def _weights_setup(ctx, inputs, output):
    lse, x = inputs[0], Arguments.of(*inputs[1:])
    ctx.save_for_backward(lse, x.q, x.k, *x.tensors, x.rest[0])
    ctx.numbers, ctx.average = x.numbers, x.rest[1]


def _weights_grad(ctx, dweights):
    lse, q, k, *tensors, rows = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph
        call = Arguments(q, k, k, tuple(tensors), ctx.numbers, ()).call()
        dlse, dq, dk, dbias = probabilities.weights_gradient(call, lse, rows, ctx.average, dweights)
    else:  # an operator of its own reads lengths, and so is not traced
        call = (q, k, k, *tensors, *ctx.numbers)
        dlse, dq, dk, dbias = weights_backward(dweights, lse, *call, rows, ctx.average)
        dbias = dbias if dbias.numel() else None
    own = (dbias if name == "bias" else None for name in OPERANDS)
    return dlse, dq, dk, None, *own, *(None,) * (_M + 2)


# ---- vmap ----------------------------------------------------------------------------------------


def _folded(info, dims, tensors, call, made):
    """One call over all of vmap's instances. `made` says which results are not empty."""

    def some(*tensors):
        return tuple(x for x, need in zip(call(*tensors), made) if need)

    found, _ = vmap_forward(info.batch_size, dims, some, tensors)
    left, empty = iter(found), tensors[0].new_empty(0)
    return tuple(next(left) if need else empty for need in made), tuple(
        0 if need else None for need in made
    )


def _first_pass_vmap(operator, info, in_dims, *args):
    n = 3 + _N
    rest, (_, need_entropy, need_argmax) = args[n:], args[n + _M :]
    made = (True, True, True, need_entropy, need_argmax)
    return _folded(info, in_dims[:n], args[:n], lambda *y: operator(*y, *rest), made)


def _maps_vmap(operator, info, in_dims, lse, q, k, v, *args):
    rest, (need_col_mass, topk, pooled) = args[_N:], args[_N + _M :]
    tensors, dims = (q, k, lse, *args[:_N]), (*in_dims[1:3], in_dims[0], *in_dims[4 : 4 + _N])
    made = (need_col_mass, topk > 0, topk > 0, pooled > 0)
    return _folded(
        info, dims, tensors, lambda q, k, lse, *y: operator(lse, q, k, k, *y, *rest), made
    )


def _weights_vmap(info, in_dims, *args):
    n = 4 + _N
    numbers, average = args[n : n + _M], args[-1]

    def one(*y):
        return (weights(*y[:n], *numbers, y[n], average),)

    tensors, dims = (*args[:n], args[n + _M]), (*in_dims[:n], in_dims[n + _M])
    found, dims = one_by_one(info.batch_size, dims, one, tensors)
    return found[0], dims[0]


# ---- registration --------------------------------------------------------------------------------


def _register(operator, plain, fake, grad, setup, vmap, cast) -> None:
    name = operator.name()
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    torch.library.register_autograd(name, grad, setup_context=setup, lib=LIBRARY)
    torch.library.register_vmap(name, vmap, lib=LIBRARY)
    register_autocast(name.removeprefix("fastattn::"), operator, cast)


for _end, (_, _bwd) in PAIRS.items():
    _op = FORWARD_STATISTICS[_end]
    _register(
        _op, _first_pass, _first_pass_fake, functools.partial(_first_pass_grad, _bwd),
        _first_pass_setup, functools.partial(_first_pass_vmap, _op), (0, 1, 2),
    )  # fmt: skip
    _op = MAPS[_end]
    _register(
        _op, _maps, _maps_fake, functools.partial(_maps_grad, _BACKENDS[_end]), _maps_setup,
        functools.partial(_maps_vmap, _op), (1, 2, 3),
    )  # fmt: skip
_register(weights, _weights, _weights_fake, _weights_grad, _weights_setup, _weights_vmap, (1, 2, 3))
LIBRARY.impl("flash_attn_weights_bwd", _weights_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::flash_attn_weights_bwd", _weights_backward_fake, lib=LIBRARY)

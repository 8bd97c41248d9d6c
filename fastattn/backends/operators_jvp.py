"""What torch needs for the operators of forward mode and its backward, as operators.py has it for
the others: result shapes, derivatives, vmap, autocast, and their kernels in plain torch, which run
where no library has registered a faster one.
"""

from __future__ import annotations

import functools

import torch

from ..core import derivatives
from ..core.call import Tangents
from ..core.derivatives import check_tangents
from ..core.spec import LEAVES, NUMBERS, OPERANDS, Operands
from ..core.tensors import as_gradient_of, unit_stride
from ..core.transforms import pull_back
from .operators import (
    by_operand,
    gradients_like,
    one_device,
    register_autocast,
    results_like,
)
from .schema import JVP_PAIRS, LIBRARY, PAIRS, Arguments
from .vmap import vmap_backward, vmap_forward

_N, _M, _T = len(OPERANDS), len(NUMBERS), len(Tangents._fields)
_TANGENTS = tuple(f"t{name}" for name in Tangents._fields)
_TENSORS = ("q", "k", "v", *OPERANDS)
_PUSHED = ("dtout", "dtlse", "out", "lse", "tout", "tlse")


def _checked(args) -> Arguments:
    x = Arguments.of(*args)
    one_device(x.q, (*_TENSORS, *_TANGENTS), (*args[: 3 + _N], *x.rest[:_T]))
    check_tangents(x.call(), Tangents(*x.rest[:_T]))
    return x


# ---- kernels in plain torch ----------------------------------------------------------------------


def plain_jvp(*args):
    x = _checked(args)
    call = x.call().but(q=unit_stride(x.q))
    return tuple(derivatives.jvp(call, Tangents(*x.rest)))


def plain_jvp_bwd(dtout, dtlse, out, lse, tout, tlse, *args):
    x = _checked(args)
    tangents, needs = Tangents(*x.rest[:_T]), x.rest[_T:]
    grads = derivatives.jvp_bwd(x.call(), tangents, dtout, dtlse, needs)
    return *map(as_gradient_of, (x.q, x.k, x.v), grads[:3]), *grads[3:]


# ---- fake kernels --------------------------------------------------------------------------------


def _jvp_fake(*args):
    x = _checked(args)
    return *results_like(x.q, x.v), *results_like(x.q, x.v)


def _jvp_bwd_fake(*args):
    pushed, args = args[: len(_PUSHED)], args[len(_PUSHED) :]
    x = _checked(args)
    one_device(x.q, _PUSHED, pushed)
    return gradients_like(x, x.rest[_T:])


# ---- autograd ------------------------------------------------------------------------------------


def _jvp_setup(ctx, inputs, output):
    x = Arguments.of(*inputs)
    ctx.save_for_backward(x.q, x.k, x.v, *x.tensors, *x.rest, *output)
    ctx.numbers = x.numbers
    ctx.set_materialize_grads(False)


def _jvp_grad(backward, jvp_bwd, ctx, dout, dlse, dtout, dtlse):
    """The gradients of second_order.AttentionJvp."""
    n = 3 + _N
    primals, tangents = ctx.saved_tensors[:n], ctx.saved_tensors[n : n + _T]
    out, lse, tout, tlse = ctx.saved_tensors[n + _T :]
    needed, leaves = ctx.needs_input_grad, Operands(*primals[3:]).leaves()
    operands = dict(zip(OPERANDS, needed[3:]))
    needs, tangent_needs = [operands[name] for name in LEAVES], needed[-len(LEAVES) :]
    call, pushed = (*primals, *ctx.numbers), not (dtout is None and dtlse is None)
    grads, of_tangents = None, (None,) * _T
    if not (dout is None and dlse is None):
        dout = torch.zeros_like(out) if dout is None else dout
        grads = backward(dout, dlse, out, lse, *call, *needs)
    if pushed:
        dtout = torch.zeros_like(tout) if dtout is None else dtout
        more = jvp_bwd(dtout, dtlse, out, lse, tout, tlse, *call, *tangents, *needs)
        grads = more if grads is None else [x + y for x, y in zip(grads, more)]
    if pushed and any(needed[-_T:]):
        of_tangents = backward(dtout, dtlse, out, lse, *call, *tangent_needs)
        pairs = zip(tangents, of_tangents, needed[-_T:])
        of_tangents = [dx.to(x.dtype) if need else None for x, dx, need in pairs]
    if grads is None:
        return (None,) * (n + _M + _T)
    return *grads[:3], *by_operand(leaves, grads, needs), *(None,) * _M, *of_tangents


def _jvp_bwd_setup(ctx, inputs, output):
    dtout, dtlse, _, _, _, _, *rest = inputs
    x = Arguments.of(*rest)
    ctx.save_for_backward(dtout, dtlse, x.q, x.k, x.v, *x.tensors, *x.rest[:_T])
    ctx.numbers, ctx.needs = x.numbers, x.rest[_T:]
    ctx.set_materialize_grads(False)


def _jvp_bwd_grad(ctx, *cotangents):
    """A third derivative: that of plain torch, a chunk of rows at a time."""
    dtout, dtlse, q, k, v, *tensors = ctx.saved_tensors
    operands, tangents = Operands(*tensors[:_N]), tensors[_N:]

    def function(dtout, dtlse, q, k, v, *rest):
        leaves, tangents = rest[: len(LEAVES)], rest[len(LEAVES) :]
        given = Operands.join(leaves, operands.others()).tensors()
        call = Arguments(q, k, v, given, ctx.numbers, ()).call()
        return tuple(derivatives.jvp_bwd(call, Tangents(*tangents), dtout, dtlse, ctx.needs))

    primals = (dtout, dtlse, q, k, v, *operands.leaves(), *tangents)
    dtout, dtlse, *grads = pull_back(function, primals, cotangents)
    own = dict(zip(LEAVES, grads[3:]))
    operands = (own.get(name) for name in OPERANDS)
    nothing, of_tangents = (None,) * 4, grads[3 + len(LEAVES) :]
    return (
        dtout, dtlse, *nothing, *grads[:3], *operands, *(None,) * _M, *of_tangents,
        *(None,) * len(LEAVES),
    )  # fmt: skip


# ---- vmap ----------------------------------------------------------------------------------------


def _jvp_vmap(jvp, info, in_dims, *args):
    n, m = 3 + _N, 3 + _N + _M
    numbers = args[n:m]
    return vmap_forward(
        info.batch_size, (*in_dims[:n], *in_dims[m:]),
        lambda *y: jvp(*y[:n], *numbers, *y[n:]), (*args[:n], *args[m:]),
    )  # fmt: skip


def _jvp_bwd_vmap(jvp_bwd, info, in_dims, *args):
    n = len(_PUSHED) + 3 + _N
    m, end = n + _M, n + _M + _T
    numbers, needs = args[n:m], args[end:]
    return vmap_backward(
        info.batch_size, (*in_dims[:n], *in_dims[m:end]),
        lambda *y: jvp_bwd(*y[:n], *numbers, *y[n:], *needs), (*args[:n], *args[m:end]), needs,
        rows=len(_PUSHED),
    )  # fmt: skip


# ---- registration --------------------------------------------------------------------------------


for _end, (_op, _bwd) in JVP_PAIRS.items():
    _, _first = PAIRS[_end]
    for _operator, _plain, _fake, _grad, _setup, _vmap in (
        (_op, plain_jvp, _jvp_fake, functools.partial(_jvp_grad, _first, _bwd), _jvp_setup,
         functools.partial(_jvp_vmap, _op)),
        (_bwd, plain_jvp_bwd, _jvp_bwd_fake, _jvp_bwd_grad, _jvp_bwd_setup,
         functools.partial(_jvp_bwd_vmap, _bwd)),
    ):  # fmt: skip
        _name = _operator.name()
        LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
        torch.library.register_fake(_name, _fake, lib=LIBRARY)
        torch.library.register_autograd(_name, _grad, setup_context=_setup, lib=LIBRARY)
        torch.library.register_vmap(_name, _vmap, lib=LIBRARY)
    _first_tangent = 3 + _N + _M
    _cast = (0, 1, 2, *range(_first_tangent, _first_tangent + 3))  # q, k, v and their tangents
    register_autocast(f"flash_attn_jvp{_end}", _op, _cast)

"""Gradients, tangents and gradients of tangents of a call, as autograd functions that can be
differentiated again. autograd.py has the forward pass. Next hop: the backend of registry.py.

Two operators beside the backward give every derivative to second order (core/derivatives.py has the
formulas): `jvp`, the tangents of (out, lse), and `jvp_bwd`, the gradients of these with respect to
the call's inputs.

    derivative                         is computed by
    tangents (forward mode)            jvp
    gradients of tangents              backward + jvp_bwd; for the tangents themselves, backward
    gradients of gradients             jvp in the direction of their cotangents, and jvp_bwd
    tangents of gradients              jvp_bwd + backward of the tangents of dout and dlse
    any other                          core/derivatives.py, differentiated chunk by chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from ..core import derivatives
from ..core.call import Call, JvpResult, Result, Tangents
from ..core.spec import LEAVES, NO_OPERANDS, OTHERS, Operands
from ..core.transforms import pull_back, push_forward
from .vmap import vmap_backward, vmap_forward

# With these keys excluded the dispatcher calls an operator's kernel directly: the functions here
# and in autograd.py are the autograd, and autocast has been applied before.
BELOW_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
for _name in ("AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA"):
    BELOW_AUTOGRAD = BELOW_AUTOGRAD | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name))

NO_OTHERS = (None,) * len(OTHERS)
_L = len(LEAVES)
_P = 3 + _L  # primals: q, k, v and LEAVES; and as many tangents


# Skips Function.apply, whose inspect.signature() costs more than the operator itself. It only adds
# support for functorch and for default arguments, which these calls do not need.
_of: Any = super  # type checkers take super()'s result for a plain object


def eager_apply(function: type) -> Any:
    """function.apply where no transform is active."""
    return _of(torch.autograd.Function, function).apply


def apply_of(function: type) -> Any:
    """function.apply, the fast way where no transform is active."""
    eager = eager_apply(function)

    def apply(*args):
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
        return eager(*args)

    return apply


def call_of(q, k, v, leaves, others, spec, num_splits=0) -> Call:
    operands = NO_OPERANDS if others is None else Operands.join(leaves, others)
    return Call(q, k, v, spec, operands, num_splits)


def in_order(leaves, others):
    """The values of LEAVES and OTHERS together, in the order of OPERANDS."""
    return Operands.join(leaves, others or NO_OTHERS).tensors()


def leaves_and_others(operands):
    """(*leaves, others) of values in the order of OPERANDS."""
    x = Operands(*operands)
    return *x.leaves(), x.others()


def gradients(dout, dlse, result, tensors, others, how):
    """The gradients of AttentionBackward, differentiable where a caller may want to differentiate
    them."""
    dout = torch.zeros_like(result.out) if dout is None else dout
    if (
        torch.is_grad_enabled()  # create_graph
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        differentiate = attention_backward
    else:
        differentiate = AttentionBackward.forward
    return differentiate(dout, dlse, *result, *tensors, others, how)


def _given(tangents) -> bool:
    return any(x is not None for x in tangents)


def _sum(grads, others):
    """Sums of two lists of gradients, of which either may be None."""
    if grads is None or others is None:
        return others if grads is None else grads
    return tuple(x + y for x, y in zip(grads, others))


class AttentionBackward(torch.autograd.Function):
    """Gradients of q, k, v and LEAVES (those of LEAVES fp32 or fp64, empty where not needed).

    Arguments: dout, dlse, out and lse; then q, k, v and LEAVES; `others`, the operands that have no
    gradient, or None; `how`, (spec, backend, needs). out and lse are functions of the other inputs,
    and second derivatives are taken through them there, so they get no gradient of their own.
    """

    @staticmethod
    def forward(dout, dlse, out, lse, q, k, v, *rest):
        *leaves, others, (spec, backend, needs) = rest
        call = call_of(q, k, v, leaves, others, spec)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return tuple(backend.backward(call, Result(out, lse), dout, dlse, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, others, how = inputs
        ctx.save_for_backward(*tensors, *(others or ()))
        ctx.save_for_forward(*tensors, *(others or ()))
        ctx.how = how
        ctx.set_materialize_grads(False)

    @staticmethod
    def _saved(ctx):
        saved = ctx.saved_tensors
        return saved[:2], Result(*saved[2:4]), saved[4 : 4 + _P], saved[4 + _P :] or None

    @staticmethod
    def backward(ctx, *cotangents):
        nothing = (None,) * (6 + _P)
        (dout, dlse), _, primals, others = AttentionBackward._saved(ctx)
        spec, backend, needs = ctx.how
        own = (x if need else None for x, need in zip(cotangents[3:], needs))
        tangents = (*cotangents[:3], *own)  # the direction in which dout and dlse are pushed
        if not _given(tangents):
            return nothing
        pushed = JvpResult(*attention_jvp(*primals, *tangents, others, (spec, backend, None)))
        wanted, grads = ctx.needs_input_grad[4:-2], (None,) * _P
        if any(wanted):
            inputs = (dout, dlse, *pushed, *primals, *tangents, others)
            grads = attention_jvp_backward(*inputs, (spec, backend, wanted[3:]))
            grads = _in_dtype_of(primals, grads, wanted)
        dlse = None if dlse is None else pushed.tlse
        return pushed.tout, dlse, None, None, *grads, None, None

    @staticmethod
    def jvp(ctx, tdout, tdlse, tout, tlse, *rest):
        (dout, dlse), result, primals, others = AttentionBackward._saved(ctx)
        spec, backend, needs = ctx.how
        tangents, first, second = rest[:-2], None, None
        if _given(tangents):
            if tout is None or tlse is None:
                *_, tout, tlse = attention_jvp(*primals, *tangents, others, (spec, backend, None))
            inputs = (dout, dlse, *result, tout, tlse, *primals, *tangents, others)
            first = attention_jvp_backward(*inputs, ctx.how)
        if tdout is not None or tdlse is not None:
            tdout = torch.zeros_like(dout) if tdout is None else tdout
            second = attention_backward(tdout, tdlse, *result, *primals, others, ctx.how)
        return _sum(first, second)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(AttentionBackward, info, in_dims, args, rows=4)


class AttentionJvp(torch.autograd.Function):
    """out, lse and their tangents.

    Arguments: q, k, v and LEAVES; a tangent of each, or None; `others`; `how`, (spec, backend,
    known), where `known` is the result if it has been computed before, or None.
    """

    @staticmethod
    def forward(*args):
        *tensors, others, (spec, backend, known) = args
        if known is not None:
            return tuple(known)
        call = call_of(*tensors[:3], tensors[3:_P], others, spec)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return tuple(backend.jvp(call, Tangents(*tensors[_P:])))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, others, (spec, backend, _) = inputs
        ctx.save_for_backward(*tensors, *output, *(others or ()))
        ctx.save_for_forward(*tensors, *output, *(others or ()))
        ctx.how = spec, backend
        ctx.set_materialize_grads(False)

    @staticmethod
    def _saved(ctx):
        """(primals, tangents, result, others)."""
        x, n = ctx.saved_tensors, 2 * _P
        return x[:_P], x[_P:n], JvpResult(*x[n : n + 4]), x[n + 4 :] or None

    @staticmethod
    def backward(ctx, dout, dlse, dtout, dtlse):
        primals, tangents, pushed, others = AttentionJvp._saved(ctx)
        result, needs = Result(pushed.out, pushed.lse), ctx.needs_input_grad
        wanted, wanted_tangents = needs[:_P], needs[_P : 2 * _P]
        grads, grads_tangents = None, (None,) * _P
        how = (*ctx.how, wanted[3:])
        if any(wanted) and not (dout is None and dlse is None):
            grads = gradients(dout, dlse, result, primals, others, how)
        if not (dtout is None and dtlse is None):
            dtout = torch.zeros_like(pushed.tout) if dtout is None else dtout
            if any(wanted):
                inputs = (dtout, dtlse, *pushed, *primals, *tangents, others)
                grads = _sum(grads, attention_jvp_backward(*inputs, how))
            if any(wanted_tangents):
                how = (*ctx.how, wanted_tangents[3:])
                grads_tangents = gradients(dtout, dtlse, result, primals, others, how)
                grads_tangents = _in_dtype_of(tangents, grads_tangents, wanted_tangents)
        grads = (None,) * _P if grads is None else _in_dtype_of(primals, grads, wanted)
        return *grads, *grads_tangents, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        """Tangents of tangents."""
        tensors = AttentionJvp._saved(ctx)
        return push_forward(
            _plain_jvp(ctx.how[0], tensors[3]), (*tensors[0], *tensors[1]), tangents
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        tensors, dims, how = _flat(in_dims, args, 0)

        def jvp(*x):
            return attention_jvp(*_nested(x, 0), how)

        return vmap_forward(info.batch_size, dims, jvp, tensors)


class AttentionJvpBackward(torch.autograd.Function):
    """Gradients of <dtout, tout> + <dtlse, tlse> with respect to q, k, v and LEAVES, as in
    AttentionBackward.

    Arguments: dtout, dtlse, out, lse, tout and tlse; then AttentionJvp's, where `how` is (spec,
    backend, needs). out, lse, tout and tlse get no gradient of their own, as in AttentionBackward.
    """

    @staticmethod
    def forward(dtout, dtlse, out, lse, tout, tlse, *args):
        *tensors, others, (spec, backend, needs) = args
        call = call_of(*tensors[:3], tensors[3:_P], others, spec)
        result, tangents = JvpResult(out, lse, tout, tlse), Tangents(*tensors[_P:])
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return tuple(backend.jvp_bwd(call, result, tangents, dtout, dtlse, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dtout, dtlse, _, _, _, _, *tensors, others, how = inputs
        ctx.save_for_backward(dtout, dtlse, *tensors, *(others or ()))
        ctx.save_for_forward(dtout, dtlse, *tensors, *(others or ()))
        ctx.how = how
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        primals, function = AttentionJvpBackward._function(ctx)
        dtout, dtlse, *rest = pull_back(function, primals, cotangents)
        return dtout, dtlse, None, None, None, None, *rest, None, None

    @staticmethod
    def jvp(ctx, dtout, dtlse, _out, _lse, _tout, _tlse, *rest):
        primals, function = AttentionJvpBackward._function(ctx)
        return push_forward(function, primals, (dtout, dtlse, *rest[:-2]))

    @staticmethod
    def _function(ctx):
        spec, _, needs = ctx.how
        n, saved = 2 + 2 * _P, ctx.saved_tensors
        return saved[:n], _plain_jvp_backward(spec, saved[n:] or None, needs)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(AttentionJvpBackward, info, in_dims, args, rows=6)


attention_backward, attention_jvp, attention_jvp_backward = map(
    apply_of, (AttentionBackward, AttentionJvp, AttentionJvpBackward)
)


def _in_dtype_of(tensors, grads, wanted):
    """Gradients in the dtype of what they belong to; None where not wanted."""
    return tuple(dx.to(x.dtype) if w else None for x, dx, w in zip(tensors, grads, wanted))


# ---- third and higher orders: core/derivatives.py, differentiated --------------------------------


def _plain_jvp(spec, others):
    """(primals, tangents) -> JvpResult."""

    def function(*tensors):
        call = call_of(*tensors[:3], tensors[3:_P], others or NO_OTHERS, spec)
        return tuple(derivatives.jvp(call, Tangents(*tensors[_P:])))

    return function


def _plain_jvp_backward(spec, others, needs):
    """(dtout, dtlse, primals, tangents) -> Gradients."""

    def function(dtout, dtlse, *tensors):
        call = call_of(*tensors[:3], tensors[3:_P], others or NO_OTHERS, spec)
        return tuple(derivatives.jvp_bwd(call, Tangents(*tensors[_P:]), dtout, dtlse, needs))

    return function


# ---- vmap ----------------------------------------------------------------------------------------


def _flat(in_dims, args, rows):
    """(the tensors in the order of vmap.py, their vmap dimensions, how)."""
    *_, others, how = args
    n = rows + 3

    def flat(x, others):
        return *x[:n], *in_order(x[n : n + _L], others), *x[n + _L : -2]

    return flat(args, others), flat(in_dims, in_dims[-2]), how


def _nested(tensors, rows):
    """The tensors of _flat() as the functions' arguments before `how`."""
    first, end = rows + 3, rows + 3 + len(LEAVES) + len(OTHERS)
    *leaves, others = leaves_and_others(tensors[first:end])
    return *tensors[:first], *leaves, *tensors[end:], others


def _vmap(function, info, in_dims, args, rows):
    tensors, dims, how = _flat(in_dims, args, rows)

    def gradients(*x):
        return function.apply(*_nested(x, rows), how)

    return vmap_backward(info.batch_size, dims, gradients, tensors, how[2], rows)

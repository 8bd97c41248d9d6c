"""From a checked call to the backend, with every derivative. Next hop: the backend of registry.py.

The backward is the backend's fused kernel, and so are forward mode and second derivatives, where it
has them (second_order.py). Forward mode computes the results and their tangents in one pass where
the tangents are known when the forward runs: in torch.autograd.forward_ad's levels, and in
torch.func.jvp and jacfwd. Inside torch.func.grad inside torch.func.jvp (Hessian-vector products)
they are known only to an outer transform, which sees the call after its forward, so that there the
forward runs twice: once alone, once with the tangents.

The cost of a call without operands in eager mode, for [1, 1, 8, 8] fp32 tensors on one thread, in
thousands of user instructions (callgrind, AVX2 kernels), which unlike times do not vary:

                                                 by the ordinary operator   by attend_simple()
    attention(), no gradient wanted                        138                      88
    attention(), gradient wanted, forward                  194                     125
    F.scaled_dot_product_attention, the same two          62, 74
    the same under enable()                               68, 83    (77, 92 before new_strided())

The ordinary operator has 23 arguments. Torch spends 19 thousand instructions on searching them for
subclasses, 12 on converting them and 5 on passing them to C++; excluding autograd takes 8 more.
attend_simple() calls an operator of nine arguments without torch's dispatcher. Of its 88 thousand,
the kernel takes 14 and the C++ around it 20.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from ..core.call import Call, JvpResult, Result, Tangents
from ..core.spec import LEAVES, NO_OPERANDS, Spec, numbers_of
from .backend import Backend
from .second_order import (
    BELOW_AUTOGRAD,
    attention_jvp,
    call_of,
    eager_apply,
    gradients,
    in_order,
    leaves_and_others,
)
from .vmap import vmap_forward

_transformed = torch._C._are_functorch_transforms_active

_NOTHING = (None, None)
_NO_LEAVES = (None,) * len(LEAVES)
_NO_NEEDS = (False,) * len(LEAVES)


class SimplePlan(NamedTuple):
    """How to run a call of four dimensions without operands and dropout. Calls that differ only
    in values and strides share one."""

    spec: Spec
    backend: Any  # a Backend; `numbers` says whether its `simple` is there
    numbers: tuple | None  # the spec's; None where backend.simple does not take these calls

    @classmethod
    def of(cls, call: Call, backend: Backend) -> SimplePlan:
        serves = backend.simple is not None and call.q.is_cpu
        return cls(call.spec, backend, numbers_of(call.spec) if serves else None)


def attend(call: Call, backend: Backend, eagerly: bool = False) -> Result:
    """The result of a checked call on `backend`, differentiable. `eagerly` is transforms.py's: what
    torch traces is the operator, and it enters the transforms there."""
    if not eagerly and (torch.compiler.is_compiling() or torch._C._is_tracing()):
        return backend.forward(call)  # the operator has its own autograd (operators.py)
    operands = call.operands
    transformed = _transformed()
    if operands.descales is not None and (transformed or forward_ad._current_level >= 0):
        _refuse_tangent("q", call.q)
        return backend.forward(call)  # the operator has its own vmap; 8 bits have no gradient
    wants_grad = torch.is_grad_enabled() and (
        call.q.requires_grad
        or call.k.requires_grad
        or call.v.requires_grad
        or (
            operands is not NO_OPERANDS
            and any(x is not None and x.requires_grad for x in operands.leaves())
        )
    )
    if not (wants_grad or transformed or forward_ad._current_level >= 0):
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return backend.forward(call)
    leaves, others = _NO_LEAVES, None
    if operands is not NO_OPERANDS:
        leaves, others = operands.leaves(), operands.others()
    how = (call.spec, backend, call.num_splits)
    if transformed or forward_ad._current_level >= 0:
        _refuse_tangent("alibi_slopes", operands.alibi_slopes)
        return Result(*_differentiable(call.q, call.k, call.v, *leaves, others, how))
    return Result(*_apply_eager(call.q, call.k, call.v, *leaves, others, how))


def attend_simple(q: Tensor, k: Tensor, v: Tensor, plan: SimplePlan) -> Result | tuple:
    """attend() of a call that `plan` was made for. Where torch has to see an operator (under a
    mode, a transform or a profiler, or for a negative view), the ordinary one runs."""
    if (
        plan.numbers is None
        or not (q.layout is k.layout is v.layout is torch.strided)  # a oneDNN tensor has no strides
        or q.is_neg()  # a view that torch's dispatcher negates: z.conj().imag
        or k.is_neg()
        or v.is_neg()
        or _transformed()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()  # pyright: ignore[reportAttributeAccessIssue]
    ):
        return attend(Call(q, k, v, plan.spec, NO_OPERANDS), plan.backend)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply_simple(q, k, v, plan)
    return plan.backend.simple(q, k, v, *plan.numbers)


class SimpleAttention(torch.autograd.Function):
    """Attention for attend_simple(): eager only, with four arguments."""

    @staticmethod
    def forward(ctx, q, k, v, plan):
        out, lse = plan.backend.simple(q, k, v, *plan.numbers)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, None
        q, k, v, out, lse = ctx.saved_tensors
        how = (ctx.plan.spec, ctx.plan.backend, _NO_NEEDS)
        grads = gradients(dout, dlse, Result(out, lse), (q, k, v, *_NO_LEAVES), None, how)
        return *grads[:3], None


class Attention(torch.autograd.Function):
    """The forward pass; its derivative is AttentionBackward.

    Arguments: q, k, v and LEAVES, which have gradients; `others`, the operands that have none, or
    None where there are no operands at all; `how`, (spec, backend, num_splits).
    """

    @staticmethod
    def forward(q, k, v, *rest):
        *leaves, others, (spec, backend, num_splits) = rest
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return backend.forward(call_of((q, k, v, *leaves), others, spec, num_splits))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, others, how = inputs
        ctx.save_for_backward(*tensors, *output, *(others or ()))
        if forward_ad._current_level >= 0 or _transformed():
            ctx.save_for_forward(*tensors, *output, *(others or ()))
        ctx.how = how
        ctx.set_materialize_grads(False)

    @staticmethod
    def _saved(ctx):
        """(q, k, v and LEAVES; out and lse; the others or None)."""
        n, saved = 3 + len(LEAVES), ctx.saved_tensors
        return saved[:n], Result(*saved[n : n + 2]), saved[n + 2 :] or None

    @staticmethod
    def backward(ctx, dout, dlse):
        nothing = (None,) * (5 + len(LEAVES))
        if dout is None and dlse is None:
            return nothing
        return Attention._gradients(ctx, dout, dlse, *Attention._saved(ctx))

    @staticmethod
    def _gradients(ctx, dout, dlse, tensors, result, others):
        spec, backend, _ = ctx.how
        needs = ctx.needs_input_grad[3:-2]
        grads = gradients(dout, dlse, result, tensors, others, (spec, backend, needs))
        own = zip(grads[3:], tensors[3:], needs)
        return *grads[:3], *(dx.to(x.dtype) if need else None for dx, x, need in own), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        """Of an outer transform; see the module's docstring."""
        tensors, _, others = Attention._saved(ctx)
        spec, backend, _ = ctx.how
        _, _, *pushed = attention_jvp(*tensors, *tangents[:-2], others, (spec, backend, None))
        return tuple(pushed)

    @staticmethod
    def vmap(info, in_dims, q, k, v, *rest):
        *leaves, others, how = rest
        dims = (*in_dims[:3], *in_order(in_dims[3:-2], in_dims[-2]))

        def attention(q, k, v, *operands):
            return _differentiable(q, k, v, *leaves_and_others(operands), how)

        tensors = (q, k, v, *in_order(leaves, others))
        return vmap_forward(info.batch_size, dims, attention, tensors)


class DualAttention(torch.autograd.Function):
    """Attention inside a level of torch.autograd.forward_ad, without a transform of torch.func. The
    forward computes the tangents too, and jvp(), which torch calls next, returns them."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, others, (spec, backend, num_splits) = args
        ctx.how, ctx.pushed, ctx.tangents = (spec, backend, num_splits), None, None
        ctx.set_materialize_grads(False)
        call = call_of(tensors, others, spec, num_splits)
        with forward_ad._set_fwd_grad_enabled(True):  # torch disables it in forward()
            tangents = [_tangent(x, forward_ad._current_level) for x in tensors]
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            # torch's older vmap, which gradcheck uses, allows no batched result here:
            # then only jvp() computes tangents.
            if all(x is None or is_legacy_batchedtensor(x) for x in tangents):
                result = backend.forward(call)
            else:
                ctx.pushed = backend.jvp(call, Tangents(*tangents))
                result = Result(*ctx.pushed[:2])
        ctx.save_for_backward(*tensors, *result, *(others or ()))
        ctx.save_for_forward(*tensors, *result, *(others or ()))
        return tuple(result)

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * (5 + len(LEAVES))
        tensors, result, others = Attention._saved(ctx)
        if ctx.tangents is not None and (level := forward_ad._current_level) >= 0:
            # torch saves outputs without their tangents, which jvp() of AttentionBackward reads.
            pairs = zip(result, ctx.tangents)
            result = Result(*(forward_ad.make_dual(x.detach(), t, level=level) for x, t in pairs))
        return Attention._gradients(ctx, dout, dlse, tensors, result, others)

    @staticmethod
    def jvp(ctx, *tangents):
        tensors, _, others = Attention._saved(ctx)
        spec, backend, _ = ctx.how
        known, ctx.pushed = ctx.pushed, None
        if known is not None:
            # Copies, since out and lse themselves would become results of AttentionJvp.
            known = JvpResult(known.out.clone(), known.lse.clone(), known.tout, known.tlse)
            ctx.tangents = known.tout, known.tlse
        _, _, *pushed = attention_jvp(*tensors, *tangents[:-2], others, (spec, backend, known))
        return tuple(pushed)


_apply_eager, _apply_simple, _apply_dual = map(
    eager_apply, (Attention, SimpleAttention, DualAttention)
)


def _level() -> int | None:
    """The level of forward mode by which unpack_dual() finds tangents here, or None: an outer
    transform's are not seen. Transforms have level 0, of which compiled code does not tell
    forward_ad._current_level."""
    if _transformed():
        return 0 if peek_interpreter_stack().key() == TransformType.Jvp else None
    return forward_ad._current_level if forward_ad._current_level >= 0 else None


def _tangent(x: Tensor | None, level: int) -> Tensor | None:
    return None if x is None else forward_ad.unpack_dual(x, level=level).tangent


def _refuse_tangent(name: str, x: Tensor | None) -> None:
    if (level := _level()) is not None and _tangent(x, level) is not None:
        raise NotImplementedError(
            f"{name} came with a tangent, and has no derivative; pass {name}.detach()"
        )


def _differentiable(q, k, v, *rest):
    """(out, lse) of Attention's arguments. Their tangents are computed in the same pass where the
    innermost transform is forward mode."""
    *leaves, others, how = rest
    if not _transformed():
        return (_apply_eager if forward_ad._current_level < 0 else _apply_dual)(q, k, v, *rest)
    level, primals = _level(), (q, k, v, *leaves)
    if level is None or all(_tangent(x, level) is None for x in primals):
        return Attention.apply(q, k, v, *rest)
    unpack = forward_ad.unpack_dual
    duals = [_NOTHING if x is None else unpack(x, level=level) for x in primals]
    primals, tangents = zip(*duals)
    spec, backend, _ = how
    out, lse, *pushed = attention_jvp(*primals, *tangents, others, (spec, backend, None))
    pairs = zip((out, lse), pushed)
    return tuple(forward_ad.make_dual(x, t, level=level) for x, t in pairs)

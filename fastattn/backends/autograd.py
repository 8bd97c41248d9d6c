"""From a checked call to the backend, with every derivative. Next hop: the row of registry.py.

First-order backward is the backend's fused kernel. Everything beyond it (jvp, double backward,
Hessian-vector products, and so on, of every option) is the derivative of the reference.

What a call without operands costs in eager mode, of [1, 1, 8, 8] fp32 tensors on one thread, in
thousands of user instructions (callgrind, AVX2 kernels; unlike times, they do not vary):

                                                 by the ordinary operator   by attend_simple()
    attention(), no gradient wanted                        138                      88
    attention(), gradient wanted, forward                  194                     125
    F.scaled_dot_product_attention, the same two          62, 74
    the same under enable()                               68, 83    (77, 92 before new_strided())

The ordinary operator has 23 arguments, which torch looks through for subclasses (19), converts (12)
and hands to C++ (5); 8 more keep autograd out. attend_simple() calls an operator of nine arguments
past torch's dispatcher. Of its 88, the kernel is 14 and the C++ around it 20.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from ..core.call import Call, Result
from ..core.reference import reference
from ..core.spec import LEAVES, NO_OPERANDS, OTHERS, Operands, Spec, numbers_of
from .vmap import vmap_backward, vmap_forward

# Below these keys an operator's kernel runs at once: no autograd, no autocast (done by then).
BELOW_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
for _name in ("AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA"):
    BELOW_AUTOGRAD = BELOW_AUTOGRAD | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name))

_NO_LEAVES, _NO_OTHERS = (None,) * len(LEAVES), (None,) * len(OTHERS)
_NO_NEEDS = (False,) * len(LEAVES)


class SimplePlan(NamedTuple):
    """How calls alike in all but values and strides run that have four dimensions, no operands and
    no dropout."""

    spec: Spec
    row: Any  # the backend
    numbers: tuple | None  # the spec's, where row.simple serves these calls

    @classmethod
    def of(cls, call: Call, row) -> SimplePlan:
        serves = row.simple is not None and call.q.is_cpu
        return cls(call.spec, row, numbers_of(call.spec) if serves else None)


def attend(call: Call, row) -> Result:
    """The result of a checked call, by the backend `row`."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return row.forward(call)  # autograd is the operator's own
    operands = call.operands
    transformed = torch._C._are_functorch_transforms_active()
    if operands.descales is not None and transformed:
        return row.forward(call)  # and vmap; there is no gradient
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
            return row.forward(call)
    leaves, others = _NO_LEAVES, None
    if operands is not NO_OPERANDS:
        leaves, others = operands.leaves(), operands.others()
    apply = Attention.apply if transformed else _apply_eager
    how = (call.spec, row, call.num_splits)
    return Result(*apply(call.q, call.k, call.v, *leaves, others, how))


def attend_simple(q: Tensor, k: Tensor, v: Tensor, plan: SimplePlan) -> Result | tuple:
    """attend() of a call that `plan` was made for. Where torch has to see the operator (a mode, a
    transform, a profiler, a negative view, a layout), it is the ordinary one."""
    if (
        plan.numbers is None
        or not (q.layout is k.layout is v.layout is torch.strided)  # oneDNN's memory is opaque
        or q.is_neg()  # a view that torch's dispatcher negates: z.conj().imag
        or k.is_neg()
        or v.is_neg()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    ):
        return attend(Call(q, k, v, plan.spec, NO_OPERANDS), plan.row)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply_simple(q, k, v, plan)
    return plan.row.simple(q, k, v, *plan.numbers)


class SimpleAttention(torch.autograd.Function):
    """Attention for attend_simple(): eager, of four arguments."""

    @staticmethod
    def forward(ctx, q, k, v, plan):
        out, lse = plan.row.simple(q, k, v, *plan.numbers)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, None
        q, k, v, out, lse = ctx.saved_tensors
        how = (ctx.plan.spec, ctx.plan.row, _NO_NEEDS)
        grads = _gradients(dout, dlse, Result(out, lse), (q, k, v, *_NO_LEAVES), None, how)
        return *grads[:3], None


def _gradients(dout, dlse, result, tensors, others, how):
    """What AttentionBackward gives, differentiable where that is wanted."""
    dout = torch.zeros_like(result.out) if dout is None else dout
    if (
        torch.is_grad_enabled()  # create_graph
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        differentiate = AttentionBackward.apply
    else:
        differentiate = AttentionBackward.forward
    return differentiate(dout, dlse, *result, *tensors, others, how)


def _call_of(q, k, v, leaves, others, spec, num_splits=0) -> Call:
    operands = NO_OPERANDS if others is None else Operands.join(leaves, others)
    return Call(q, k, v, spec, operands, num_splits)


class Attention(torch.autograd.Function):
    """The forward pass; its derivative is AttentionBackward.

    Arguments: q, k, v and LEAVES, which have gradients; `others`, the operands that have none, or
    None where there are no operands at all; `how`, (spec, row, num_splits).
    """

    @staticmethod
    def forward(q, k, v, *rest):
        *leaves, others, (spec, row, num_splits) = rest
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return row.forward(_call_of(q, k, v, leaves, others, spec, num_splits))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, others, how = inputs
        ctx.save_for_backward(*tensors, *output, *(others or ()))
        if forward_ad._current_level >= 0:
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
        tensors, result, others = Attention._saved(ctx)
        spec, row, _ = ctx.how
        needs = ctx.needs_input_grad[3:-2]
        grads = _gradients(dout, dlse, result, tensors, others, (spec, row, needs))
        own = zip(grads[3:], tensors[3:], needs)
        return *grads[:3], *(dx.to(x.dtype) if need else None for dx, x, need in own), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        tensors, _, others = Attention._saved(ctx)
        spec, _, _ = ctx.how
        return push_forward(reference_of(spec, others), tensors, tangents[:-2])

    @staticmethod
    def vmap(info, in_dims, q, k, v, *rest):
        *leaves, others, how = rest
        dims = (*in_dims[:3], *_in_order(in_dims[3:-2], in_dims[-2]))

        def attention(q, k, v, *operands):
            return Attention.apply(q, k, v, *_leaves_and_others(operands), how)

        tensors = (q, k, v, *_in_order(leaves, others))
        return vmap_forward(info.batch_size, dims, attention, tensors)


# Past Function.apply, whose inspect.signature() costs more than the operator itself. What it adds
# is for functorch, and for default arguments; neither is here.
_apply_eager = super(torch.autograd.Function, Attention).apply
_apply_simple = super(torch.autograd.Function, SimpleAttention).apply


class AttentionBackward(torch.autograd.Function):
    """Gradients of q, k, v and LEAVES (those of LEAVES fp32 or fp64, empty where not needed).

    Arguments: dout, dlse, out and lse; then Attention's, where `how` is (spec, row, needs). out and
    lse depend on the other inputs; derivatives treat them as part of the computation, so they get
    none of their own.
    """

    @staticmethod
    def forward(dout, dlse, out, lse, q, k, v, *rest):
        *leaves, others, (spec, row, needs) = rest
        call = _call_of(q, k, v, leaves, others, spec)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return tuple(row.backward(call, Result(out, lse), dout, dlse, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, dlse, _, _, *tensors, others, how = inputs
        ctx.save_for_backward(dout, dlse, *tensors, *(others or ()))
        ctx.save_for_forward(dout, dlse, *tensors, *(others or ()))
        ctx.how = how
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        primals, function = AttentionBackward._function(ctx)
        dout, dlse, *rest = pull_back(function, primals, cotangents)
        return dout, dlse, None, None, *rest, None, None

    @staticmethod
    def jvp(ctx, dout, dlse, _out, _lse, *rest):
        primals, function = AttentionBackward._function(ctx)
        return push_forward(function, primals, (dout, dlse, *rest[:-2]))

    @staticmethod
    def _function(ctx):
        spec, _, needs = ctx.how
        n, saved = 5 + len(LEAVES), ctx.saved_tensors
        return saved[:n], reference_grads_of(spec, saved[n:] or None, needs)

    @staticmethod
    def vmap(info, in_dims, dout, dlse, out, lse, q, k, v, *rest):
        *leaves, others, how = rest
        dims = (*in_dims[:7], *_in_order(in_dims[7:-2], in_dims[-2]))

        def gradients(dout, dlse, out, lse, q, k, v, *operands):
            tensors = (dout, dlse, out, lse, q, k, v)
            return AttentionBackward.apply(*tensors, *_leaves_and_others(operands), how)

        tensors = (dout, dlse, out, lse, q, k, v, *_in_order(leaves, others))
        _, _, needs = how
        return vmap_backward(info.batch_size, dims, gradients, tensors, needs)


def _in_order(leaves, others):
    """What belongs to LEAVES and OTHERS, in OPERANDS' order."""
    return Operands.join(leaves, others or _NO_OTHERS).tensors()


def _leaves_and_others(operands):
    """(*leaves, others) of what is in OPERANDS' order."""
    x = Operands(*operands)
    return *x.leaves(), x.others()


# ---- derivatives of the reference --------------------------------------------------------------


def reference_of(spec, others):
    """(q, k, v, *LEAVES) -> (out, lse)."""
    _refuse_batched(others)

    def function(q, k, v, *leaves):
        return tuple(reference(q, k, v, spec, Operands.join(leaves, others or _NO_OTHERS)))

    return function


# Operands whose values the reference reads: they say which keys exist and which weights it drops.
_READ = {*OTHERS} - {"mask", "alibi_slopes", "key_begin", "key_end"}


def _refuse_batched(others) -> None:
    """The reference reads values, and those that vmap gives each instance cannot be read."""
    for name, x in zip(OTHERS, others or ()):
        while name in _READ and x is not None and is_functorch_wrapped_tensor(x):
            if is_batchedtensor(x):
                raise NotImplementedError(
                    f"{name} came with a value for each of vmap's instances, where derivatives "
                    "other than a first backward do not exist; take these in a loop over the "
                    f"instances, or share {name} among them (in_dims=None)"
                )
            x = get_unwrapped(x)


def reference_grads_of(spec, others, needs):
    """(dout, dlse, q, k, v, *LEAVES) -> their gradients; those of LEAVES as `needs` says."""

    def function(dout, dlse, q, k, v, *leaves):
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        leaves = tuple(None if x is None else x.to(accumulate) for x in leaves)
        grads = pull_back(reference_of(spec, others), (q, k, v, *leaves), (dout, dlse))
        empty = q.new_empty(0, dtype=accumulate)
        own = (x if need else empty for x, need in zip(grads[3:], needs))
        return *grads[:3], *own

    return function


def _of_tensors(function, args):
    """(function of the arguments that are tensors, those, their places)."""
    places = [n for n, x in enumerate(args) if x is not None]

    def of_tensors(*tensors):
        full = [None] * len(args)
        for n, x in zip(places, tensors):
            full[n] = x
        return function(*full)

    return of_tensors, tuple(args[n] for n in places), places


def pull_back(function, primals, cotangents):
    """Gradients for each primal (None for None). A cotangent that is None is zero."""
    of_tensors, tensors, places = _of_tensors(function, primals)
    outputs, vjp = torch.func.vjp(of_tensors, *tensors)
    grads = vjp(tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents)))
    result = [None] * len(primals)
    for n, grad in zip(places, grads):
        result[n] = grad
    return tuple(result)


def push_forward(function, primals, tangents):
    """Tangents of the outputs, as the transpose of the transpose: torch.func.jvp cannot run
    inside a forward-mode level that the user opened, vjp can."""
    of_tensors, tensors, places = _of_tensors(function, primals)
    outputs, vjp = torch.func.vjp(of_tensors, *tensors)
    _, transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(y) for y in outputs))
    given = (tangents[n] for n in places)
    (result,) = transposed(
        tuple(torch.zeros_like(x) if t is None else t for x, t in zip(tensors, given))
    )
    return result

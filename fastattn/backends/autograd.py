"""From a checked call to the backend, with every derivative. Next hop: the backend of registry.py.

First-order backward is the backend's fused kernel. Everything beyond it (jvp, double backward,
Hessian-vector products and so on, with every option) differentiates the reference.

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
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from ..core.call import Call, Result
from ..core.reference import reference
from ..core.spec import LEAVES, NO_OPERANDS, OTHERS, Operands, Spec, numbers_of
from .backend import Backend
from .vmap import vmap_backward, vmap_forward

# With these keys excluded the dispatcher calls an operator's kernel directly: autograd.py is the
# autograd, and autocast has been applied before.
BELOW_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
for _name in ("AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA"):
    BELOW_AUTOGRAD = BELOW_AUTOGRAD | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name))

_NO_LEAVES, _NO_OTHERS = (None,) * len(LEAVES), (None,) * len(OTHERS)
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


def attend(call: Call, backend: Backend) -> Result:
    """The result of a checked call on `backend`, differentiable."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return backend.forward(call)  # the operator has its own autograd (operators.py)
    operands = call.operands
    transformed = torch._C._are_functorch_transforms_active()
    if operands.descales is not None and transformed:
        return backend.forward(call)  # the operator has its own vmap; 8-bit has no gradient
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
    apply = Attention.apply if transformed else _apply_eager
    how = (call.spec, backend, call.num_splits)
    return Result(*apply(call.q, call.k, call.v, *leaves, others, how))


def attend_simple(q: Tensor, k: Tensor, v: Tensor, plan: SimplePlan) -> Result | tuple:
    """attend() of a call that `plan` was made for. Where torch has to see an operator (under a
    mode, a transform or a profiler, or for a negative view), the ordinary one runs."""
    if (
        plan.numbers is None
        or not (q.layout is k.layout is v.layout is torch.strided)  # a oneDNN tensor has no strides
        or q.is_neg()  # a view that torch's dispatcher negates: z.conj().imag
        or k.is_neg()
        or v.is_neg()
        or torch._C._are_functorch_transforms_active()
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
        grads = _gradients(dout, dlse, Result(out, lse), (q, k, v, *_NO_LEAVES), None, how)
        return *grads[:3], None


def _gradients(dout, dlse, result, tensors, others, how):
    """The gradients of AttentionBackward, differentiable where a caller may want to differentiate
    them."""
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
    None where there are no operands at all; `how`, (spec, backend, num_splits).
    """

    @staticmethod
    def forward(q, k, v, *rest):
        *leaves, others, (spec, backend, num_splits) = rest
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return backend.forward(_call_of(q, k, v, leaves, others, spec, num_splits))

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
        spec, backend, _ = ctx.how
        needs = ctx.needs_input_grad[3:-2]
        grads = _gradients(dout, dlse, result, tensors, others, (spec, backend, needs))
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


# Skips Function.apply, whose inspect.signature() costs more than the operator itself. It only adds
# support for functorch and for default arguments, which these calls do not need.
_of: Any = super  # type checkers take super()'s result for a plain object
_apply_eager = _of(torch.autograd.Function, Attention).apply
_apply_simple = _of(torch.autograd.Function, SimpleAttention).apply


class AttentionBackward(torch.autograd.Function):
    """Gradients of q, k, v and LEAVES (those of LEAVES fp32 or fp64, empty where not needed).

    Arguments: dout, dlse, out and lse; then Attention's, where `how` is (spec, backend, needs). out
    and lse are functions of the other inputs, and second derivatives are taken through them there,
    so they get no gradient of their own.
    """

    @staticmethod
    def forward(dout, dlse, out, lse, q, k, v, *rest):
        *leaves, others, (spec, backend, needs) = rest
        call = _call_of(q, k, v, leaves, others, spec)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return tuple(backend.backward(call, Result(out, lse), dout, dlse, needs))

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
    """The values of LEAVES and OTHERS together, in the order of OPERANDS."""
    return Operands.join(leaves, others or _NO_OTHERS).tensors()


def _leaves_and_others(operands):
    """(*leaves, others) of values in the order of OPERANDS."""
    x = Operands(*operands)
    return *x.leaves(), x.others()


# ---- derivatives of the reference --------------------------------------------------------------


def reference_of(spec, others):
    """(q, k, v, *LEAVES) -> (out, lse)."""
    _refuse_batched(others)

    def function(q, k, v, *leaves):
        return tuple(reference(q, k, v, spec, Operands.join(leaves, others or _NO_OTHERS)))

    return function


# Operands whose values the reference reads: they decide which keys exist and which probabilities
# dropout zeroes.
_READ = {*OTHERS} - {"mask", "alibi_slopes", "key_begin", "key_end"}


def _refuse_batched(others) -> None:
    """Raises for a batched operand that the reference has to read, which vmap does not allow."""
    for name, x in zip(OTHERS, others or ()):
        while name in _READ and x is not None and is_functorch_wrapped_tensor(x):
            if is_batchedtensor(x):
                raise NotImplementedError(
                    f"{name} came with a value for each of vmap's instances, which derivatives "
                    "other than a first backward do not support; take these in a loop over the "
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
    """(the function of only those arguments that are not None, these arguments, their indices)."""
    places = [n for n, x in enumerate(args) if x is not None]

    def of_tensors(*tensors):
        full = [None] * len(args)
        for n, x in zip(places, tensors):
            full[n] = x
        return function(*full)

    return of_tensors, tuple(args[n] for n in places), places


def pull_back(function, primals, cotangents):
    """The gradient of each primal (None for None). A cotangent of None counts as zero."""
    of_tensors, tensors, places = _of_tensors(function, primals)
    outputs, vjp = torch.func.vjp(of_tensors, *tensors)[:2]
    grads = vjp(tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents)))
    result: list[Any] = [None] * len(primals)
    for n, grad in zip(places, grads):
        result[n] = grad
    return tuple(result)


def push_forward(function, primals, tangents):
    """Tangents of the outputs, computed as the vjp of the vjp, because torch.func.jvp cannot run
    inside a forward-mode level that the user opened, and vjp can."""
    of_tensors, tensors, places = _of_tensors(function, primals)
    outputs, vjp = torch.func.vjp(of_tensors, *tensors)[:2]
    _, transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(y) for y in outputs))[:2]
    given = (tangents[n] for n in places)
    (result,) = transposed(
        tuple(torch.zeros_like(x) if t is None else t for x, t in zip(tensors, given))
    )
    return result

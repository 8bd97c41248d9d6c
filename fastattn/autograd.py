"""From a checked call to the backend, with every derivative. Next hop: the row of backends.py.

First-order backward is the backend's fused kernel. Everything beyond it (jvp, double backward,
Hessian-vector products, and so on, of every option) is the derivative of the reference.

What Python costs in eager mode, for [1, 1, 8, 8] tensors, in thousands of user instructions (0.2 us
a thousand on the busy AVX2 machine where they were counted; unlike times, they do not vary):

    the operator alone, 21 arguments, kernel included     115     (its argument passing alone: 64)
    attention(), no gradient wanted                       147     checks 19, key guard 8, rest 5
    attention(), gradient wanted, forward                 193     a bare autograd.Function: 33
    F.scaled_dot_product_attention, without / with grad    42 / 48
    the same under enable()                                77 / 86
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from .reference import reference
from .spec import Operands

NO_OPERANDS = Operands()
_NO_OTHERS = (None,) * 9

# Below these keys an operator's kernel runs at once: no autograd, no autocast (done by then).
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
for _name in ("AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA"):
    _KEYS = _KEYS | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name))


def attend(q, k, v, spec, operands, row, num_splits=0):
    """(out, lse) of a checked call in normal form, by the backend `row`."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return row.forward(q, k, v, spec, operands, num_splits)  # autograd is the operator's own
    if operands.descales is not None and torch._C._are_functorch_transforms_active():
        return row.forward(q, k, v, spec, operands, num_splits)  # and vmap; there is no gradient
    bias, sinks = operands.bias, operands.sinks
    wants_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )
    transformed = torch._C._are_functorch_transforms_active()
    if not (wants_grad or transformed or forward_ad._current_level >= 0):
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return row.forward(q, k, v, spec, operands, num_splits)
    others = None if operands is NO_OPERANDS else other_operands(operands)
    apply = Attention.apply if transformed else _apply_eager
    return apply(q, k, v, bias, sinks, (others, spec, row, num_splits))


def _join(bias, sinks, others) -> Operands:
    return NO_OPERANDS if others is None else Operands(*_interleave(bias, sinks, others))


def _interleave(bias, sinks, others):
    """The eleven operands (or their vmap dimensions) in order."""
    mask, slopes, *rest = others or _NO_OTHERS
    return (mask, bias, slopes, sinks, *rest)


def _separate(mask, bias, slopes, sinks, *rest):
    """_interleave's inverse."""
    return bias, sinks, (mask, slopes, *rest)


class Attention(torch.autograd.Function):
    """The forward pass; its derivative is AttentionBackward.

    `call` is (others, spec, row, num_splits): everything that has no derivative. others is the nine
    operands besides bias and sinks, or None when there are no operands at all.
    """

    @staticmethod
    def forward(q, k, v, bias, sinks, call):
        others, spec, row, num_splits = call
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return row.forward(q, k, v, spec, _join(bias, sinks, others), num_splits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, bias, sinks, call = inputs
        others = call[0] or ()
        ctx.save_for_backward(q, k, v, bias, sinks, *output, *others)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(q, k, v, bias, sinks, *output, *others)
        ctx.call = call[1:]  # without tensors
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 6
        q, k, v, bias, sinks, out, lse, *others = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        spec, row, _ = ctx.call
        _, _, _, need_dbias, need_dsinks, _ = ctx.needs_input_grad
        call = (tuple(others) or None, spec, row, need_dbias, need_dsinks)
        if (
            torch.is_grad_enabled()  # create_graph
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            differentiate = AttentionBackward.apply
        else:
            differentiate = AttentionBackward.forward
        grads = differentiate(dout, dlse, out, lse, q, k, v, bias, sinks, call)
        dq, dk, dv, dbias, dsinks = grads
        dbias = dbias.to(bias.dtype) if need_dbias else None
        dsinks = dsinks.to(sinks.dtype) if need_dsinks else None
        return dq, dk, dv, dbias, dsinks, None

    @staticmethod
    def jvp(ctx, *tangents):
        q, k, v, bias, sinks, _, _, *others = ctx.saved_tensors
        function = reference_of(ctx.call[0], others)
        return push_forward(function, (q, k, v, bias, sinks), tangents[:5])

    @staticmethod
    def vmap(info, in_dims, q, k, v, bias, sinks, call):
        others, *call = call

        def attention(q, k, v, *operands):
            bias, sinks, others = _separate(*operands)
            return Attention.apply(q, k, v, bias, sinks, (others, *call))

        dims = (*in_dims[:3], *_interleave(*in_dims[3:5], in_dims[5][0]))
        tensors = (q, k, v, *_interleave(bias, sinks, others))
        return vmap_forward(info.batch_size, dims, attention, tensors, call[0].dropout_p)


# Past Function.apply, whose inspect.signature() costs more than the operator itself. What it adds
# is for functorch, and for default arguments; neither is here.
_apply_eager = super(torch.autograd.Function, Attention).apply


class AttentionBackward(torch.autograd.Function):
    """dq, dk, dv, dbias, dsinks (the last two fp32 or fp64, empty where not needed).

    `call` is (others, spec, row, need_dbias, need_dsinks). out and lse depend on the other inputs;
    derivatives treat them as part of the computation, so they get none of their own.
    """

    @staticmethod
    def forward(dout, dlse, out, lse, q, k, v, bias, sinks, call):
        others, spec, row, *needs = call
        operands = _join(bias, sinks, others)
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return row.backward(dout, dlse, out, lse, q, k, v, spec, operands, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, dlse, _, _, q, k, v, bias, sinks, call = inputs
        others = call[0] or ()
        ctx.save_for_backward(dout, dlse, q, k, v, bias, sinks, *others)
        ctx.save_for_forward(dout, dlse, q, k, v, bias, sinks, *others)
        ctx.call = call[1:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        primals, function = AttentionBackward._function(ctx)
        dout, dlse, *rest = pull_back(function, primals, cotangents)
        return dout, dlse, None, None, *rest, None

    @staticmethod
    def jvp(ctx, dout, dlse, _out, _lse, *rest):
        primals, function = AttentionBackward._function(ctx)
        return push_forward(function, primals, (dout, dlse, *rest[:5]))

    @staticmethod
    def _function(ctx):
        spec, _, *needs = ctx.call
        saved = ctx.saved_tensors
        return saved[:7], reference_grads_of(spec, saved[7:], *needs)

    @staticmethod
    def vmap(info, in_dims, dout, dlse, out, lse, q, k, v, bias, sinks, call):
        others, *call = call

        def gradients(dout, dlse, out, lse, q, k, v, *operands):
            bias, sinks, others = _separate(*operands)
            tensors = (dout, dlse, out, lse, q, k, v, bias, sinks)
            return AttentionBackward.apply(*tensors, (others, *call))

        dims = (*in_dims[:7], *_interleave(*in_dims[7:9], in_dims[9][0]))
        tensors = (dout, dlse, out, lse, q, k, v, *_interleave(bias, sinks, others))
        spec, _, *needs = call
        return vmap_backward(info.batch_size, dims, gradients, tensors, spec.dropout_p, *needs)


def other_operands(x: Operands):
    """The operands but for the differentiable ones, which lead the Functions' arguments."""
    return (
        *(x.mask, x.alibi_slopes, x.kv_lens, x.kv_starts, x.document_ids, x.cu_seqlens_q),
        *(x.cu_seqlens_k, x.page_table, x.dropout_seed),
    )


# ---- derivatives of the reference --------------------------------------------------------------


def reference_of(spec, others):
    """(q, k, v, bias, sinks) -> (out, lse)."""

    def function(q, k, v, bias, sinks):
        return reference(q, k, v, spec, Operands(*_interleave(bias, sinks, others)))

    return function


def reference_grads_of(spec, others, need_dbias, need_dsinks):
    """(dout, dlse, q, k, v, bias, sinks) -> (dq, dk, dv, dbias, dsinks)."""

    def function(dout, dlse, q, k, v, bias, sinks):
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        bias, sinks = (None if x is None else x.to(accumulate) for x in (bias, sinks))
        grads = pull_back(reference_of(spec, others), (q, k, v, bias, sinks), (dout, dlse))
        dq, dk, dv, dbias, dsinks = grads
        empty = q.new_empty(0, dtype=accumulate)
        return dq, dk, dv, dbias if need_dbias else empty, dsinks if need_dsinks else empty

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


# ---- vmap --------------------------------------------------------------------------------------
# Dense calls join vmap's dimension with the batch. Where that would change what is computed (one
# dropout mask for each instance, packed or paged operands, sinks of each instance), instances run
# one by one. Tensors are (..., q, k, v, and the eleven operands).

_MASK, _BIAS, _SLOPES, _SINKS = range(4)


def vmap_forward(size, dims, call, tensors, dropout_p):
    operands, operand_dims = tensors[3:], dims[3:]
    if dropout_p > 0 or operand_dims[_SINKS] is not None or not _foldable(operands):
        return one_by_one(size, dims, call, tensors)
    batch = _sizes(tensors[0], dims[0])[0]
    folded = [_fold(x, d, size, batch) for x, d in zip(tensors[:3], dims[:3])]
    results = call(*folded, *_fold_operands(operands, operand_dims, size, batch))
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0, 0)


def vmap_backward(size, dims, call, tensors, dropout_p, need_dbias, need_dsinks):
    operands, operand_dims = tensors[7:], dims[7:]
    own_sinks = need_dsinks or operand_dims[_SINKS] is not None
    if dropout_p > 0 or own_sinks or not _foldable(operands):
        return one_by_one(size, dims, call, tensors)
    batch = _sizes(tensors[4], dims[4])[0]
    folded = [_fold(x, dim, size, batch) for x, dim in zip(tensors[:7], dims[:7])]
    bias = operands[_BIAS]
    own_batch = 0 if bias is None else _sizes(bias, operand_dims[_BIAS])[0]
    operands = _fold_operands(operands, operand_dims, size, batch)
    if need_dbias:  # the gradient is each instance's own, so the bias must be too
        operands[_BIAS] = _fold(bias, operand_dims[_BIAS], size, batch)
    *grads, dbias, dsinks = call(*folded, *operands)
    grads = [x.unflatten(0, (size, batch)) for x in grads]
    if need_dbias:
        dbias = dbias.unflatten(0, (size, batch))
        dbias = dbias.sum(1, keepdim=True) if own_batch == 1 else dbias
    return (*grads, dbias, dsinks), (0, 0, 0, 0 if need_dbias else None, None)


def _foldable(operands) -> bool:
    packed, paged = operands[7] is not None, operands[9] is not None
    return not (packed or paged)


def _sizes(x, dim):
    """An instance's shape."""
    return x.shape if dim is None else x.movedim(dim, 0).shape[1:]


def _fold(x, dim, size, batch):
    """[size * batch, ...]. A batch of 1 is expanded, which copies nothing until it must."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)


def _fold_operands(operands, dims, size, batch):
    """The eleven operands of the joined batch; what all instances share stays as it is."""
    folded = []
    for n, (x, dim) in enumerate(zip(operands, dims)):
        if x is not None and n == _SLOPES and dim is not None and x.dim() == 2:  # each [heads]
            x, dim = x.movedim(dim, 0).unsqueeze(1), 0
        if x is None or (dim is None and _shared(n, x)):
            folded.append(x)
        else:
            folded.append(_fold(x, dim, size, batch))
    return folded


def _shared(n, x) -> bool:
    """Does operand n, the same for every instance, mean the same for the joined batch?"""
    if n in (_MASK, _BIAS):
        return x.shape[0] == 1
    return n == _SINKS or (n == _SLOPES and x.dim() == 1)


def one_by_one(size, dims, call, tensors):
    results = [
        call(*(x if dim is None else x.select(dim, n) for x, dim in zip(tensors, dims)))
        for n in range(size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*results))
    return stacked, (0,) * len(stacked)

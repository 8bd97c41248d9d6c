"""From a checked call that asks for statistics to the backend's kernels, with every derivative.
Next hops: the backend's forward_statistics and maps, or the definitions in core/probabilities.py.

What a statistic costs, and where its gradient comes from:

    max_logit, argmax, entropy    the forward pass, which keeps them beside out and lse. Entropy's
                                  gradient is a term of the backward kernel
    max, diagonal_mass, sink_mass, and the gradients of max_logit and topk: plain torch of the
                                  scores of one key a row (k keys), core/chosen_keys.py
    col_mass, topk, pooled        a second pass. The gradient of col_mass and pooled is that of
                                  attention with other values: sum(dc * col_mass) is attention whose
                                  values are dc, summed over the rows, and likewise for a map's bins

Under transforms of torch.func and in forward mode the two passes are apart (RowStatistics), and
derivatives beyond the first differentiate the definitions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core import probabilities
from ..core.call import Call, Result
from ..core.chosen_keys import diagonal, scores_of_keys
from ..core.quantization import dequantized
from ..core.reference import reference
from ..core.spec import LEAVES, NO_OPERANDS
from ..core.statistics import COL_MASS, FirstPass, Maps, TopK, Wanted, key_slots
from ..core.transforms import pull_back, push_forward
from .autograd import attend
from .backend import Backend
from .second_order import BELOW_AUTOGRAD, call_of, gradients, in_order, leaves_and_others
from .vmap import vmap_forward

Statistics = dict[str, Tensor | TopK]


def attend_with_statistics(call: Call, backend: Backend) -> tuple[Result, Statistics]:
    """The result of a checked call on `backend`, and the statistics that it asks for by name, all
    differentiable but those that are keys."""
    wanted = call.statistics
    if wanted is None:
        return attend(call, backend), {}
    if call.operands.descales is not None:  # 8-bit tensors are widened once for both passes
        wide, dtype = dequantized(call, used=False)
        (out, lse), found = attend_with_statistics(wide, backend)
        return Result(out.to(dtype), lse), found
    differentiated = _differentiated(call)
    largest = wanted.need_largest and differentiated
    need_argmax = "argmax" in wanted.names or largest
    if wanted.need_rows:
        first = _first(call, backend, wanted.need_entropy, need_argmax)
        out, lse, max_logit, entropy, argmax = first
        if largest:
            own = scores_of_keys(call, argmax.unsqueeze(-1)).squeeze(-1)
            max_logit = torch.where(argmax < 0, max_logit, own)
    else:
        out, lse = attend(call, backend)
        max_logit = entropy = argmax = lse
    made = _maps(call, backend, lse, wanted) if wanted.second_pass else {}
    rows = {
        "max_logit": lambda: max_logit,
        "entropy": lambda: entropy,
        "argmax": lambda: argmax,
        "max": lambda: mass(max_logit, lse),
        "sink_mass": lambda: _sink_mass(call, lse),
        "diagonal_mass": lambda: mass(diagonal(call), lse),
    }
    found = {name: made[name] if name in made else rows[name]() for name in wanted.names}
    return Result(out, lse), found


def mass(scores: Tensor, lse: Tensor) -> Tensor:
    """The probability of a key with that score; 0 for a score of -inf."""
    hidden = scores == -torch.inf
    exponent = torch.where(hidden, 0.0, scores - torch.where(hidden, 0.0, lse))
    return torch.where(hidden, 0.0, exponent.clamp(max=0).exp())


def _sink_mass(call: Call, lse: Tensor) -> Tensor:
    """The sink's probability; 0 in a call without sinks, and for a row that sees no key."""
    sinks = call.operands.sinks
    if sinks is None:
        return torch.zeros_like(lse)
    scores = sinks.to(lse.dtype)[:, None].expand_as(lse)
    return mass(torch.where(lse == -torch.inf, -torch.inf, scores), lse)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _differentiated(call: Call) -> bool:
    """Whether someone may want a derivative of the call."""
    tensors = (call.q, call.k, call.v, *call.operands.leaves())
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return wanted or _transformed()


def _parts(call: Call):
    """(LEAVES, the other operands or None), as autograd functions take them."""
    if call.operands is NO_OPERANDS:
        return (None,) * len(LEAVES), None
    return call.operands.leaves(), call.operands.others()


# ---- the first pass -----------------------------------------------------------------------------


def _first(call: Call, backend: Backend, need_entropy: bool, need_argmax: bool) -> FirstPass:
    compiling = torch.compiler.is_compiling() or torch._C._is_tracing()
    kernel, needs = backend.forward_statistics, (need_entropy, need_argmax)
    if compiling and kernel is not None:
        return kernel(call, *needs)
    if compiling:
        return FirstPass(*attend(call, backend), *probabilities.rows(call, *needs))
    leaves, others = _parts(call)
    if kernel is None or _transformed():
        result = attend(call, backend)
        found = iter(RowStatistics.apply(call.q, call.k, *leaves, others, (call, backend, needs)))
        empty = result.lse.new_empty(0)
        entropy, argmax = (next(found) if need else empty for need in needs)
        return FirstPass(*result, next(found), entropy, argmax)
    if not _differentiated(call):
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return kernel(call, *needs)
    how = (call.spec, backend, call.num_splits, needs)
    return FirstPass(*AttentionWithRows.apply(call.q, call.k, call.v, *leaves, others, how))


class AttentionWithRows(torch.autograd.Function):
    """The first pass in eager mode: out, lse, max_logit, entropy, argmax. max_logit has no gradient
    here; attend_with_statistics() takes it from the score of the key argmax.

    Arguments: those of autograd.py's Attention; `how` also has (need_entropy, need_argmax).
    """

    @staticmethod
    def forward(ctx, q, k, v, *rest):
        *leaves, others, (spec, backend, num_splits, needs) = rest
        call = call_of(q, k, v, leaves, others, spec, num_splits)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            made = backend.forward_statistics(call, *needs)
        ctx.save_for_backward(q, k, v, *leaves, *made[:2], made.entropy, *(others or ()))
        ctx.how = spec, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(made.max_logit, made.argmax)
        return tuple(made)

    @staticmethod
    def backward(ctx, dout, dlse, _max_logit, dentropy, _argmax):
        n, saved, (spec, backend) = 3 + len(LEAVES), ctx.saved_tensors, ctx.how
        tensors, result, entropy = saved[:n], Result(*saved[n : n + 2]), saved[n + 2]
        others, needs = saved[n + 3 :] or None, ctx.needs_input_grad[3:-2]
        if dentropy is None and dout is None and dlse is None:
            return (None,) * (n + 2)
        if dentropy is None:
            grads = gradients(dout, dlse, result, tensors, others, (spec, backend, needs))
        elif torch.is_grad_enabled():  # create_graph
            grads = gradients(dout, dlse, result, tensors, others, (spec, backend, needs))
            function, primals = _entropy_of(spec, tensors, others)
            own = pull_back(function, primals, (dentropy,))
            pairs = zip(grads, (*own[:2], None, *own[2:]))
            grads = [x if y is None or not x.numel() else x + y for x, y in pairs]
        else:
            dout = torch.zeros_like(result.out) if dout is None else dout
            dlse = -dentropy * entropy if dlse is None else dlse - dentropy * entropy
            call = call_of(*tensors[:3], tensors[3:], others, spec)
            grads = backend.backward(call, result, dout, dlse, needs, dentropy)
        own = zip(grads[3:], tensors[3:], needs)
        return *grads[:3], *(dx.to(x.dtype) if need else None for dx, x, need in own), None, None


def _entropy_of(spec, tensors, others):
    """(q, k, *LEAVES) -> entropy by its definition, and these tensors; of q, k, v and LEAVES."""

    def function(q, k, *leaves):
        return (probabilities.rows(call_of(q, k, k, leaves, others, spec), True, False).entropy,)

    return function, (*tensors[:2], *tensors[3:])


class RowStatistics(torch.autograd.Function):
    """Statistics of rows, apart from the forward pass: entropy and argmax, as `needs` says, and
    max_logit.

    Arguments: q, k and LEAVES; `others`; `how`, (a call with the same spec, backend, needs).
    """

    @staticmethod
    def forward(q, k, *rest):
        *leaves, others, (like, backend, (need_entropy, need_argmax)) = rest
        call = call_of(q, k, k, leaves, others, like.spec, like.num_splits)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            kernel = backend.forward_statistics or probabilities.first_pass
            made = kernel(call, need_entropy, need_argmax)
        entropy = (made.entropy,) if need_entropy else ()
        argmax = (made.argmax,) if need_argmax else ()
        return *entropy, *argmax, made.max_logit

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, others, (like, _, needs) = inputs
        ctx.save_for_backward(*tensors, *(others or ()))
        ctx.save_for_forward(*tensors, *(others or ()))
        ctx.spec, (ctx.need_entropy, _) = like.spec, needs
        ctx.mark_non_differentiable(*output[int(ctx.need_entropy) :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _function(ctx):
        n, saved = 2 + len(LEAVES), ctx.saved_tensors
        return _entropy_of(ctx.spec, (*saved[:2], None, *saved[2:n]), saved[n:] or None)

    @staticmethod
    def backward(ctx, *cotangents):
        if not ctx.need_entropy or cotangents[0] is None:
            return (None,) * (4 + len(LEAVES))
        function, primals = RowStatistics._function(ctx)
        return *pull_back(function, primals, cotangents[:1]), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        if not ctx.need_entropy:
            return (None,) * (1 + len(ctx.needs_input_grad))
        function, primals = RowStatistics._function(ctx)
        pushed = push_forward(function, primals, tangents[:-2])
        return *pushed, None, None

    @staticmethod
    def vmap(info, in_dims, q, k, *rest):
        return _vmap(RowStatistics, info, in_dims, (q, k), rest)


def _vmap(function, info, in_dims, tensors, rest):
    """Either autograd function over vmap's instances; `tensors` are those before LEAVES, and the
    first two are q and k."""
    n, (*leaves, others, how) = len(tensors), rest
    own = (in_dims[0], in_dims[1], in_dims[1])
    dims = (*own, *in_order(in_dims[n:-2], in_dims[-2]))

    def run(q, k, _, *operands):
        return function.apply(q, k, *leaves_and_others(operands), how)

    q, k = tensors
    return vmap_forward(info.batch_size, dims, run, (q, k, k, *in_order(leaves, others)))


# ---- the second pass ----------------------------------------------------------------------------


def _maps(call: Call, backend: Backend, lse: Tensor, wanted: Wanted) -> Statistics:
    """col_mass, topk and pooled by their names."""
    call = without_dropout(call)
    first, *more = wanted.pooled or (0,)
    made = second_pass(call, backend, lse, wanted.need_col_mass, wanted.topk, first)
    maps = {first: made.pooled}
    for size in more:
        maps[size] = second_pass(call, backend, lse, False, 0, size).pooled
    found: Statistics = {COL_MASS: made.col_mass}
    probs, keys = made.topk_probs, made.topk_keys
    if wanted.topk and _differentiated(call):
        own = mass(scores_of_keys(call, keys), lse.unsqueeze(-1))
        probs = torch.where((keys < 0) & (probs != 0), probs, own)  # those of a row with NaN
    for name in wanted.names:
        kind, _, number = name.partition(":")
        if kind == "topk":
            found[name] = TopK(probs[..., : int(number)], keys[..., : int(number)])
        elif kind == "pooled":
            found[name] = maps[int(number)]
    return found


def without_dropout(call: Call) -> Call:
    operands = replace(call.operands, dropout_seed=None) if call.spec.dropout_p else call.operands
    return call.but(spec=replace(call.spec, dropout_p=0.0), operands=operands, statistics=None)


def second_pass(call: Call, backend: Backend, lse: Tensor, *asked) -> Maps:
    """Maps of a call without dropout; asked is (need_col_mass, topk, pooled). col_mass and pooled
    are differentiable."""
    kernel = backend.maps or probabilities.maps
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return kernel(call, lse, *asked)
    if not _differentiated(call):
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return kernel(call, lse, *asked)
    leaves, others = _parts(call)
    how = (call.spec, backend, asked)
    lse = lse.detach()
    made = iter(SecondPass.apply(call.q, call.k, lse, *leaves, others, how))
    empty, (col_mass, topk, pooled) = lse.new_empty(0), asked
    return Maps(
        *(next(made) if need else empty for need in (col_mass, topk > 0, topk > 0, pooled > 0))
    )


class SecondPass(torch.autograd.Function):
    """Those of Maps' tensors that are asked for. lse is a function of the other inputs, so it gets
    no gradient of its own.

    Arguments: q, k, lse and LEAVES; `others`; `how`, (spec, backend, asked).
    """

    @staticmethod
    def forward(q, k, lse, *rest):
        *leaves, others, (spec, backend, asked) = rest
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            kernel = backend.maps or probabilities.maps
            made = kernel(call_of(q, k, k, leaves, others, spec), lse, *asked)
        needs = zip(made, (asked[0], asked[1] > 0, asked[1] > 0, asked[2] > 0))
        return tuple(x for x, need in needs if need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, _, *leaves, others, how = inputs
        ctx.save_for_backward(q, k, *leaves, *(others or ()))
        ctx.save_for_forward(q, k, *leaves, *(others or ()))
        ctx.how = how
        need_col_mass, topk, _ = how[2]
        if topk:
            first = int(need_col_mass)
            ctx.mark_non_differentiable(*output[first : first + 2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _saved(ctx):
        n, saved = 2 + len(LEAVES), ctx.saved_tensors
        return saved[:2], saved[2:n], saved[n:] or None

    @staticmethod
    def backward(ctx, *cotangents):
        (q, k), leaves, others = SecondPass._saved(ctx)
        spec, backend, (need_col_mass, _, pooled) = ctx.how
        dcol = cotangents[0] if need_col_mass else None
        dpooled = cotangents[-1] if pooled else None
        if dcol is None and dpooled is None:
            return (None,) * (5 + len(LEAVES))
        needs = ctx.needs_input_grad[3:-2]
        call = call_of(q, k, k, leaves, others, spec)
        grads = maps_gradient(call, backend, dcol, dpooled, needs)
        own = zip(grads[2:], leaves, needs)
        leaves = (dx.to(x.dtype) if need else None for dx, x, need in own)
        return *grads[:2], None, *leaves, None, None

    @staticmethod
    def jvp(ctx, tq, tk, _, *rest):
        (q, k), leaves, others = SecondPass._saved(ctx)
        spec, _, (need_col_mass, topk, pooled) = ctx.how

        def function(q, k, *leaves):
            call = call_of(q, k, k, leaves, others, spec)
            lse = reference(q, k, k, spec, call.operands).lse
            made = probabilities.maps(call, lse, need_col_mass, 0, pooled)
            return tuple(x for x, need in ((made[0], need_col_mass), (made[3], pooled)) if need)

        pushed = iter(push_forward(function, (q, k, *leaves), (tq, tk, *rest[:-2])))
        col_mass = (next(pushed),) if need_col_mass else ()
        keys = (None, None) if topk else ()
        return *col_mass, *keys, *((next(pushed),) if pooled else ())

    @staticmethod
    def vmap(info, in_dims, q, k, lse, *rest):
        *leaves, others, how = rest
        dims = (in_dims[0], in_dims[1], in_dims[2], *in_order(in_dims[3:-2], in_dims[-2]))

        def run(q, k, lse, *operands):
            return SecondPass.apply(q, k, lse, *leaves_and_others(operands), how)

        tensors = (q, k, lse, *in_order(leaves, others))
        return vmap_forward(info.batch_size, dims, run, tensors)


def maps_gradient(call: Call, backend: Backend, dcol, dpooled, needs) -> tuple:
    """The gradients of (q, k, *LEAVES) for those of col_mass and of pooled, either may be None.

    sum(dcol * col_mass) is the sum over rows of attention with the values dcol, one column of them
    for each query head that shares the keys; sum(dpooled * pooled) is attention with one value for
    each bin of keys, of which a row takes its own bin's share of dpooled.
    """
    q, k = call.q, call.k
    batch, heads, q_len, _ = q.shape
    group, values, douts = heads // max(1, k.shape[1]), [], []
    if dcol is not None:
        values.append(dcol.unflatten(1, (-1, group)).transpose(2, 3))  # [B, kv_heads, keys, group]
        head = torch.arange(heads, device=q.device) % group
        own = torch.nn.functional.one_hot(head, group)[:, None, :]
        douts.append(own.expand(batch, -1, q_len, -1).to(dcol.dtype))
    if dpooled is not None:
        n, keys = dpooled.shape[-1], key_slots(call)
        across = torch.nn.functional.one_hot(probabilities.bins(keys, n, q.device), n)
        values.append(across.expand(batch, k.shape[1], -1, -1).to(dpooled.dtype))
        rows = dpooled / probabilities.rows_of_bins(q_len, n, dpooled)[:, None]
        douts.append(rows[:, :, probabilities.bins(q_len, n, q.device)])
    v, dout = (torch.cat(x, -1).to(q.dtype).contiguous() for x in (values, douts))
    result = attend(call.but(v=v), backend)
    leaves, others = _parts(call)
    tensors, how = (q, k, v, *leaves), (call.spec, backend, needs)
    grads = gradients(dout, None, result, tensors, others, how)
    return *grads[:2], *grads[3:]

"""Forward mode and second derivatives in plain torch: every option, any dtype, any device, O(S)
memory, and differentiable again. The truth that kernels are tested against, and what runs where a
backend has no kernel. Next hop: the scores of reference.py.

With scores S = cap(scale q.k) + bias + ALiBi, P = exp(S - lse), the dropout factors Z, and a
prefix t for tangents:

    T = S' in the direction of the tangents,  mu = sum_j P T + P_sink tsink
    tlse = mu,  tout = (Z P (T - mu)) V + (Z P) tV

and for the gradients of <G, tout> + <g, tlse>, with D = rowsum(G out) - g, nu = rowsum(G tout):

    dP = Z (G.V) - D,  dS = P dP,  gS = P (dP (T - mu) + Z (G.tV) - nu)
    dbias = gS,  dv = (Z P (T - mu))^T G,  dsink = -P_sink ((tsink - mu) D + nu), summed over rows
    dq and dk: through S' = f1 scale (tq.k + q.tk) + tbias, where f1 = 1 - tanh^2 is the slope of
    the softcap (1 without one) and f2 = -2 tanh f1 / cap its derivative by scale q.k

Rows are computed a chunk at a time. Orders above the second differentiate these functions chunk by
chunk with torch.func.vjp (`_ByChunks`), so that no order stores S x S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import Call, Gradients, JvpResult, Tangents
from .reference import (
    Piece,
    for_query_heads,
    in_memory_order_of,
    keep_factors,
    keys_of,
    no_autocast,
    part_of,
    pieces,
    rows_of,
    scores_of,
    softmax_of,
)
from .spec import OTHERS, Operands, Spec
from .tensors import accumulate_dtype
from .transforms import of_tensors, one_by_one, pull_back, push_forward

CHUNK = 1 << 20  # scores of a chunk, of which some 12 copies exist at once: 48 MiB in float32
LEAST_ROWS = 32  # of a chunk, however many keys and heads there are

# Where the part of a tensor that belongs to a chunk lies: rows of q, keys of k, a part of the
# bias's plane, or all of it.
ROWS, KEYS, PLANE, ALL = "rows", "keys", "plane", "all"
_PRIMALS = (ROWS, KEYS, KEYS, PLANE, ALL)  # of q, k, v, bias, sinks, and of their tangents


def jvp(call: Call, tangents: Tangents) -> JvpResult:
    """The results of a call, and their tangents."""
    check_tangents(call, tangents)
    inputs = (*_primals(call), *tangents)
    out, lse, tout, tlse = _by_chunks(
        _jvp_of_chunk,
        call,
        (*_PRIMALS, *_PRIMALS),
        inputs,
        (ROWS,) * 4,
        (0.0, -torch.inf, 0.0, 0.0),
    )
    out, tout = (in_memory_order_of(call.q, x.to(call.q.dtype)) for x in (out, tout))
    return JvpResult(out, lse, tout, tlse)


def jvp_bwd(
    call: Call, tangents: Tangents, dtout: Tensor, dtlse: Tensor | None, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients of <dtout, tout> + <dtlse, tlse> with respect to the call's q, k, v, bias and
    sinks, not to the tangents. `needs` says which of LEAVES need one."""
    check_tangents(call, tangents)
    pairs = zip(needs, call.operands.leaves(), strict=True)
    need_dbias, need_dsinks = (need and x is not None for need, x in pairs)
    function = partial(_jvp_bwd_of_chunk, need_dbias=need_dbias, need_dsinks=need_dsinks)
    dq, dk, dv, *own = _by_chunks(
        function,
        call,
        (*_PRIMALS, *_PRIMALS, ROWS, ROWS),
        (*_primals(call), *tangents, dtout, dtlse),
        (ROWS, KEYS, KEYS, *(PLANE,) * need_dbias, *(ALL,) * need_dsinks),
    )
    dq, dk, dv = (x.to(call.q.dtype) for x in (dq, dk, dv))
    own = iter(own)
    empty = partial(dq.new_empty, 0, dtype=accumulate_dtype(call.q.dtype))
    dbias, dsinks = (next(own) if need else empty() for need in (need_dbias, need_dsinks))
    return Gradients(dq, dk, dv, dbias, dsinks)


def check_tangents(call: Call, tangents: Tangents) -> None:
    """Raises for tangents whose shape or dtype is not that of their input."""
    for name, x, t in zip(Tangents._fields, _primals(call), tangents):
        if t is None:
            continue
        if x is None:
            raise ValueError(f"t{name}, a tangent of {name}, came without {name}")
        if t.shape != x.shape:
            raise ValueError(
                f"t{name} has shape {list(t.shape)} and {name} {list(x.shape)}; a tangent has its "
                "input's shape"
            )
        wider = () if name in "qkv" else (accumulate_dtype(call.q.dtype),)
        if t.dtype not in (x.dtype, *wider):
            accepted = " or ".join(dict.fromkeys(map(str, (x.dtype, *wider))))
            raise TypeError(f"t{name} is {t.dtype} and {name} {x.dtype}; accepted is {accepted}")


def _primals(call: Call) -> tuple:
    return call.q, call.k, call.v, *call.operands.leaves()


# ---- the formulas, for one chunk -----------------------------------------------------------------


class _Terms(NamedTuple):
    """What both formulas start from. P, Z and T are [b, heads, m, n], sums over keys [b, heads, m,
    1]; keys and values are those of each query head."""

    k: Tensor
    v: Tensor
    probs: Tensor  # P
    kept: Tensor  # Z P
    factors: Tensor | None  # Z; None without dropout
    sink_probs: Tensor  # P of the sink, [b, heads, m, 1 or 0]
    slope: Tensor | None  # f1
    tanh: Tensor | None
    dot: Tensor  # the tangent of scale q.k
    tangent: Tensor  # T - mu
    sink_tangent: Tensor  # tsink - mu, like sink_probs
    mu: Tensor
    lse: Tensor  # [b, heads, m]


def _terms(spec, operands, piece, q, k, v, bias, sinks, tq, tk, tbias, tsinks) -> _Terms:
    k, v, tk = (x if x is None else for_query_heads(x, q.shape[1]) for x in (k, v, tk))
    scores, tanh = scores_of(q, k, bias, spec, operands, piece)
    probs, sink_probs, lse, _ = softmax_of(scores, sinks)
    factors = keep_factors(probs, spec, operands, piece) if spec.dropout_p > 0 else None
    dot = torch.zeros_like(probs)
    if tq is not None:
        dot = dot + tq @ k.mT
    if tk is not None:
        dot = dot + q @ tk.mT
    dot = spec.scale * dot
    slope = None if tanh is None else 1 - tanh * tanh
    tangent = dot if slope is None else slope * dot
    if tbias is not None:
        tangent = tangent + tbias
    sink_tangent = torch.zeros_like(sink_probs)
    if tsinks is not None:
        sink_tangent = sink_tangent + tsinks[:, None, None]
    mu = (probs * tangent).sum(-1, keepdim=True)
    mu = mu + (sink_probs * sink_tangent).sum(-1, keepdim=True)
    kept = probs if factors is None else probs * factors
    return _Terms(
        k, v, probs, kept, factors, sink_probs, slope, tanh, dot, tangent - mu, sink_tangent - mu,
        mu, lse,
    )  # fmt: skip


def _tout(x: _Terms, tv: Tensor | None) -> Tensor:
    tout = (x.kept * x.tangent) @ x.v
    return tout if tv is None else tout + x.kept @ for_query_heads(tv, x.v.shape[1])


def _jvp_of_chunk(chunk, q, k, v, bias, sinks, tq, tk, tv, tbias, tsinks):
    x = _terms(*chunk, q, k, v, bias, sinks, tq, tk, tbias, tsinks)
    return x.kept @ x.v, x.lse, _tout(x, tv), x.mu.squeeze(-1)


def _jvp_bwd_of_chunk(
    chunk, q, k, v, bias, sinks, tq, tk, tv, tbias, tsinks, dtout, dtlse,
    *, need_dbias, need_dsinks,
):  # fmt: skip
    spec, kv_heads = chunk[0], k.shape[1]
    x = _terms(*chunk, q, k, v, bias, sinks, tq, tk, tbias, tsinks)
    D = (dtout * (x.kept @ x.v)).sum(-1, keepdim=True)
    if dtlse is not None:
        D = D - dtlse[..., None]
    nu = (dtout * _tout(x, tv)).sum(-1, keepdim=True)
    a = dtout @ x.v.mT
    u = None if tv is None else dtout @ for_query_heads(tv, q.shape[1]).mT
    if x.factors is not None:
        a, u = a * x.factors, u if u is None else u * x.factors
    centred = a - D
    ds = x.probs * (centred * x.tangent - nu if u is None else centred * x.tangent + (u - nu))
    ds_dot, ds_tdot = ds, x.probs * centred  # of scale q.k, and of its tangent
    if x.slope is not None:
        curvature = -2 / spec.softcap * x.tanh * x.slope
        ds_dot, ds_tdot = ds * x.slope + ds_tdot * x.dot * curvature, ds_tdot * x.slope
    dq, dk = ds_dot @ x.k, ds_dot.mT @ q
    if tk is not None:
        dq = dq + ds_tdot @ for_query_heads(tk, q.shape[1])
    if tq is not None:
        dk = dk + ds_tdot.mT @ tq
    dv = (x.kept * x.tangent).mT @ dtout
    grads = [spec.scale * dq, *(_for_kv_heads(y, kv_heads) for y in (spec.scale * dk, dv))]
    if need_dbias:
        grads.append(ds.sum_to_size(bias.shape))
    if need_dsinks:
        grads.append(-(x.sink_probs * (x.sink_tangent * D + nu)).sum((0, 2, 3)))
    return tuple(grads)


def _for_kv_heads(x: Tensor, kv_heads: int) -> Tensor:
    """The gradient of for_query_heads()."""
    return x.unflatten(1, (kv_heads, x.shape[1] // max(1, kv_heads))).sum(2)


# ---- chunk by chunk ------------------------------------------------------------------------------


class _Program(NamedTuple):
    """A function of a chunk's parts, by which the function of whole tensors is computed."""

    # (chunk: (spec, operands, piece), the parts of the inputs) -> the parts of the outputs
    function: Callable
    inputs: tuple[str, ...]  # where each part lies; the first two inputs are q and k
    outputs: tuple[str, ...]  # parts of rows are put beside each other, all others are added
    fills: tuple[float, ...]  # what rows of no chunk get

    @classmethod
    def of(cls, function, inputs, outputs, tensors, fills=None) -> _Program:
        """The program for those of the inputs `tensors` that are not None; the function gets None
        for the others."""
        given = [None if x is None else True for x in tensors]  # no tensor is kept

        def of_given(chunk, *parts):
            return of_tensors(partial(function, chunk), given)[0](*parts)

        places = tuple(place for place, x in zip(inputs, tensors, strict=True) if x is not None)
        return cls(of_given, places, outputs, fills or (0.0,) * len(outputs))

    def pulled(self, cotangents) -> _Program:
        """(inputs, cotangents of the outputs) -> gradients of the inputs."""
        n = len(self.inputs)

        def function(chunk, *parts):
            return pull_back(partial(self.function, chunk), parts[:n], parts[n:])

        places, tensors = (*self.inputs, *self.outputs), (*(True,) * n, *cotangents)
        return _Program.of(function, places, self.inputs, tensors)

    def pushed(self, tangents) -> _Program:
        """(inputs, their tangents) -> tangents of the outputs."""
        n = len(self.inputs)

        def function(chunk, *parts):
            return push_forward(partial(self.function, chunk), parts[:n], parts[n:])

        places, tensors = (*self.inputs, *self.inputs), (*(True,) * n, *tangents)
        return _Program.of(function, places, self.outputs, tensors)

    def run(self, spec: Spec, operands: Operands, tensors) -> tuple[Tensor, ...]:
        q, k = tensors[:2]
        plane = next((x.shape for x, at in zip(tensors, self.inputs) if at == PLANE), None)
        totals: list[Any] = [None] * len(self.outputs)
        for piece in _chunks(q, k, spec, operands):
            parts = [_part(x, at, operands, piece) for x, at in zip(tensors, self.inputs)]
            results = self.function((spec, operands, piece), *parts)
            for n, (part, at) in enumerate(zip(results, self.outputs, strict=True)):
                if totals[n] is None:
                    shape = {PLANE: plane, ALL: part.shape}.get(at)
                    if shape is None:
                        x = q if at == ROWS else k
                        shape = (x.shape[0], part.shape[1], x.shape[2], *part.shape[3:])
                    totals[n] = part.new_full(shape, self.fills[n])
                if piece is _NO_ROWS:
                    continue
                view = _part(totals[n], at, operands, piece)
                _ = view.copy_(part) if at == ROWS else view.add_(part)
        return tuple(totals)


_NO_ROWS = Piece(0, range(0), range(0), 0, 0, 0, 0)  # stands for a call without sequences


def _chunks(q: Tensor, k: Tensor, spec: Spec, operands: Operands) -> Iterator[Piece]:
    """The pieces of a call cut into CHUNK scores or fewer, as far as LEAST_ROWS allows, without the
    keys on which the band of their rows has no part."""
    (batch, heads, _, _), none = q.shape, True
    for piece in pieces(q, k, operands):
        none, (i, j) = False, (piece.i, piece.j)
        split = piece.sequence is None and batch * heads * len(i) * len(j) > CHUNK
        rows = max(LEAST_ROWS, CHUNK // max(1, heads * len(j)))
        for n in range(batch) if split else (piece.sequence,):
            for start in range(i.start, i.stop, rows) or (i.start,):
                some = range(start, min(i.stop, start + rows))
                lengths = piece.q_len, piece.kv_len
                first = max(j.start, spec.lo(some.start, *lengths))
                end = min(j.stop, spec.hi(max(some.start, some.stop - 1), *lengths))
                keys = range(first, max(first, end))
                yield piece._replace(sequence=n, i=some, j=keys)
    if none:
        yield _NO_ROWS


def _part(x: Tensor, place: str, operands: Operands, piece: Piece) -> Tensor:
    """The part of a tensor that belongs to a chunk: a view, except for paged keys."""
    if place == ROWS:
        return rows_of(x, operands, piece)
    if place == KEYS:
        return keys_of(x, operands, piece)
    return part_of(x, piece) if place == PLANE else x


def _by_chunks(function, call: Call, places, inputs, outputs, fills=None) -> tuple[Tensor, ...]:
    """A function of chunks over a whole call, in fp32 (fp64 for fp64). See _Program."""
    if KEYS in outputs and call.operands.paged:
        raise NotImplementedError("k and v in pages have no gradient; pass them as dense tensors")
    program = _Program.of(function, places, outputs, inputs, fills)
    dtype = accumulate_dtype(call.q.dtype)
    tensors = [x.to(dtype) for x in inputs if x is not None]
    others = {name: x for name, x in zip(OTHERS, call.operands.others()) if x is not None}
    return _ByChunks.apply(program, call.spec, tuple(others), *tensors, *others.values())


class _ByChunks(torch.autograd.Function):
    """Runs a program. Its derivatives of every order are programs too, so that memory stays O(S).

    Arguments: the program, the spec, the names of the operands without gradient; the program's
    inputs, then these operands.
    """

    @staticmethod
    def forward(program, spec, names, *tensors):
        n = len(program.inputs)
        with no_autocast(tensors[0].device.type):
            return program.run(spec, Operands(**dict(zip(names, tensors[n:]))), tensors[:n])

    @staticmethod
    def setup_context(ctx, inputs, output):
        program, spec, names, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.how = program, spec, names
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        program, spec, names = ctx.how
        n, tensors = len(program.inputs), ctx.saved_tensors
        nothing = (None,) * (3 + len(tensors))
        if all(x is None for x in cotangents):
            return nothing
        given = [x for x in cotangents if x is not None]
        inputs = (*tensors[:n], *given, *tensors[n:])
        grads = _ByChunks.apply(program.pulled(cotangents), spec, names, *inputs)
        return None, None, None, *grads, *(None,) * len(names)

    @staticmethod
    def jvp(ctx, _program, _spec, _names, *tangents):
        program, spec, names = ctx.how
        n, tensors = len(program.inputs), ctx.saved_tensors
        given = [x for x in tangents[:n] if x is not None]
        inputs = (*tensors[:n], *given, *tensors[n:])
        return _ByChunks.apply(program.pushed(tangents[:n]), spec, names, *inputs)

    @staticmethod
    def vmap(info, in_dims, program, spec, names, *tensors):
        def one(*x):
            return _ByChunks.apply(program, spec, names, *x)

        return one_by_one(info.batch_size, in_dims[3:], one, tensors)

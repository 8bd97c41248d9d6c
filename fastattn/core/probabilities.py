"""Attention probabilities and their statistics in plain torch: the definitions that kernels are
tested against, and what runs where a backend has no kernel. Every option, any device, a chunk of
rows at a time, differentiable any number of times. Next hop: the scores of reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call
from .reference import (
    Piece,
    for_query_heads,
    keep_factors,
    keys_of,
    no_autocast,
    part_of,
    pieces,
    reference,
    rows_of,
    scores_of,
)
from .statistics import FirstPass, Maps, Rows, key_slots
from .tensors import accumulate_dtype
from .transforms import pull_back

CHUNK = 1 << 20  # scores of a chunk of rows
LARGE_LSE = 4096.0  # from here on, the rounding of lse matters in exp(score - lse)

# ---- the definitions ----------------------------------------------------------------------------


def first_pass(call: Call, need_entropy: bool, need_argmax: bool) -> FirstPass:
    """The reference's result with statistics of its rows."""
    result = reference(call.q, call.k, call.v, call.spec, call.operands)
    return FirstPass(*result, *rows(call, need_entropy, need_argmax))


def rows(call: Call, need_entropy: bool, need_argmax: bool) -> Rows:
    """The statistics of each row. max_logit is the score of the first of equal keys, also for its
    gradient."""
    q = call.q
    wide = q.new_empty(0, dtype=accumulate_dtype(q.dtype))
    max_logit = wide.new_full(q.shape[:3], -torch.inf)
    entropy = wide.new_zeros(q.shape[:3] if need_entropy else 0)
    argmax = torch.full(q.shape[:3] if need_argmax else (0,), -1, device=q.device)
    for piece in _chunks(call):
        if not len(piece.j):
            continue
        scores = _scores(call, piece)
        first = scores.masked_fill(scores.isnan(), -torch.inf).argmax(-1, keepdim=True)
        largest = scores.gather(-1, first).squeeze(-1)  # of equal scores the first
        broken = scores.isnan().any(-1) & (largest != torch.inf)
        largest = largest.masked_fill(broken, torch.nan)
        at = call.operands, piece
        rows_of(max_logit, *at).copy_(largest)
        if need_entropy:
            rows_of(entropy, *at).copy_(_entropy(scores, call.operands.sinks))
        if need_argmax:
            none = broken | (largest == -torch.inf)
            rows_of(argmax, *at).copy_((first.squeeze(-1) + piece.j.start).masked_fill(none, -1))
    return Rows(max_logit, entropy, argmax)


def _entropy(scores: Tensor, sinks: Tensor | None) -> Tensor:
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    if sinks is not None:
        own = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, own], -1)
    hidden = scores == -torch.inf
    log_probs = torch.where(dead, 0.0, scores).log_softmax(-1)
    log_probs = torch.where(hidden, 0.0, log_probs)  # 0 log 0 is 0
    probs = torch.where(hidden, 0.0, log_probs.exp())
    return torch.where(dead.squeeze(-1), 0.0, -(probs * log_probs).sum(-1))


def maps(call: Call, lse: Tensor, need_col_mass: bool, topk: int, pooled: int) -> Maps:
    """What needs the whole of P, made from lse, which need not be that of these keys alone: after
    merge_states(), P is the probabilities over the keys of all the merged calls."""
    q, operands = call.q, call.operands
    batch, heads, q_len, _ = q.shape
    keys = key_slots(call)
    col_mass = lse.new_zeros((batch, heads, keys) if need_col_mass else 0)
    shape = (batch, heads, q_len, topk) if topk else (0,)
    probs_of, keys_of_rows = lse.new_zeros(shape), torch.full(shape, -1, device=q.device)
    maps = lse.new_zeros((batch, heads, pooled, pooled) if pooled else 0)
    for piece in _chunks(call):
        if not len(piece.j):
            continue
        scores = _scores(call, piece)
        probs = probabilities(scores, rows_of(lse, operands, piece))
        if need_col_mass:
            _keys_at(col_mass, operands, piece).add_(probs.sum(2))
        if topk:
            some, which = _largest(scores, probs, topk, piece.j.start)
            rows_of(probs_of, operands, piece).copy_(some)
            rows_of(keys_of_rows, operands, piece).copy_(which)
        if pooled:
            down = _bins(piece.i, q_len, pooled, probs)  # [m, n]
            down = down / rows_of_bins(q_len, pooled, probs)
            across = _bins(piece.j, keys, pooled, probs)
            own = maps if piece.sequence is None else maps[piece.sequence : piece.sequence + 1]
            own.add_(down.mT @ probs @ across)
    return Maps(col_mass, probs_of, keys_of_rows, maps)


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 for keys that a row does not see. Where lse is so large that its
    rounding is felt, it is the softmax of the scores times the share that lse gives them."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees no key: exp(-inf) is 0
    hidden = scores == -torch.inf
    probs = (scores - lse.unsqueeze(-1)).clamp(max=0).exp().masked_fill(hidden, 0.0)
    far = (lse.abs() >= LARGE_LSE) & lse.isfinite()
    readable = type(far) is Tensor and far.is_cpu and not torch.compiler.is_compiling()
    if readable and not bool(far.any()):
        return probs
    near = scores.masked_fill(~far.unsqueeze(-1), 0.0)
    gap = near.logsumexp(-1) - lse
    rounding = 8 * torch.finfo(lse.dtype).eps * lse.abs()
    share = torch.where(gap.abs() <= rounding, 1.0, gap.clamp(max=0).exp())
    exact = (near.softmax(-1) * share.unsqueeze(-1)).masked_fill(hidden, 0.0)
    return torch.where(far.unsqueeze(-1), exact, probs)


def _largest(scores: Tensor, probs: Tensor, k: int, first_key: int) -> tuple[Tensor, Tensor]:
    """(probs, keys) of the k largest scores of each row, of equal ones the first keys."""
    n = min(k, scores.shape[-1])
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    order = order.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    none = scores.gather(-1, order) == -torch.inf
    broken = probs.isnan().any(-1, keepdim=True)
    some = probs.gather(-1, order).masked_fill(none, 0.0).masked_fill(broken, torch.nan)
    which = (order + first_key).masked_fill(none | broken, -1)
    return F.pad(some, (0, k - n)), F.pad(which, (0, k - n), value=-1)


def bins(size: int, n: int, device) -> Tensor:
    """The bin of each of `size` positions, of n: int64 [size]."""
    return torch.arange(size, device=device) * n // size


def rows_of_bins(size: int, n: int, like: Tensor) -> Tensor:
    """How many positions each bin has: [n], in the dtype of `like`."""
    first = (torch.arange(n + 1, device=like.device) * size + n - 1) // n  # of each bin
    return first.diff().to(like.dtype)


def _bins(positions: range, size: int, n: int, like: Tensor) -> Tensor:
    """[len(positions), n]: 1 where a position is in the bin."""
    own = bins(size, n, like.device)[positions.start : positions.stop]
    return F.one_hot(own, n).to(like.dtype)


# ---- attention weights --------------------------------------------------------------------------


class _Part(NamedTuple):
    """Rows of one piece whose weights are made at once."""

    piece: Piece  # with those of its rows
    at: slice | Tensor  # where they are among the rows asked for


def weights(call: Call, lse: Tensor, row_numbers: Tensor | None, average: bool) -> Tensor:
    """P with dropout, in q's dtype: [B, heads, rows, keys] of all rows or of those listed (int64),
    or with `average` the mean over heads [B, rows, keys]. Differentiable; a chunk at a time."""
    q = call.q
    count = q.shape[2] if row_numbers is None else row_numbers.shape[0]
    heads = () if average else (q.shape[1],)
    made = lse.new_zeros(q.shape[0], *heads, count, call.k.shape[2])
    for part in _parts(call, row_numbers):
        own = _weights_of(call, lse, part.piece)
        own = own.mean(1) if average else own
        n, keys = part.piece.sequence, part.piece.j
        entries = made if n is None else made[n : n + 1]
        if isinstance(part.at, slice):
            entries[..., part.at, keys.start : keys.stop].add_(own)
        else:
            own = own.expand(*own.shape[:-2], len(part.at), -1)
            entries[..., keys.start : keys.stop].index_copy_(-2, part.at, own)
    return made.to(q.dtype)


def _weights_of(call: Call, lse: Tensor, piece: Piece) -> Tensor:
    probs = probabilities(_scores(call, piece), rows_of(lse, call.operands, piece))
    if call.spec.dropout_p:
        probs = probs * keep_factors(probs, call.spec, call.operands, piece)
    return probs


def _parts(call: Call, row_numbers: Tensor | None) -> Iterator[_Part]:
    """The chunks of all rows, or the runs of rows that are listed."""
    if row_numbers is None:
        for piece in _chunks(call):
            yield _Part(piece, slice(piece.i.start, piece.i.stop))
        return
    listed = row_numbers.tolist()
    for piece in pieces(call.q, call.k, call.operands):
        for row in sorted({*listed} & {*piece.i}):
            places = [n for n, other in enumerate(listed) if other == row]
            at = torch.tensor(places, device=call.q.device)
            yield _Part(piece._replace(i=range(row, row + 1)), at)


def weights_gradient(call: Call, lse: Tensor, row_numbers, average: bool, dweights: Tensor):
    """The gradients (dlse, dq, dk, dbias or None) of weights(). A chunk at a time, which is made
    again, so that no more than a chunk of scores is stored."""
    inputs, sums = (lse, call.q, call.k, call.operands.bias), None
    for part in _parts(call, row_numbers):

        def function(lse, q, k, bias, piece=part.piece):
            own = call.but(q=q, k=k, operands=replace(call.operands, bias=bias))
            made = _weights_of(own, lse, piece)
            return ((made.mean(1) if average else made),)

        n, keys = part.piece.sequence, part.piece.j
        entries = dweights if n is None else dweights[n : n + 1]
        own = entries[..., part.at, keys.start : keys.stop]
        if not isinstance(part.at, slice):  # a row that is listed several times
            own = own.sum(-2, keepdim=True)
        grads = pull_back(function, inputs, (own.to(lse.dtype),))
        pairs = zip(sums or grads, grads)
        sums = grads if sums is None else [x if y is None else x + y for x, y in pairs]
    return sums or [None if x is None else torch.zeros_like(x) for x in inputs]


# ---- pieces -------------------------------------------------------------------------------------


def _chunks(call: Call) -> Iterator[Piece]:
    """The call's pieces, cut into runs of rows with at most CHUNK scores where they can be."""
    batch, heads = call.q.shape[:2]
    for piece in pieces(call.q, call.k, call.operands):
        row = heads * len(piece.j) * (batch if piece.sequence is None else 1)
        step = max(1, CHUNK // max(1, row))
        for start in range(piece.i.start, piece.i.stop, step):
            yield piece._replace(i=range(start, min(start + step, piece.i.stop)))


def _scores(call: Call, piece: Piece) -> Tensor:
    """The scores of a piece in fp32 (fp64), [b, heads, m, n], -inf where a row sees no key."""
    x, dtype = call.operands, accumulate_dtype(call.q.dtype)
    with no_autocast(call.q.device.type):
        q = rows_of(call.q, x, piece).to(dtype)
        k = for_query_heads(keys_of(call.k, x, piece), q.shape[1]).to(dtype)
        bias = None if x.bias is None else part_of(x.bias, piece)
        return scores_of(q, k, bias, call.spec, x, piece)[0]


def _keys_at(x: Tensor, operands, piece: Piece) -> Tensor:
    """The piece's keys of x [B, heads, keys], where packed sequences lie one after the other."""
    own = slice(piece.key + piece.j.start, piece.key + piece.j.stop)
    if operands.packed or piece.sequence is None:
        return x[:, :, own]
    return x[piece.sequence : piece.sequence + 1, :, own]

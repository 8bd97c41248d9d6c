"""The scores of some chosen keys of each row, in plain torch: O(rows x keys chosen x D), with every
option, differentiable any number of times. Statistics that concern one key of a row (the largest,
the diagonal, the top k) get their gradients from here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call
from .reference import finite_sum, no_autocast
from .spec import NO_OPERANDS
from .tensors import accumulate_dtype


class Places(NamedTuple):
    """Where each row of q lies: int64 tensors that broadcast to [B, 1, rows, 1], or numbers."""

    sequence: Tensor  # the batch entry or packed sequence
    i: Tensor  # position in it
    q_len: Tensor | int
    kv_start: Tensor | int
    kv_len: Tensor | int
    key: Tensor | int  # index in k of the sequence's first key


def places(call: Call) -> Places:
    x, device = call.operands, call.q.device
    batch, _, rows, _ = call.q.shape
    at = torch.arange(rows, device=device)[None, None, :, None]
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        # One more sequence, which is empty, has the rows past the last one.
        cu_q, cu_k = (torch.cat([cu, cu[-1:]]).long() for cu in (x.cu_seqlens_q, x.cu_seqlens_k))
        n = torch.bucketize(at, cu_q[1:-1], right=True)
        kv_len, key = cu_k[n + 1] - cu_k[n], cu_k[n]
        at = torch.where(n < cu_q.shape[0] - 2, at - cu_q[n], 0)
        q_len = cu_q[n + 1] - cu_q[n]
        if x.kv_lens is not None:
            lens = torch.cat([x.kv_lens, x.kv_lens.new_zeros(1)]).long()
            kv_len = lens[n]
        n = n.clamp(max=max(0, cu_q.shape[0] - 3))
    else:
        n = torch.arange(batch, device=device)[:, None, None, None]
        slots = call.k.shape[2] * (1 if x.page_table is None else x.page_table.shape[1])
        kv_len = slots if x.kv_lens is None else x.kv_lens.long()[:, None, None, None]
        q_len, key = rows, 0
    start = 0 if x.kv_starts is None else x.kv_starts.long()[n]
    return Places(n, at, q_len, start, kv_len, key)


def scores_of_keys(call: Call, keys: Tensor) -> Tensor:
    """The scores of key keys[b, h, i, n], counted in the row's sequence, for row i: fp32 (fp64)
    [B, heads, rows, n], -inf for a key that the row does not see or that is not there (-1).

    Args:
        keys: int64 [B or 1, heads or 1, rows, n].
    """
    q, k, x, spec = call.q, call.k, call.operands, call.spec
    dtype, heads = accumulate_dtype(q.dtype), q.shape[1]
    shape = (*q.shape[:3], keys.shape[-1])
    if not (k.numel() and q.numel() and (x.page_table is None or x.page_table.numel())):
        return q.new_full(shape, -torch.inf, dtype=dtype)
    at = places(call)
    head = torch.arange(heads, device=q.device)[None, :, None, None]
    visible = _visible(call, at, head, keys)
    safe = torch.where(visible, keys, 0)  # no other key is read: it may be NaN
    with no_autocast(q.device.type):
        rows = torch.where(visible.unsqueeze(-1), _rows_of_keys(call, at, head, safe), 0)
        scores = spec.scale * (q.unsqueeze(3).to(dtype) * rows.to(dtype)).sum(-1)
    if spec.softcap > 0:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if x.bias is not None:
        bias = _picked(x.bias, at.sequence, head, at.i, safe)
        scores = finite_sum(scores, torch.where(visible, bias, 0))
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes.to(dtype)
        slopes = slopes[None, :, None, None] if slopes.dim() == 1 else slopes[at.sequence, head]
        distance = at.i + spec.offset(at.q_len, at.kv_len) - safe
        scores = finite_sum(scores, -slopes * distance.abs())
    return torch.where(visible, scores, -torch.inf)


def diagonal(call: Call) -> Tensor:
    """The score of the key on each row's diagonal, [B, heads, rows]; -inf where the row does not
    see it."""
    q, k, x, spec = call.q, call.k, call.operands, call.spec
    at = places(call)
    keys = at.i + spec.offset(at.q_len, at.kv_len)
    plain = x is NO_OPERANDS and spec.softcap == 0 and q.shape[1] == k.shape[1]
    if not plain or q.shape[2] == 0:
        return scores_of_keys(call, keys).squeeze(-1)
    # Without operands rows and their keys are slices: a tenth of the time of looking each key up.
    offset = spec.offset(q.shape[2], k.shape[2])
    first, end = max(0, -offset), min(q.shape[2], k.shape[2] - offset)
    rows, own = q[:, :, first:end], k[:, :, first + offset : max(first, end) + offset]
    dtype = accumulate_dtype(q.dtype)
    with no_autocast(q.device.type):
        scores = spec.scale * torch.linalg.vecdot(rows.to(dtype), own.to(dtype))
    return F.pad(scores, (first, q.shape[2] - max(first, end)), value=-torch.inf)


def _visible(call: Call, at: Places, head: Tensor, keys: Tensor) -> Tensor:
    """Which of the keys exist and are seen: bool [B, heads, rows, n]."""
    x, spec = call.operands, call.spec
    inside = (keys >= at.kv_start) & (keys >= 0) & (keys < at.kv_len)
    lo, hi = (f(at.i, at.q_len, at.kv_len) for f in (spec.lo, spec.hi))
    visible = inside & (keys >= lo) & (keys < hi)
    safe = torch.where(inside, keys, 0)
    if x.document_ids is not None:
        own = x.document_ids[at.sequence, at.i.clamp(max=x.document_ids.shape[1] - 1)]
        visible = visible & (x.document_ids[at.sequence, safe] == own)
    if x.mask is not None:
        visible = visible & _picked(x.mask, at.sequence, head, at.i, safe)
    if x.key_begin is not None and x.key_end is not None:
        begin, end = (_picked(y, at.sequence, head, at.i, safe) for y in (x.key_begin, x.key_end))
        visible = visible & (keys >= begin) & (keys < end)
    return visible.expand(*call.q.shape[:3], keys.shape[-1])


def _picked(x: Tensor, *where: Tensor) -> Tensor:
    """x[where] of an operand with four dimensions; sizes of 1 broadcast."""
    return x[tuple(torch.zeros_like(at) if n == 1 else at for n, at in zip(x.shape, where))]


def _rows_of_keys(call: Call, at: Places, head: Tensor, keys: Tensor) -> Tensor:
    """The rows of k of the chosen keys: [B, heads, rows, n, D]."""
    k, table = call.k, call.operands.page_table
    kv_head = head // (call.q.shape[1] // k.shape[1])
    if table is not None:
        page = table[at.sequence, keys // k.shape[2]].long().clamp(0, k.shape[0] - 1)
        return k[page, kv_head, keys % k.shape[2]]
    if call.operands.packed:
        return k[0, kv_head, keys + at.key]
    return k[at.sequence, kv_head, keys]

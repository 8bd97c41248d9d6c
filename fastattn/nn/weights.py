"""The attention weights of a call, from its lse: what nn.MultiheadAttention's need_weights asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..philox import keep_probability, keep_rows

CHUNK = 1 << 21  # scores at a time, 8 MiB of float32


def weights_of(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    window: tuple[None, int] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    average: bool = True,
) -> Tensor:
    """softmax(q k' / sqrt(D) + bias), masked, after dropout; differentiable.

    q [B, H, L, D], k [B, H, S, D], lse [B, H, L] and the options are those of the call of
    attention(align="start") that gave lse; window is None or (None, right).

    Returns [B, L, S], the mean over heads, or with average=False [B, H, L, S], in q's dtype. Rows
    that see no key are 0. Beyond that, memory is CHUNK scores: rows are computed in chunks, and
    again for the gradient.
    """
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    rows = max(16, CHUNK // max(1, batch * heads * kv_len) // 16 * 16)  # keep_rows wants 16s
    part = _part
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        part = _checkpointed
    hidden = None if mask is None else ~mask
    if kv_lens is not None:
        beyond = torch.arange(kv_len, device=q.device) >= kv_lens[:, None, None, None]
        hidden = beyond if hidden is None else hidden | beyond
    parts = [
        part(
            q[:, :, i : i + rows], k, lse[:, :, i : i + rows], _rows(hidden, i, rows),
            _rows(bias, i, rows), window, i, dropout_p, dropout_seed, average,
        )
        for i in range(0, max(q_len, 1), rows)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _rows(x: Tensor | None, first: int, rows: int) -> Tensor | None:
    return x if x is None or x.shape[2] == 1 else x[:, :, first : first + rows]


def _checkpointed(*args) -> Tensor:
    return checkpoint(_part, *args, use_reentrant=False, preserve_rng_state=False)


def _part(q, k, lse, hidden, bias, window, first, dropout_p, seed, average) -> Tensor:
    """Rows first : first + rows of the weights."""
    compute, dtype = lse.dtype, q.dtype
    batch, heads, rows, head_dim = q.shape
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(compute) * head_dim**-0.5 @ k.to(compute).mT  # [B, H, rows, S]
    if bias is not None:
        scores = scores + bias
    if window is not None:
        i = torch.arange(first, first + rows, device=q.device)[:, None]
        after = torch.arange(k.shape[2], device=q.device) > i + window[1]
        scores = scores.masked_fill(after, -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing: exp(-inf) = 0
    weights = (scores - lse.unsqueeze(-1)).exp()
    if dropout_p:
        kept = keep_rows(seed, batch * heads, first, rows, k.shape[2], dropout_p)
        weights = weights * kept.view_as(weights) / keep_probability(dropout_p)
    return (weights.mean(1) if average else weights).to(dtype)

"""The attention weights of a call, from its lse: what nn.MultiheadAttention's need_weights asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..attention import attention
from ..philox import keep_probability

CHUNK = 1 << 18  # scores at a time, 1 MiB of float32: they stay in the cache


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
    that see no key are 0. Beyond that, memory is CHUNK scores and, with dropout, 32 bits for 16
    weights: rows are computed in chunks, and again for the gradient.
    """
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    rows = max(1, CHUNK // max(1, batch * heads * kv_len))
    kept = _kept(dropout_seed, batch, heads, q_len, kv_len, dropout_p) if dropout_p else None
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
            _rows(bias, i, rows), _rows(kept, i, rows), window, i, dropout_p, average,
        )
        for i in range(0, max(q_len, 1), rows)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _rows(x: Tensor | None, first: int, rows: int) -> Tensor | None:
    return x if x is None or x.shape[2] == 1 else x[:, :, first : first + rows]


def _checkpointed(*args) -> Tensor:
    return checkpoint(_part, *args, use_reentrant=False, preserve_rng_state=False)


def _part(q, k, lse, hidden, bias, kept, window, first, dropout_p, average) -> Tensor:
    """Rows first : first + rows of the weights."""
    compute, dtype = lse.dtype, q.dtype
    rows, head_dim = q.shape[2:]
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
    if kept is not None:
        bits = kept.unsqueeze(-1) >> torch.arange(16, dtype=torch.int32, device=q.device) & 1
        bits = bits.flatten(-2)[..., : k.shape[2]]  # [B, H, rows, S]
        weights = weights * bits / keep_probability(dropout_p)
    return (weights.mean(1) if average else weights).to(dtype)


def _kept(seed, batch, heads, q_len, kv_len, p) -> Tensor:
    """Which weights dropout keeps: int32 [B, H, L, S / 16], bit j % 16 of word j // 16 for key j.

    The kernel itself says it. All scores are 0, so all weights are equal, and key j's value is
    2^(j % 16) in channel j // 16: out is the words, but for a factor, and exact enough to round.
    """
    device, j = seed.device, torch.arange(kv_len, device=seed.device)
    words = torch.arange(-(-kv_len // 16), device=device)
    values = torch.where(j[:, None] // 16 == words, 2.0 ** (j % 16)[:, None], 0.0)
    q = torch.zeros(batch, heads, q_len, 1, device=device)
    k = torch.zeros(batch, 1, kv_len, 1, device=device)  # one head for all
    with torch.autocast(device.type, enabled=False):
        v = values.expand(batch, 1, -1, -1)
        out = attention(q, k, v, dropout_p=p, dropout_seed=seed)
    return (out * (kv_len * keep_probability(p))).round().to(torch.int32)

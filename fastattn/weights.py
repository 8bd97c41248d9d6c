"""The attention weights of a call, from its lse: what need_weights and output_attentions ask for.
Rows are computed some at a time. Next hop: none, plain torch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .core import checks
from .core.philox import keep_probability
from .core.reference import finite_sum
from .core.spec import Spec
from .functional import attention

LARGE_LSE = 4096.0  # from here on its rounding is felt in exp(score - lse)
CHUNK = 1 << 18  # scores at a time, 1 MiB of float32: they stay in the cache


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    align: str = "end",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    kv_lens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    average: bool = False,
) -> Tensor:
    """What attention() multiplied v with: exp(score - lse), dropped out by the same key.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D].
        lse: [B, Hq, Sq], attention()'s, with the sinks in it.
        average: the mean over heads.
        The rest is what attention() got, masks and biases in four dimensions and key ranges in
        three.

    Returns:
        [B, Hq, Sq, Skv], or with average [B, Sq, Skv], in q's dtype; differentiable. A row that
        sees no key is 0. Beyond that, memory is CHUNK scores and, with dropout, 32 bits for 16
        weights: rows are computed in chunks, and again for the gradient. Under torch.compile, which
        unrolls chunks, there is one.
    """
    (batch, heads, q_len, head_dim), kv_len = q.shape, k.shape[2]
    spec = checks.spec_of(head_dim, scale, False, window, align, softcap, dropout_p)
    if head_origin is not None:
        head_origin = checks.head_origin(head_origin, batch, heads)
    kept = None
    if dropout_p:
        kept = _kept(dropout_seed, batch, heads, q_len, kv_len, dropout_p, head_origin)
    part = partial(_part, spec, q_len, average)
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        part = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    rows = max(1, CHUNK // max(1, batch * heads * kv_len))
    # What traces would keep q_len constant in a range, and write out every chunk of it.
    whole = torch.compiler.is_compiling() or torch._C._is_tracing() or q_len <= rows
    rows, starts = (q_len, [0]) if whole else (rows, range(0, q_len, rows))
    parts = [
        part(
            i, q[:, :, i : i + rows], k, lse[:, :, i : i + rows], _rows(mask, i, rows),
            _rows(bias, i, rows), _rows(kept, i, rows), kv_lens, document_ids,
            [_rows(x, i, rows) for x in key_ranges or ()],
        )
        for i in starts
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _rows(x: Tensor | None, first: int, rows: int) -> Tensor | None:
    return x if x is None or x.shape[2] == 1 else x[:, :, first : first + rows]


def _part(
    spec: Spec,
    q_len,
    average,
    first,
    q,
    k,
    lse,
    mask,
    bias,
    kept,
    kv_lens,
    document_ids,
    key_ranges,
) -> Tensor:
    """Rows first : first + q.shape[2] of the weights."""
    compute, dtype, kv_len = lse.dtype, q.dtype, k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if k.shape[1] != q.shape[1] else k
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(compute) * spec.scale @ k.to(compute).mT  # [B, H, rows, Skv]
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = finite_sum(scores, bias)
    for visible in _visible(spec, q_len, kv_len, first, q, mask, kv_lens, document_ids, key_ranges):
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing: exp(-inf) = 0
    weights = (scores - lse.unsqueeze(-1)).clamp_(max=0).exp()
    far = (lse.abs() >= LARGE_LSE) & lse.isfinite()
    if not checks.has_values(far) or bool(far.any()):
        exact = _of_large_scores(scores.masked_fill(~far.unsqueeze(-1), 0.0), lse)
        weights = torch.where(far.unsqueeze(-1), exact, weights)
    if kept is not None:
        bits = kept.unsqueeze(-1) >> torch.arange(16, dtype=torch.int32, device=q.device) & 1
        bits = bits.flatten(-2)[..., :kv_len]  # [B, H, rows, Skv]
        weights = weights * bits / keep_probability(spec.dropout_p)
    return (weights.mean(1) if average else weights).to(dtype)


def _of_large_scores(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) without lse's rounding: a softmax, times what the sink leaves of 1."""
    gap = scores.logsumexp(-1) - lse
    rounding = 8 * torch.finfo(lse.dtype).eps * lse.abs()
    kept = torch.where(gap.abs() <= rounding, 1.0, gap.clamp(max=0).exp())
    return scores.softmax(-1) * kept.unsqueeze(-1)


def _visible(spec, q_len, kv_len, first, q, mask, kv_lens, document_ids, key_ranges):
    """What hides keys, each bool and broadcastable to the scores, True = visible."""
    i = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    j = torch.arange(kv_len, device=q.device)
    if kv_lens is not None:
        kv_len = kv_lens.long()[:, None, None, None]  # the diagonal is the entry's own
        yield j < kv_len
    if spec.left >= 0:
        yield j >= spec.lo(i, q_len, kv_len)
    if spec.right >= 0:
        yield j < spec.hi(i, q_len, kv_len)
    if document_ids is not None:
        own = document_ids[:, first : first + q.shape[2]]
        yield own[:, None, :, None] == document_ids[:, None, None, :]
    if mask is not None:
        yield mask
    if key_ranges:
        begin, end = (x.unsqueeze(3) for x in key_ranges)
        yield (j >= begin) & (j < end)


def _kept(seed, batch, heads, q_len, kv_len, p, head_origin=None) -> Tensor:
    """Which weights dropout keeps: int32 [B, H, Sq, Skv / 16]; key j is bit j % 16 of word j // 16.

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
        out = attention(q, k, v, head_origin=head_origin, dropout_p=p, dropout_seed=seed)
    return (out * (kv_len * keep_probability(p))).round().to(torch.int32)

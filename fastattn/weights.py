"""The attention weights of a call, computed from its lse, for need_weights and output_attentions.
Rows are processed in chunks, in plain torch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .capturing import unseen
from .core import checks
from .core.philox import keep_probability
from .core.reference import finite_sum
from .core.spec import Spec
from .functional import attention

LARGE_LSE = 4096.0  # above this, the rounding of lse matters in exp(score - lse)
CHUNK = 1 << 18  # scores of a chunk: 1 MiB in float32, which fits in the CPU's L2 cache


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
    """The attention weights that attention() multiplied with v: exp(score - lse), with the same
    dropout.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D].
        lse: [B, Hq, Sq], returned by attention(); it includes the sinks.
        average: return the mean over heads.
        The other arguments are those of the call of attention(), with masks and biases in four
        dimensions and key ranges in three.

    Returns:
        [B, Hq, Sq, Skv], or with average [B, Sq, Skv], in q's dtype; differentiable. A row that
        sees no key is 0. Additional memory is CHUNK scores and, with dropout, 32 bits for every 16
        weights, because rows are computed in chunks, and again in the backward pass. Under
        torch.compile, which would unroll the chunks, there is one chunk.
    """
    (batch, heads, q_len, head_dim), kv_len = q.shape, k.shape[2]
    spec = checks.spec_of(head_dim, scale, False, window, align, softcap, dropout_p)
    if head_origin is not None:
        head_origin = checks.head_origin(head_origin, batch, heads)
    kept = None
    if dropout_p:
        kept = _kept(dropout_seed, batch, heads, q_len, kv_len, dropout_p, head_origin)
    chunk = partial(_chunk, spec, q_len, average)
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        chunk = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
    rows = max(1, CHUNK // max(1, batch * heads * kv_len))
    # A range over chunks would make q_len a constant of the trace, and unroll every chunk.
    whole = torch.compiler.is_compiling() or torch._C._is_tracing() or q_len <= rows
    rows, starts = (q_len, [0]) if whole else (rows, range(0, q_len, rows))
    chunks = [
        chunk(
            i, q[:, :, i : i + rows], k, lse[:, :, i : i + rows], _rows(mask, i, rows),
            _rows(bias, i, rows), _rows(kept, i, rows), kv_lens, document_ids,
            [_rows(x, i, rows) for x in key_ranges or ()],
        )
        for i in starts
    ]  # fmt: skip
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-2)


def _rows(x: Tensor | None, first: int, rows: int) -> Tensor | None:
    return x if x is None or x.shape[2] == 1 else x[:, :, first : first + rows]


def _chunk(
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
    """Rows [first, first + q.shape[2]) of the attention weights."""
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
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees no key: exp(-inf) = 0
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
    """exp(scores - lse) without the rounding of lse: the softmax, times 1 - the sink's share."""
    gap = scores.logsumexp(-1) - lse
    rounding = 8 * torch.finfo(lse.dtype).eps * lse.abs()
    kept = torch.where(gap.abs() <= rounding, 1.0, gap.clamp(max=0).exp())
    return scores.softmax(-1) * kept.unsqueeze(-1)


def _visible(spec, q_len, kv_len, first, q, mask, kv_lens, document_ids, key_ranges):
    """The masks of the call, each bool and broadcastable to the scores, True = visible."""
    i = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    j = torch.arange(kv_len, device=q.device)
    if kv_lens is not None:
        kv_len = kv_lens.long()[:, None, None, None]  # each sequence has its own diagonal
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

    The attention kernel computes it: all scores are 0, so that all weights are equal, and the value
    of key j is 2^(j % 16) in channel j // 16. The output is then the words times a constant, which
    rounding makes exact.
    """
    device, j = seed.device, torch.arange(kv_len, device=seed.device)
    words = torch.arange(-(-kv_len // 16), device=device)
    values = torch.where(j[:, None] // 16 == words, 2.0 ** (j % 16)[:, None], 0.0)
    q = torch.zeros(batch, heads, q_len, 1, device=device)
    k = torch.zeros(batch, 1, kv_len, 1, device=device)  # one kv head for all heads
    with unseen(), torch.autocast(device.type, enabled=False):
        v = values.expand(batch, 1, -1, -1)
        out = attention(q, k, v, head_origin=head_origin, dropout_p=p, dropout_seed=seed)
    return (out * (kv_len * keep_probability(p))).round().to(torch.int32)

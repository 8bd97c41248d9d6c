"""The attention weights that models return under output_attentions=True, from lse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import keep_mask, keep_probability
from .masks import band, same_document


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    align: str = "end",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    document_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """What attention() multiplied v with: exp(score - lse), dropped out by the same key.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D].
        lse: [B, Hq, Sq], attention()'s, with the sinks in it.
        The rest is what attention() got.

    Returns:
        [B, Hq, Sq, Skv] in q's dtype, differentiable. A row that sees no key is zero.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(compute).repeat_interleave(heads // k.shape[1], dim=1)
    scores = (head_dim**-0.5 if scale is None else scale) * (q.to(compute) @ k.mT)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    left, right = (-1 if side is None else side for side in window)
    offset = kv_len - q_len if align == "end" else 0
    visible = band(q_len, kv_len, left, right, offset, q.device)
    if document_ids is not None:
        visible = visible & same_document(document_ids)
    if mask is not None:
        visible = visible & mask
    lse = lse.unsqueeze(-1)
    visible = visible & (lse != -torch.inf)
    # Masked before exp, so that no inf - inf reaches a gradient.
    weights = torch.where(visible, scores - lse, -torch.inf).exp()
    if dropout_p:
        kept = keep_mask(
            dropout_seed, batch * heads, q_len, kv_len, dropout_p, device=q.device
        ).view_as(weights)
        weights = weights * kept / keep_probability(dropout_p)
    return weights.to(q.dtype)

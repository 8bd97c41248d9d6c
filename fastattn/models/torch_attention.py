"""Attention by torch's scaled_dot_product_attention, with the arguments that the blocks pass.

For comparison: attention="torch" makes a model of fastattn.models use it. Options that SDPA has no
argument for become a mask, as a user of SDPA would write it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import KVCache


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    align: str = "start",
    offset: Tensor | None = None,
) -> Tensor:
    """Attention with fastattn.attention's arguments; q, k, v and the result are [B, H, S, D].

    offset, [B], is for caches: row i of sequence b is at position i + offset[b]. None: at i, which
    is align="start".

    Raises:
        NotImplementedError: softcap, sinks, or head_origin with dropout, which SDPA does not have.
        ValueError: align is "end".
    """
    unknown = {"sinks": sinks is not None, "softcap": bool(softcap)}
    unknown["head_origin"] = head_origin is not None and dropout_p > 0
    for name, refused in unknown.items():
        if refused:
            raise NotImplementedError(
                f'{name} came with attention="torch", and SDPA does not have it; use '
                'attention="fastattn"'
            )
    if align != "start":
        raise ValueError(f'align is {align!r}; accepted with attention="torch" is "start"')
    if key_ranges is not None:
        begin, end = (x.unsqueeze(-1) for x in key_ranges)
        key = torch.arange(k.shape[2], device=k.device)
        inside = (begin <= key) & (key < end)
        mask = inside[(None,) * (4 - inside.dim())] & (True if mask is None else mask)
    extra = [x for x in (window, mask, bias, kv_lens, document_ids, offset) if x is not None]
    seen = None
    if extra:
        seen, causal = _seen(q, k, causal, window, mask, kv_lens, document_ids, offset), False
        seen = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
        seen = seen.expand(*seen.shape[:2], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(
        *(q, k, v, seen, dropout_p, causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _seen(q, k, causal, window, mask, kv_lens, document_ids, offset) -> Tensor:
    """bool, broadcastable to [B, H, Sq, Skv], True = attend: the keys that each row sees."""
    device = q.device
    row = torch.arange(q.shape[2], device=device)[:, None]
    key = torch.arange(k.shape[2], device=device)
    if offset is not None:
        row = row + offset[:, None, None, None]
    left, right = (None, None) if window is None else window
    right = 0 if causal else right
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if right is not None and right >= 0:
        seen = seen & (key <= row + right)
    if left is not None and left >= 0:
        seen = seen & (key >= row - left)
    if kv_lens is not None:
        seen = seen & (key < kv_lens[:, None, None, None])
    if document_ids is not None:
        ids = document_ids.view(-1, 1, document_ids.shape[-1])
        seen = seen & (ids[..., :, None] == ids[..., None, :])
    return seen if mask is None else seen & mask


class TorchCache(KVCache):
    """A KVCache whose attend() is torch's attention over all keys in the cache."""

    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        new_lens: Tensor | None = None,
        **options,
    ) -> Tensor:
        """As KVCache.attend."""
        if k is not None:
            self.reserve(k.shape[1])
            rows = torch.arange(self.batch, device=k.device)[:, None]
            slots = self.positions(k.shape[2])
            if slots.numel() and int(slots.max()) >= self.max_len:
                raise ValueError(f"{k.shape[2]} new keys overrun the cache's {self.max_len} slots")
            self.k[rows, :, slots] = k.transpose(1, 2).to(self.k.dtype)
            self.v[rows, :, slots] = v.transpose(1, 2).to(self.v.dtype)
        before = self.lens
        after = before + (0 if k is None else k.shape[2])
        held = int(after.max())  # as a user of SDPA would, attend only to the filled slots
        mask = options.pop("mask", None)
        if mask is not None and mask.shape[-1] > held:
            mask = mask[..., :held]
        offset = before if k is not None else after - q.shape[2]
        out = torch_attention(
            q.to(self.k.dtype),
            *(self.k[:, :, :held], self.v[:, :, :held]),
            **options, mask=mask, kv_lens=after, offset=offset,
        )  # fmt: skip
        self.lens = after if new_lens is None else before + new_lens.to(before.dtype)
        self.filled = self.filled or k is not None
        return out

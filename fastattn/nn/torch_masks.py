"""Converts the masks of torch's modules (True = hidden) to the cheapest options of attention()."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks


def operands(padding, attn, is_causal, batch, heads, q_len, kv_len, extra, dtype) -> dict:
    """The options window, mask, bias and kv_lens of attention(), as a dict.

    Args:
        padding: nn.MultiheadAttention's key_padding_mask, [batch, kv_len], bool or float.
        attn: its attn_mask, [q_len, kv_len] or [batch * heads, q_len, kv_len], bool or float.
        is_causal: a top-left causal mask on top of both.
        extra: keys in front of the kv_len keys, which every row sees.
        dtype: that of q.

    A causal attn_mask becomes a window (half the work), and padding at the end becomes kv_lens
    (padded keys are not read). Any other padding becomes a mask or bias that broadcasts over rows
    and heads. Only two float masks are added up in memory, because attention() takes one bias.
    """
    padding = _checked("key_padding_mask", padding, {2: (batch, kv_len)})
    shapes = {2: (q_len, kv_len), 3: (batch * heads, q_len, kv_len)}
    attn = _checked("attn_mask", attn, shapes)
    if _is_triangle(attn):
        is_causal, attn = True, None
    kv_lens = _lengths(padding)
    hidden, bias = None, None
    if padding is not None and kv_lens is None:
        padding = F.pad(padding, (extra, 0))[:, None, None]  # [batch, 1, 1, keys]
        hidden, bias = (padding, None) if padding.dtype == torch.bool else (None, padding)
    if attn is not None:
        attn = attn[None, None] if attn.dim() == 2 else attn.unflatten(0, (batch, heads))
        attn = F.pad(attn, (extra, 0))  # [1 or batch, 1 or heads, q_len, keys]
        if attn.dtype != torch.bool:
            wide = torch.promote_types(dtype, torch.float32)  # a sum in half precision would round
            bias = attn if bias is None else bias.to(wide) + attn
        else:
            if hidden is not None:  # one of the two becomes a bias, and neither is expanded
                bias = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)
            hidden = attn
    return {
        "window": (None, extra) if is_causal else None,
        "mask": None if hidden is None else ~hidden,
        "bias": bias,
        "kv_lens": None if kv_lens is None else kv_lens + extra,
    }


def _checked(name: str, mask: Tensor | None, shapes: dict[int, tuple]) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"{name} is {mask.dtype}; accepted are torch.bool and floating types")
    if tuple(mask.shape) != shapes.get(mask.dim()):
        accepted = " and ".join(str(list(shape)) for shape in shapes.values())
        raise RuntimeError(f"{name} has shape {list(mask.shape)}; accepted is {accepted}")
    return mask


def _is_triangle(mask: Tensor | None) -> bool:
    """Does this mask hide exactly the keys after each row's own? Reading two corners first settles
    most masks."""
    if mask is None or mask.dim() != 2 or not checks.has_values(mask) or mask.requires_grad:
        return False
    hide = True if mask.dtype == torch.bool else -torch.inf
    if min(mask.shape) < 1 or mask.shape[1] < 2 or mask[0, -1] != hide or mask[-1, 0] != 0:
        return False
    return torch.equal(mask, torch.full_like(mask, hide).triu_(1))


def _lengths(padding: Tensor | None) -> Tensor | None:
    """int32 [batch]: where each sequence's padding begins; None if it is not all at the end."""
    if padding is None or padding.dtype != torch.bool or not checks.has_values(padding):
        return None
    lens = padding.shape[1] - padding.sum(1, dtype=torch.int32)
    keys = torch.arange(padding.shape[1], dtype=torch.int32)
    return lens if torch.equal(padding, keys >= lens[:, None]) else None

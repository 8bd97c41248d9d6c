"""The operators around attention: norm, rotate, gate and linear_cross_entropy.

Each has a reference in plain torch here: float64-exact, and the source of every derivative beyond
the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks

# ---- references --------------------------------------------------------------------------------


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_reference(x, residual, weight, bias, eps, center):
    """(y, summed): summed = x + residual, or x; y = its RMSNorm, or LayerNorm with center."""
    summed = x if residual is None else x + residual
    y = summed.to(_accumulate(summed.dtype))
    if center:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(summed.dtype), summed


def rotate_reference(x, cos, sin, positions, interleaved):
    """x [..., S, D], pairs of its first 2 * cos.shape[-1] channels turned by the angles of rows
    s (or positions[s] or [b, s]) of cos and sin."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 3:  # [B, S, pairs]: over the heads
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].to(cos.dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gate_reference(gate, up, activation):
    """activation(gate) * up, rounded once."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    gate, up = (x.to(_accumulate(dtype)) for x in (gate, up))
    return (GATES[activation](gate) * up).to(dtype)


def linear_cross_entropy_reference(
    hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, softcap
):
    """The loss of each row [N], from all the logits."""
    logits = F.linear(hidden, weight, bias).to(_accumulate(hidden.dtype))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels != ignore_index
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, torch.where(kept, labels, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * target
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(kept, loss, 0.0)


# ---- the calls ---------------------------------------------------------------------------------


def norm(x, residual, weight, bias, eps, center):
    """(y, summed) as norm_reference says."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {checks.show(residual)} and x {checks.show(x)}; they "
                         "must be equal")  # fmt: skip
    return norm_reference(x, residual, weight, bias, eps, center)


def rotate(x, cos, sin, positions, interleaved):
    """x turned, as rotate_reference says."""
    return rotate_reference(x, cos, sin, positions, interleaved)


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up."""
    return gate_reference(gate, up, activation)


def linear_cross_entropy(
    hidden, weight, labels, bias, ignore_index, label_smoothing, z_loss, softcap, reduction, chunk
):
    """The loss over chunks of rows; linear_cross_entropy_reference says what of each row."""
    rows = labels.reshape(-1)
    loss = linear_cross_entropy_reference(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, ignore_index, label_smoothing,
        z_loss, softcap,
    )  # fmt: skip
    if reduction == "none":
        return loss.view(labels.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / (rows != ignore_index).sum()

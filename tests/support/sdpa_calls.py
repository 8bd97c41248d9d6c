"""Inputs of scaled_dot_product_attention, and the result of torch's math path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def math(*args, **kwargs):
    """torch's math path, whether or not the switch is on."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def qkv(*shape, kv=None, grad=False, dtype=torch.float32):
    """query, key, value of the shapes (..., length, channels)."""
    shapes = (shape, kv or shape, kv or shape)
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]

"""Small helpers on tensors: memory order, the dtype of sums, autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import AUTOCAST

try:
    from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense
except ImportError:  # the name in older releases
    from torch._prims_common import (
        is_non_overlapping_and_dense as is_dense,  # pyright: ignore[reportAttributeAccessIssue]
    )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its last stride is not 1, as the kernels need."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def is_8_bit(x: Tensor) -> bool:
    return x.dtype in (torch.int8, torch.float8_e4m3fn)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the active torch.autocast for x's device, or None; meta tensors have none."""
    kind = x.device.type
    on = kind in AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def autocast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in autocast's dtype. fp64 and 8-bit tensors keep theirs."""
    return x if x.dtype == torch.float64 or is_8_bit(x) else x.to(dtype)


def empty_result(x: Tensor) -> Tensor:
    """An uninitialised tensor like x, in x's memory order where x is dense, else contiguous."""
    dense = is_dense(x) and (x.shape[-1] <= 1 or x.stride(-1) == 1)
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


def as_gradient_of(x: Tensor, dx: Tensor) -> Tensor:
    """A copy of dx with the strides that every backend gives the gradient of x."""
    return torch.empty_like(unit_stride(x)).copy_(dx)

"""Checks of memory before an in-place write: what may be written to, and what overlaps with it.
Called by fused/kv_append.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import has_memory, show


def writable(name, x) -> None:
    """Raises for a tensor that cannot be written to, or whose elements share memory."""
    if has_memory(x) and x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made in torch.inference_mode() and is written to outside "
                         "of it; make it under torch.no_grad(), or call in inference "
                         "mode")  # fmt: skip
    if x.is_contiguous():
        return
    places = [(stride, n) for stride, n in zip(x.stride(), x.shape) if n > 1]
    for d, (stride, _) in enumerate(places):
        others = (s * (n - 1) for i, (s, n) in enumerate(places) if i != d and s <= stride)
        if stride <= sum(others):
            raise ValueError(
                f"{name} has shape {show(x)} and strides {list(x.stride())}, so that some of its "
                "elements share memory, and is written to; pass a copy, as by contiguous()"
            )


def copied_if_overlapping(x: Tensor, *written: Tensor) -> Tensor:
    """x, or a copy of it where it may share memory with the tensors about to be written."""
    if not has_memory(x):
        return x
    place = span(x)
    return x.clone() if any(overlap(place, span(y)) for y in written if has_memory(y)) else x


def span(x) -> tuple[int, int]:
    """The addresses [first, end) between which x lies, in bytes."""
    if not x.numel():
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def overlap(a, b) -> bool:
    """Do two spans have an address in common?"""
    return a[0] < b[1] and b[0] < a[1]


def share_memory(x, y) -> bool:
    """Do two tensors share an element? Spans may overlap without that: k and v may be the two
    halves of each row of one tensor."""
    if not overlap(span(x), span(y)):
        return False
    first, second = _Addresses(x).array(), _Addresses(y).array()
    # numpy's stubs know two special values of max_work, and no number.
    return np.may_share_memory(first, second, max_work=10**5)  # pyright: ignore[reportArgumentType]


class _Addresses:
    """A tensor's addresses in the form of NumPy's array interface, because NumPy can intersect
    strided ranges. No element is read, so tensors on a GPU work too."""

    def __init__(self, x: Tensor) -> None:
        size = x.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "strides": tuple(stride * size for stride in x.stride()),
        }

    def array(self):
        return np.asarray(self)

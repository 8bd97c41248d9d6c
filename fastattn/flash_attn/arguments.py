"""Checks of the arguments of flash_attn's functions. Shapes are checked here, because fastattn
would see them transposed, and the errors of fastattn's functions get flash_attn's argument names.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastattn.core import checks

# fastattn's names in error messages, and flash_attn's names for the same.
_NAMES = {
    "scale": "softmax_scale",
    "window": "window_size",
    "page_table": "block_table",
    "page_size": "block_size",
    "pages": "blocks",
    "page": "block",
    "cache_lens": "cache_seqlens",
    "rotary's cos": "rotary_cos",
    "rotary's sin": "rotary_sin",
}
_THEIRS = re.compile(r"\b(" + "|".join(_NAMES) + r")\b")


def call_named(function, *args, **options):
    """The function's result; its error messages name the arguments as flash_attn does."""
    try:
        return function(*args, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        if len(error.args) == 1:
            error.args = (_THEIRS.sub(lambda word: _NAMES[word[0]], str(error)),)
        raise


def _ranked(name, x, accepted) -> Tensor:
    if checks.tensor(name, x).dim() != accepted.count(",") + 1:
        raise ValueError(f"{name} has shape {checks.show(x)}; accepted is {accepted}")
    return x


def unpacked(name, x, accepted) -> tuple[Tensor, ...]:
    """The two tensors of kv, or the three of qkv, along the third-last dimension, as views."""
    checks.same_kind(**{name: _ranked(name, x, accepted)})
    if x.shape[-3] != len(name):  # kv or qkv
        raise ValueError(f"{name} has shape {checks.show(x)}; accepted is {accepted}")
    return x.unbind(-3)


def dense_shapes(q, k, v) -> None:
    for name, x, accepted in (
        ("q", q, "[B, Sq, heads, D]"),
        ("k", k, "[B, Skv, kv_heads, D]"),
        ("v", v, "[B, Skv, kv_heads, Dv]"),
    ):
        _ranked(name, x, accepted)
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"the batch sizes of q, k and v are {q.shape[0]}, {k.shape[0]} and "
                         f"{v.shape[0]}; they must be equal")  # fmt: skip
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"v has length {v.shape[1]} (shape {checks.show(v)}) and k {k.shape[1]} "
                         f"(shape {checks.show(k)}); they must be equal")  # fmt: skip
    checks.head_counts(q.shape[2], k.shape[2], v.shape[2])
    checks.head_dims(q, k, v)


def cache_shapes(q, k_cache, v_cache, k, v, block_table) -> None:
    for name, x, accepted in (
        ("q", q, "[B, Sq, heads, D]"),
        ("k_cache", k_cache, "[B, Smax, kv_heads, D] or [blocks, block_size, kv_heads, D]"),
        ("v_cache", v_cache, "[B, Smax, kv_heads, Dv] or [blocks, block_size, kv_heads, Dv]"),
    ):
        if checks.tensor(name, x).dim() != 4:
            raise ValueError(f"{name} has shape {checks.show(x)}; accepted is {accepted}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"v_cache has shape {checks.show(v_cache)} and k_cache {checks.show(k_cache)}; all but "
            "the last sizes must be equal"
        )
    checks.head_counts(q.shape[2], k_cache.shape[2], v_cache.shape[2])
    checks.head_dims(q, k_cache, v_cache)
    if block_table is not None:
        _ranked("block_table", block_table, "[B, max_blocks]")
    if k is None or v is None:
        return
    new = _ranked("k", k, "[B, Snew, kv_heads, D]").shape[1]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = [q.shape[0], new, *cache.shape[2:]]
        if list(checks.tensor(name, x).shape) != wanted:
            raise ValueError(f"{name} has shape {checks.show(x)}; accepted is [B, Snew, kv_heads, "
                             f"head_dim] = {wanted}, with one Snew for k and v")  # fmt: skip


def max_length(name, x) -> int:
    """max_seqlen_q or max_seqlen_k as an int; transformers passes tensors of one integer."""
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_floating_point():
        x = int(x)
    return checks.length(name, x)


def pair(window_size):
    """window_size as a pair of numbers; programs also pass tensors and arrays of two integers."""
    if isinstance(window_size, (tuple, list)):
        return tuple(_plain(side) for side in window_size)
    return _plain(window_size)


def _plain(x):
    """The numbers of a tensor or an array; anything else unchanged."""
    return x.tolist() if hasattr(x, "tolist") else x


def undifferentiable(function):
    """Wraps a function that raises for inputs that require grad. The wrapper accepts them and
    raises only in the backward pass."""

    def call(q, k, v, *args, **options):
        wanted = [x for x in (q, k, v) if isinstance(x, Tensor) and x.requires_grad]
        if not wanted or not torch.is_grad_enabled():
            return function(q, k, v, *args, **options)
        with torch.no_grad():
            results = function(q, k, v, *args, **options)
        if isinstance(results, Tensor):
            return _NoGradient.apply(results, *wanted)
        return tuple(_NoGradient.apply(x, *wanted) for x in results)

    return call


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(x, *inputs):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "flash_attn_varlen_func with block_table has no gradient; gather the blocks into k and "
            "v [Tk, kv_heads, D], or detach the inputs"
        )

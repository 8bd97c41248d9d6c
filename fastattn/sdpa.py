"""scaled_dot_product_attention() with torch's signature and semantics. override.py makes programs
that call torch's function use it. Next hop: backends/registry.py.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from . import habits
from .backends import registry
from .core import checks, tensors
from .core.call import Call
from .core.spec import NO_OPERANDS, Operands, Spec
from .forms import autocast
from .functional import run

_NAME = "scaled_dot_product_attention"
_PLAIN = {Tensor, torch.nn.Parameter}
_PLANS: dict = {}  # (spec, backend) of 4-D calls without mask and dropout
_MAX_PLANS = 4096
is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing


@habits.unscriptable
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, computed by fastattn.

    Args:
        query: (N, ..., Hq, L, E); leading dimensions broadcast, ranks may differ, at least 2.
        key: (N, ..., H, S, E).
        value: (N, ..., H, S, Ev).
        attn_mask: broadcastable to (N, ..., Hq, L, S): bool (True = attend), or float32 or query's
            dtype, added to the scores and differentiable. torch.nn.attention.bias works too.
        dropout_p: probability in [0, 1] of dropping an attention weight, in training and evaluation
            alike.
        is_causal: row i sees keys 0 to i (aligned top-left), also where L != S.
        scale: None is 1 / sqrt(E).
        enable_gqa: allows H < Hq; the heads of key and of value must each divide query's.

    Returns:
        (N, ..., Hq, L, Ev) in query's dtype and, where Ev = E and query is dense, memory order.

    It differs from torch where torch is wrong or raises: is_causal together with attn_mask applies
    both; a mask may have one dimension or none; a row that sees no key gives 0 with every backend;
    NaN always propagates; value must be as long as key; a NaN or infinite scale raises; and every
    derivative exists (double backward, torch.func). Jagged NestedTensors of 4 dimensions without a
    mask are computed by varlen_attention(), other NestedTensors by torch.

    Raises:
        RuntimeError for shapes, dtypes and devices, TypeError for types, as torch does.
    """
    if torch._C._is_any_autocast_enabled() and isinstance(query, Tensor) and not query.is_nested:
        query, key, value = autocast(query, key, value)
    plan_key = None
    if (
        attn_mask is None
        and type(dropout_p) in (float, int)
        and dropout_p == 0
        and type(query) in _PLAIN
        and type(key) in _PLAIN
        and type(value) in _PLAIN
        and not is_compiling()
        and not _is_tracing()
    ):
        try:
            plan_key = (
                query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
                query.device, key.device, value.device, dropout_p, is_causal, scale, enable_gqa,
                type(is_causal), type(enable_gqa), registry.forced(),
            )  # fmt: skip
            plan = _PLANS.get(plan_key)
        except (TypeError, RuntimeError):  # an argument that the checks below reject
            plan_key = plan = None
        if plan is not None:
            spec, backend = plan
            return run(Call(query, key, value, spec, NO_OPERANDS), backend).out
    return _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, plan_key)


def _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, plan_key):
    _check_types(query, key, value, attn_mask, is_causal, enable_gqa)
    dropout_p = _number("dropout_p", dropout_p)
    if query.is_nested or key.is_nested or value.is_nested:
        return _nested(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    align_end = False
    if attn_mask is not None and type(attn_mask) not in _PLAIN:
        attn_mask, is_causal, align_end = _causal_bias(attn_mask, is_causal, query, key)
    _check_kinds(query, key, value, attn_mask, dropout_p)
    if query.dtype not in checks.DTYPES:  # torch computes it, or raises its own error
        torchs = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
        return torchs.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead, heads, kv_heads = _broadcast(query, key, value, enable_gqa)
    shape = (*lead, heads, query.shape[-2], value.shape[-1])
    if max(query.dim(), key.dim(), value.dim()) == 2:
        shape = shape[1:]
    if dropout_p == 1 or not (query.numel() and key.numel() and value.numel()):
        return _zeros(shape, query, key, value, attn_mask)
    spec = Spec(
        scale=_scale(scale, query.shape[-1]),
        right=0 if is_causal else -1,
        align_end=align_end,
        dropout_p=float(dropout_p),
    )
    q4 = _four(query, lead, heads)
    k4 = _four(key, lead, kv_heads, repeat=enable_gqa)
    v4 = _four(value, lead, kv_heads, repeat=enable_gqa)
    checks.sizes(q4.shape[0] * heads, query.shape[-2], key.shape[-2])
    operands = NO_OPERANDS
    if attn_mask is not None or spec.dropout_p:
        full = (*lead, heads, query.shape[-2], key.shape[-2])
        mask = None if attn_mask is None else _four_mask(attn_mask, full, len(shape))
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        operands = Operands(
            mask=mask if boolean else None,
            bias=None if boolean else mask,
            dropout_seed=checks.dropout_key(None, query.device) if spec.dropout_p else None,
        )
    call = Call(q4, k4, v4, spec, operands)
    backend = registry.pick(None, call)
    if plan_key is not None and q4 is query and k4 is key and v4 is value:
        if len(_PLANS) >= _MAX_PLANS:
            _PLANS.clear()
        _PLANS[plan_key] = (spec, backend)
    out = run(call, backend).out
    return out if out.shape == shape else out.reshape(shape)


# ---- checks, with torch's error classes ---------------------------------------------------------


def _check_types(query, key, value, attn_mask, is_causal, enable_gqa) -> None:
    arguments = [("query", query), ("key", key), ("value", value)]
    if attn_mask is not None:
        arguments.append(("attn_mask", attn_mask))
    for n, (name, x) in enumerate(arguments, 1):
        if not isinstance(x, Tensor):
            raise TypeError(f"{_NAME}(): argument '{name}' (position {n}) must be Tensor, not "
                            f"{type(x).__name__}")  # fmt: skip
    for name, x in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(x, bool):
            raise TypeError(f"{_NAME}(): argument '{name}' must be bool, not {type(x).__name__}")


def _check_kinds(query, key, value, attn_mask, dropout_p) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    if not query.device == key.device == value.device:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got query.device: "
            f"{query.device} key.device: {key.device} and value.device: {value.device} instead."
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be at least 2 dimensional, but got query.dim: "
            f"{query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise RuntimeError(
                "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
                f"attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead."
            )
        if attn_mask.device != query.device:
            raise RuntimeError(
                "Expected attn_mask and query to be on the same device, but got attn_mask.device: "
                f"{attn_mask.device} and query.device: {query.device} instead."
            )
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")


def _number(name, x) -> float:
    """x as a float; like torch, accepts ints, numpy's numbers and 0-dimensional tensors."""
    try:
        if not isinstance(x, (str, Tensor)) or (isinstance(x, Tensor) and x.dim() == 0):
            return float(x)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"{_NAME}(): argument '{name}' must be float, not {type(x).__name__}")


def _scale(scale, head_dim) -> float:
    if scale is None:
        return checks.default_scale(head_dim)
    return checks.scale_of(_number("scale", scale))


# ---- broadcasting: everything becomes [batch, heads, length, channels] --------------------------


def _broadcast(query, key, value, enable_gqa):
    """(leading sizes, query heads, key-value heads) after broadcasting."""
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise IndexError(
            "enable_gqa needs a dimension of heads (the third from last), but got query.dim: "
            f"{query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()}"
        )
    hq, hk, hv = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    if enable_gqa:
        if not hk or not hv or hq % hk or hq % hv:
            raise RuntimeError(
                "Number of heads in key and value must divide the number of heads in query, but "
                f"got {hk} (key), {hv} (value) and {hq} (query)"
            )
        heads, kv_heads = hq, math.lcm(hk, hv)
    else:
        heads = _common("heads", query, key, value, hq, hk, hv)
        kv_heads = 1 if hk == hv == 1 else heads
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            "Expected query and key to have the same last size, but got query.shape: "
            f"{list(query.shape)} and key.shape: {list(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "Expected key and value to have the same length (second last size), but got key.shape: "
            f"{list(key.shape)} and value.shape: {list(value.shape)}"
        )
    leads = [x.shape[:-3] for x in (query, key, value)]
    rank = max(map(len, leads))
    leads = [(1,) * (rank - len(lead)) + tuple(lead) for lead in leads]
    lead = tuple(_common("leading sizes", query, key, value, *sizes) for sizes in zip(*leads))
    return lead, heads, kv_heads


def _common(what, query, key, value, *sizes) -> int:
    """The size to which all broadcast."""
    common = next((n for n in sizes if n != 1), 1)
    if any(n not in (1, common) for n in sizes):
        raise RuntimeError(
            f"Expected query, key and value to have {what} that broadcast, but got query.shape: "
            f"{list(query.shape)} key.shape: {list(key.shape)} and value.shape: {list(value.shape)}"
        )
    return common


def _four(x, lead, heads, repeat=False):
    """x as [batch, heads, length, channels]; a view where strides can describe it, else a copy."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    if x.shape[-3] != heads:
        if repeat and x.shape[-3] > 1:
            x = x.repeat_interleave(heads // x.shape[-3], dim=-3)
        else:
            x = x.expand(*x.shape[:-3], heads, *x.shape[-2:])
    if x.shape[:-3] != lead:
        x = x.expand(*lead, *x.shape[-3:])
    if len(lead) == 1:
        return x
    return x.unsqueeze(0) if not lead else x.flatten(0, -4)


def _four_mask(mask, full, rank):
    """attn_mask as [batch, heads, rows, keys], each size 1 or full, where rows are queries."""
    shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if mask.dim() > rank or any(n not in (1, m) for n, m in zip(shape, full)):
        raise RuntimeError(
            f"Expected attn_mask to broadcast to {list(full[-rank:])} (..., query heads, rows, "
            f"keys), but got attn_mask.shape: {list(mask.shape)}"
        )
    mask = mask.reshape(shape)  # only inserts sizes of 1
    lead, rest = shape[:-3], shape[-3:]
    if all(n == 1 for n in lead):
        return mask.reshape(1, *rest)
    return mask.expand(*full[:-3], *rest).flatten(0, -4)


def _zeros(shape, query, *others):
    """Zeros that depend on every input in autograd, with zero gradients."""
    zero = sum(x[..., :0].sum() for x in (query, *others) if x is not None and x.requires_grad)
    return query.new_zeros(shape) + zero


# ---- Tensor subclasses --------------------------------------------------------------------------


def _causal_bias(mask, is_causal, query, key):
    """(mask, is_causal, align_end) for a torch.nn.attention.bias.CausalBias; any other mask is
    returned unchanged."""
    module = sys.modules.get("torch.nn.attention.bias")
    if module is None or not isinstance(mask, module.CausalBias):
        return mask, is_causal, False
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    lower_right = mask.variant == module.CausalVariant.LOWER_RIGHT
    if lower_right and (mask.seq_len_q, mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise RuntimeError(
            f"Expected a CausalBias for {query.shape[-2]} rows and {key.shape[-2]} keys, but got "
            f"one for {mask.seq_len_q} and {mask.seq_len_kv}"
        )
    return None, True, lower_right


def _nested(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Jagged (B, H, ragged, D) by varlen_attention(), any other NestedTensor by torch."""

    def packable(x):
        return (
            x.layout == torch.jagged and x.dim() == 4 and x._ragged_idx == 2 and x._lengths is None
        )

    same_heads = query.size(-3) == key.size(-3) == value.size(-3) if query.dim() == 4 else False
    if (
        attn_mask is not None
        or not all(x.is_nested and packable(x) for x in (query, key, value))
        or not (same_heads or enable_gqa)
        or key.size(1) != value.size(1)
        or query.dtype not in checks.DTYPES
        or dropout_p == 1
    ):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    from .functional import varlen_attention

    dtype = tensors.autocast_dtype(query)
    if dtype is not None:
        query, key, value = (tensors.autocast_to(x, dtype) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, ragged, H, D]
    nested: tuple[Any, ...] = (query, key, value)
    cu_q, cu_k, cu_v = (x.offsets() for x in nested)
    if cu_k is not cu_v and not torch.equal(cu_k, cu_v):
        raise RuntimeError("Expected nested key and value to have the same lengths")
    longest = [int(cu.diff().max()) if cu.numel() > 1 else 0 for cu in (cu_q, cu_k)]
    out = varlen_attention(
        query.values(), key.values(), value.values(), cu_q.int(), cu_k.int(), *longest,
        scale=None if scale is None else float(scale), causal=is_causal, align="start",
        dropout_p=dropout_p,
    )  # fmt: skip
    return torch.nested.nested_tensor_from_jagged(out, offsets=cu_q).transpose(1, 2)

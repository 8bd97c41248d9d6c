"""FP8 and INT8 tensors and their scales (spec.Descales): value = stored number * scale. Triton's
kernels read both, and the CUDA kernels read FP8 q, k and v; for the other backends the tensors are
dequantized here, and nowhere else. Next hop: back to backends/registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import checks
from .call import Call, Result
from .spec import Descales

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
RANGES = {INT8: (-128.0, 127.0), E4M3: (-448.0, 448.0)}


def check(name: str, x: Tensor | None, batch: int | None, kv_heads: int, device) -> None:
    """Raises for a scale that is not fp32 [kv_heads] or, with batch, [batch, kv_heads]."""
    if x is None:
        return
    checks.on_device(name, x, device)
    if x.dtype != torch.float32:
        raise TypeError(f"{name} is {x.dtype}; accepted is torch.float32")
    shapes: dict[str, tuple[int, ...]] = {"[kv_heads]": (kv_heads,)}
    if batch is not None:
        shapes["[B, kv_heads]"] = (batch, kv_heads)
    if tuple(x.shape) not in shapes.values():
        accepted = " and ".join(f"{meaning} = {list(shape)}" for meaning, shape in shapes.items())
        raise ValueError(f"{name} has shape {checks.show(x)}; accepted: {accepted}")


def quantize(x: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, kv_heads, S, *] / descale [B or 1, kv_heads] as int8 or float8_e4m3fn: rounded to
    nearest, ties to even, and clamped to the dtype's range."""
    x = (x.float() / descale[..., None, None]).clamp(*RANGES[dtype])
    return (x.round() if dtype == INT8 else x).to(dtype)


def widen(x: Tensor, descale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [B, kv_heads, S, *] times its scale in `dtype`: an fp32 product, rounded once."""
    if descale is None:
        return x.to(dtype)
    return (x.float() * descale[..., None, None]).to(dtype)


def widened(forward: Callable[[Call], Result], call: Call) -> Result:
    """The result of a call with 8-bit tensors by the `forward` of a backend that reads none.

    Of a cache, only the slots that some sequence uses are read.
    """
    wide, out_dtype = dequantized(call)
    out, lse = forward(wide)
    return Result(out.to(out_dtype), lse)


def dequantized(call: Call, used: bool = True) -> tuple[Call, torch.dtype]:
    """(The call with k and v in q's dtype, or all three in fp32 where q is FP8; the dtype of out,
    which is then bfloat16).

    Args:
        used: leave away the slots of a cache past every sequence's keys.
    """
    descales, q = call.operands.descales or Descales(), call.q
    call = _without_pages(call.but(operands=replace(call.operands, descales=None)), used)
    dtype = torch.float32 if q.dtype == E4M3 else q.dtype
    out_dtype = torch.bfloat16 if q.dtype == E4M3 else q.dtype
    if q.dtype == E4M3:
        own = descales.q
        if own is not None:  # one for each query head
            own = own.repeat_interleave(q.shape[1] // max(1, call.k.shape[1]), -1)
        q = widen(q, own, dtype)
    k, v = widen(call.k, descales.k, dtype), widen(call.v, descales.v, dtype)
    return call.but(q=q, k=k, v=v), out_dtype


def _without_pages(call: Call, used: bool) -> Call:
    """The call without pages; with `used`, also without the slots past every sequence's keys."""
    k, v, operands = call.k, call.v, call.operands
    if operands.kv_lens is None or operands.document_ids is not None:
        return call
    table, size = operands.page_table, k.shape[2]
    slots = size if table is None else size * table.shape[1]
    if used and checks.has_values(operands.kv_lens):
        slots = max(operands.kv_lens.tolist(), default=0)
    if table is not None:
        pages = table[:, : -(-slots // size)].long().clamp(0, k.shape[0] - 1)  # [B, pages]
        # Indexed as bytes, because not every device can index FP8; [B, kv_heads, pages * size, *].
        k, v = (x.view(INT8)[pages].view(x.dtype).transpose(1, 2).flatten(2, 3) for x in (k, v))
    mask, bias = (
        x if x is None or x.shape[3] == 1 else x[..., :slots]
        for x in (operands.mask, operands.bias)
    )
    k, v = k[:, :, :slots], v[:, :, :slots]
    operands = replace(operands, mask=mask, bias=bias, page_table=None)
    return call.but(k=k, v=v, operands=operands)

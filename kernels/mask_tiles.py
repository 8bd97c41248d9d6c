"""Finds the tiles of a bool mask that hold a True; kernels skip the others. Next: forward.py."""

import torch
import triton
import triton.language as tl

from .params import TileList
from .score import operand_at


@triton.jit
def any_kernel(mask, any_of, heads, q_len, kv_len, q_tiles, kv_tiles, BLOCK_Q: tl.constexpr,
               BLOCK_KV: tl.constexpr):  # fmt: skip
    """Sets any_of [batch, heads, q_tiles, kv_tiles]. Programs: tiles."""
    program = tl.program_id(0)
    column, rest = program % kv_tiles, program // kv_tiles
    row, rest = rest % q_tiles, rest // q_tiles
    i, j = row * BLOCK_Q + tl.arange(0, BLOCK_Q), column * BLOCK_KV + tl.arange(0, BLOCK_KV)
    at = operand_at(mask, rest // heads, rest % heads, i[:, None], j)
    here = tl.load(at, mask=(i < q_len)[:, None] & (j < kv_len), other=0)
    tl.store(any_of + program, tl.max(tl.max((here != 0).to(tl.int32), 1), 0))


def tile_lists(mask, tensor4, q_len, kv_len, block_q, block_kv, transposed=False) -> TileList:
    """For each row tile, the key tiles in which mask [batch, heads, rows, keys] holds a True; with
    transposed, for each key tile the row tiles. Each dimension of mask is full or 1 (broadcast).

    Lists cover q_len rows and kv_len keys. Tiles that see the same part of the mask share a list.
    """
    batch, heads, rows, keys = mask.shape
    q_len = max(q_len, rows) if transposed else rows
    kv_len = keys if transposed else max(kv_len, keys)
    q_tiles, kv_tiles = triton.cdiv(q_len, block_q), triton.cdiv(kv_len, block_kv)
    some = torch.empty(batch, heads, q_tiles, kv_tiles, dtype=torch.int32, device=mask.device)
    if some.numel():
        any_kernel[(some.numel(),)](
            tensor4, some, heads, q_len, kv_len, q_tiles, kv_tiles, block_q, block_kv
        )
    some = some.mT.contiguous() if transposed else some
    tiles, others = some.shape[2:]
    rank = torch.zeros(batch, heads, tiles, others + 1, dtype=torch.int32, device=mask.device)
    rank[..., 1:] = torch.cumsum(some, -1)
    order = torch.argsort(some, dim=-1, descending=True, stable=True).to(torch.int32)
    shared = (keys if transposed else rows) == 1
    return TileList(
        rank,
        order,
        heads * tiles if batch > 1 else 0,
        tiles if heads > 1 else 0,
        0 if shared else 1,
        others,
    )

"""Launches the second pass, which makes statistics of the probabilities from lse: flash_attn_maps.
Next: column_mass.py.

Only the column mass has a kernel of its own. A pooled map is attention whose values are the unit
vectors of the bins of keys, and the largest probabilities of each row are those of plain torch, a
chunk of rows at a time.
"""

from __future__ import annotations

import torch
import triton

from ..core import probabilities
from ..core.call import Call
from ..core.spec import Operands, Spec, split_arguments
from ..core.statistics import Maps
from ..core.tensors import unit_stride
from . import config as configs
from . import tune
from .column_mass import mass_kernel
from .config import Config
from .host_params import make_params, rows4, with_rows_of_keys
from .launch import Outputs, blocks_of, run_forward, sizes_of, tile_list
from .params import constants

DTYPES = Maps(torch.float32, torch.float32, torch.int64, torch.float32)


def maps(lse, q, k, v, *rest, config: Config | None = None, device=None) -> Maps:
    """flash_attn_maps. rest is the operands, the numbers, need_col_mass, topk and pooled."""
    tensors, (scale, softcap, *band, _), (need_col_mass, topk, pooled) = split_arguments(rest)
    spec = Spec(scale, softcap, *band)  # P is before dropout
    call = Call(*map(unit_stride, (q, k, k)), spec, Operands(*tensors))
    found = Maps(*(lse.new_empty(0, dtype=dtype) for dtype in DTYPES))
    pooled_in_torch = pooled if call.operands.varlen or call.operands.paged else 0
    if topk or pooled_in_torch:
        found = probabilities.maps(call, lse, False, topk, pooled_in_torch)
    if need_col_mass:
        found = found._replace(col_mass=column_mass(call, lse, config, device))
    if pooled and not pooled_in_torch:
        found = found._replace(pooled=pooled_map(call, lse, pooled, config, device))
    return found


def column_mass(call: Call, lse, config: Config | None = None, device=None) -> torch.Tensor:
    """P summed over rows: fp32 [B, heads, keys]. Keys of packed calls are those in memory, keys of
    paged calls the slots of a row of the table."""
    q, k, x = call.q, call.k, call.operands
    if x.varlen and x.paged:
        raise NotImplementedError("fastattn: the column mass of packed sequences came with "
                                  "page_table; accepted are packed keys or pages")  # fmt: skip
    p = make_params(q, k, k, q, lse, x, call.spec)
    p = p._replace(ranges=with_rows_of_keys(x, p))
    mass = q.new_zeros(*q.shape[:2], p.lengths.kv_len, dtype=torch.float32)
    if not (mass.numel() and q.numel()):
        return mass
    head_dim = q.shape[3]
    device = device or configs.device_of(q)

    def run(config: Config) -> None:
        if x.varlen:
            tiles = p.lengths.kv_len // config.block_kv + p.lengths.sequences
        else:
            tiles = triton.cdiv(p.lengths.kv_len, config.block_kv) * p.lengths.sequences
        visible = tile_list(x, p, config, transposed=True)
        mass_kernel[(tiles * p.heads,)](
            p, rows4(mass), visible, constants(**sizes_of(q, k), **blocks_of(config)),
            num_warps=config.warps,
        )  # fmt: skip

    default = configs.find(configs.BACKWARD_KEYS, device, q.element_size(), head_dim)
    with torch.cuda.device_of(q):
        run(config or tune.choose("column_mass", q.dtype, (head_dim,), default, run))
    return mass


def pooled_map(call: Call, lse, n: int, config: Config | None = None, device=None) -> torch.Tensor:
    """P summed over each bin of keys and averaged over each bin of rows: fp32 [B, heads, n, n]."""
    q, k = call.q, call.k
    down, across = (probabilities.bins(x.shape[2], n, q.device) for x in (q, k))
    down, across = (torch.nn.functional.one_hot(x, n) for x in (down, across))
    out = q.new_zeros(*q.shape[:3], n, dtype=torch.float32)  # [B, heads, rows, n]
    own_lse = torch.empty_like(lse)  # lse may be of more keys than these
    call = call.but(v=across.to(q.dtype).expand(*k.shape[:2], -1, -1))
    run_forward(call, Outputs(out, own_lse, {}), config, device)
    share = torch.where(own_lse == -torch.inf, 0.0, own_lse - lse).exp()
    return (down / down.sum(0)).mT.to(out.dtype) @ (out * share[..., None])

"""Launches forward mode: flash_attn_jvp. Next: jvp.py.

No value is read on the device, as in launch.py.
"""

from __future__ import annotations

import torch
import triton

from ..core.call import Call
from ..core.spec import LEAVES, Operands, Spec, split_arguments
from ..core.tensors import unit_stride
from . import config as configs
from . import tune
from .config import Config
from .host_params import heads4, make_params, operand4, rows4
from .jvp import Tangents, jvp_kernel
from .launch import blocks_of, new_results, row_tiles, sizes_of, tile_list
from .params import Tensor4, constants


def jvp(q, k, v, *rest, config: Config | None = None, device=None):
    """flash_attn_jvp: (out, lse, tout, tlse). rest is the operands, the numbers and the tangents of
    q, k, v, bias and sinks, each of which may be None."""
    tensors, numbers, tangents = split_arguments(rest)
    call = Call(*(unit_stride(x) for x in (q, k, v)), Spec(*numbers), Operands(*tensors))
    tangents = _checked(tangents, (q, k, v, *call.operands.leaves()))
    out, lse = new_results(call.q, call.v, call.operands.varlen)
    make = torch.zeros_like if call.operands.varlen else torch.empty_like
    tout, tlse = make(out), make(lse)
    if lse.numel() and out.numel():
        with torch.cuda.device_of(q):
            _jvp(call, (out, lse), (tout, tlse), tangents, config, device)
    return out, lse, tout, tlse


def _checked(tangents, primals) -> list[torch.Tensor | None]:
    """The tangents, those of q, k and v with unit last strides."""
    checked: list[torch.Tensor | None] = []
    for name, x, t in zip(("q", "k", "v", *LEAVES), primals, tangents):
        if t is not None and (x is None or t.shape != x.shape):
            got = "None" if x is None else list(x.shape)
            raise RuntimeError(f"fastattn: t{name} has shape {list(t.shape)} and {name} {got}; a "
                               f"tangent has its primal's shape")  # fmt: skip
        if t is not None and name not in LEAVES:
            if t.dtype != x.dtype:
                raise RuntimeError(f"fastattn: t{name} is {t.dtype} and {name} {x.dtype}; a "
                                   "tangent of q, k or v has its primal's dtype")  # fmt: skip
            t = unit_stride(t)
        checked.append(t)
    return checked


def _jvp(call: Call, results, result_tangents, tangents, config, device) -> None:
    """Fills results, (out, lse), and their tangents."""
    q, v, operands = call.q, call.v, call.operands
    batch, heads, _, head_dim = q.shape
    v_dim = v.shape[3]
    device = device or configs.device_of(q)
    p = make_params(q, call.k, v, *results, operands, call.spec)
    tq, tk, tv, tbias, tsinks = tangents
    t = Tangents(
        *(Tensor4() if x is None else rows4(x) for x in (tq, tk, tv)),
        operand4(tbias),
        heads4(tsinks),
        *map(rows4, result_tangents),
        None if tq is tk is tbias is None else 1,
    )

    def run(config: Config) -> None:
        tiles = row_tiles(p, 1, config.block_q)
        visible = tile_list(operands, p, config)
        sizes = sizes_of(q, v)
        sizes["BLOCK_DV"] = min(sizes["BLOCK_DV"], configs.CHUNK_D)
        programs = tiles * triton.cdiv(v_dim, sizes["BLOCK_DV"]) * heads
        compiled_for = constants(**sizes, **blocks_of(config))
        jvp_kernel[(programs * (1 if operands.varlen else batch),)](
            p, t, visible, tiles, compiled_for, num_warps=config.warps
        )

    default = configs.find(configs.JVP, device, q.element_size(), head_dim, v_dim)
    run(config or tune.choose("jvp", q.dtype, (head_dim, v_dim), default, run))

"""From an operator's arguments to kernel launches; backends/operators.py calls forward() and
backward(). Next: host_params.py, which makes the Params; then forward.py.

No value is read on the device: a call never waits for the GPU and can be captured in a CUDA graph.
Arguments are in the normal form of backends/schema.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.call import Call
from ..core.quantization import E4M3
from ..core.spec import Descales, Operands, Spec, split_arguments
from ..core.tensors import is_dense, unit_stride
from . import config as configs
from . import tune
from .backward import Gradients, delta_kernel, rows_kernel
from .backward_bias import bias_kernel
from .backward_keys import keys_kernel
from .combine import combine_kernel
from .config import Config, Device
from .forward import forward_kernel
from .host_params import make_params, operand4, rows4, with_rows_of_keys
from .mask_tiles import tile_lists
from .params import Params, Statistics, Tensor4, TileList, constants

MAX_SPLITS = 128
MIN_SPLIT_KEYS = 256  # a split of fewer keys costs more than it saves
LOG_ZERO = -200.0  # exp() of it is 0 in fp32


# ---- what both passes share ---------------------------------------------------------------------


def _readable(x: torch.Tensor, device: Device) -> torch.Tensor:
    """x, viewed as bytes where it is float8_e4m3fn and the GPU has no such type."""
    return x.view(torch.uint8) if x.dtype == E4M3 and not device.fp8 else x


def precision(q: torch.Tensor) -> str:
    """The input precision of fp32 products, from torch's own flag."""
    tf32 = q.is_cuda and q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def row_tiles(p: Params, group: int, block: int) -> int:
    """Tiles of query rows of one sequence; in varlen calls an upper bound for all of them."""
    if p.lengths.cu_q is None:
        return triton.cdiv(p.lengths.q_len * group, block)
    return p.lengths.q_len * group // block + p.lengths.sequences


def sizes_of(q, v) -> dict:
    dims = {"D": q.shape[3], "DV": v.shape[3]}
    blocks = {f"BLOCK_{name}": configs.block_of(size) for name, size in dims.items()}
    if q.dtype == E4M3:
        blocks["BLOCK_D"] = max(32, blocks["BLOCK_D"])  # the least that an fp8 product sums over
    return dims | blocks | {"PRECISION": precision(q)}


def blocks_of(config: Config) -> dict:
    return {"BLOCK_Q": config.block_q, "BLOCK_KV": config.block_kv, "STAGES": config.stages}


def tile_list(operands, p: Params, config: Config, transposed: bool = False) -> TileList:
    if operands.mask is None:
        return TileList()
    lengths = (p.lengths.q_len, p.lengths.kv_len)
    return tile_lists(operands.mask, p.mask, *lengths, config.block_q, config.block_kv, transposed)


def _descriptors(p: Params, tensors, config: Config, length: int, blocks):
    """Tensor descriptors for tiles [length, block] of two tensors, or (None, None). The Config
    has to ask for them, strides have to be multiples of 16 bytes, and a tile has to hold the whole
    head dimension. Lengths, varlen and pages exclude them: a descriptor would load what does not
    exist."""
    x = p.lengths
    absent = (x.kv_lens, x.kv_starts, x.cu_k, x.doc_begin, p.pages.table)
    if not config.tma or any(one is not None for one in absent):
        return None, None
    for t, block in zip(tensors, blocks):
        size = t.element_size()
        if t.shape[3] > block or t.data_ptr() % 16 or any(n * size % 16 for n in t.stride()[:3]):
            return None, None
    return tuple(
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, length, block])
        for t, block in zip(tensors, blocks)
    )


# ---- forward ------------------------------------------------------------------------------------


def new_results(q, v, varlen: bool):
    """out and lse with the shapes and strides of the fake kernel. In varlen calls rows that no
    sequence has get 0 and -inf here, because no program writes them."""
    same = q.shape[3] == v.shape[3] and is_dense(q)
    dtype = torch.bfloat16 if q.dtype == E4M3 else q.dtype
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_like(q, dtype=dtype) if same else q.new_empty(shape, dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return (out.zero_(), lse.fill_(-math.inf)) if varlen else (out, lse)


def forward(q, k, v, *rest, config: Config | None = None, device=None):
    """flash_attn_fwd: (out, lse). rest is the operands, the numbers, num_splits and, in the Triton
    operator, three descales. config replaces the table's Config, and device that of q."""
    tensors, numbers, (num_splits, *descales) = split_arguments(rest)
    operands, spec = Operands(*tensors, Descales(*descales)), Spec(*numbers)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out, lse = new_results(q, v, operands.varlen)
    call = Call(q, k, v, spec, operands, num_splits)
    run_forward(call, Outputs(out, lse, {}), config, device)
    return out, lse


def forward_stats(q, k, v, *rest, config: Config | None = None, device=None):
    """flash_attn_fwd_stats: (out, lse, max_logit, entropy, argmax). rest is the operands, the
    numbers, num_splits, need_entropy and need_argmax."""
    tensors, numbers, (num_splits, *needs) = split_arguments(rest)
    operands, spec = Operands(*tensors), Spec(*numbers)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out, lse = new_results(q, v, operands.varlen)
    wanted = [name for name, need in zip(STATISTICS, (True, *needs)) if need]
    statistics = _new_statistics(lse, wanted)
    call = Call(q, k, v, spec, operands, num_splits)
    run_forward(call, Outputs(out, lse, statistics), config, device)
    empty = _new_statistics(lse.new_empty(0), STATISTICS)
    return out, lse, *(empty | statistics).values()


class Outputs(NamedTuple):
    """What the forward fills."""

    out: torch.Tensor
    lse: torch.Tensor
    statistics: dict[str, torch.Tensor]  # by name; of lse's shape


# What a statistic is where a row sees no key, and its dtype.
STATISTICS = {
    "max_logit": (-math.inf, torch.float32),
    "entropy": (0.0, torch.float32),
    "argmax": (-1, torch.int64),
}


def _new_statistics(like: torch.Tensor, names) -> dict[str, torch.Tensor]:
    """Tensors of like's shape for the named statistics. Rows that no sequence has keep their
    values, because no program writes them."""
    return {name: torch.full_like(like, STATISTICS[name][0], dtype=STATISTICS[name][1])
            for name in names}  # fmt: skip


def _statistics4(tensors: dict[str, torch.Tensor], tensor4) -> Statistics | None:
    """The kernels' Statistics; None without any."""
    return Statistics(**{name: tensor4(x) for name, x in tensors.items()}) if tensors else None


def _splits4(x: torch.Tensor) -> Tensor4:
    """x [splits, B, heads, q_len, ...]; col is the stride between splits."""
    return Tensor4(x, *x.stride()[1:4], x.stride(0))


def run_forward(call: Call, into: Outputs, config: Config | None, device) -> None:
    """Fills `into` with the results of a call whose tensors have unit last strides."""
    if into.lse.numel() and into.out.numel():
        with torch.cuda.device_of(call.q):
            _forward(call, into, config, device)


def _forward(call: Call, into: Outputs, config, device) -> None:
    q, k, v, operands, spec = call.q, call.k, call.v, call.operands, call.spec
    batch, heads, q_len, head_dim = q.shape
    v_dim = v.shape[3]
    block_dv = configs.block_of(v_dim)
    device = device or configs.device_of(q)
    itemsize = max(2, q.element_size())  # 8-bit tensors use the 16-bit table
    if config is None:
        table, kind = configs.FORWARD, "forward"
        if into.statistics:
            table, kind = configs.STATISTICS, "statistics"
        default = configs.find(table, device, itemsize, head_dim, v_dim)
        config = tune.choose(kind, q.dtype, (head_dim, v_dim), default,
                          lambda config: _forward(call, into, config, device))  # fmt: skip
    q, k, v = (_readable(x, device) for x in (q, k, v))
    p = make_params(q, k, v, into.out, into.lse, operands, spec)
    p = p._replace(statistics=_statistics4(into.statistics, rows4))

    # The q heads of a kv head share a tile (pack_gqa) where all their rows fit into one.
    group = heads // k.shape[1]
    if operands.varlen or q_len * group > config.block_q:
        group = 1
    tiles = row_tiles(p, group, config.block_q)
    programs = tiles * triton.cdiv(v_dim, block_dv) * (heads // group)
    programs *= 1 if operands.varlen else batch
    visible = tile_list(operands, p, config) if group == 1 else TileList()
    splits = call.num_splits or _splits(p, programs, device)
    splits = min(splits, MAX_SPLITS, max(1, p.lengths.kv_len))
    parts = p
    if splits > 1:
        split_out = q.new_empty(splits, *into.out.shape, dtype=torch.float32)
        split_lse = q.new_full((splits, *into.lse.shape), -math.inf, dtype=torch.float32)
        split_stats = _statistics4(_new_statistics(split_lse, into.statistics), _splits4)
        parts = p._replace(
            out=_splits4(split_out),
            lse=_splits4(split_lse),
            sinks=Tensor4(),
            statistics=split_stats,
        )
    sizes = sizes_of(q, v)
    tma = _descriptors(p, (k, v), config, config.block_kv, (sizes["BLOCK_D"], sizes["BLOCK_DV"]))
    compiled_for = constants(**sizes, **blocks_of(config), GROUP=group, SPLITS=splits)
    forward_kernel[(programs * splits,)](
        parts, visible, tiles, *tma, compiled_for, num_warps=config.warps
    )
    if splits > 1:
        rows, block = into.lse.numel(), 16
        combine_kernel[(triton.cdiv(rows, block) * triton.cdiv(v_dim, block_dv),)](
            p, split_out, split_lse, split_stats, rows, splits,
            DV=v_dim, BLOCK_Q=block, BLOCK_DV=block_dv,
        )  # fmt: skip


def _splits(p: Params, programs: int, device: Device) -> int:
    """How many splits of the keys to make: as many as fill the GPU once, 1 where the tiles do."""
    room = device.processors // programs
    return max(1, min(room, p.lengths.kv_len // MIN_SPLIT_KEYS))


# ---- backward -----------------------------------------------------------------------------------


def backward(dout, dlse, out, lse, q, k, v, *rest, config: Config | None = None, device=None):
    """flash_attn_bwd: (dq, dk, dv, dbias, dsinks), the last two fp32 and empty where not needed.
    rest is the operands, the numbers, need_dbias, need_dsinks and dentropy, the gradient of the
    rows' entropy, of which dlse has the part -dentropy * entropy; it may be None or absent."""
    tensors, numbers, (need_dbias, need_dsinks, *more) = split_arguments(rest)
    dentropy = more[0] if more else None
    operands, spec = Operands(*tensors), Spec(*numbers)
    if operands.paged:
        raise NotImplementedError("fastattn: page_table is given, and paged keys have no gradient")
    dout, out, q, k, v = (unit_stride(x) for x in (dout, out, q, k, v))
    make = torch.zeros_like if operands.varlen else torch.empty_like
    dq, dk, dv = (make(x) for x in (q, k, v))
    bias, sinks = operands.bias, operands.sinks
    dbias = q.new_zeros(bias.shape if need_dbias else (0,), dtype=torch.float32)
    dsinks = q.new_zeros(sinks.shape if need_dsinks else (0,), dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dsinks
    with torch.cuda.device_of(q):
        p = make_params(q, k, v, out, lse, operands, spec)
        delta, lse2 = (torch.empty(lse.shape, device=q.device) for _ in range(2))
        g = Gradients(
            *(rows4(dout), rows4(delta), rows4(lse2), rows4(dq), rows4(dk), rows4(dv)),
            *_bias_sums(p, q, dbias if need_dbias else None),
            torch.zeros(lse.shape[:2], dtype=torch.int32, device=q.device),
            None if dentropy is None else rows4(dentropy),
        )
        dlse4 = Tensor4() if dlse is None else rows4(dlse)
        _backward(q, k, v, dlse4, operands, p, g, config, device)
        _reduce_bias(g, dbias)
        if need_dsinks:
            log_probs = (sinks.float()[:, None] - lse).clamp(max=0)
            ds = delta if dentropy is None else delta + dentropy * log_probs.clamp(min=LOG_ZERO)
            dsinks = torch.where(lse == -math.inf, 0.0, -log_probs.exp() * ds).sum((0, 2))
    return dq, dk, dv, dbias, dsinks


def _backward(q, k, v, dlse, operands, p: Params, g: Gradients, config, device) -> None:
    batch, heads, q_len, head_dim = q.shape
    v_dim = v.shape[3]
    block_d, block_dv = configs.block_of(head_dim), configs.block_of(v_dim)
    device = device or configs.device_of(q)
    programs = batch * heads * triton.cdiv(q_len, 32)
    delta_kernel[(programs,)](
        p.out, g.dout, p.lse, dlse, g.delta.ptr, g.lse.ptr, g.large, q_len, heads,
        DV=v_dim, BLOCK_Q=32, BLOCK_DV=block_dv,
    )  # fmt: skip
    key = (device, q.element_size(), head_dim, v_dim)
    sequences = p.lengths.sequences
    grids = 1 if operands.varlen else sequences  # a varlen tile finds its own sequence
    sizes, blocks = sizes_of(q, v), (block_d, block_dv)

    def rows_pass(config: Config) -> None:
        tiles = row_tiles(p, 1, config.block_q)
        visible = tile_list(operands, p, config)
        tma = _descriptors(p, (k, v), config, config.block_kv, blocks)
        compiled_for = constants(**sizes, **blocks_of(config))
        shared = g.dbias.ptr is not None and g.dbias.ptr.shape[:2] != (sequences, heads)
        own = g._replace(dbias=Tensor4()) if shared else g  # bias_kernel writes a shared dbias
        rows_kernel[(tiles * triton.cdiv(head_dim, block_d) * grids * heads,)](
            p, own, visible, tiles, *tma, compiled_for, num_warps=config.warps
        )
        if shared:
            bias_batch, bias_heads, rows, columns = g.dbias.ptr.shape
            programs = triton.cdiv(rows, config.block_q) * triton.cdiv(columns, config.block_kv)
            bias_kernel[(programs * bias_batch * bias_heads,)](
                p, g, rows, columns, sequences // bias_batch, heads // bias_heads, compiled_for,
                num_warps=config.warps,
            )  # fmt: skip

    default = configs.find(configs.BACKWARD_ROWS, *key)
    rows_pass(config or tune.choose("rows", q.dtype, (head_dim, v_dim), default, rows_pass))

    of_keys = p._replace(ranges=with_rows_of_keys(operands, p))

    def keys_pass(config: Config) -> None:
        if operands.varlen:
            tiles = p.lengths.kv_len // config.block_kv + sequences
        else:
            tiles = triton.cdiv(p.lengths.kv_len, config.block_kv)
        visible = tile_list(operands, p, config, transposed=True)
        tma = _descriptors(p, (q, g.dout.ptr), config, config.block_q, blocks)
        chunks = max(triton.cdiv(head_dim, block_d), triton.cdiv(v_dim, block_dv))
        keys_kernel[(tiles * chunks * grids * p.kv_heads,)](
            of_keys,
            g,
            visible,
            chunks,
            *tma,
            constants(**sizes, **blocks_of(config)),
            num_warps=config.warps,
        )

    default = configs.find(configs.BACKWARD_KEYS, *key)
    keys_pass(config or tune.choose("keys", q.dtype, (head_dim, v_dim), default, keys_pass))


def _bias_sums(p: Params, q, dbias):
    """Gradients' dbias, bias_rows and bias_keys: one of them, chosen by how the bias broadcasts."""
    nothing = Tensor4()
    if dbias is None:
        return nothing, nothing, nothing
    _, _, rows, columns = dbias.shape
    if rows > 1 and columns > 1:
        return operand4(dbias), nothing, nothing
    long = columns if columns > 1 else max(rows, p.lengths.q_len)
    sums = q.new_zeros(p.lengths.sequences, p.heads, long, dtype=torch.float32)
    sums = rows4(sums)
    return (nothing, nothing, sums) if columns > 1 else (nothing, sums, nothing)


def _reduce_bias(g: Gradients, dbias) -> None:
    """Sets dbias from the sums over rows or keys, where the kernels made them."""
    for sums, dim in ((g.bias_rows.ptr, 3), (g.bias_keys.ptr, 2)):
        if sums is not None:
            sums = sums.unsqueeze(dim)
            shared = [n for n in range(4) if dbias.shape[n] == 1 and sums.shape[n] > 1]
            dbias.copy_(sums.sum(shared, keepdim=True) if shared else sums)

"""From an operator's arguments to kernel launches. Called by ops.py. Next: params.py, forward.py.

Nothing here looks at a value on the device: no call waits for the GPU, and all can be captured in a
CUDA graph. Arguments are in the normal form of ops.py.
"""

from __future__ import annotations

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.philox import FIRST_HEAD, TOTAL_HEADS, keep_probability, keep_threshold
from ..core.quantization import E4M3
from ..core.spec import Descales, Operands, Spec, split_arguments
from ..core.tensors import is_dense, unit_stride
from . import config, tune
from .backward import Gradients, delta_kernel, keys_kernel, rows_kernel
from .backward_bias import bias_kernel
from .combine import combine_kernel
from .forward import forward_kernel
from .mask_tiles import tile_lists
from .params import (
    Descale,
    Dropout,
    Lengths,
    Pages,
    Params,
    Ranges,
    Tensor4,
    TileList,
    constants,
)
from .score import LOG2E, MAX

MAX_PARTS = 128
MIN_PART_KEYS = 256  # a part of fewer keys costs more than it brings


# ---- params -------------------------------------------------------------------------------------


def _rows4(x: torch.Tensor) -> Tensor4:
    """[B, heads, rows, columns], the last of stride 1, or [B, heads, rows]."""
    return Tensor4(x, *x.stride()[:3], 0)


def _operand4(x: torch.Tensor | None) -> Tensor4:
    """A tensor that broadcasts to four dimensions."""
    if x is None:
        return Tensor4()
    strides = (0 if n == 1 else stride for n, stride in zip(x.shape, x.stride()))
    return Tensor4(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides)


def _heads4(x: torch.Tensor | None) -> Tensor4:
    """[heads] or [entries, heads]."""
    if x is None:
        return Tensor4()
    return Tensor4(x, x.stride(0) if x.dim() == 2 else 0, x.stride(-1))


def _lengths(q, k, x: Operands) -> Lengths:
    begin = end = None
    if x.document_ids is not None:
        ids = x.document_ids.contiguous()
        begin = torch.searchsorted(ids, ids, out_int32=True)
        end = torch.searchsorted(ids, ids, right=True, out_int32=True)
    vectors = (x.kv_lens, x.kv_starts, x.cu_seqlens_q, x.cu_seqlens_k)
    return Lengths(
        x.cu_seqlens_q.shape[0] - 1 if x.packed else q.shape[0],
        q.shape[2],
        k.shape[2] * (x.page_table.shape[1] if x.paged else 1),
        *(None if vector is None else vector.contiguous() for vector in vectors),
        begin,
        end,
    )


def _rows_of_keys(x: Operands, p: Params) -> Ranges:
    """p's ranges, with the transposed question's answers: the rows that see a key, which one search
    for each key gives, since neither end of a range ever decreases with the row."""
    if x.key_begin is None:
        return p.ranges
    j, entry = torch.arange(p.lengths.kv_len, device=x.key_begin.device), None
    if x.packed:  # keys as they lie in memory, of all sequences
        cu = x.cu_seqlens_k.long()
        entry = torch.searchsorted(cu, j, right=True).clamp(1, max(1, p.lengths.entries)) - 1
        j = j - cu[entry]
    first, last = (_search(end[..., 0], j, entry, p.lengths.q_len)
                   for end in (x.key_end, x.key_begin))  # fmt: skip
    return p.ranges._replace(first=first, last=last)


def _search(ends: torch.Tensor, j: torch.Tensor, entry, q_len: int) -> Tensor4:
    """How many rows of ends [entries or 1, heads or 1, rows or 1] are at most j [keys], as
    [entries or 1, heads or 1, keys]; of packed calls [1, heads or 1, keys], where key j[t] is of
    sequence entry[t]."""
    entries, heads, rows = ends.shape
    j = j.expand(entries if entry is None else 1, heads, -1)
    if entry is not None and entries > 1:  # all sequences in one search, far enough apart
        entry = entry.expand(1, heads, -1)
        apart = (1 << 31) * torch.arange(entries, device=ends.device)[:, None, None]
        ends = (ends.long().clamp(0, 1 << 30) + apart).transpose(0, 1).flatten(1)[None]
        found = torch.searchsorted(ends.contiguous(), j + (entry << 31), right=True) - entry * rows
    else:
        found = torch.searchsorted(ends.long().contiguous(), j.contiguous(), right=True)
    if rows == 1:  # one range for all rows: 0 or 1 found
        found = found * q_len
    return _operand4(found.int().unsqueeze(3))


def _dropout(seed, p: float) -> Dropout:
    if not p:
        return Dropout()
    if seed is None or seed.dtype != torch.int64 or len(seed) not in (FIRST_HEAD, TOTAL_HEADS + 1):
        raise RuntimeError("fastattn: dropout needs dropout_seed, int64 [2], seed and offset, or "
                           "[4], and then the first head and the number of all heads")  # fmt: skip
    part = 1 if len(seed) > FIRST_HEAD else None
    return Dropout(seed.contiguous(), part, keep_threshold(p), 1 / keep_probability(p))


def make_params(q, k, v, out, lse, x: Operands, spec: Spec) -> Params:
    capped, base2 = spec.softcap > 0, LOG2E.value
    table = None if x.page_table is None else x.page_table.contiguous()
    return Params(
        q=_rows4(q),
        k=_rows4(k),
        v=_rows4(v),
        out=_rows4(out),
        lse=_rows4(lse),
        mask=_operand4(x.mask),
        bias=_operand4(x.bias),
        slopes=_heads4(x.alibi_slopes),
        sinks=_heads4(x.sinks),
        lengths=_lengths(q, k, x),
        ranges=Ranges(_operand4(x.key_begin), _operand4(x.key_end)),
        pages=Pages() if table is None else Pages(table, table.stride(0), k.shape[2]),
        dropout=_dropout(x.dropout_seed, spec.dropout_p),
        descale=_descale(x.descales or Descales(), q.shape[0], k.shape[1]),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        scale=float(spec.scale),
        factor=_finite(spec.scale / spec.softcap) if capped else spec.scale * base2,
        cap=spec.softcap * base2 if capped else None,
        left=None if spec.left < 0 else spec.left,
        right=None if spec.right < 0 else spec.right,
        align_end=1 if spec.align_end else None,
    )


def _finite(x: float) -> float:
    """x as a kernel takes it, in float32: 0 times infinity would be NaN."""
    return max(-MAX.value, min(MAX.value, x))


def _descale(x: Descales, entries: int, kv_heads: int) -> Descale:
    given = [one for one in x if one is not None]
    if not given:
        return Descale()
    own = any(one.dim() == 2 for one in given)  # has each entry its own
    if own:
        x = (None if one is None else one.expand(entries, kv_heads) for one in x)
    x = [None if one is None else one.contiguous() for one in x]
    return Descale(*x, kv_heads if own else 0, 1)


def _readable(x: torch.Tensor, device: config.Device) -> torch.Tensor:
    """x; as bytes, where it is float8_e4m3fn and the GPU has no such numbers."""
    return x.view(torch.uint8) if x.dtype == E4M3 and not device.fp8 else x


def precision(q: torch.Tensor) -> str:
    """How fp32 products are made: as torch's own flag says."""
    tf32 = q.is_cuda and q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


# ---- forward ------------------------------------------------------------------------------------


def row_tiles(p: Params, lanes: int, block: int) -> int:
    """Tiles of rows of one entry; of all of them, at most, when packed."""
    if p.lengths.cu_q is None:
        return triton.cdiv(p.lengths.q_len * lanes, block)
    return p.lengths.q_len * lanes // block + p.lengths.entries


def new_results(q, v, packed: bool):
    """out and lse, as the fake kernel says; rows in no sequence are 0 and -inf."""
    same = q.shape[3] == v.shape[3] and is_dense(q)
    dtype = torch.bfloat16 if q.dtype == E4M3 else q.dtype
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_like(q, dtype=dtype) if same else q.new_empty(shape, dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return (out.zero_(), lse.fill_(-math.inf)) if packed else (out, lse)


def forward(q, k, v, *rest, row: config.Config | None = None, device=None):
    """flash_attn_fwd: (out, lse). rest is the operands, the numbers, num_splits and, or not, three
    descales; row stands in for the table's Config, device for q's (config.Device)."""
    tensors, numbers, (num_splits, *descales) = split_arguments(rest)
    operands, spec = Operands(*tensors, Descales(*descales)), Spec(*numbers)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out, lse = new_results(q, v, operands.packed)
    if lse.numel() == 0 or out.numel() == 0:
        return out, lse
    with torch.cuda.device_of(q):
        _forward(q, k, v, out, lse, operands, spec, num_splits, row, device)
    return out, lse


def _forward(q, k, v, out, lse, operands, spec, num_splits, row, device) -> None:
    batch, heads, q_len, head_dim = q.shape
    v_dim = v.shape[3]
    block_dv = config.block_of(v_dim)
    device = device or config.device_of(q)
    itemsize = max(2, q.element_size())  # 8-bit tiles are at most as large as the 16-bit ones
    if row is None:
        default = config.find(config.FORWARD, device, itemsize, head_dim, v_dim)
        arguments = (q, k, v, out, lse, operands, spec, num_splits)
        row = tune.choose("forward", q.dtype, (head_dim, v_dim), default,
                          lambda row: _forward(*arguments, row, device))  # fmt: skip
    q, k, v = (_readable(x, device) for x in (q, k, v))
    p = make_params(q, k, v, out, lse, operands, spec)

    # The q heads of a kv head share a tile where that does not make more of them.
    group = heads // k.shape[1]
    if operands.packed or q_len * group > row.block_q:
        group = 1
    tiles = row_tiles(p, group, row.block_q)
    programs = tiles * triton.cdiv(v_dim, block_dv) * (heads // group)
    programs *= 1 if operands.packed else batch
    visible = _tile_list(operands, p, row) if group == 1 else TileList()
    parts = num_splits or _parts(p, programs, device)
    parts = min(parts, MAX_PARTS, max(1, p.lengths.kv_len))
    into = p
    if parts > 1:
        part_out = q.new_empty(parts, *out.shape, dtype=torch.float32)
        part_lse = q.new_full((parts, *lse.shape), -math.inf, dtype=torch.float32)
        into = p._replace(
            out=Tensor4(part_out, *part_out.stride()[1:4], part_out.stride(0)),
            lse=Tensor4(part_lse, *part_lse.stride()[1:4], part_lse.stride(0)),
            sinks=Tensor4(),
        )
    sizes = _sizes(q, v)
    tma = _descriptors(p, (k, v), row, row.block_kv, (sizes["BLOCK_D"], sizes["BLOCK_DV"]))
    compiled_for = constants(**sizes, **_blocks(row), GROUP=group, PARTS=parts)
    forward_kernel[(programs * parts,)](
        into, visible, tiles, *tma, compiled_for, num_warps=row.warps
    )
    if parts > 1:
        rows, block = lse.numel(), 16
        combine_kernel[(triton.cdiv(rows, block) * triton.cdiv(v_dim, block_dv),)](
            p.out, lse, part_out, part_lse, p, rows, heads, q_len, parts,
            DV=v_dim, BLOCK_Q=block, BLOCK_DV=block_dv,
        )  # fmt: skip


def _parts(p: Params, programs: int, device: config.Device) -> int:
    """Into how many parts to cut the keys: as many as fill the GPU once, or 1 where tiles do."""
    room = device.processors // programs
    return max(1, min(room, p.lengths.kv_len // MIN_PART_KEYS))


def _descriptors(p: Params, tensors, row: config.Config, length: int, blocks):
    """Tensor descriptors for tiles [length, block] of two tensors where the Config asks for them
    and they can describe them: 16-byte strides, whole head dimensions, and no rows or keys that do
    not exist, because those would be read."""
    x = p.lengths
    absent = (x.kv_lens, x.kv_starts, x.cu_k, x.doc_begin, p.pages.table)
    if not row.tma or any(one is not None for one in absent):
        return None, None
    for t, block in zip(tensors, blocks):
        size = t.element_size()
        if t.shape[3] > block or t.data_ptr() % 16 or any(n * size % 16 for n in t.stride()[:3]):
            return None, None
    return tuple(
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, length, block])
        for t, block in zip(tensors, blocks)
    )


# ---- backward -----------------------------------------------------------------------------------


def backward(dout, dlse, out, lse, q, k, v, *rest, row: config.Config | None = None, device=None):
    """flash_attn_bwd: (dq, dk, dv, dbias, dsinks), the last two fp32 and empty where not needed.
    rest is the operands, the numbers, need_dbias and need_dsinks."""
    tensors, numbers, (need_dbias, need_dsinks) = split_arguments(rest)
    operands, spec = Operands(*tensors), Spec(*numbers)
    if operands.paged:
        raise NotImplementedError("fastattn: keys in pages have no gradient")
    dout, out, q, k, v = (unit_stride(x) for x in (dout, out, q, k, v))
    make = torch.zeros_like if operands.packed else torch.empty_like
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
            *(_rows4(dout), _rows4(delta), _rows4(lse2), _rows4(dq), _rows4(dk), _rows4(dv)),
            *_bias_sums(p, q, dbias if need_dbias else None),
            torch.zeros(lse.shape[:2], dtype=torch.int32, device=q.device),
        )
        dlse4 = Tensor4() if dlse is None else _rows4(dlse)
        _backward(q, k, v, dlse4, operands, p, g, row, device)
        _reduce_bias(g, dbias)
        if need_dsinks:
            weight = (sinks.float()[:, None] - lse).clamp(max=0).exp()
            dsinks = torch.where(lse == -math.inf, 0.0, -weight * delta).sum((0, 2))
    return dq, dk, dv, dbias, dsinks


def _backward(q, k, v, dlse, operands, p: Params, g: Gradients, row, device) -> None:
    batch, heads, q_len, head_dim = q.shape
    v_dim = v.shape[3]
    block_d, block_dv = config.block_of(head_dim), config.block_of(v_dim)
    device = device or config.device_of(q)
    programs = batch * heads * triton.cdiv(q_len, 32)
    delta_kernel[(programs,)](
        p.out, g.dout, p.lse, dlse, g.delta.ptr, g.lse.ptr, g.large, q_len, heads,
        DV=v_dim, BLOCK_Q=32, BLOCK_DV=block_dv,
    )  # fmt: skip
    key = (device, q.element_size(), head_dim, v_dim)
    entries = p.lengths.entries
    times = 1 if operands.packed else entries
    sizes, blocks = _sizes(q, v), (block_d, block_dv)

    def rows_pass(row_of: config.Config) -> None:
        tiles = row_tiles(p, 1, row_of.block_q)
        visible = _tile_list(operands, p, row_of)
        tma = _descriptors(p, (k, v), row_of, row_of.block_kv, blocks)
        compiled_for = constants(**sizes, **_blocks(row_of))
        shared = g.dbias.ptr is not None and g.dbias.ptr.shape[:2] != (entries, heads)
        own = g._replace(dbias=Tensor4()) if shared else g  # of these rows alone
        rows_kernel[(tiles * triton.cdiv(head_dim, block_d) * times * heads,)](
            p, own, visible, tiles, *tma, compiled_for, num_warps=row_of.warps
        )
        if shared:
            bias_batch, bias_heads, rows, columns = g.dbias.ptr.shape
            programs = triton.cdiv(rows, row_of.block_q) * triton.cdiv(columns, row_of.block_kv)
            bias_kernel[(programs * bias_batch * bias_heads,)](
                p, g, rows, columns, entries // bias_batch, heads // bias_heads, compiled_for,
                num_warps=row_of.warps,
            )  # fmt: skip

    default = config.find(config.BACKWARD_ROWS, *key)
    rows_pass(row or tune.choose("rows", q.dtype, (head_dim, v_dim), default, rows_pass))

    of_keys = p._replace(ranges=_rows_of_keys(operands, p))

    def keys_pass(row_of: config.Config) -> None:
        if operands.packed:
            tiles = p.lengths.kv_len // row_of.block_kv + entries
        else:
            tiles = triton.cdiv(p.lengths.kv_len, row_of.block_kv)
        visible = _tile_list(operands, p, row_of, turned=True)
        tma = _descriptors(p, (q, g.dout.ptr), row_of, row_of.block_q, blocks)
        chunks = max(triton.cdiv(head_dim, block_d), triton.cdiv(v_dim, block_dv))
        keys_kernel[(tiles * chunks * times * p.kv_heads,)](
            of_keys,
            g,
            visible,
            chunks,
            *tma,
            constants(**sizes, **_blocks(row_of)),
            num_warps=row_of.warps,
        )

    default = config.find(config.BACKWARD_KEYS, *key)
    keys_pass(row or tune.choose("keys", q.dtype, (head_dim, v_dim), default, keys_pass))


def _sizes(q, v) -> dict:
    dims = {"D": q.shape[3], "DV": v.shape[3]}
    blocks = {f"BLOCK_{name}": config.block_of(size) for name, size in dims.items()}
    if q.dtype == E4M3:
        blocks["BLOCK_D"] = max(32, blocks["BLOCK_D"])  # the shortest fp8 product
    return dims | blocks | {"PRECISION": precision(q)}


def _blocks(row: config.Config) -> dict:
    return {"BLOCK_Q": row.block_q, "BLOCK_KV": row.block_kv, "STAGES": row.stages}


def _tile_list(operands, p: Params, row: config.Config, turned: bool = False) -> TileList:
    if operands.mask is None:
        return TileList()
    lengths = (p.lengths.q_len, p.lengths.kv_len)
    return tile_lists(operands.mask, p.mask, *lengths, row.block_q, row.block_kv, turned)


def _bias_sums(p: Params, q, dbias):
    """Gradients' dbias, bias_rows and bias_keys: one of them, by how the bias broadcasts."""
    nothing = Tensor4()
    if dbias is None:
        return nothing, nothing, nothing
    _, _, rows, columns = dbias.shape
    if rows > 1 and columns > 1:
        return _operand4(dbias), nothing, nothing
    long = columns if columns > 1 else max(rows, p.lengths.q_len)
    sums = q.new_zeros(p.lengths.entries, p.heads, long, dtype=torch.float32)
    sums = _rows4(sums)
    return (nothing, nothing, sums) if columns > 1 else (nothing, sums, nothing)


def _reduce_bias(g: Gradients, dbias) -> None:
    """dbias from the sums over rows or keys, where there are such."""
    for sums, dim in ((g.bias_rows.ptr, 3), (g.bias_keys.ptr, 2)):
        if sums is not None:
            sums = sums.unsqueeze(dim)
            shared = [n for n in range(4) if dbias.shape[n] == 1 and sums.shape[n] > 1]
            dbias.copy_(sums.sum(shared, keepdim=True) if shared else sums)

"""From checked tensors to the kernels' Params. Next: params.py, which documents the fields.

No value is read on the device: a call never waits for the GPU and can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from ..core.philox import FIRST_HEAD, TOTAL_HEADS, keep_probability, keep_threshold
from ..core.spec import Descales, Operands, Spec
from .params import Descale, Dropout, Lengths, Pages, Params, Ranges, Tensor4
from .score import LOG2E, MAX


def rows4(x: torch.Tensor) -> Tensor4:
    """x [B, heads, rows, columns] with unit stride in a row, or [B, heads, rows]."""
    return Tensor4(x, *x.stride()[:3], 0)


def operand4(x: torch.Tensor | None) -> Tensor4:
    """A tensor that broadcasts to four dimensions."""
    if x is None:
        return Tensor4()
    strides = (0 if n == 1 else stride for n, stride in zip(x.shape, x.stride()))
    return Tensor4(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides)


def heads4(x: torch.Tensor | None) -> Tensor4:
    """[heads] or [sequences, heads]."""
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
        x.cu_seqlens_q.shape[0] - 1 if x.varlen else q.shape[0],
        q.shape[2],
        k.shape[2] * (x.page_table.shape[1] if x.paged else 1),
        *(None if vector is None else vector.contiguous() for vector in vectors),
        begin,
        end,
    )


def with_rows_of_keys(x: Operands, p: Params) -> Ranges:
    """p's ranges together with their transpose, the rows [first, last) that see each key. A binary
    search for each key finds them, because neither end of a range decreases along the rows."""
    if x.key_begin is None:
        return p.ranges
    j, sequence = torch.arange(p.lengths.kv_len, device=x.key_begin.device), None
    if x.varlen:  # the keys of all sequences, as they lie in memory
        cu = x.cu_seqlens_k.long()
        sequence = torch.searchsorted(cu, j, right=True).clamp(1, max(1, p.lengths.sequences)) - 1
        j = j - cu[sequence]
    first, last = (_search(end[..., 0], j, sequence, p.lengths.q_len)
                   for end in (x.key_end, x.key_begin))  # fmt: skip
    return p.ranges._replace(first=first, last=last)


def _search(ends: torch.Tensor, j: torch.Tensor, sequence, q_len: int) -> Tensor4:
    """How many rows of ends [sequences or 1, heads or 1, rows or 1] are at most j [keys]: int32
    [sequences or 1, heads or 1, keys]. In varlen calls it is [1, heads or 1, keys], and key j[t]
    belongs to sequence[t]."""
    sequences, heads, rows = ends.shape
    j = j.expand(sequences if sequence is None else 1, heads, -1)
    if sequence is not None and sequences > 1:  # one search, each sequence offset past the last
        sequence = sequence.expand(1, heads, -1)
        apart = (1 << 31) * torch.arange(sequences, device=ends.device)[:, None, None]
        ends = (ends.long().clamp(0, 1 << 30) + apart).transpose(0, 1).flatten(1)[None]
        found = (
            torch.searchsorted(ends.contiguous(), j + (sequence << 31), right=True)
            - sequence * rows
        )
    else:
        found = torch.searchsorted(ends.long().contiguous(), j.contiguous(), right=True)
    if rows == 1:  # one range for all rows: found is 0 or 1
        found = found * q_len
    return operand4(found.int().unsqueeze(3))


def _dropout(seed, p: float) -> Dropout:
    if not p:
        return Dropout()
    if seed is None or seed.dtype != torch.int64 or len(seed) not in (FIRST_HEAD, TOTAL_HEADS + 1):
        raise RuntimeError("fastattn: dropout needs dropout_seed, int64 [2], seed and offset, or "
                           "[4], with the first head and the number of all heads")  # fmt: skip
    sharded = 1 if len(seed) > FIRST_HEAD else None
    return Dropout(seed.contiguous(), sharded, keep_threshold(p), 1 / keep_probability(p))


def make_params(q, k, v, out, lse, x: Operands, spec: Spec) -> Params:
    capped, base2 = spec.softcap > 0, LOG2E.value
    table = None if x.page_table is None else x.page_table.contiguous()
    return Params(
        q=rows4(q),
        k=rows4(k),
        v=rows4(v),
        out=rows4(out),
        lse=rows4(lse),
        mask=operand4(x.mask),
        bias=operand4(x.bias),
        slopes=heads4(x.alibi_slopes),
        sinks=heads4(x.sinks),
        lengths=_lengths(q, k, x),
        ranges=Ranges(operand4(x.key_begin), operand4(x.key_end)),
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
    """x clamped to finite float32 numbers: a product of 0 and infinity would be NaN."""
    return max(-MAX.value, min(MAX.value, x))


def _descale(x: Descales, sequences: int, kv_heads: int) -> Descale:
    given = [one for one in x if one is not None]
    if not given:
        return Descale()
    own = any(one.dim() == 2 for one in given)  # a scale for each sequence
    if own:
        x = (None if one is None else one.expand(sequences, kv_heads) for one in x)
    x = [None if one is None else one.contiguous() for one in x]
    return Descale(*x, kv_heads if own else 0, 1)

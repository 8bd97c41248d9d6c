"""The arguments of the attention kernels: the counterpart of csrc/cpu/params.h. Next: spec.py.

Triton takes NamedTuples as arguments. A field that is None is a compile-time constant, so
that `if p.mask.ptr is not None` costs nothing: each set of operands compiles a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import triton.language as tl


class Tensor4(NamedTuple):
    """[batch, heads, rows, columns] in memory; strides in elements, 0 where broadcast."""

    ptr: Any = None
    batch: int = 0
    head: int = 0
    row: int = 0
    col: int = 0


class Lengths(NamedTuple):
    """The lengths of sequences. A sequence is a batch entry, or one of a varlen call."""

    sequences: int
    q_len: int  # rows in memory of a batch entry; in varlen calls, of all sequences
    kv_len: int  # key slots, likewise
    kv_lens: Any = None  # [sequences]
    kv_starts: Any = None  # [sequences]
    cu_q: Any = None  # [sequences + 1]
    cu_k: Any = None
    doc_begin: Any = None  # [sequences, rows]: the first row of a row's document
    doc_end: Any = None


class Ranges(NamedTuple):
    """Key ranges: a row sees at most keys [begin, end); at most rows [first, last) see a key."""

    begin: Tensor4 = Tensor4()  # int32 [sequences, heads, rows]
    end: Tensor4 = Tensor4()
    first: Tensor4 = Tensor4()  # int32 [sequences, heads, keys], for keys_kernel only
    last: Tensor4 = Tensor4()


class Pages(NamedTuple):
    table: Any = None  # [sequences, max_pages]
    row: int = 0
    size: int = 0


class Dropout(NamedTuple):
    seed: Any = None  # int64 [2] or [4], see philox.py
    sharded: int | None = None  # 1: seed also holds the first head and the number of all heads
    threshold: int = 0  # of 65536: a probability is kept if its 16 random bits are below
    inverse_keep: float = 1.0


class Descale(NamedTuple):
    """Scales of FP8 and int8 tensors, [sequences, kv_heads] each (batch 0: [kv_heads]): a value is
    the stored number times its scale."""

    q: Any = None
    k: Any = None
    v: Any = None
    batch: int = 0
    head: int = 0


class Statistics(NamedTuple):
    """What the forward tells of each row beside out and lse, laid out like lse."""

    max_logit: Tensor4  # fp32; -inf where a row sees no key
    entropy: Any = None  # a Tensor4, fp32: in nats, of the keys and the sink; None: not asked for
    argmax: Any = None  # a Tensor4, int64: the first key of the largest score; -1


class Params(NamedTuple):
    q: Tensor4  # [B, heads, q_len, D]
    k: Tensor4  # [B, kv_heads, kv_len, D]; paged [pages, kv_heads, page_size, D]
    v: Tensor4
    out: Tensor4  # [B, heads, q_len, Dv]; col is the stride between splits
    lse: Tensor4  # [B, heads, q_len], likewise
    mask: Tensor4  # [sequences, heads, rows, keys]
    bias: Tensor4
    slopes: Tensor4  # ALiBi, by batch and head
    sinks: Tensor4  # by head
    lengths: Lengths
    ranges: Ranges
    pages: Pages
    dropout: Dropout
    descale: Descale
    heads: int
    kv_heads: int
    scale: float  # of q.k
    factor: float  # scale in base 2; before a cap, scale / softcap
    cap: float | None  # softcap in base 2; None: off
    left: int | None  # keys visible behind the diagonal; None: unbounded
    right: int | None
    align_end: int | None  # 1: the diagonal ends at the last key; None: it starts at the first
    statistics: Any = None  # of Statistics; None: none are asked for


@dataclass(frozen=True)
class Constants:
    """Compile-time constants of a kernel. Triton requires that the fields are constexprs, which
    constants() makes."""

    D: Any  # head dimension of q and k; DV: of v
    DV: Any
    BLOCK_D: Any  # channels in a tile: the whole head dimension, or a chunk
    BLOCK_DV: Any
    BLOCK_Q: Any
    BLOCK_KV: Any
    STAGES: Any
    PRECISION: Any  # of fp32 products: "tf32" or "ieee"
    GROUP: Any  # q heads that share a tile
    SPLITS: Any  # of the keys, whose partial results are merged


@cache
def constants(GROUP=1, SPLITS=1, **values) -> Constants:
    values |= {"GROUP": GROUP, "SPLITS": SPLITS}
    return Constants(**{name: tl.constexpr(value) for name, value in values.items()})


class Segment(NamedTuple):
    """Rows and keys that may see each other: those of sequence n, or of one document in it."""

    n: Any  # the sequence: index of mask, bias, slopes, dropout and pages
    batch: Any  # index in memory of q, out and, unless paged, k and v
    row0: Any  # where the sequence's row 0 lies in memory
    key0: Any
    offset: Any  # the diagonal of row i is key i + offset
    row_begin: Any  # positions count from the start of the sequence
    row_end: Any
    key_begin: Any
    key_end: Any


class Range(NamedTuple):
    """A loop over tiles [begin, end), of which [full_begin, full_end) need no mask."""

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


class TileRows(NamedTuple):
    """The rows of a tile. Where the GROUP q heads of a kv head share it (pack_gqa), row r of the
    tile is row r // GROUP of head r % GROUP."""

    i: Any  # [rows]: position in the sequence
    head: Any  # [rows], or a scalar without pack_gqa
    ok: Any  # [rows]: whether the segment has such a row
    lo: Any  # [rows]: the row sees keys [lo, hi)
    hi: Any


class TileList(NamedTuple):
    """Which tiles of a bool mask hold a True (mask_tiles.py); int32."""

    rank: Any = None  # [batch, heads, tiles, others + 1]: how many such tiles come before
    tile: Any = None  # [batch, heads, tiles, others]: their numbers, in order
    batch: int = 0  # strides in tiles
    head: int = 0
    row: int = 0
    others: int = 0

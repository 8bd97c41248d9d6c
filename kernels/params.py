"""Where a kernel finds its operands: the twin of csrc/cpu/params.h. Next: spec.py.

Triton takes NamedTuples as arguments. A field that is None is absent at compile time, so
`if p.mask.ptr is not None` costs nothing, and a kernel exists once for each set of operands.
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
    """How long entries are. An entry is a batch entry or a sequence of a packed call."""

    entries: int
    q_len: int  # rows in memory of one entry; of all of them when packed
    kv_len: int  # keys that have a place, likewise
    kv_lens: Any = None  # [entries]
    kv_starts: Any = None  # [entries]
    cu_q: Any = None  # [entries + 1]
    cu_k: Any = None
    doc_begin: Any = None  # [entries, rows]: the first row of a row's document
    doc_end: Any = None


class Ranges(NamedTuple):
    """Key ranges: a row sees keys [begin, end) at most; a key, rows [first, last)."""

    begin: Tensor4 = Tensor4()  # int32 [entries, heads, rows]
    end: Tensor4 = Tensor4()
    first: Tensor4 = Tensor4()  # int32 [entries, heads, keys], for the pass over rows alone
    last: Tensor4 = Tensor4()


class Pages(NamedTuple):
    table: Any = None  # [entries, max_pages]
    row: int = 0
    size: int = 0


class Dropout(NamedTuple):
    seed: Any = None  # int64 [2] or [4], see philox.py
    part: int | None = None  # 1: it says of which heads of how many these are a part
    threshold: int = 0  # of 65536: a weight is kept when its 16 bits are below
    inverse_keep: float = 1.0


class Descale(NamedTuple):
    """Scales of fp8 and int8 tensors, [entries, kv_heads] each (batch 0: [kv_heads]): what is meant
    is what is stored times these."""

    q: Any = None
    k: Any = None
    v: Any = None
    batch: int = 0
    head: int = 0


class Params(NamedTuple):
    q: Tensor4  # [B, heads, q_len, D]
    k: Tensor4  # [B, kv_heads, kv_len, D]; paged [pages, kv_heads, page_size, D]
    v: Tensor4
    out: Tensor4  # [B, heads, q_len, Dv]; the column is the stride from part to part of the keys
    lse: Tensor4  # [B, heads, q_len], likewise
    mask: Tensor4  # [entries, heads, rows, keys]
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


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for. Fields are constexprs (constants()): Triton wants them so."""

    D: Any  # head dimensions, of q and k, of v
    DV: Any
    BLOCK_D: Any  # channels of a tile: all of them, or a chunk
    BLOCK_DV: Any
    BLOCK_Q: Any
    BLOCK_KV: Any
    STAGES: Any
    PRECISION: Any  # of fp32 products: "tf32" or "ieee"
    GROUP: Any  # q heads that share a tile
    PARTS: Any  # of the keys


@cache
def constants(GROUP=1, PARTS=1, **values) -> Constants:
    values |= {"GROUP": GROUP, "PARTS": PARTS}
    return Constants(**{name: tl.constexpr(value) for name, value in values.items()})


class Segment(NamedTuple):
    """Rows and keys of entry n that may meet: the whole entry, or one document of it."""

    n: Any  # indexes mask, bias, slopes, dropout, pages
    batch: Any  # index in memory of q, out and, unless paged, k and v
    row0: Any  # where the entry's row 0 lies in memory
    key0: Any
    offset: Any  # the diagonal of row i is key i + offset
    row_begin: Any  # positions count from the entry's first
    row_end: Any
    key_begin: Any
    key_end: Any


class Range(NamedTuple):
    """Tiles [begin, end) of a loop; all of [full_begin, full_end) needs no mask."""

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


class Lanes(NamedTuple):
    """The rows of a tile. Where the q heads of a kv head share one, lane = row * GROUP + head."""

    i: Any  # [lanes]: row
    head: Any  # [lanes], or one for all
    ok: Any  # [lanes]: is it a row of the segment
    lo: Any  # [lanes]: the row sees keys [lo, hi)
    hi: Any


class TileList(NamedTuple):
    """Which tiles of a bool mask hold a True (mask_tiles.py); int32."""

    rank: Any = None  # [batch, heads, tiles, others + 1]: how many such tiles come before
    tile: Any = None  # [batch, heads, tiles, others]: their numbers, in order
    batch: int = 0  # strides in tiles
    head: int = 0
    row: int = 0
    others: int = 0

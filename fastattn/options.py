"""The keyword arguments of attention(), varlen_attention(), decode_attention() and explain() for
type checkers, used by the functions' overloads. tests/attention/test_types.py checks that they
match the functions' own signatures.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

Align = Literal["end", "start"]
BackendName = Literal["cuda", "triton", "cpu", "reference"]


class Options(TypedDict, total=False):
    """The options that the three functions share, without return_lse and return_stats, which decide
    their return type and so have overloads."""

    scale: float | None
    causal: bool
    window: tuple[int | None, int | None] | None
    align: Align
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float
    sinks: Tensor | None
    kv_lens: Tensor | None
    document_ids: Tensor | None
    key_ranges: tuple[Tensor, Tensor] | None
    head_origin: tuple[int, int] | None
    dropout_p: float
    dropout_seed: tuple[int, int] | Tensor | None
    deterministic: bool | None
    backend: BackendName | None


class DenseOptions(Options, total=False):
    """attention()'s."""

    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None


class PackedOptions(Options, total=False):
    """varlen_attention()'s."""

    page_table: Tensor | None


class CacheOptions(Options, total=False):
    """decode_attention()'s, but for cache_lens, which it requires."""

    k: Tensor | None
    v: Tensor | None
    page_table: Tensor | None
    cache_leftpad: Tensor | None
    cache_batch_idx: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    rotary_interleaved: bool
    k_descale: Tensor | None
    v_descale: Tensor | None
    num_splits: int | None

"""What an attention call computes: `Spec` (numbers) and `Operands` (optional tensors).

A mask is an interval: row i sees keys [lo(i), hi(i)), and neither end ever decreases with i.
csrc/spec.h holds the same few lines in C++; an exhaustive test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spec:
    """The numbers of a call. Scores are softcap(scale * q.k) + bias + alibi, then masked."""

    scale: float  # zero and negative included; at most 1e30 in size
    softcap: float = 0.0  # s -> softcap * tanh(s / softcap); 0 is off
    left: int = -1  # row i sees no key before i + offset - left; -1 is unbounded
    right: int = -1  # row i sees no key after i + offset + right; -1 is unbounded; causal is 0
    align_end: bool = True  # the diagonal ends at the last key (True) or starts at the first
    dropout_p: float = 0.0  # probability in [0, 1) that a weight is dropped

    def offset(self, q_len: Any, kv_len: Any) -> Any:
        """The key that lies on row 0's diagonal. Lengths are those of the batch entry."""
        return kv_len - q_len if self.align_end else 0

    def lo(self, i: Any, q_len: Any, kv_len: Any) -> Any:
        """First key that row i sees, in [0, kv_len]. Ints give an int, tensors a tensor."""
        first = i * 0 if self.left < 0 else i + self.offset(q_len, kv_len) - self.left
        return _clip(first, kv_len)

    def hi(self, i: Any, q_len: Any, kv_len: Any) -> Any:
        """One past the last key that row i sees, in [lo, kv_len]."""
        end = i * 0 + kv_len if self.right < 0 else i + self.offset(q_len, kv_len) + self.right + 1
        return _clip(end, kv_len)


class Descales(NamedTuple):
    """Scales of 8-bit tensors, fp32 [kv_heads] or [B, kv_heads]: what is stored times its scale is
    what is meant. None is 1."""

    q: Tensor | None = None  # q's heads share that of their kv head
    k: Tensor | None = None
    v: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The optional tensors of a call, in the order in which the operators take them.

    An entry is a batch entry, or a sequence of a packed call; N is the number of entries, and
    mask and bias broadcast to [N, heads, q_len, kv_len] (the longest lengths, when packed).
    """

    mask: Tensor | None = None  # bool, 4-D, each dimension 1 or full; True = attend
    bias: Tensor | None = None  # float, 4-D, each dimension 1 or full; added to the scores
    alibi_slopes: Tensor | None = None  # fp32 [heads] or [N, heads]; adds -slope * |i + offset - j|
    sinks: Tensor | None = None  # [heads]: a logit that joins the softmax denominator only
    kv_lens: Tensor | None = None  # int32 [N]: keys at or past kv_lens[n] do not exist
    kv_starts: Tensor | None = None  # int32 [N]: keys before kv_starts[n] do not exist
    document_ids: Tensor | None = None  # int32 [B, S], non-decreasing; rows see their own document
    cu_seqlens_q: Tensor | None = None  # int32 [N + 1]: sequence n is rows cu[n]:cu[n + 1]
    cu_seqlens_k: Tensor | None = None  # int32 [N + 1]: the same for keys (lengths only, if paged)
    page_table: Tensor | None = None  # int32 [N, max_pages]: k and v are [pages, kv_heads, size, *]
    dropout_seed: Tensor | None = None  # int64 [2] or [4]: philox.py's SEED, OFFSET, ...
    descales: Descales | None = None  # there where k and v (and perhaps q) are 8-bit; not a tensor

    @property
    def packed(self) -> bool:
        """Sequences lie one after the other in one row, told apart by cu_seqlens."""
        return self.cu_seqlens_q is not None

    @property
    def paged(self) -> bool:
        """Keys and values lie in pages that page_table names."""
        return self.page_table is not None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The eleven operands, in the order of the operators' arguments."""
        return tuple(getattr(self, name) for name in OPERANDS)


OPERANDS = tuple(field.name for field in fields(Operands))[:-1]  # the names of the eleven


def _clip(x, high):
    if isinstance(high, Tensor):
        return torch.minimum(torch.as_tensor(x).clamp(min=0), high)
    return x.clamp(0, high) if isinstance(x, Tensor) else max(0, min(x, high))

"""What an attention call computes: `Spec` (numbers) and `Operands` (optional tensors).

A mask is an interval: row i, a query, sees keys [lo(i), hi(i)), and neither end ever decreases as i
grows. csrc/spec.h has the same functions in C++, and an exhaustive test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spec:
    """The numbers of a call. A score is softcap(scale * q.k) + bias + ALiBi, and is then masked."""

    scale: float  # any sign, or zero; |scale| <= 1e30
    softcap: float = 0.0  # s -> softcap * tanh(s / softcap); 0 is off
    left: int = -1  # row i sees no key before i + offset - left; -1 is unbounded
    right: int = -1  # row i sees no key after i + offset + right; -1 is unbounded; causal is 0
    align_end: bool = True  # the diagonal ends at the last key (True) or starts at the first
    dropout_p: float = 0.0  # chance in [0, 1) that an attention probability is dropped

    def offset(self, q_len: Any, kv_len: Any) -> Any:
        """The key on the diagonal of row 0, for a sequence of q_len rows and kv_len keys."""
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
    """Scales of FP8 and INT8 tensors, fp32 [kv_heads] or [B, kv_heads]: the stored value times its
    scale is the value. None is a scale of 1."""

    q: Tensor | None = None  # query heads share the scale of their kv head
    k: Tensor | None = None
    v: Tensor | None = None


def _is(vmap: str, gradient: bool = False) -> dict:
    """Metadata of an operand: whether it has a gradient, and how vmap folds its own dimension into
    the batch (backends/vmap.py; N is the number of sequences):

    broadcast  four dimensions, of which the first is N, or 1 for all sequences
    entries    the first dimension is N
    heads      [heads], for all sequences, or [N, heads]
    all        [heads], for all sequences; instances that each have their own run one by one
    alone      a call with this operand runs its instances one by one
    """
    return {"vmap": vmap, "gradient": gradient}


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The optional tensors of a call. This is the only list of them: the operators' schemas, the
    order of their arguments, the saved tensors and vmap's rules are made from it.

    N is the number of sequences: the batch size, or the number of sequences of a packed call. Mask
    and bias broadcast to [N, heads, q_len, kv_len], where packed calls take the longest lengths.
    """

    # bool, 4-D, each dimension 1 or full; True = attend
    mask: Tensor | None = field(default=None, metadata=_is("broadcast"))
    # float, 4-D, each dimension 1 or full; added to the scores
    bias: Tensor | None = field(default=None, metadata=_is("broadcast", gradient=True))
    # fp32 [heads] or [N, heads]; adds -slope * |i + offset - j|
    alibi_slopes: Tensor | None = field(default=None, metadata=_is("heads"))
    # [heads]: a logit in the softmax denominator only
    sinks: Tensor | None = field(default=None, metadata=_is("all", gradient=True))
    # int32 [N]: keys at or past kv_lens[n] do not exist
    kv_lens: Tensor | None = field(default=None, metadata=_is("entries"))
    # int32 [N]: keys before kv_starts[n] do not exist
    kv_starts: Tensor | None = field(default=None, metadata=_is("entries"))
    # int32 [B, S], non-decreasing; rows see their own document
    document_ids: Tensor | None = field(default=None, metadata=_is("entries"))
    # int32, 4-D [N or 1, heads or 1, rows or 1, 1], non-decreasing along the rows: a row sees keys
    # [key_begin, key_end) on top of everything else; both or neither are given
    key_begin: Tensor | None = field(default=None, metadata=_is("broadcast"))
    key_end: Tensor | None = field(default=None, metadata=_is("broadcast"))
    # int32 [N + 1]: sequence n is rows cu[n]:cu[n + 1]
    cu_seqlens_q: Tensor | None = field(default=None, metadata=_is("alone"))
    # int32 [N + 1]: the same for keys (lengths only, if paged)
    cu_seqlens_k: Tensor | None = field(default=None, metadata=_is("alone"))
    # int32 [N, max_pages]: k and v are [pages, kv_heads, page_size, *]
    page_table: Tensor | None = field(default=None, metadata=_is("alone"))
    # int64 [2] or [4]: (seed, offset), and with tensor parallelism philox.py's head numbers
    dropout_seed: Tensor | None = field(default=None, metadata=_is("alone"))
    descales: Descales | None = None  # of FP8 or INT8 k and v (and FP8 q); not a tensor

    @property
    def varlen(self) -> bool:
        """Sequences lie one after the other in one batch entry; cu_seqlens says where each is."""
        return self.cu_seqlens_q is not None

    @property
    def paged(self) -> bool:
        """Keys and values lie in the pages that page_table lists."""
        return self.page_table is not None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of the operators' arguments."""
        return _tensors_of(self)

    def given(self) -> list[str]:
        """The names of the operands that are not None."""
        return [name for name in self.__slots__ if getattr(self, name) is not None]

    def leaves(self) -> tuple[Tensor | None, ...]:
        """The tensors that have a gradient, in the order of LEAVES."""
        return _leaves_of(self)

    def others(self) -> tuple[Tensor | None, ...]:
        """The tensors that have no gradient, in the order of OTHERS."""
        return _others_of(self)

    @staticmethod
    def join(leaves, others) -> Operands:
        """The inverse of leaves() and others()."""
        return Operands(*_in_order((*leaves, *others)))


_TENSORS = [x for x in fields(Operands) if x.metadata]
OPERANDS = tuple(x.name for x in _TENSORS)  # in the order of the operators' arguments
LEAVES = tuple(x.name for x in _TENSORS if x.metadata["gradient"])  # have a gradient
OTHERS = tuple(x.name for x in _TENSORS if not x.metadata["gradient"])
VMAP = {x.name: x.metadata["vmap"] for x in _TENSORS}
NUMBERS = tuple(x.name for x in fields(Spec))  # in the order of the operators' arguments


def _getter(names: tuple[str, ...]):
    """x -> (x.name, ...), made from source text: torch.compile cannot trace operator.attrgetter,
    and a loop over the names would cost every call 2 us."""
    return eval(f"lambda x: ({', '.join(f'x.{name}' for name in names)},)")


_tensors_of, _leaves_of, _others_of = map(_getter, (OPERANDS, LEAVES, OTHERS))
_in_order = itemgetter(*((*LEAVES, *OTHERS).index(name) for name in OPERANDS))
numbers_of = _getter(NUMBERS)


def split_arguments(rest: tuple) -> tuple[tuple, tuple, tuple]:
    """An operator's arguments after v as (those of OPERANDS, those of NUMBERS, the rest)."""
    n, m = len(OPERANDS), len(OPERANDS) + len(NUMBERS)
    return rest[:n], rest[n:m], rest[m:]


NO_OPERANDS = Operands()


def _clip(x, high):
    if isinstance(high, Tensor):
        return torch.minimum(torch.as_tensor(x).clamp(min=0), high)
    return x.clamp(0, high) if isinstance(x, Tensor) else max(0, min(x, high))

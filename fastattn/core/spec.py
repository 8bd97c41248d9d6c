"""What an attention call computes: `Spec` (numbers) and `Operands` (optional tensors).

A mask is an interval: row i sees keys [lo(i), hi(i)), and neither end ever decreases with i.
csrc/spec.h holds the same few lines in C++; an exhaustive test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import itemgetter
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
    dropout_p: float = 0.0  # chance in [0, 1) that an attention probability is dropped

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


def _is(vmap: str, gradient: bool = False) -> dict:
    """What an operand is: whether it has a gradient, and what vmap makes of it when it joins its
    own dimension with the call's entries (backends/vmap.py):

    broadcast  the first of its four dimensions counts entries, or is 1 for all of them
    entries    its first dimension counts entries
    heads      [heads], for all entries; or [entries, heads]
    all        [heads], for all entries: instances that each have their own run one by one
    alone      instances of a call that has it run one by one
    """
    return {"vmap": vmap, "gradient": gradient}


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The optional tensors of a call. This is the one list of them: the operators' schemas and the
    order of their arguments, saved tensors and vmap are made from it.

    An entry is a batch entry, or a sequence of a packed call; N is the number of entries, and
    mask and bias broadcast to [N, heads, q_len, kv_len] (the longest lengths, when packed).
    """

    # bool, 4-D, each dimension 1 or full; True = attend
    mask: Tensor | None = field(default=None, metadata=_is("broadcast"))
    # float, 4-D, each dimension 1 or full; added to the scores
    bias: Tensor | None = field(default=None, metadata=_is("broadcast", gradient=True))
    # fp32 [heads] or [N, heads]; adds -slope * |i + offset - j|
    alibi_slopes: Tensor | None = field(default=None, metadata=_is("heads"))
    # [heads]: a logit that joins the softmax denominator only
    sinks: Tensor | None = field(default=None, metadata=_is("all", gradient=True))
    # int32 [N]: keys at or past kv_lens[n] do not exist
    kv_lens: Tensor | None = field(default=None, metadata=_is("entries"))
    # int32 [N]: keys before kv_starts[n] do not exist
    kv_starts: Tensor | None = field(default=None, metadata=_is("entries"))
    # int32 [B, S], non-decreasing; rows see their own document
    document_ids: Tensor | None = field(default=None, metadata=_is("entries"))
    # int32, 4-D [N or 1, heads or 1, rows or 1, 1], non-decreasing along the rows: a row sees no
    # key before its key_begin, and none from its key_end on; both or neither
    key_begin: Tensor | None = field(default=None, metadata=_is("broadcast"))
    key_end: Tensor | None = field(default=None, metadata=_is("broadcast"))
    # int32 [N + 1]: sequence n is rows cu[n]:cu[n + 1]
    cu_seqlens_q: Tensor | None = field(default=None, metadata=_is("alone"))
    # int32 [N + 1]: the same for keys (lengths only, if paged)
    cu_seqlens_k: Tensor | None = field(default=None, metadata=_is("alone"))
    # int32 [N, max_pages]: k and v are [pages, kv_heads, size, *]
    page_table: Tensor | None = field(default=None, metadata=_is("alone"))
    # int64 [2] or [4]: philox.py's SEED, OFFSET, ...
    dropout_seed: Tensor | None = field(default=None, metadata=_is("alone"))
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
        """The tensors, in the order of the operators' arguments."""
        return _tensors_of(self)

    def given(self) -> list[str]:
        """The names of those that are there."""
        return [name for name in self.__slots__ if getattr(self, name) is not None]

    def leaves(self) -> tuple[Tensor | None, ...]:
        """Those of LEAVES."""
        return _leaves_of(self)

    def others(self) -> tuple[Tensor | None, ...]:
        """Those of OTHERS."""
        return _others_of(self)

    @staticmethod
    def join(leaves, others) -> Operands:
        """From what leaves() and others() give."""
        return Operands(*_in_order((*leaves, *others)))


_TENSORS = [x for x in fields(Operands) if x.metadata]
OPERANDS = tuple(x.name for x in _TENSORS)  # in the order of the operators' arguments
LEAVES = tuple(x.name for x in _TENSORS if x.metadata["gradient"])  # those that have a gradient
OTHERS = tuple(x.name for x in _TENSORS if not x.metadata["gradient"])
VMAP = {x.name: x.metadata["vmap"] for x in _TENSORS}
NUMBERS = tuple(x.name for x in fields(Spec))  # likewise


def _getter(names: tuple[str, ...]):
    """x -> (x.name, ...). Written out, since torch.compile does not know operator.attrgetter, and a
    loop over names would cost every call 2 us."""
    return eval(f"lambda x: ({', '.join(f'x.{name}' for name in names)},)")


_tensors_of, _leaves_of, _others_of = map(_getter, (OPERANDS, LEAVES, OTHERS))
_in_order = itemgetter(*((*LEAVES, *OTHERS).index(name) for name in OPERANDS))
numbers_of = _getter(NUMBERS)


def split_arguments(rest: tuple) -> tuple[tuple, tuple, tuple]:
    """(what belongs to OPERANDS, to NUMBERS, the rest) of an operator's arguments after v."""
    n, m = len(OPERANDS), len(OPERANDS) + len(NUMBERS)
    return rest[:n], rest[n:m], rest[m:]


NO_OPERANDS = Operands()


def _clip(x, high):
    if isinstance(high, Tensor):
        return torch.minimum(torch.as_tensor(x).clamp(min=0), high)
    return x.clamp(0, high) if isinstance(x, Tensor) else max(0, min(x, high))

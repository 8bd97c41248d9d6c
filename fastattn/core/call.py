"""`Call`, and the results: what every function between the public functions and the kernels takes
and returns.

The public functions make a Call from their arguments, checked and in normal form, and
backends/registry.py finds the backend that runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from .spec import Operands, Spec
from .statistics import Wanted


# Not frozen, because making a frozen dataclass costs a call of setattr for each field. Treat it as
# frozen.
@dataclass(slots=True, eq=False)
class Call:
    """One attention call in the operators' normal form: four dimensions, and one dtype for q, k and
    v (except that k and v may be 8-bit)."""

    q: Tensor  # [B, heads, q_len, D]; packed: [1, heads, rows, D]
    k: Tensor  # [B, kv_heads, kv_len, D]; paged: [pages, kv_heads, page_size, D]
    v: Tensor  # [B, kv_heads, kv_len, v_dim], packed and paged like k
    spec: Spec
    operands: Operands  # NO_OPERANDS for a call without any
    num_splits: int = 0  # splits of the keys (split-KV decoding); 0: the backend chooses
    statistics: Wanted | None = None  # what return_stats asks for

    def but(self, **changes) -> Call:
        """A copy of the call with other tensors, operands or numbers."""
        return replace(self, **changes)


class Result(NamedTuple):
    """The results of a forward pass."""

    out: Tensor  # [B, heads, q_len, v_dim] in q's dtype
    lse: Tensor  # [B, heads, q_len], fp32 (fp64 for fp64)


class Gradients(NamedTuple):
    """The results of a backward pass. Gradients of operands are fp32 (fp64 for fp64), and empty
    where they are not needed."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor
    dsinks: Tensor


class Tangents(NamedTuple):
    """Tangents of a call's inputs that have gradients, each with its input's shape. None counts as
    zero. Those of operands may also be fp32 (fp64 for fp64)."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None


class JvpResult(NamedTuple):
    """The results of a forward pass and their tangents."""

    out: Tensor
    lse: Tensor
    tout: Tensor  # like out; 0 in a row that sees no key
    tlse: Tensor  # like lse; 0 in a row that sees no key

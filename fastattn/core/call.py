"""What travels from the public functions to the kernels, and back: `Call` and `Result`.

The public functions make a Call of their arguments, checked and in normal form;
backends/registry.py finds the row that runs it. Every function between takes a Call and returns a
Result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from .spec import Operands, Spec


# Not frozen, which would cost a call of setattr for each field; nobody changes one all the same.
@dataclass(slots=True, eq=False)
class Call:
    """One attention call in the operators' normal form: four dimensions, one dtype (8-bit k and v
    aside)."""

    q: Tensor  # [B, heads, q_len, D]; of packed sequences [1, heads, rows, D]
    k: Tensor  # [B, kv_heads, kv_len, D]; in pages [pages, kv_heads, page_size, D]
    v: Tensor  # [B, kv_heads, kv_len, v_dim], likewise
    spec: Spec
    operands: Operands  # NO_OPERANDS: a call without any
    num_splits: int = 0  # of the keys; 0: the backend chooses

    def but(self, **changes) -> Call:
        """The same call with other tensors, operands or numbers."""
        return replace(self, **changes)


class Result(NamedTuple):
    """What a forward gives."""

    out: Tensor  # [B, heads, q_len, v_dim] in q's dtype
    lse: Tensor  # [B, heads, q_len], fp32 (fp64 for fp64)


class Gradients(NamedTuple):
    """What a backward gives; those of operands in fp32 (fp64), and empty where not needed."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor
    dsinks: Tensor

"""Statistics of the attention probabilities P: what can be asked for, and in what form it comes.

P is what the softmax gives before dropout, over the keys that a row sees and its sink. The pass
that makes out also makes max_logit, entropy and argmax (FirstPass); what needs all of P is made by
a second pass, which computes it again from lse (Maps). Next hops: probabilities.py defines each of
them in plain torch, and ../backends/statistics.py asks a backend's kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .call import Call

# ---- names --------------------------------------------------------------------------------------

# Each statistic: the passes that make it, and what it is (docs/statistics.md has the formulas).
ROW_NAMES = ("max_logit", "entropy", "max", "argmax", "sink_mass", "diagonal_mass")
COL_MASS, TOPK, POOLED = "col_mass", "topk", "pooled"
ACCEPTED = (
    f"{', '.join(map(repr, (*ROW_NAMES, COL_MASS)))}, 'topk:K' (K keys a row) and 'pooled:N' "
    "(an N x N map)"
)


class TopK(NamedTuple):
    """The largest probabilities of each row, in falling order; equal ones by key."""

    probs: Tensor  # [B, heads, q_len, k]; 0 where the row sees fewer keys
    keys: (
        Tensor  # int64 [B, heads, q_len, k], counted in the row's sequence; -1 where it sees fewer
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """The statistics that a call is asked for."""

    names: tuple[str, ...]  # as they were asked for, in order
    topk: int = 0  # the most keys of a row that a name asks for; 0: none
    pooled: tuple[int, ...] = ()  # the sizes of the maps, in order

    @classmethod
    def parse(cls, names) -> Wanted:
        """Of return_stats=names. Raises one sentence for what is not a statistic."""
        if not isinstance(names, (tuple, list)) or not all(isinstance(x, str) for x in names):
            shown = f"a {type(names).__name__}" if isinstance(names, Tensor) else repr(names)
            raise TypeError(
                f"return_stats is {shown}; accepted is a tuple of names, such as "
                "('max_logit', 'entropy'), or None"
            )
        topk, pooled = 0, []
        for name in names:
            kind, colon, number = name.partition(":")
            if kind in (TOPK, POOLED):
                size = int(number) if number.isascii() and number.isdigit() else 0
                if size < 1:
                    raise ValueError(
                        f"return_stats has {name!r}; accepted is {kind!r} with a number of at "
                        f"least 1, as in '{kind}:8'"
                    )
                topk = max(topk, size) if kind == TOPK else topk
                if kind == POOLED and size not in pooled:
                    pooled.append(size)
            elif colon or (name not in ROW_NAMES and name != COL_MASS):
                raise ValueError(f"return_stats has {name!r}; accepted are {ACCEPTED}")
        return cls(tuple(names), topk, tuple(pooled))

    @property
    def need_entropy(self) -> bool:
        return "entropy" in self.names

    @property
    def need_largest(self) -> bool:
        """Whether the gradient of some statistic is that of each row's largest score."""
        return "max_logit" in self.names or "max" in self.names

    @property
    def need_rows(self) -> bool:
        """Whether the forward pass has to make more than out and lse."""
        return self.need_largest or self.need_entropy or "argmax" in self.names

    @property
    def need_col_mass(self) -> bool:
        return COL_MASS in self.names

    @property
    def second_pass(self) -> bool:
        return self.need_col_mass or self.topk > 0 or len(self.pooled) > 0

    def check(self, call: Call) -> None:
        """Raises one sentence for a statistic that the call cannot have."""
        q_len, keys, x = call.q.shape[2], key_slots(call), call.operands
        if self.topk > keys:
            raise ValueError(
                f"return_stats has 'topk:{self.topk}' and k has {keys} keys; accepted is at most "
                "that many"
            )
        if self.pooled and x.varlen:
            raise NotImplementedError(
                f"return_stats has 'pooled:{self.pooled[0]}' for packed sequences, whose maps "
                "would be of different sizes; call attention() of each sequence for it"
            )
        for size in self.pooled:
            if size > min(q_len, keys):
                raise ValueError(
                    f"return_stats has 'pooled:{size}' for {q_len} rows and {keys} keys; accepted "
                    "is at most the smaller of the two"
                )
        if self.need_col_mass and x.varlen and x.paged:
            raise NotImplementedError(
                "return_stats has 'col_mass' for packed sequences with page_table, whose keys "
                "have no order of their own; decode_attention() has it, one row of keys for each "
                "sequence"
            )


def mapped(function: Callable[[Tensor], Tensor], *values) -> Any:
    """function of each of the values: of a tensor, or of all tensors in a dict or a TopK."""

    def one(x):
        if isinstance(x, dict):
            return {name: one(y) for name, y in x.items()}
        return TopK(*map(function, x)) if isinstance(x, TopK) else function(x)

    return tuple(map(one, values))


def key_slots(call: Call) -> int:
    """How many keys a statistic of keys has: those of k, or the slots of a row of pages."""
    table = call.operands.page_table
    return call.k.shape[2] * (1 if table is None else table.shape[1])


# ---- results ------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Statistics of each row [B, heads, q_len], fp32 (fp64 for fp64). What is not needed is empty.
    A row that sees no key has -inf, 0 and -1; one with a NaN score NaN, NaN and -1."""

    max_logit: Tensor  # the largest score of a key
    entropy: Tensor  # -sum p log p, in nats, over the keys and the sink
    argmax: Tensor  # int64: the first key with that score, counted in the row's sequence


class FirstPass(NamedTuple):
    """A forward pass with statistics of its rows: Result and Rows."""

    out: Tensor
    lse: Tensor
    max_logit: Tensor
    entropy: Tensor
    argmax: Tensor


class Maps(NamedTuple):
    """What a second pass makes, fp32 (fp64 for fp64) except the keys. What is not asked for is
    empty."""

    col_mass: Tensor  # [B, heads, keys]: the sum of P over the rows
    topk_probs: Tensor  # [B, heads, q_len, k], as in TopK
    topk_keys: Tensor
    pooled: Tensor  # [B, heads, n, n]: P summed over the keys of a bin, averaged over its rows

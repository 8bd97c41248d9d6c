"""attention_weights(): the attention weights of a call, made again from its lse, for need_weights,
output_attentions and whoever looks inside. Next hops: forms.py, which checks the call, and
torch.ops.fastattn.flash_attn_weights (csrc/cpu/ops_statistics.cpp, or core/probabilities.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import habits
from .backends import schema
from .core import checks, probabilities
from .core.call import Call
from .core.tensors import accumulate_dtype
from .forms import dense_form
from .options import Align


@habits.public
def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Tensor | slice | None = None,
    heads: Tensor | slice | None = None,
    average: bool = False,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: Align = "end",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: tuple[int, int] | Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """The attention weights that attention() multiplied with v: exp(score - lse), and with dropout
    what it kept of them.

    Args:
        q: [B, Hq, Sq, D], as in the call of attention(); also [B, Sq, D] and [Sq, D].
        k: [B, Hkv, Skv, D].
        lse: [B, Hq, Sq], returned by attention(..., return_lse=True). It includes the sinks.
        rows: which rows of q: an int64 tensor [R] in any order, a slice, or None for all.
        heads: which query heads, likewise.
        average: the mean over these heads, which are then never stored apart.
        dropout_seed: the call's; needed with dropout_p, because a seed that is drawn now drops
            other weights.
        sinks: the call's. Where lse is so large that its rounding would be felt, the weights are
            made from the scores and the sinks instead.

    The other arguments are those of the call.

    Returns:
        [B, heads, rows, Skv] in q's dtype, or with average [B, rows, Skv], and [heads, ...] and
        [...] for q of a lower rank. Differentiable in q, k, lse and bias. A row that sees no key is
        0. Beside the result, memory is linear in the lengths, in the backward too.
    """
    if unknown:
        habits.refuse_unknown(attention_weights, unknown)
    checks.flag("average", average)
    if dropout_p and dropout_seed is None:
        raise ValueError("dropout_p came without dropout_seed; accepted is the seed of the call "
                         "whose weights these are")  # fmt: skip
    call, rank, _, _ = dense_form({
        "q": q, "k": k, "v": k, "scale": scale, "causal": causal, "window": window, "align": align,
        "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "softcap": softcap,
        "sinks": sinks, "kv_lens": kv_lens, "document_ids": document_ids,
        "key_ranges": key_ranges, "head_origin": head_origin, "dropout_p": dropout_p,
        "dropout_seed": dropout_seed, "q_descale": None, "k_descale": None, "v_descale": None,
        "return_lse": True, "return_stats": None, "deterministic": None, "backend": None,
    })  # fmt: skip
    lse = _lse_of(call, lse, rank)
    if rows is not None:
        rows = _indices("rows", rows, call.q)
    if heads is None:
        made = _weights(call, lse, rows, average)
    else:
        calls = _of_heads(call, lse, _indices("heads", heads, call.q, dim=1), head_origin)
        parts = [_weights(*one, rows, False) for one in calls]
        made = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        made = made.mean(1) if average else made
    if rank == 4:
        return made
    made = made if average else made.squeeze(1)
    return made if rank == 3 else made[0]


def _weights(call: Call, lse: Tensor, rows: Tensor | None, average: bool) -> Tensor:
    if forward_ad._current_level >= 0:  # the operator has no tangents
        return probabilities.weights(call, lse, rows, average)
    return schema.weights(lse, *schema.arguments(call), rows, average)


def _lse_of(call: Call, lse: Tensor, rank: int) -> Tensor:
    checks.tensor("lse", lse)
    checks.on_device("lse", lse, call.q.device)
    wanted, dtype = tuple(call.q.shape[:3]), accumulate_dtype(call.q.dtype)
    own = wanted if rank == 4 else (wanted[0], wanted[2]) if rank == 3 else wanted[2:]
    if tuple(lse.shape) != own or lse.dtype != dtype:
        raise ValueError(
            f"lse is {lse.dtype} of shape {checks.show(lse)}; accepted is attention()'s, {dtype} "
            f"of shape {list(own)}"
        )
    return lse if rank == 4 else lse.reshape(wanted)


def _indices(name: str, x, q: Tensor, dim: int = 2) -> Tensor:
    """rows or heads as an int64 tensor of numbers in [0, n)."""
    n = q.shape[dim]
    if isinstance(x, slice):
        return torch.arange(n, device=q.device)[x] if (x.step or 1) > 0 else _refuse(name, x, n)
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
        _refuse(name, x, n)
    checks.on_device(name, x, q.device)
    if checks.has_values(x) and x.numel() and not (int(x.min()) >= 0 and int(x.max()) < n):
        raise ValueError(
            f"{name} has {int(x.min())} and {int(x.max())}; accepted are numbers in [0, {n})"
        )
    return x.long()


def _refuse(name: str, x, n: int):
    raise TypeError(
        f"{name} is {checks.said(x)}; accepted are an int64 tensor of one dimension with numbers "
        f"in [0, {n}), a slice that goes forward, and None for all"
    )


def _of_heads(call: Call, lse: Tensor, heads: Tensor, head_origin) -> list[tuple[Call, Tensor]]:
    """The call of these heads alone, and their lse. With dropout, which counts heads, one of each
    head: [(call, lse), ...]."""
    if call.spec.dropout_p:
        first, total = head_origin or (0, call.q.shape[1])
        return [
            _chosen(call, lse, heads[n : n + 1], (first + int(heads[n]), total))
            for n in range(heads.shape[0])
        ] or [_chosen(call, lse, heads, (0, total))]
    return [_chosen(call, lse, heads, None)]


def _chosen(call: Call, lse: Tensor, heads: Tensor, origin) -> tuple[Call, Tensor]:
    x, group = call.operands, call.q.shape[1] // max(1, call.k.shape[1])

    def of(y: Tensor | None, dim: int) -> Tensor | None:
        return y if y is None or y.shape[dim] == 1 < call.q.shape[1] else y.index_select(dim, heads)

    seed = x.dropout_seed
    if seed is not None and origin is not None:
        seed = torch.cat([seed[:2], seed.new_tensor(origin)])
    operands = replace(
        x, mask=of(x.mask, 1), bias=of(x.bias, 1), alibi_slopes=of(x.alibi_slopes, -1),
        sinks=of(x.sinks, 0), key_begin=of(x.key_begin, 1), key_end=of(x.key_end, 1),
        dropout_seed=seed,
    )  # fmt: skip
    k = call.k.index_select(1, heads // group)
    q = call.q.index_select(1, heads)
    return call.but(q=q, k=k, v=k, operands=operands), lse.index_select(1, heads)

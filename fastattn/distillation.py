"""Losses that make a student attend as its teacher does, in memory linear in the lengths.

The loss of row i is the KL divergence of the student's row from the teacher's,

    KL_i = sum_j Pt_ij (log Pt_ij - log Ps_ij) = lse_i - H_i - sum_j Pt_ij s_ij

with the teacher's probabilities Pt and their entropy H, the student's scores s and their lse. Where
s is tau q.k alone, the last sum is tau q_i . (sum_j Pt_ij k_j): the student's query times the
teacher's attention with the student's keys as values. So everything is a call of fused kernels,
and so is the gradient. Other scores (a bias, a softcap, ALiBi) are made again by chunks of rows.
Next hop: functional.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .backends import registry
from .capturing import unseen
from .core.call import Call
from .core.probabilities import probabilities
from .core.reference import (
    Piece,
    for_query_heads,
    keys_of,
    no_autocast,
    part_of,
    pieces,
    rows_of,
    scores_of,
)
from .core.statistics import Wanted
from .core.tensors import accumulate_dtype
from .forms import dense_form
from .functional import attention, run, run_with_statistics
from .records import Record

Reduction = Literal["mean", "sum", "none"]
CHUNK = 1 << 20  # scores of a chunk of rows, 4 MiB in float32
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(attention).parameters.items()
    if parameter.default is not parameter.empty
}
_OPTIONS = (  # those that change scores or hide keys
    *("scale", "causal", "window", "align", "mask", "bias", "alibi_slopes", "softcap", "sinks"),
    *("kv_lens", "document_ids", "key_ranges", "head_origin"),
)
_SHARED = (
    *("mask", "kv_lens", "kv_starts", "document_ids", "key_begin", "key_end"),
    *("cu_seqlens_q", "cu_seqlens_k"),
)


def relation(q: Tensor, k: Tensor, **options: Any) -> Call:
    """The rows softmax(scale q k^T) as the losses take them, of tensors that no capture() recorded.

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, Skv, D].
        options: those of attention() that change scores or hide keys.
    """
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise TypeError(f"relation() has no option {unknown[0]!r}; it has {', '.join(_OPTIONS)}")
    return dense_form(_DEFAULTS | options | {"q": q, "k": k, "v": k})[0]


def attention_transfer_loss(
    teacher: Record | Call,
    student: Record | Call,
    *,
    rows: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher's rows || student's rows), without their S x S matrices.

    Args:
        teacher: a record of capture(inputs=True), or a relation(). It gets no gradient.
        student: the same, of capture(inputs=True, grad=True) so that it does. It must have the
            teacher's number of heads and of keys, and may have another head dimension and other
            options for its scores; both must see the same keys.
        rows: bool [B, Sq] (or what broadcasts to [B, heads, Sq]): the rows that count, such as
            those of real tokens; None: all.
        reduction: "mean" over the rows that count, of all heads; "sum"; or "none": [B, heads, Sq].

    Returns:
        The loss in float32 (float64 for float64), in which it is computed. A row that sees no key
        counts 0. Its rounding is that of the scores, so that equal rows may give -1e-6.
        Differentiable in the student's queries, keys, bias and sinks.

    Raises:
        ValueError: sizes that differ, or keys that only one side sees.
        NotImplementedError: calls of paged or 8-bit caches.

    Source: the attention transfer of MiniLM (Wang et al., arXiv:2002.10957).
    """
    teacher, student = _call("teacher", teacher), _call("student", student)
    _check(teacher, student)
    # A mean of keys that is rounded to half precision would be off by as much as the loss.
    dtype = torch.promote_types(teacher.q.dtype, student.q.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        teacher = _widened(teacher, dtype)
    student = _widened(student, dtype)
    with unseen():
        return _reduced(_divergence(teacher, student), rows, reduction)


def relation_loss(
    teacher: Tensor,
    student: Tensor,
    *,
    relation_heads: int | None = None,
    rows: Tensor | None = None,
    reduction: Reduction = "mean",
    **options: Any,
) -> Tensor:
    """The attention-transfer loss of the relations softmax(x x^T / sqrt(D)) of two tensors, without
    S x S memory: of the values of two models as in MiniLM, or of queries or keys as in MiniLMv2.

    Args:
        teacher, student: [B, heads, S, D]; heads and D may differ where relation_heads is given.
        relation_heads: the heads' channels are joined and cut again into so many (MiniLMv2). None:
            the heads stay, and must be equally many.
        rows, reduction: as attention_transfer_loss() takes them.
        options: what hides keys: mask, kv_lens, causal, document_ids and so on, as attention()
            takes them.

    Sources: MiniLM (arXiv:2002.10957), MiniLMv2 (Wang et al., arXiv:2012.15828).
    """
    sides = []
    for name, x in (("teacher", teacher), ("student", student)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; accepted is [B, heads, S, D]")
        if relation_heads is not None:
            width = x.shape[1] * x.shape[3]
            if width % relation_heads:
                raise ValueError(f"relation_heads is {relation_heads}, and {name} has {width} "
                                 "channels in all; accepted is a divisor")  # fmt: skip
            x = x.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2)
        sides.append(relation(x, x, **options))
    return attention_transfer_loss(*sides, rows=rows, reduction=reduction)


def _widened(call: Call, dtype: torch.dtype) -> Call:
    """The call without values, with everything that scores are made of in `dtype`. Where gradients
    are off, in no graph."""
    x = call.operands
    q, k, bias, sinks = (
        None if y is None else y.to(dtype) if torch.is_grad_enabled() else y.detach().to(dtype)
        for y in (call.q, call.k, x.bias, x.sinks)
    )
    return call.but(q=q, k=k, v=k, operands=replace(x, bias=bias, sinks=sinks))


# ---- the divergence ------------------------------------------------------------------------------


def _divergence(teacher: Call, student: Call) -> Tensor:
    """[B, heads, Sq]"""
    keys = _for_heads(student.k, teacher.q.shape[1])
    wanted = teacher.but(k=_for_heads(teacher.k, teacher.q.shape[1]), v=keys,
                         statistics=Wanted.parse(("entropy",)))  # fmt: skip
    result, stats = run_with_statistics(wanted, registry.pick(None, wanted))
    student = student.but(v=student.k[..., :8].detach())  # lse does not depend on the values
    own = run(student, registry.pick(None, student)).lse
    sees = result.lse > -torch.inf
    if _only_products(student):
        expected = _expected_by_keys(student, result.out)
    else:
        expected = _expected_by_chunks(teacher, student, result.lse)
    sinks = student.operands.sinks
    if sinks is not None and teacher.operands.sinks is not None:
        share = (teacher.operands.sinks.to(own.dtype)[:, None] - result.lse).exp()
        expected = expected + share * sinks.to(own.dtype)[:, None]
    own = torch.where(sees, own, 0.0)
    return torch.where(sees, own - stats["entropy"].detach() - expected, 0.0)


def _only_products(call: Call) -> bool:
    x = call.operands
    return not call.spec.softcap and x.bias is None and x.alibi_slopes is None


def _expected_by_keys(student: Call, keys: Tensor) -> Tensor:
    """sum_j Pt_ij s_ij from the teacher's mean of the student's keys, [B, heads, Sq, D]."""
    compute = torch.promote_types(keys.dtype, torch.float32)
    return student.spec.scale * (student.q.to(compute) * keys.to(compute)).sum(-1)


def _expected_by_chunks(teacher: Call, student: Call, lse: Tensor) -> Tensor:
    """The same of any scores: the sum itself, a chunk of rows at a time, which the backward pass
    computes again."""
    x = student.operands
    expected = torch.zeros_like(lse)
    for piece in _chunks(student):
        tensors = (student.q, student.k, x.bias)
        part = checkpoint(_chunk, teacher, lse, student, piece, *tensors, use_reentrant=False,
                          preserve_rng_state=False)  # fmt: skip
        rows_of(expected, x, piece).copy_(part)
    return expected


def _chunks(call: Call) -> Iterator[Piece]:
    batch, heads = call.q.shape[:2]
    for piece in pieces(call.q, call.k, call.operands):
        row = heads * len(piece.j) * (batch if piece.sequence is None else 1)
        step = max(1, CHUNK // max(1, row))
        for start in range(piece.i.start, piece.i.stop, step) if len(piece.j) else ():
            yield piece._replace(i=range(start, min(start + step, piece.i.stop)))


def _chunk(teacher: Call, lse: Tensor, student: Call, piece: Piece, q, k, bias) -> Tensor:
    with torch.no_grad():
        scores = _scores(teacher, piece, teacher.q, teacher.k, teacher.operands.bias)
        probs = probabilities(scores, rows_of(lse, teacher.operands, piece))  # [b, heads, m, n]
    scores = _scores(student, piece, q, k, bias)
    return (probs * torch.where(probs > 0, scores, 0.0)).sum(-1)


def _scores(call: Call, piece: Piece, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    x, dtype = call.operands, accumulate_dtype(call.q.dtype)
    with no_autocast(q.device.type):
        rows = rows_of(q, x, piece).to(dtype)
        keys = for_query_heads(keys_of(k, x, piece), q.shape[1]).to(dtype)
        own = None if bias is None else part_of(bias, piece)
        return scores_of(rows, keys, own, call.spec, x, piece)[0]


def _for_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _reduced(losses: Tensor, rows: Tensor | None, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; accepted are 'mean', 'sum' and 'none'")
    count: Any = losses.numel()
    if rows is not None:
        if rows.dtype != torch.bool:
            raise TypeError(f"rows is {rows.dtype}; accepted is bool, True for a row that counts")
        rows = (rows[:, None] if rows.dim() == 2 else rows).expand_as(losses)
        losses, count = torch.where(rows, losses, 0.0), rows.sum()
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(1, count)


# ---- checks --------------------------------------------------------------------------------------


def _call(name: str, x: Any) -> Call:
    call = x.call if isinstance(x, Record) else x
    if not isinstance(call, Call):
        raise TypeError(
            f"{name} is a {type(x).__name__} without a call; accepted are a record of "
            "fastattn.capture(inputs=True) and relation(q, k, ...)"
        )
    if call.operands.paged or call.operands.descales:
        raise NotImplementedError(
            f"{name} is a call of a paged or 8-bit cache; accepted are calls of training"
        )
    if call.spec.dropout_p:  # the probabilities before dropout are compared
        operands = replace(call.operands, dropout_seed=None)
        call = call.but(spec=replace(call.spec, dropout_p=0.0), operands=operands)
    return call


def _check(teacher: Call, student: Call) -> None:
    if teacher.q.device != student.q.device:
        raise ValueError(f"the student is on {student.q.device} and the teacher on "
                         f"{teacher.q.device}; one device is accepted")  # fmt: skip
    for what, sizes in (
        ("batch entries, heads and rows", [x.q.shape[:3] for x in (teacher, student)]),
        ("keys", [x.k.shape[2:3] for x in (teacher, student)]),
    ):
        if sizes[0] != sizes[1]:
            raise ValueError(f"the student has {list(sizes[1])} {what} and the teacher "
                             f"{list(sizes[0])}; they must be equal")  # fmt: skip
    theirs, ours = (_band(x) for x in (teacher, student))
    if ours != theirs:
        raise ValueError(f"the student's (left, right, aligned to the end) is {ours} and the "
                         f"teacher's {theirs}; both must see the same keys")  # fmt: skip
    for name in _SHARED:
        a, b = (getattr(x.operands, name) for x in (teacher, student))
        if (a is None) != (b is None) or (a is not None and a is not b and not torch.equal(a, b)):
            raise ValueError(f"{name} of teacher and student differ; both must see the same keys")
    if teacher.operands.sinks is not None and student.operands.sinks is None:
        raise ValueError("the teacher has sinks and the student has none, which no row of the "
                         "student can equal; accepted is sinks on both, or on the student "
                         "alone")  # fmt: skip


def _band(call: Call) -> tuple[int, int, bool]:
    spec = call.spec
    return spec.left, spec.right, spec.align_end and max(spec.left, spec.right) >= 0

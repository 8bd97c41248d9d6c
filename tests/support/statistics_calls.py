"""Statistics of a case from its probabilities, which the reference gives for values that are the
unit vectors of the keys. They are differentiable, and nothing of fastattn.core.statistics is in
them."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Problem
from torch import Tensor

from fastattn.core.reference import reference


def probabilities(problem: Problem) -> tuple[Tensor, Tensor]:
    """(P before dropout [N, heads, rows, keys], lse): packed calls have the keys as they lie in
    memory, paged calls the slots of their sequence's row of the table."""
    q, k, _, spec, x = problem
    pages, kv_heads, length, _ = k.shape
    undropped = replace(spec, dropout_p=0.0)
    if not x.paged:
        unit = torch.eye(length, dtype=q.dtype).expand(pages, kv_heads, -1, -1)
        return reference(q, k, unit, undropped, x)
    unit = torch.eye(pages * length, dtype=q.dtype).view(pages, 1, length, -1)
    probs, lse = reference(q, k, unit.expand(-1, kv_heads, -1, -1), undropped, x)
    slots = (x.page_table.long()[..., None] * length + torch.arange(length)).flatten(1)
    slots = slots[_sequence_of_rows(problem)][None] if x.varlen else slots[:, None]
    return probs.gather(3, slots[:, None].expand(*probs.shape[:3], -1)), lse


def entropy_of(problem: Problem, probs: Tensor, lse: Tensor) -> Tensor:
    """-sum p log p over the keys and the sink, differentiable also where p is 0."""
    if problem.operands.sinks is not None:
        dead = lse == -torch.inf
        sink = (problem.operands.sinks[:, None] - torch.where(dead, 0.0, lse)).exp()
        probs = torch.cat([probs, torch.where(dead, 0.0, sink)[..., None]], -1)
    seen = torch.where(probs > 0, probs, 1.0)
    return -(seen * seen.log()).sum(-1)


def true_statistics(problem: Problem) -> dict[str, Tensor]:
    """lse, max_logit, entropy, column mass, and P itself."""
    probs, lse = probabilities(problem)
    largest = probs.amax(-1) if probs.shape[-1] else torch.zeros_like(lse)
    return {
        "probs": probs,
        "lse": lse,
        "max_logit": torch.where(largest > 0, lse + largest.log(), -torch.inf),
        "entropy": entropy_of(problem, probs, lse),
        "col_mass": probs.sum(2),
    }


def first_keys(problem: Problem) -> Tensor:
    """Where the keys of each row's sequence begin among those of probabilities(): [1, 1, rows]."""
    x = problem.operands
    if not x.varlen or x.paged:
        return torch.zeros(1, 1, problem.q.shape[2], dtype=torch.long)
    return x.cu_seqlens_k.long()[_sequence_of_rows(problem)].view(1, 1, -1)


def _sequence_of_rows(problem: Problem) -> Tensor:
    """The sequence of each row of a packed call; the last for rows of none."""
    cu = problem.operands.cu_seqlens_q.long()
    found = torch.searchsorted(cu, torch.arange(problem.q.shape[2]), right=True) - 1
    return found.clamp(max=len(cu) - 2)

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
    memory, paged calls the slots of a row of the table."""
    q, k, _, spec, x = problem
    pages, kv_heads, length, _ = k.shape
    undropped = replace(spec, dropout_p=0.0)
    if not x.paged:
        unit = torch.eye(length, dtype=q.dtype).expand(pages, kv_heads, -1, -1)
        return reference(q, k, unit, undropped, x)
    unit = torch.eye(pages * length, dtype=q.dtype).view(pages, 1, length, -1)
    probs, lse = reference(q, k, unit.expand(-1, kv_heads, -1, -1), undropped, x)
    slots = (x.page_table.long()[..., None] * length + torch.arange(length)).flatten(1)
    if x.packed:
        raise NotImplementedError("rows of several sequences have no slots in common")
    return probs.gather(3, slots[:, None, None].expand(*probs.shape[:3], -1)), lse


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
    """Where the keys of each row's sequence begin in memory: [N or 1, 1, rows]."""
    x = problem.operands
    rows = torch.arange(problem.q.shape[2])
    if not x.packed:
        return torch.zeros(1, 1, len(rows), dtype=torch.long)
    sequence = torch.searchsorted(x.cu_seqlens_q.long(), rows, right=True) - 1
    return x.cu_seqlens_k.long()[sequence.clamp(max=len(x.cu_seqlens_k) - 1)].view(1, 1, -1)

"""Cases of the CUDA kernels: shapes around their tiles, masks, options; plain attention; and the
tolerance of the forward kernels."""

from __future__ import annotations

from dataclasses import replace

import emulated
import torch
from cases import Case, Problem
from torch import Tensor

from fastattn.core.quantization import E4M3
from fastattn.core.reference import reference
from fastattn.core.tolerance import allowed_error

DIMS = (64, 128, 256)
# Tiles of sm_90 are 192 or 128 rows (64 a warpgroup) by 128 or 80 keys; of sm_80, 128 or 64 by 64
# or 32.
SHAPES = {
    "one": {"q_len": 1, "kv_len": 1},
    "row": {"q_len": 1, "kv_len": 300},
    "key": {"q_len": 200, "kv_len": 1},
    "tile": {"q_len": 192, "kv_len": 128},
    "odd": {"q_len": 131, "kv_len": 257},
    "long": {"q_len": 449, "kv_len": 449, "batch": 1, "heads": 1},
}
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "causal-start": {"causal": True, "align": "start"},
    "window": {"window": (37, 11)},
    "left": {"window": (90, None)},
    "right": {"window": (None, 3)},
    "sliding": {"window": (100, 0)},
    "diagonal": {"window": (0, 0)},
}
OPTIONS = {
    "gqa": {"heads": 6, "kv_heads": 2, "q_len": 70, "kv_len": 150, "causal": True},
    "kv_lens": {"batch": 4, "q_len": 90, "kv_len": 300, "kv_lens": (0, 1, 128, 255)},
    "kv_lens-causal": {
        "batch": 4, "q_len": 90, "kv_len": 300, "kv_lens": (0, 45, 300, 257), "causal": True,
    },
    "kv_starts": {
        "batch": 3, "q_len": 90, "kv_len": 300, "kv_lens": (20, 300, 280),
        "kv_starts": (20, 0, 131),
    },
    "kv_starts-window": {
        "batch": 3, "q_len": 130, "kv_len": 300, "kv_lens": (290, 300, 280),
        "kv_starts": (7, 0, 131), "window": (64, 0),
    },
    "softcap": {"q_len": 150, "kv_len": 300, "softcap": 3.0},
    "softcap-causal": {"q_len": 150, "kv_len": 300, "softcap": 20.0, "causal": True, "scale": 0.7},
    "sinks": {"q_len": 150, "kv_len": 300, "sinks": True, "causal": True},
    "sinks-dead": {"batch": 3, "q_len": 70, "kv_len": 90, "sinks": True, "kv_lens": (0, 1, 90)},
    "scale-negative": {"q_len": 70, "kv_len": 150, "scale": -0.4, "causal": True},
    "scale-zero": {"q_len": 70, "kv_len": 150, "scale": 0.0, "window": (30, 30)},
    "scale-large": {"q_len": 70, "kv_len": 150, "scale": 3.0},
    "dead-rows": {"q_len": 400, "kv_len": 100, "causal": True, "batch": 1},
    "bshd": {"q_len": 100, "kv_len": 200, "layout": "bshd", "causal": True},
    "qkv": {"q_len": 150, "kv_len": 150, "layout": "qkv"},
    "one_kv_head": {
        "q_len": 150, "kv_len": 150, "heads": 4, "kv_heads": 1, "layout": "one_kv_head",
    },
}  # fmt: skip


# Sequences one after the other: packed ones, and documents.
PACKED = {
    "few": {"packed": ((70, 150), (1, 1), (128, 128))},
    "empty": {"packed": ((0, 30), (50, 0), (0, 0), (65, 200))},
    "causal": {"packed": ((200, 200), (33, 90), (64, 64), (1, 300)), "causal": True},
    "window": {"packed": ((150, 260), (90, 40)), "window": (60, 5), "sinks": True},
    "one": {"packed": ((131, 131),)},
    "lengths": {
        "packed": ((70, 150), (90, 40), (20, 20)), "kv_lens": (100, 3, 0), "heads": 4,
        "kv_heads": 2, "causal": True,
    },
    "documents-few": {"documents": (1, 50, 17, 64, 7), "q_len": 139, "kv_len": 139},
    "documents-gqa": {
        "documents": (200, 3, 190), "q_len": 393, "kv_len": 393, "heads": 4, "kv_heads": 2,
        "causal": True,
    },
    "documents-lengths": {
        "documents": (130, 50, 20), "q_len": 200, "kv_len": 200, "batch": 4, "causal": True,
        "kv_lens": (0, 60, 200, 170), "sinks": True,
    },
    "documents-starts": {
        "documents": (130, 50, 20), "q_len": 200, "kv_len": 200, "batch": 3,
        "kv_lens": (200, 150, 30), "kv_starts": (140, 0, 30), "window": (90, 5),
    },
    "documents-tiny": {"documents": (1,) * 65, "q_len": 65, "kv_len": 65, "causal": True},
    "documents-one": {"documents": (139,), "q_len": 139, "kv_len": 139, "causal": True},
}  # fmt: skip


def visible(problem: Problem) -> Tensor:
    """[B, 1, q_len, kv_len]: which keys a row sees."""
    q, k, _, spec, x = problem
    seen = torch.zeros(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool)
    sequences = x.cu_seqlens_q.shape[0] - 1 if x.packed else q.shape[0]
    for i in range(sequences):
        view = seen[0 if x.packed else i]
        if x.packed:
            own, theirs = (
                slice(*cu[i : i + 2].tolist()) for cu in (x.cu_seqlens_q, x.cu_seqlens_k)
            )
            view = view[own, theirs]
        rows, keys = torch.arange(view.shape[0])[:, None], torch.arange(view.shape[1])
        n = view.shape[1] if x.kv_lens is None else x.kv_lens[i].item()
        start = 0 if x.kv_starts is None else x.kv_starts[i].item()
        view |= (keys >= spec.lo(rows, len(rows), n)) & (keys < spec.hi(rows, len(rows), n))
        view &= (keys >= start) & (keys < n)
        if x.document_ids is not None:
            view &= x.document_ids[i, :, None] == x.document_ids[i]
    return seen[:, None]


def exact(problem: Problem) -> Problem:
    """The exact result, in float64."""
    wide = problem.to(torch.float64)
    tensors = list(wide[:3])
    for i, scale in enumerate(problem.operands.descales or ()):
        if scale is not None:
            of_heads = scale.double().repeat_interleave(tensors[i].shape[1] // scale.shape[-1], -1)
            tensors[i] = tensors[i] * of_heads[..., None, None]
    return Problem(*tensors, wide.spec, replace(wide.operands, descales=None))


def plain_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) with every step in the problem's dtype, rounded as torch's own math would be. For
    float8, the probs, scaled to a largest value of 256, and the result are in bfloat16."""
    float8 = problem.q.dtype == E4M3
    q, k, v, spec, x = exact(problem) if float8 else problem
    q = q.nan_to_num()
    seen, group = visible(problem), q.shape[1] // k.shape[1]
    k, v = (y.nan_to_num().repeat_interleave(group, 1) for y in (k, v))
    scores = (q @ k.mT) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    dead = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0)
    if x.sinks is not None:
        sinks = x.sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    lse = scores.float().logsumexp(-1)
    probs = scores.softmax(-1)[..., : k.shape[2]].masked_fill(dead, 0)
    if float8:
        step = probs.amax(-1, keepdim=True).masked_fill(dead, 1) / 256
        probs = (probs / step).to(E4M3).double() * step
    out = (probs @ v).to(torch.bfloat16 if float8 else q.dtype)
    return out, lse.masked_fill(dead[..., 0], -torch.inf)


def check_forward(case: Case, dtype: torch.dtype, seed: int, **how) -> None:
    check_problem(case.make(dtype, seed), seed, **how)


def check_problem(problem: Problem, seed: int, **how) -> None:
    """At most twice the error of plain attention in its dtype, plus a rounding of the result."""
    out, lse = emulated.forward(problem, seed, **how)
    expected, expected_lse = reference(*exact(problem))
    paged = problem.operands.paged  # then math in fp32, whose error is a rounding
    plain, _ = reference(*problem) if paged else plain_attention(problem)
    floor = (2 if paged else 1) * torch.finfo(out.dtype).eps * expected.abs().max()
    limit = allowed_error("result", (plain.double() - expected).abs().max(), floor)
    assert (out.double() - expected).abs().max() <= limit
    dead = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead)
    assert out[dead].eq(0).all()
    torch.testing.assert_close(lse[~dead].double(), expected_lse[~dead], atol=2e-5, rtol=2e-6)

"""What a call cannot avoid, counted exactly: arithmetic on visible pairs, compulsory traffic."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("fwd", "bwd", "fwdbwd")
FORMULAS = {  # FLOP, 2 per multiply-add, softmax not counted
    "fwd": "2 (D + Dv) per visible pair",
    "bwd": "2 (3 D + 2 Dv) per visible pair",
    "fwdbwd": "2 (4 D + 3 Dv) per visible pair",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot avoid: arithmetic on the visible pairs, and compulsory traffic."""

    pairs: int
    flops: int
    bytes: int


def attention_work(
    *,
    pairs: int,  # visible pairs over all batches and query heads
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,  # keys that exist: those past a padding mask need not be read
    dim: int,
    v_dim: int | None = None,
    itemsize: int = 4,
    mask_bytes: int = 0,  # a bool mask: read once in each pass
    bias_bytes: int = 0,  # a learned bias: read once in each pass, its gradient written once
    mode: str = "fwd",
) -> Work:
    """FLOPs: 2 per multiply-add. Forward: QK^T and PV, 2 (D + Dv) a pair. Backward: five products,
    QK^T again, dO V^T, dS K, dS^T Q and P^T dO, 2 (3 D + 2 Dv) a pair (2.5 forwards at D = Dv).
    Softmax is not counted. Bytes: each operand read once and each result written once, per pass."""
    v_dim = dim if v_dim is None else v_dim
    q_bytes = batch * heads * q_len * dim * itemsize
    k_bytes = batch * kv_heads * kv_len * dim * itemsize
    v_bytes = batch * kv_heads * kv_len * v_dim * itemsize
    out_bytes = batch * heads * q_len * v_dim * itemsize
    lse_bytes = batch * heads * q_len * 4  # kept only for a backward pass
    inputs = q_bytes + k_bytes + v_bytes
    flops = {"fwd": 2 * (dim + v_dim) * pairs, "bwd": 2 * (3 * dim + 2 * v_dim) * pairs}
    moved = {
        "fwd": inputs + out_bytes + (lse_bytes if mode != "fwd" else 0) + mask_bytes + bias_bytes,
        "bwd": 2 * inputs + 2 * out_bytes + lse_bytes + mask_bytes + 2 * bias_bytes,
    }
    passes = ("fwd", "bwd") if mode == "fwdbwd" else (mode,)
    return Work(pairs, sum(flops[p] for p in passes), sum(moved[p] for p in passes))

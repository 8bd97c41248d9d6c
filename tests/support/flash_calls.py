"""Shared by the tests of fastattn.flash_attn: a plain float64 reference, options, sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.philox import keep_probability


class Plain(NamedTuple):
    out: Tensor  # [Sq, H, Dv]
    lse: Tensor  # [H, Sq]
    weights: Tensor  # [H, Sq, Skv], before dropout


def plain(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, dropout_p=0.0, kept=None, first=0, **_ignored,
) -> Plain:  # fmt: skip
    """One sequence, q [Sq, H, D], k and v [Skv, Hkv, D], by FlashAttention 2's documentation.

    alibi_slopes [H]; kept [H, Sq, Skv]: what dropout keeps; keys before `first` do not exist.
    """
    (rows, heads, dim), keys = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (
        dim**-0.5 if softmax_scale is None else softmax_scale
    )
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    j = torch.arange(keys)
    ahead = j - (torch.arange(rows)[:, None] + keys - rows)  # [Sq, Skv]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * ahead.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = (j >= first).expand(rows, keys)
    seen = seen & (ahead >= -left) if left >= 0 else seen
    seen = seen & (ahead <= right) if right >= 0 else seen
    blind = ~seen.any(-1)  # [Sq]
    scores = torch.where(blind[:, None], 0.0, torch.where(seen, scores, -torch.inf))
    lse = torch.where(blind, torch.inf, scores.logsumexp(-1))
    weights = torch.where(blind[:, None], 0.0, scores.softmax(-1))
    used = weights if kept is None else weights * kept / keep_probability(dropout_p)
    return Plain(torch.einsum("hij,jhd->ihd", used, v), lse, weights)


def slopes_of(slopes, n):
    return slopes[n] if slopes is not None and slopes.dim() == 2 else slopes


def plain_batch(q, k, v, alibi_slopes=None, kept=None, **options):
    """plain() of each entry of [B, S, H, D]: out [B, Sq, H, Dv], lse [B, H, Sq], probs."""
    each = [
        plain(
            q[n], k[n], v[n], alibi_slopes=slopes_of(alibi_slopes, n),
            kept=None if kept is None else kept[n], **options,
        )
        for n in range(q.shape[0])
    ]  # fmt: skip
    return Plain(*(torch.stack(x) for x in zip(*each)))


BATCH, HEADS, DIM = 2, 4, 8

# Each is one option; the tests combine them in pairs.
OPTIONS = {
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (3, -1)},
    "right": {"window_size": (-1, 2)},
    "scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "alibi of entries": {"alibi_slopes": torch.linspace(0.1, 0.8, 8).view(BATCH, HEADS)},
    "dropout": {"dropout_p": 0.3},
    "deterministic": {"deterministic": True},
    "one kv head": {"kv_heads": 1},
    "two kv heads": {"kv_heads": 2},
}  # fmt: skip


def pairs():
    """(name, options) of every option alone and with every other that it does not contradict."""
    names = list(OPTIONS)
    for n, a in enumerate(names):
        yield a, dict(OPTIONS[a])
        for b in names[n + 1 :]:
            if not OPTIONS[a].keys() & OPTIONS[b].keys():
                yield f"{a}, {b}", OPTIONS[a] | OPTIONS[b]


def gradients(results, weights, inputs):
    """Gradients of sum(w * finite result) over (result, w) pairs."""
    loss = sum(
        (torch.where(x.isfinite(), x, 0.0) * w).sum() for x, w in zip(results, weights, strict=True)
    )
    return torch.autograd.grad(loss, inputs)


def assert_all_close(got, want, **tolerances):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **tolerances)

"""Random bits for dropout: Philox4x32-10, 16 bits per score, in plain torch.

The bits are a pure function of (seed, offset, batch x head, row, key). Tile shape, device, dtype
and head dimension do not enter, so that every backend drops the same attention probabilities.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The same functions
in C++: csrc/philox.h; in Triton: kernels/philox.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Indices into the operand dropout_seed: int64 [2], or [4] where the call has some of a model's
# heads (tensor parallelism) and dropout counts heads over the whole model. csrc/philox.h and
# kernels/philox.py have the same names.
SEED, OFFSET, FIRST_HEAD, TOTAL_HEADS = range(4)

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def keep_threshold(p: float) -> int:
    """A score is kept where its 16 bits are below this: (1 - p) * 65536 rounded, at least 1."""
    return max(1, math.floor((1.0 - p) * 65536 + 0.5))


def keep_probability(p: float) -> float:
    """The exact chance of being kept: 1 - p rounded to a multiple of 1/65536, at least one."""
    return keep_threshold(p) / 65536


def heads_of(dropout_seed: Tensor, sequences: range, heads: int) -> Tensor:
    """The batch x head numbers that dropout takes for the heads of these sequences: int64
    [len(sequences) * heads]."""
    first, total = 0, heads
    if len(dropout_seed) > FIRST_HEAD:
        first, total = dropout_seed[FIRST_HEAD:].tolist()
    n = torch.arange(sequences.start, sequences.stop, device=dropout_seed.device)[:, None]
    return (n * total + first + torch.arange(heads, device=dropout_seed.device)).flatten()


def keep_mask(seed, heads_total: int, q_len: int, kv_len: int, p: float, *, device=None) -> Tensor:
    """Which attention probabilities dropout keeps: bool [heads_total, q_len, kv_len], True = kept.

    Args:
        seed: the pair (seed, offset), two 64-bit integers or an int64 tensor [2].
        heads_total: batch * heads; with tensor parallelism, the heads of the whole model.
        p: the probability of dropping, in [0, 1).
    """
    bh, i, j = (torch.arange(n, device=device) for n in (heads_total, q_len, kv_len))
    return keep_block(seed, bh, i, j, p)


def keep_block(seed, bh: Tensor, i: Tensor, j: Tensor, p: float) -> Tensor:
    """keep_mask at chosen indices: int64 vectors bh [N] (batch x head), i [M] (rows) and j [L]
    (keys) give bool [N, M, L]. seed may also be the operand dropout_seed of four numbers, of which
    the last two are not read."""
    seed = seed.tolist() if isinstance(seed, Tensor) else seed
    seed, offset = int(seed[SEED]), int(seed[OFFSET])
    key = (seed & _LOW32, ((seed >> 32) ^ (offset >> 32)) & _LOW32)
    # One Philox call gives the bits of rows i and i ^ 8 at keys j, j ^ 1, j ^ 8 and j ^ 9, as the
    # fragments of tensor cores lie. Each call is computed once.
    row_calls, row = torch.unique((i >> 4) * 8 + (i & 7), return_inverse=True)
    key_calls, col = torch.unique((j >> 4) * 4 + ((j & 7) >> 1), return_inverse=True)
    counter = (row_calls[:, None], key_calls, bh[:, None, None], offset & _LOW32)
    words = torch.stack(philox4x32(counter, key), dim=-1)  # [N, row calls, key calls, 4]
    word = 2 * ((i[:, None] >> 3) & 1) + ((j >> 3) & 1)  # [M, L]: which of the four words
    bits = words[:, row[:, None], col, word] >> (16 * (j & 1)) & 0xFFFF
    return bits < keep_threshold(p)


def keep_rows(seed, rows: int, columns: int, p: float, *, device=None) -> Tensor:
    """Which elements the row kernels (norm, activation) keep: bool [rows, columns].

    seed is the pair (seed, offset), as in keep_mask. One Philox call gives the bits of eight
    elements in a block of 64 columns: column c takes 16-bit half (c >> 3) & 1 of word (c >> 4) & 3
    of call (c >> 6) * 8 + (c & 7). The same in C++: csrc/cpu/rows.inl.
    """
    seed, offset = seed.tolist() if isinstance(seed, Tensor) else map(int, seed)
    key = (seed & _LOW32, ((seed >> 32) ^ (offset >> 32)) & _LOW32)
    blocks = -(-columns // 64)
    call = torch.arange(8 * blocks, device=device)
    row = torch.arange(rows, device=device)[:, None]
    words = philox4x32((call, row & _LOW32, row >> 32, offset & _LOW32), key)
    words = torch.stack(words, dim=-1).view(rows, blocks, 8, 4).transpose(2, 3)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=3)  # [rows, blocks, 4, 2, 8]
    return bits.flatten(1)[:, :columns] < keep_threshold(p)


def philox4x32(counter, key) -> Any:
    """Ten rounds of Philox4x32: counter (four 32-bit words) and key (two) give four words. Each is
    an int, or an int64 tensor; tensors broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _multiply(_MULTIPLIERS[0], c0)
        high_b, low_b = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def _multiply(a: int, b):
    """The high and low 32-bit words of a * b. b is multiplied in two 16-bit pieces, so that no
    product reaches 2^63."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (lower + ((upper & 0xFFFF) << 16)) & _LOW32
    return high, low

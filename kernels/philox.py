"""Dropout's random bits, the same on every backend, as in csrc/philox.h. Next: score.py."""

import triton
import triton.language as tl

# Where the numbers of the operand dropout_seed lie, as in fastattn/core/philox.py.
SEED, OFFSET = tl.constexpr(0), tl.constexpr(1)
FIRST_HEAD, TOTAL_HEADS = tl.constexpr(2), tl.constexpr(3)


@triton.jit
def dropout_key(pointer):
    """(key, last counter word) of seed and offset. The offset's upper 32 bits go into the key, its
    lower 32 bits into the counter."""
    seed, offset = tl.load(pointer + SEED), tl.load(pointer + OFFSET)
    return seed ^ (offset >> 32 << 32), offset.to(tl.int32)  # the lower 32 bits


@triton.jit
def dropout_head(p, n, head):
    """The index of a head of sequence n in dropout's counter."""
    if p.dropout.sharded is not None:
        first, total = tl.load(p.dropout.seed + FIRST_HEAD), tl.load(p.dropout.seed + TOTAL_HEADS)
        counted = (n * total + first + head).to(tl.int32)
    else:
        counted = n * p.heads + head
    return counted


@triton.jit
def keep_tile(
    p, bh, i0, j0, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Whether the probability of each row from i0 on and key from j0 on is kept: bool [BLOCK_I,
    BLOCK_J], or transposed [BLOCK_J, BLOCK_I].

    i0, j0 and the blocks are multiples of 16. One philox call makes eight 16-bit numbers, for
    rows i and i ^ 8 and keys j, j ^ 1, j ^ 8 and j ^ 9.
    """
    row = i0 // 2 + tl.arange(0, BLOCK_I // 2)
    column = j0 // 4 + tl.arange(0, BLOCK_J // 4)
    zero = tl.zeros([BLOCK_I // 2, BLOCK_J // 4], tl.int32)
    key, last = dropout_key(p.dropout.seed)
    w0, w1, w2, w3 = tl.philox(key, zero + row[:, None], zero + column, zero + bh, zero + last)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., .., half of rows, half of keys]
    bits = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    kept = (bits < p.dropout.threshold).to(tl.int8)
    kept = tl.reshape(kept, [BLOCK_I // 16, 8, BLOCK_J // 16, 4, 2, 2, 2])
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, 2, 5, 3, 6, 0, 4, 1), [BLOCK_J, BLOCK_I])
    else:
        kept = tl.reshape(tl.permute(kept, 0, 4, 1, 2, 5, 3, 6), [BLOCK_I, BLOCK_J])
    return kept != 0


@triton.jit
def keep_each(p, bh, i, j):
    """The same for i and j that broadcast: a philox call for every probability."""
    zero = (bh + i + j) * 0
    key, last = dropout_key(p.dropout.seed)
    row, column = i // 16 * 8 + i % 8, j // 16 * 4 + j % 8 // 2
    w0, w1, w2, w3 = tl.philox(key, zero + row, zero + column, zero + bh, zero + last)
    upper_row, upper_key = zero + i // 8 % 2, zero + j // 8 % 2
    low, high = tl.where(upper_key == 1, w1, w0), tl.where(upper_key == 1, w3, w2)
    word = tl.where(upper_row == 1, high, low)
    bits = tl.where(zero + j % 2 == 1, word >> 16, word & 0xFFFF).to(tl.int32)
    return bits < p.dropout.threshold

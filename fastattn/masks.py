"""Common masks as key_ranges: two int32 tensors instead of a [rows, keys] mask.

    ranges = fastattn.masks.chunked(8192, q_len=32768, device=q.device)
    out = fastattn.attention(q, k, v, causal=True, key_ranges=ranges)

Each function returns (begin, end) of the smallest shapes that broadcast to [B, heads, rows]. Rows
(queries) and keys are counted as positions in the sequence, and `offset` is the position of row 0
among the keys: 0 where rows and keys are the same tokens; kv_len - q_len where the last row is at
the last key (align="end"); or the number of keys in a cache before new tokens. It is an int, or an
int tensor [B] (for packed sequences, [N]) where sequences differ. No value is read, so nothing
synchronizes with a GPU. Next hop: core/ranges.py, which checks key_ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import checks

__all__ = ["block_causal", "chunked", "prefix"]


def prefix(
    prefix_lens: Tensor | int,
    q_len: int,
    *,
    offset: Tensor | int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """A prefix that all rows see, and causal attention after it (prefix-LM, PaliGemma).

    The row at position p sees keys j < max(prefix_len, p + 1): attention within the prefix is
    bidirectional. Do not add causal=True, which would make the prefix causal too.

    Args:
        prefix_lens: int tensor [B], the prefix length of each sequence, or an int for all.
        q_len: rows of q, Sq (for packed sequences, max_seqlen_q).
        offset: the position of row 0, an int or [B]; see the module's docstring.
        device: of the results; None: that of the tensors given, else the CPU.

    Returns:
        begin [1, 1, 1], which is 0, and end [B or 1, 1, q_len].

    >>> begin, end = prefix(torch.tensor([2, 0]), q_len=4)
    >>> end[:, 0].tolist()
    [[2, 2, 3, 4], [1, 2, 3, 4]]
    """
    device = _device_of(device, prefix_lens, offset)
    lengths = _per_sequence("prefix_lens", prefix_lens, device)
    end = torch.maximum(_positions(q_len, offset, device) + 1, lengths)
    return _zero(device), _int32(end)


def chunked(
    chunk_size: int,
    q_len: int,
    *,
    offset: Tensor | int = 0,
    first: Tensor | int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within chunks of `chunk_size` tokens (Llama 4's local layers).

    The row at position p sees keys [c, c + chunk_size), where c = chunk_size * (p // chunk_size) is
    the start of its chunk. Add causal=True for causal attention within a chunk, as in Llama 4.

    Args:
        chunk_size: tokens of a chunk, at least 1.
        q_len: rows of q, Sq (for packed sequences, max_seqlen_q).
        offset: the position of row 0, an int or [B]; see the module's docstring.
        first: the position where the first chunk begins, an int or [B]: the length of a sequence's
            padding on the left.
        device: of the results; None: that of the tensors given, else the CPU.

    Returns:
        begin and end, [B or 1, 1, q_len] each.

    >>> begin, end = chunked(3, q_len=4, offset=2)
    >>> begin.flatten().tolist(), end.flatten().tolist()
    ([0, 3, 3, 3], [3, 6, 6, 6])
    """
    chunk_size = _size("chunk_size", chunk_size)
    device = _device_of(device, offset, first)
    start = _per_sequence("first", first, device)
    chunk = torch.div(_positions(q_len, offset, device) - start, chunk_size, rounding_mode="floor")
    begin = chunk * chunk_size + start
    return _int32(begin), _int32(begin + chunk_size)


def block_causal(
    block_sizes: int | Sequence[int],
    q_len: int,
    *,
    offset: Tensor | int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each block sees all of itself and of the blocks before it (frames of a video, scales of an
    image, blocks of a block diffusion model).

    Args:
        block_sizes: tokens of every block, or a list with the tokens of each. Rows past the last
            block belong to it; rows before position 0 see nothing.
        q_len: rows of q, Sq (for packed sequences, max_seqlen_q).
        offset: the position of row 0, an int or [B]; see the module's docstring.
        device: of the results; None: that of the tensors given, else the CPU.

    Returns:
        begin [1, 1, 1], which is 0, and end [B or 1, 1, q_len].

    >>> begin, end = block_causal([1, 2, 4], q_len=5)
    >>> end.flatten().tolist()
    [1, 3, 3, 7, 7]
    """
    device = _device_of(device, offset)
    p = _positions(q_len, offset, device)
    if isinstance(block_sizes, (list, tuple)):
        sizes = [_size("block_sizes", n) for n in block_sizes]
        if not sizes:
            raise ValueError("block_sizes is empty; accepted are an int and a sequence of ints")
        ends = torch.tensor(sizes, device=device).cumsum(0)
        block = torch.searchsorted(ends, p.contiguous(), right=True).clamp(max=len(sizes) - 1)
        return _zero(device), _int32(torch.where(p < 0, 0, ends[block]))
    size = _size("block_sizes", block_sizes)
    return _zero(device), _int32((torch.div(p, size, rounding_mode="floor") + 1) * size)


def _positions(q_len: int, offset: Tensor | int, device) -> Tensor:
    """The position of each row: int64 [B or 1, 1, q_len]."""
    rows = torch.arange(checks.length("q_len", q_len), device=device)
    return rows + _per_sequence("offset", offset, device)


def _per_sequence(name: str, x: Tensor | int, device) -> Tensor:
    """An int or int tensor [B] as int64 [B or 1, 1, 1], in which no sum of positions overflows."""
    if not isinstance(x, Tensor):
        if not -checks.MAX_LENGTH < checks.integer(name, x) < checks.MAX_LENGTH:
            raise ValueError(f"{name} is {x}; accepted is an int in (-2**30, 2**30)")
        x = torch.full((1,), x, dtype=torch.int64, device=device)
    if x.dtype not in (torch.int32, torch.int64) or x.dim() > 1:
        raise TypeError(f"{name} is {x.dtype} of shape {checks.show(x)}; accepted are an int and "
                        "an int32 tensor [B]")  # fmt: skip
    x = x.to(device, torch.int64).view(-1, 1, 1)
    return x.clamp(-checks.MAX_LENGTH, checks.MAX_LENGTH)


def _int32(x: Tensor) -> Tensor:
    """Positions as int32. Beyond MAX_LENGTH there are no keys, so nothing is lost by clamping."""
    return x.clamp(-checks.MAX_LENGTH, checks.MAX_LENGTH).to(torch.int32)


def _size(name: str, x) -> int:
    x = checks.integer(name, x)
    if not 1 <= x < checks.MAX_LENGTH:
        raise ValueError(f"{name} is {x}; accepted is an int in [1, 2**30)")
    return x


def _zero(device) -> Tensor:
    return torch.zeros(1, 1, 1, dtype=torch.int32, device=device)


def _device_of(device, *tensors) -> torch.device:
    given = (x.device for x in tensors if isinstance(x, Tensor))
    return next(given, torch.device("cpu")) if device is None else torch.device(device)

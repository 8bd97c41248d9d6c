"""From padded batches to packed tokens and back: the functions of flash_attn.bert_padding.

Imports are absolute so that the file also loads as flash_attn.bert_padding, where the package
stands in for flash_attn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core import checks
from fastattn.flash_attn.absent import absent

_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one sequence after the other.

    Args:
        hidden_states: [B, S, ...], any dtype.
        attention_mask: [B, S] bool or int; nonzero tokens are kept.
        unused_mask: [B, S] bool or int; nonzero tokens are also kept in the packed tensor, but
            seqused does not count them.

    Returns:
        (tokens, indices, cu_seqlens, max_seqlen, seqused), as in FlashAttention 2.7: tokens
        [T, ...], differentiable; indices [T] int64, their positions among the B * S; cu_seqlens
        [B + 1] int32; max_seqlen, an int; seqused [B] int32.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype or shape.
    """
    used = _mask("attention_mask", attention_mask, hidden_states)
    kept = used
    if unused_mask is not None:
        kept = used | _mask("unused_mask", unused_mask, hidden_states)
    lens, seqused = (x.sum(dim=-1, dtype=torch.int32) for x in (kept, used))
    tokens, indices = _take(hidden_states, kept)
    return tokens, indices, _offsets(lens), _longest(lens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """unpad_input() for batch rows that hold several sequences each.

    Args:
        hidden_states: [B, S, ...]: a row has its sequences one after the other, then padding.
        attention_mask_in_length: [B, S] int: the lengths of the row's sequences, then zeros. With
            S = 6, [2, 3, 0, 0, 0, 0] means two tokens, three tokens and one of padding.

    Returns:
        (tokens, indices, cu_seqlens, max_seqlen) as in unpad_input; cu_seqlens [N + 1] is for the
        N sequences of all rows.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype or shape, or lengths that are
            negative or more than S in a row.
    """
    lengths = _mask("attention_mask_in_length", attention_mask_in_length, hidden_states, dtype=None)
    totals, capacity = lengths.sum(dim=-1), lengths.shape[1]
    if checks.has_values(lengths) and bool(((totals > capacity) | (lengths < 0).any(-1)).any()):
        raise ValueError(
            f"attention_mask_in_length has rows that sum to {totals.tolist()}; accepted are "
            f"lengths that are not negative and sum to at most {capacity} in each row"
        )
    lens = lengths.flatten()
    lens = lens[lens != 0].to(torch.int32)
    kept = torch.arange(capacity, device=lengths.device) < totals.unsqueeze(1)
    return *_take(hidden_states, kept), _offsets(lens), _longest(lens)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: tokens at their positions, zeros elsewhere. Differentiable.

    Args:
        hidden_states: [T, ...], any dtype.
        indices: [T] int64 or int32: the position of each token among the batch * seqlen.
        batch, seqlen: sizes of the result.

    Returns:
        [batch, seqlen, ...].

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value.
    """
    batch, seqlen = checks.length("batch", batch), checks.length("seqlen", seqlen)
    rows = checks.tensor("hidden_states", hidden_states).shape[:1]
    indices = _indices(indices, hidden_states, batch * seqlen)
    if indices.shape != rows:
        raise ValueError(
            f"indices has shape {checks.show(indices)} and hidden_states "
            f"{checks.show(hidden_states)}; accepted is one index for each token"
        )
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy_(0, indices, hidden_states).view(batch, seqlen, *padded.shape[1:])


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices] for input [N, ...] and indices [T]: [T, ...], differentiable.

    The gradient of a repeated index is the sum of its gradients (FlashAttention keeps one of them).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value.
    """
    if checks.tensor("input", input).dim() < 1:
        raise ValueError("input has shape []; accepted is [N, ...]")
    return input.index_select(0, _indices(indices, input, input.shape[0]))


def _take(hidden_states, kept):
    """(tokens, indices) where kept [B, S] is True."""
    indices = kept.flatten().nonzero().flatten()
    return hidden_states.flatten(0, 1).index_select(0, indices), indices


def _offsets(lens):
    return torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lens) -> int:
    return int(lens.max()) if lens.numel() else 0


def _mask(name, x, hidden_states, dtype=torch.bool):
    """x, checked to be [B, S] of integers or bools, as bool (unchanged with dtype=None)."""
    if checks.tensor("hidden_states", hidden_states).dim() < 2:
        raise ValueError(
            f"hidden_states has shape {checks.show(hidden_states)}; accepted is [B, S, ...]"
        )
    if checks.tensor(name, x).device != hidden_states.device:
        raise ValueError(
            f"{name} is on {x.device} and hidden_states on {hidden_states.device}; one device is "
            "accepted"
        )
    if x.dtype not in _MASKS or (dtype is None and x.dtype == torch.bool):
        accepted = "integers" if dtype is None else "bool and integers, 0 for padding"
        raise TypeError(f"{name} is {x.dtype}; accepted are {accepted}")
    if x.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} has shape {checks.show(x)}; accepted is hidden_states' [B, S] = "
            f"{list(hidden_states.shape[:2])}"
        )
    return x if dtype is None else x != 0


def _indices(x, other, rows):
    """x, checked to be [T] integers in [0, rows), as int64."""
    if checks.tensor("indices", x).dtype not in (torch.int32, torch.int64) or x.dim() != 1:
        raise TypeError(
            f"indices is {x.dtype} of shape {checks.show(x)}; accepted is int64 (or int32) [T]"
        )
    if x.device != other.device:
        raise ValueError(f"indices is on {x.device} and the tokens on {other.device}; one device "
                         "is accepted")  # fmt: skip
    if checks.has_values(x) and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < rows:
        raise ValueError(
            f"indices reach from {int(x.min())} to {int(x.max())}; accepted is [0, {rows - 1}]"
        )
    return x.long()


def __getattr__(name: str):
    raise absent(__name__, name)

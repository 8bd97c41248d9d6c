"""Checks and conversion of models' inputs: tokens, padding masks, labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..nn import LinearCrossEntropy

IGNORED = -100  # a label without a loss
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tokens(name: str, ids: Tensor, vocab_size: int, max_len: int) -> Tensor:
    """ids as int64, checked to be integers [B, S] in [0, vocab_size) with S at most max_len. Values
    are checked only on the CPU, where reading them does not synchronize."""
    if checks.tensor(name, ids).dim() != 2 or ids.dtype not in INTEGERS:
        raise ValueError(f"{name} is {ids.dtype} {checks.show(ids)}; accepted are integers [B, S]")
    if ids.shape[1] > max_len:
        raise ValueError(f"{name} has length {ids.shape[1]}; accepted is at most max_len {max_len}")
    if checks.has_values(ids) and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name} holds {bad}; accepted are tokens in [0, {vocab_size})")
    return ids.long()


def padding(name: str, mask: Tensor | None, like: Tensor) -> dict[str, Tensor]:
    """A padding mask as an option of Attention: {}, {"kv_lens": [B]} or {"mask": bool [B, S]}.

    mask is [B, S], the first two sizes of `like`, bool or 0 and 1, where 1 is a real token; None
    says that all are real. Where its values may be read, padding on the right becomes lengths,
    which are cheaper.
    """
    if mask is None:
        return {}
    wanted = tuple(like.shape[:2])
    if checks.tensor(name, mask).shape != wanted:
        raise ValueError(f"{name} has shape {checks.show(mask)}; accepted is {list(wanted)}, 1 for "
                         "a real token and 0 for padding")  # fmt: skip
    if mask.device != like.device:
        raise ValueError(f"{name} is on {mask.device} and its tokens on {like.device}; one device "
                         "is accepted")  # fmt: skip
    real = mask if mask.dtype == torch.bool else mask != 0
    if not checks.has_values(mask):
        return {"mask": real}
    if mask.dtype != torch.bool and not torch.equal(real.to(mask.dtype), mask):
        raise ValueError(f"{name} holds other numbers than 0 and 1; accepted are 1 for a real "
                         "token and 0 for padding")  # fmt: skip
    lens = real.sum(1, dtype=torch.int32)
    if torch.equal(real, torch.arange(mask.shape[1], device=mask.device) < lens[:, None]):
        return {} if real.all() else {"kv_lens": lens}
    return {"mask": real}


def sequence_parts(x: Tensor, ids: Tensor) -> Tensor:
    """x, the embedded ids, checked for sequence parallelism, which gives each process a part of the
    rows: torch assumes equal parts, and would abort the process otherwise."""
    rows, here = ids.shape[1], x.shape[1]
    if here != rows and (here == 0 or rows % here):
        raise ValueError(f"sequences of {rows} tokens came to a plan of sequence parallelism that "
                         f"leaves {here} here; accepted are multiples of the number of processes, "
                         "and no generate()")  # fmt: skip
    return x


def labels_like(name: str, labels: Tensor, shape: tuple[int, ...], classes: int) -> Tensor:
    """labels as int64, checked to have that shape and to be IGNORED or in [0, classes)."""
    if tuple(checks.tensor(name, labels).shape) != tuple(shape) or labels.dtype not in INTEGERS:
        raise ValueError(f"{name} is {labels.dtype} {checks.show(labels)}; accepted are integers "
                         f"{list(shape)}")  # fmt: skip
    if checks.has_values(labels):
        bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if bad.numel():
            raise ValueError(f"{name} holds {int(bad[0])}; accepted are {IGNORED} (ignored) and "
                             f"numbers in [0, {classes})")  # fmt: skip
    return labels.long()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over labels that are not IGNORED, in float32 or float64; 0 if all
    are."""
    logits = wide(logits.flatten(0, -2))
    return _mean(F.cross_entropy(logits, labels.flatten(), reduction="sum"), labels)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


_LINEAR = LinearCrossEntropy(reduction="sum")


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """cross_entropy(hidden @ weight.T + bias, labels) without the logits in memory."""
    return _mean(_LINEAR(hidden, weight, labels, bias), labels)


def _mean(total: Tensor, labels: Tensor) -> Tensor:
    return total / (labels != IGNORED).sum().clamp(min=1)

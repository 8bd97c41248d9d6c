"""The steps of torch's layers, x + dropout(block(x)) and its norm, in few passes over memory.
Next hops: ../fused/norm.py (dropout, addition and norm), ../fused/activation.py (bias, activation
and dropout).

Where kernels run, a submodule of exactly torch's class without hooks is computed as part of a fused
operator. Any other submodule is called, so that hooks run and replacements take effect.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused import norm as fused
from ..fused import operator
from ..fused.activation import activate
from .linear import call_linear, linear, plain


class Steps:
    """The steps that the forwards of the encoder layer and the decoder layer have in common."""

    def _step(self, name: str, dropout: nn.Module, norm: nn.Module, *args, **kwargs):
        """(block, dropout, norm) for torch's method `name`. The block leaves its dropout to the
        caller, which fuses it. A method that a subclass overrides drops out by itself, as torch's
        forward expects, and dropout is then None."""
        method = getattr(self, name)
        own = all(getattr(method, "__func__", None) is not theirs for theirs in _TORCHS[name])
        block = method if own else partial(_BLOCKS[name], self)
        return (lambda x: block(x, *args, **kwargs)), None if own else dropout, norm

    def _run(self, x: Tensor, *steps) -> Tensor:
        if not self.norm_first:
            for block, dropout, norm in steps:
                x, _ = join(x, block(x), dropout, norm)
            return x
        following = [norm for _, _, norm in steps[1:]]
        y = steps[0][2](x)
        for (block, dropout, _), norm in zip(steps, [*following, None]):
            y, x = join(x, block(y), dropout, norm)
        return x


def join(x: Tensor, branch: Tensor, dropout: nn.Module | None, norm: nn.Module | None):
    """(norm(summed), summed) of summed = x + dropout(branch); a None leaves out its step."""
    eager = _fusable(x, branch)
    p = _probability(dropout) if eager else None
    if p is None:
        branch, p = branch if dropout is None else dropout(branch), 0.0
    if eager and plain(norm, nn.LayerNorm) and norm.normalized_shape == branch.shape[-1:]:
        return fused.norm(branch, x, norm.weight, norm.bias, norm.eps, True, p)
    x = x + (activate(branch, dropout_p=p) if p else branch)
    return x if norm is None else norm(x), x


def _feed_forward(layer, x: Tensor) -> Tensor:
    first, drop, activation = layer.linear1, layer.dropout, _name_of(layer.activation)
    if plain(first, nn.Linear) and _fusable(x, first.weight, first.bias):
        p = _probability(drop)
        if activation is not None and p is not None:
            hidden = activate(linear(x, first.weight, None), first.bias, p, activation)
            return call_linear(layer.linear2, hidden)
    return call_linear(layer.linear2, drop(layer.activation(first(x))))


def _attend(layer, x: Tensor, mask, padding, is_causal: bool = False) -> Tensor:
    return layer.self_attn(
        x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False
    )[0]


def _attend_memory(layer, x: Tensor, memory, mask, padding, is_causal: bool = False) -> Tensor:
    return layer.multihead_attn(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal,
        need_weights=False,
    )[0]  # fmt: skip


_BLOCKS = {"_sa_block": _attend, "_mha_block": _attend_memory, "_ff_block": _feed_forward}
_TORCHS = {
    name: [vars(cls)[name] for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
           if name in vars(cls)]
    for name in _BLOCKS
}  # fmt: skip


# ---- what may be fused --------------------------------------------------------------------------


def _fusable(*tensors: Tensor | None) -> bool:
    return operator.has_kernel(*tensors) and not any(x is not None and x.is_nested for x in tensors)


def _probability(dropout: nn.Module | None) -> float | None:
    """The present p of a plain nn.Dropout, if kernels accept it; None: call the module."""
    if not plain(dropout, nn.Dropout):
        return None
    p = dropout.p if dropout.training else 0.0
    return p if p < 1 else None


_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))


def _name_of(activation) -> str | None:
    """activate()'s name for a layer's activation, or None if it has none."""
    if plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    for cls, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu")):
        if plain(activation, cls):
            return name
    return next((name for function, name in _FUNCTIONS if activation is function), None)

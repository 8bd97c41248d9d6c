"""Removing attention heads: which matter (head_importance), and prune_heads(), which takes the
others out of a model's weights. Next hops: capturing.py, projections.py.

    with fastattn.pruning.head_importance() as importance:
        model(**batch).loss.backward()
    fastattn.pruning.prune_heads(model, fastattn.pruning.least_important(importance, keep=48))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .capturing import Watch
from .core.call import Call, Result
from .projections import HEADS, KV_HEADS, WIDTHS, Projections, projections_of

Heads = Mapping[str, Iterable[int]]


class Importance(dict):
    """{name of an attention module: float64 [heads], the sum over examples seen so far}."""


class head_importance(Watch):
    """How much each attention head matters to a loss, from its gradients, in the one pass that
    computes these (Michel et al., arXiv:1905.10650): the mean over examples of

        | sum over rows and channels of out * dout |,

    which is |d loss / d gate| of a gate of 1 on the head's output: to first order, how much the
    loss changes without the head. The loss has to be a sum or a mean over examples.

    Open it around forward and backward passes; several of them add up. It is a dict from module
    names, as capture() gives them, to tensors [heads]. The model's gradients do not change.

    Args:
        normalize: divide each layer's by its norm, as the paper does, so that layers whose
            gradients are larger than others' do not take all. Default True.
    """

    def __init__(self, *, normalize: bool = True) -> None:
        super().__init__()
        self._normalize, self._importance = normalize, Importance()

    def __enter__(self) -> Importance:
        super().__enter__()
        return self._importance

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self._normalize:
            for name, x in self._importance.items():
                self._importance[name] = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)

    def seen(self, name: str, call: Call, result: Result) -> None:
        if result.out.requires_grad:
            result.out.register_hook(partial(self._add, name, result.out.detach()))

    def _add(self, name: str, out: Tensor, dout: Tensor) -> None:
        by_example = (out.double() * dout.double()).sum((2, 3)).abs()  # [B, heads]
        found = by_example.sum(0)
        before = self._importance.get(name)
        self._importance[name] = found if before is None else before + found


def least_important(importance: Mapping[str, Tensor], keep: int) -> dict[str, list[int]]:
    """The heads to prune so that the `keep` most important of all layers stay, and at least one of
    each layer: {module name: heads}, for prune_heads()."""
    ranked = sorted(
        ((float(x), name, head) for name, xs in importance.items() for head, x in enumerate(xs)),
        reverse=True,
    )
    if not len(importance) <= keep <= len(ranked):
        raise ValueError(f"keep is {keep}; accepted is {len(importance)} (a head of each layer) to "
                         f"{len(ranked)} (all)")  # fmt: skip
    best = {name: int(xs.argmax()) for name, xs in importance.items()}
    stays = set(best.items())
    for _, name, head in ranked:
        if len(stays) < keep:
            stays.add((name, head))
    return {
        name: [head for head in range(len(xs)) if (name, head) not in stays]
        for name, xs in importance.items()
    }


@torch.no_grad()
def prune_heads(model: nn.Module, heads: Heads) -> nn.Module:
    """Removes attention heads from a model, in place: their rows of the projections of q, k and v,
    and their columns of the projection of the result. The outputs become those of the model whose
    pruned heads give zero.

    Served are fastattn.nn.Attention and fastattn.models; torch.nn.MultiheadAttention after
    fastattn.swap(), whose forward takes any number of heads (torch's own does not); and
    transformers' models with the projections of projections.LAYOUTS, such as BERT, RoBERTa,
    DistilBERT, ALBERT, ViT and Llama. The state_dict becomes smaller; to load it, prune a new model
    in the same way first. Optimizers hold the old parameters, so make them afterwards.

    Args:
        heads: {name of an attention module, as capture() and head_importance() give it: the heads
            to remove, as numbered now}. With grouped keys, whole groups.

    Raises:
        ValueError: a module that is not known, a head that it has not, all of its heads, or a part
            of a group; nothing is changed then.
    """
    plans = [(projections_of(model, name), sorted({*removed})) for name, removed in heads.items()]
    kept = [_kept(parts, removed) for parts, removed in plans]
    for (parts, removed), (query, group) in zip(plans, kept, strict=True):
        if removed:
            _prune(parts, query, group)
    return model


def _kept(parts: Projections, removed: list[int]) -> tuple[Tensor, Tensor]:
    """The query heads and the heads of keys that stay."""
    name, count = parts.name or "(model)", parts.heads
    if any(not 0 <= head < count for head in removed):
        raise ValueError(f"{name} has {count} heads, and {removed} are to go; accepted are 0 to "
                         f"{count - 1}")  # fmt: skip
    if len(removed) == count:
        raise ValueError(f"all {count} heads of {name} are to go; accepted is to keep one")
    size = count // parts.kv_heads
    groups = [head // size for head in removed]
    if any(groups.count(g) != size for g in groups):
        raise ValueError(f"{name} has {size} query heads for each head of keys, and {removed} are "
                         "to go; accepted are whole groups")  # fmt: skip
    if any(count in x.shape for x in _others(parts)):
        raise ValueError(f"{name} has further weights for each head (a relative position bias, "
                         "say), which prune_heads() cannot prune")  # fmt: skip
    if not parts.layers and type(parts.module).forward is nn.MultiheadAttention.forward:
        raise ValueError(f"{name} is torch's own MultiheadAttention, whose forward takes only "
                         "embed_dim / head_dim heads; call fastattn.swap(model) first")  # fmt: skip
    if getattr(parts.module, "head_origin", None) is not None:
        raise ValueError(f"{name} has head_origin: it is one process's part of a layer; prune "
                         "before sharding")  # fmt: skip
    stays = [head for head in range(count) if head not in removed]
    return torch.tensor(stays), torch.tensor([g for g in range(parts.kv_heads) if g not in groups])


def _others(parts: Projections) -> list[Tensor]:
    """Tensors of the module beside its projections and what _prune() knows."""
    known = {id(x) for layer in (*parts.layers, parts.out) for x in layer.parameters()}
    names = {"sinks", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
    names |= {f"{x}_proj_weight" for x in "qkv"}
    own = [*parts.module.named_parameters(), *parts.module.named_buffers()]
    own = [(name, x) for name, x in own if "norm" not in name.lower()]  # of channels, not heads
    return [x for name, x in own if id(x) not in known and name not in names]


def _prune(parts: Projections, query: Tensor, group: Tensor) -> None:
    module: Any = parts.module
    dim = parts.head_dim
    rows, keys = (_channels(x, dim).to(parts.out.weight.device) for x in (query, group))
    parts.out.weight = _cut(parts.out.weight, rows, 1)
    parts.out.in_features = len(rows)
    for layer, index in zip(parts.layers, (rows, keys, keys)):
        layer.weight = _cut(layer.weight, index, 0)
        if layer.bias is not None:
            layer.bias = _cut(layer.bias, index, 0)
        layer.out_features = len(index)
    if not parts.layers:
        third = parts.heads * dim
        every = torch.cat([rows + n * third for n in range(3)])
        for name, index, axis in (
            *((f"{x}_proj_weight", rows, 0) for x in "qkv"),
            ("in_proj_weight", every, 0), ("in_proj_bias", every, 0),
            ("bias_k", rows, 2), ("bias_v", rows, 2),
        ):  # fmt: skip
            if (x := getattr(module, name)) is not None:
                setattr(module, name, _cut(x, index, axis))
    if getattr(module, "sinks", None) is not None:
        module.sinks = _cut(module.sinks, query.to(module.sinks.device), 0)
    counts = dict.fromkeys(HEADS, len(query)) | dict.fromkeys(KV_HEADS, len(group))
    for name, count in (counts | dict.fromkeys(WIDTHS, len(rows))).items():
        if name in vars(module):
            setattr(module, name, count)


def _channels(heads: Tensor, dim: int) -> Tensor:
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def _cut(x: Tensor, index: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(x.index_select(axis, index).contiguous(), requires_grad=x.requires_grad)

"""Where an attention module has its projections: what pruning.py cuts, and signals.py rescales.

LAYOUTS is the table of attribute names, of fastattn.nn's and transformers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Attributes of the projections of q, k, v and of the result; "^" begins at the parent module.
LAYOUTS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # fastattn.nn.Attention, ViT, DeiT, DINOv2, Llama
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # BART's family, CLIP, SigLIP
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("query", "key", "value", "dense"),  # ALBERT
    ("query", "key", "value", "out"),
    ("query", "key", "value", "^output.dense"),  # BERT, RoBERTa, ELECTRA and their like
)
HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
HEAD_DIMS = ("head_dim", "attention_head_size")
KV_HEADS = ("kv_heads", "num_key_value_heads")
WIDTHS = ("all_head_size",)  # heads times head_dim


@dataclass(frozen=True)
class Projections:
    """The projections of one attention module: linear layers, or of a MultiheadAttention parts of
    its in_proj_weight."""

    name: str
    module: nn.Module
    layers: tuple[nn.Linear, ...]  # of q, k and v; () for a MultiheadAttention
    out: nn.Linear
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.out.in_features // self.heads

    def rows(self, which: int) -> list[Tensor]:
        """The weight, and the bias if there is one, that make q (0), k (1) or v (2): views whose
        first dimension is heads * head_dim."""
        if self.layers:
            layer = self.layers[which]
            return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        module: Any = self.module
        if module.in_proj_weight is None:
            weight = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[which]
        else:
            weight = module.in_proj_weight.chunk(3)[which]
        bias = module.in_proj_bias
        return [weight] if bias is None else [weight, bias.chunk(3)[which]]


def projections_of(model: nn.Module, name: str) -> Projections:
    """The projections of the attention module `name` of the model, or of the one that it is inside.

    Raises ValueError, in a sentence, where the module is none of the layouts that are known.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name!r}: {error}") from error
    if isinstance(module, nn.MultiheadAttention):
        return Projections(name, module, (), module.out_proj, module.num_heads, module.num_heads)
    for *sources, target in LAYOUTS:
        layers: list[Any] = [getattr(module, source, None) for source in sources]
        parent = model.get_submodule(name.rpartition(".")[0])
        out: Any = _at(parent, target[1:]) if target[0] == "^" else _at(module, target)
        if all(isinstance(x, nn.Linear) for x in (*layers, out)):
            break
    else:
        raise ValueError(
            f"{_shown(name)} is a {type(module).__name__}, whose projections are not where "
            f"fastattn looks for them; accepted are modules with linear layers named "
            f"{', '.join('/'.join(names) for names in LAYOUTS)}, and torch.nn.MultiheadAttention"
        )
    heads, head_dim = _first(module, HEADS), _first(module, HEAD_DIMS)
    if heads is None and head_dim is not None:
        heads = layers[0].out_features // head_dim
    if heads is None:
        raise ValueError(f"{_shown(name)} is a {type(module).__name__} without a number of heads; "
                         f"accepted is an attribute {', '.join((*HEADS, *HEAD_DIMS))}")  # fmt: skip
    width = out.in_features // heads
    kv_heads = layers[1].out_features // width
    if layers[0].out_features != heads * width or layers[2].out_features != kv_heads * width:
        raise ValueError(f"{_shown(name)} has heads of different sizes for keys and values; "
                         "accepted are equal ones")  # fmt: skip
    return Projections(name, module, tuple(layers), out, heads, kv_heads)


def _at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((vars(module)[n] for n in names if isinstance(vars(module).get(n), int)), None)


def _shown(name: str) -> str:
    return name or "(model)"

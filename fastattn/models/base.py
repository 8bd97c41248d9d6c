"""What every model shares: its configuration, its output, the start of its weights, its folder.
Next hop: checkpoint.py for the folder, torch_attention.py for attention="torch".
"""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from ..core import checks
from ..functional import attention
from ..nn import Attention, KVCache, LearnedPositionalEncoding
from . import checkpoint
from .torch_attention import TorchCache, torch_attention

IMPLEMENTATIONS = {"fastattn": (attention, KVCache), "torch": (torch_attention, TorchCache)}
STD = 0.02  # of every matrix at the start (GPT-2's and BERT's)


class ModelOutput(OrderedDict):
    """What forward() gives: a dict of the tensors there are, also as attributes, None where there
    is none, and by number; transformers' names.

    loss: a scalar, float32, when labels are given.
    logits: the model's or its head's.
    seq_relationship_logits: [B, 2]: follows, does not.
    start_logits, end_logits: [B, S].
    last_hidden_state: [B, S, dim].

    An OrderedDict, because FSDP1 makes a plain dict of every other.
    """

    NAMES = (
        *("loss", "logits", "seq_relationship_logits", "start_logits", "end_logits"),
        "last_hidden_state",
    )

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__({n: tensors[n] for n in self.NAMES if tensors.get(n) is not None})

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in self.NAMES:
            raise AttributeError(f"a ModelOutput has no {name!r}; it has {', '.join(self.NAMES)}")
        return self.get(name)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


# Sharded training and torch.compile look for tensors inside what a model returns.
register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: ModelOutput(**dict(zip(names, values))),
    serialized_type_name="fastattn.models.ModelOutput",
)


class NormalStart:
    """A module's reset_parameters(): Normal(0, std) weight, zero bias.

    An attribute of the module, whose class stays torch's own: quantisation and adapters look for
    that. The module is held weakly, so that its memory goes with its last user."""

    def __init__(self, module: nn.Module, std: float) -> None:
        self.module, self.std = weakref.ref(module), std

    def __call__(self) -> None:
        module = self.module()
        nn.init.normal_(module.weight, std=self.std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def __reduce__(self):  # copied and pickled with its module, it is the copy's
        return NormalStart, (self.module(), self.std)


@dataclass(kw_only=True)
class Config:
    """Sizes that every model has.

    Args:
        vocab_size: tokens that there are.
        max_len: the longest sequence.
        dim: size of a token's vector.
        heads: attention heads; dim is a multiple.
        kv_heads: heads of keys and values, which divide heads. None: as many.
        layers: transformer blocks.
        hidden: width of the feed-forward blocks; None: their own default.
        dropout: of embeddings, of what each sublayer adds and of attention weights, in training.
        attention: whose attention: "fastattn", or "torch" for torch's
            scaled_dot_product_attention. The weights are the same, and so are the results up to
            rounding; Model.set_attention switches a built model.
    """

    vocab_size: int
    max_len: int = 1024
    dim: int = 768
    heads: int = 12
    kv_heads: int | None = None
    layers: int = 12
    hidden: int | None = None
    dropout: float = 0.0
    attention: str = "fastattn"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" or (f.type == "int | None" and value is not None):
                checks.integer(f.name, value)
            if f.type == "bool":
                checks.flag(f.name, value)
        for name in ("vocab_size", "max_len", "dim", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is 1 or more")
        _implementation(self.attention)


def _implementation(name: str) -> tuple:
    if name not in IMPLEMENTATIONS:
        accepted = " and ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"attention is {name!r}; accepted are {accepted}")
    return IMPLEMENTATIONS[name]


M = TypeVar("M", bound="Model")


class Model(nn.Module):
    """A model made of blocks. A subclass has config_class and build(config).

    Args:
        config: a config_class; None: one made of the keyword arguments.
        fields: config_class's fields by name; they win over config's.
    """

    config_class: ClassVar[type[Config]]
    config: Config

    def __init__(self, config: Config | None = None, **fields_: Any) -> None:
        super().__init__()
        kind, name = self.config_class, type(self).__name__
        if config is not None and not isinstance(config, kind):
            raise TypeError(
                f"{name}'s config is of type {type(config).__name__}; accepted is {kind.__name__}, "
                "or its fields as keyword arguments"
            )
        known = [f.name for f in fields(kind)]
        unknown = [n for n in fields_ if n not in known]
        if unknown:
            raise TypeError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}")
        if config is None and "vocab_size" not in fields_:
            raise TypeError(f"{name} needs vocab_size, or a {kind.__name__}")
        self.config = kind(**fields_) if config is None else replace(config, **fields_)
        self.build(self.config)
        self.reset_parameters()
        self.set_attention(self.config.attention)

    def build(self, config: Config) -> None:
        """Makes the submodules."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is made of")

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) matrices, zero biases; what is added to the residual stream starts
        smaller by sqrt(number of additions), so that its size does not grow with depth (GPT-2).

        Every part's own reset_parameters() gives the same distribution, so a model made on the meta
        device may also be started part by part, as FSDP does it."""
        added = [m for n, m in self.named_modules() if n.endswith(("o_proj", "down_proj"))]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = STD / math.sqrt(len(added)) if module in added else STD
                module.reset_parameters = NormalStart(module, std)
        for module in self.modules():
            own = next(module.parameters(recurse=False), None) is not None
            if own and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in added:  # again, so that a seed keeps giving the weights it gave
            module.reset_parameters()

    def set_attention(self, name: str) -> None:
        """Whose attention computes from now on: "fastattn" or "torch"."""
        attend, _ = _implementation(name)
        self.config.attention = name
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def new_caches(self, layers: list[Attention], batch: int, max_len: int) -> list[KVCache]:
        """An empty cache for each of some attention layers."""
        _, kind = _implementation(self.config.attention)
        return [layer.make_cache(batch, max_len, kind=kind) for layer in layers]

    # ---- its folder ---------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes model.safetensors and config.json into `folder`, made if it is missing.

        An interrupted save leaves the files that were there. state_dict: the weights, where this
        module does not hold all of them (sharded training); None: its own.
        """
        state = self.state_dict() if state_dict is None else state_dict
        config = {"model": self._kind(), **asdict(self.config)}
        checkpoint.save(folder, state, config)

    @classmethod
    def from_pretrained(cls: type[M], folder: str | os.PathLike[str], **changes: Any) -> M:
        """The model that save_pretrained wrote, in eval mode, in the dtype it was saved in.

        changes: fields of the configuration to set otherwise (dropout, attention, ...). With
        another `head` or `num_labels` the new head starts anew and the rest is loaded.

        Raises CheckpointError where files are missing, corrupted, or another model's.
        """
        state, saved = checkpoint.load(folder)
        name = saved.pop("model", None)
        if name != cls._kind():
            held = f"a {name}" if name and isinstance(name, str) else "no known model"
            raise checkpoint.CheckpointError(
                f"{folder} holds {held}; {cls._kind()}.from_pretrained accepts a {cls._kind()}'s "
                "folder"
            )
        anew = [n for n in ("head", "num_labels") if n in changes and changes[n] != saved.get(n)]

        def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: x for n, x in tensors.items() if not (anew and n.startswith("head."))}

        expected = cls._without_memory(saved, changes, state, folder).state_dict()
        checkpoint.match(kept(expected), kept(state), str(folder))
        model = cls(**{**saved, **changes})
        model.load_state_dict(model.state_dict() | kept(state), assign=True)
        return model.eval()

    @classmethod
    def _without_memory(
        cls, saved: dict[str, Any], changes: dict[str, Any], state: Mapping[str, Tensor], folder
    ) -> Model:
        """The model on the meta device, where sizes cost nothing: a broken configuration is a
        CheckpointError whatever is in it, and what is wrong with changes is their own error."""
        numbers = sum(x.numel() for x in state.values())

        def build(fields_: dict) -> Model:
            for name, x in fields_.items():  # layers, and what rotary counts, cost memory here too
                most = len(state) if name == "layers" else numbers
                if isinstance(x, int) and x > most and name != "max_len":
                    raise ValueError(f"{name} is {x}, and the weights are {len(state)} tensors of "
                                     f"{numbers} numbers")  # fmt: skip
            with torch.device("meta"):
                return cls(**fields_)

        try:
            return build({**saved, **changes})
        except Exception as error:
            try:
                build(saved)
            except Exception:
                raise checkpoint.CheckpointError(
                    f"the configuration in {folder} makes no {cls._kind()}: {error}"
                ) from error
            raise  # without changes it makes one

    @classmethod
    def _kind(cls) -> str:
        """The model's name in config.json: that of the class with the config_class, because
        fully_shard() makes a class of its own."""
        return next(c.__name__ for c in cls.__mro__ if "config_class" in vars(c))

    def load_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Takes the weights in `folder`; one that does not fit raises and changes nothing."""
        state, _ = checkpoint.load(folder)
        checkpoint.match(self.state_dict(), state, str(folder))
        self.load_state_dict(state)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold; transformers' arguments, as its Trainer asks."""
        tables = (nn.Embedding, LearnedPositionalEncoding)
        skipped = {id(m.weight) for m in self.modules() if isinstance(m, tables)}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(p) in skipped)
        )

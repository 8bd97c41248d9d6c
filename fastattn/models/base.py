"""What all models share: configuration, output, initialisation, saving and loading.
Next hop: checkpoint.py for the files, torch_attention.py for attention="torch".
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
STD = 0.02  # initial standard deviation of matrices (GPT-2, BERT)


class ModelOutput(OrderedDict):
    """The result of forward(): a dict of the tensors that were computed, by transformers' names.
    They are also attributes, which are None if not computed, and can be indexed by number.

    loss: a scalar, float32, when labels are given.
    logits: of the model or its head.
    seq_relationship_logits: [B, 2]: the second sentence follows, or does not.
    start_logits, end_logits: [B, S].
    last_hidden_state: [B, S, dim].

    It is an OrderedDict, because FSDP1 converts any other dict to a plain one.
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


# So that sharded training and torch.compile find the tensors in a model's output.
register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: ModelOutput(**dict(zip(names, values))),
    serialized_type_name="fastattn.models.ModelOutput",
)


class NormalStart:
    """A module's reset_parameters(): weight from Normal(0, std), bias zero.

    It is an attribute of the module, because the class must stay torch's own: quantization and
    adapters go by the class. It holds the module weakly, to make no reference cycle.
    """

    def __init__(self, module: nn.Module, std: float) -> None:
        self.module, self.std = weakref.ref(module), std

    def __call__(self) -> None:
        module = self.module()
        nn.init.normal_(module.weight, std=self.std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def __reduce__(self):  # copied with its module, it refers to the copy
        return NormalStart, (self.module(), self.std)


@dataclass(kw_only=True)
class Config:
    """The options that every model has.

    Args:
        vocab_size: size of the vocabulary.
        max_len: length of the longest sequence, default 1024.
        dim: size of a token's vector, default 768.
        heads: attention heads, default 12; dim must be a multiple.
        kv_heads: heads of keys and values, of which heads must be a multiple. None: heads.
        layers: transformer blocks, default 12.
        hidden: width of the feed-forward blocks; None: their default.
        dropout: probability of dropping an element of embeddings and sublayer outputs, and an
            attention weight, in training; default 0.
        attention: "fastattn", or "torch" for torch's scaled_dot_product_attention. Parameters are
            the same, and results up to rounding; Model.set_attention switches a built model.

    Raises:
        ValueError or TypeError: a field, which is named, is not accepted.
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
    """The base of the models. A subclass defines config_class and build(config).

    Args:
        config: an instance of config_class; None: it is made from the keyword arguments.
        fields_: fields of config_class by name; they take precedence over config's.
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
        raise NotImplementedError(f"{type(self).__name__} does not implement build()")

    def reset_parameters(self) -> None:
        """Initialises matrices from Normal(0, 0.02) and biases with zero. The standard deviation of
        projections into the residual stream is divided by sqrt(number of such projections), so that
        activations do not grow with depth (GPT-2).

        The reset_parameters() of each submodule gives the same distribution, so a model made on the
        meta device may also be initialised module by module, as FSDP does.
        """
        added = [m for n, m in self.named_modules() if n.endswith(("o_proj", "down_proj"))]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = STD / math.sqrt(len(added)) if module in added else STD
                module.reset_parameters = NormalStart(module, std)
        for module in self.modules():
            own = next(module.parameters(recurse=False), None) is not None
            if own and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in added:  # again, so that a seed gives the same weights as in older versions
            module.reset_parameters()

    def set_attention(self, name: str) -> None:
        """Selects the attention of all blocks: "fastattn" or "torch"."""
        attend, _ = _implementation(name)
        self.config.attention = name
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def new_caches(self, layers: list[Attention], batch: int, max_len: int) -> list[KVCache]:
        """An empty cache for each of the given attention layers."""
        _, kind = _implementation(self.config.attention)
        return [layer.make_cache(batch, max_len, kind=kind) for layer in layers]

    # ---- saving and loading -------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes model.safetensors and config.json into `folder`, which is created if missing.

        An interrupted save leaves the previous files intact. state_dict: the weights, if this
        module does not hold all of them (sharded training); None: its own.
        """
        state = self.state_dict() if state_dict is None else state_dict
        config = {"model": self._kind(), **asdict(self.config)}
        checkpoint.save(folder, state, config)

    @classmethod
    def from_pretrained(cls: type[M], folder: str | os.PathLike[str], **changes: Any) -> M:
        """The model that save_pretrained wrote, in eval mode and in the saved dtype.

        Args:
            folder: where save_pretrained wrote it.
            changes: fields of the configuration to change (dropout, attention, ...). With another
                `head` or `num_labels`, the head is newly initialised and the rest is loaded.

        Raises:
            CheckpointError: files are missing, corrupted, or of another model.
        """
        state, saved = checkpoint.load(folder)
        name = saved.pop("model", None)
        if name != cls._kind():
            held = f"a {name}" if name and isinstance(name, str) else "no known model"
            raise checkpoint.CheckpointError(
                f"{folder} holds {held}; {cls._kind()}.from_pretrained accepts a {cls._kind()}'s "
                "folder"
            )
        new_head = any(n in changes and changes[n] != saved.get(n) for n in ("head", "num_labels"))

        def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: x for n, x in tensors.items() if not (new_head and n.startswith("head."))}

        expected = cls._without_memory(saved, changes, state, folder).state_dict()
        checkpoint.match(kept(expected), kept(state), str(folder))
        model = cls(**{**saved, **changes})
        model.load_state_dict(model.state_dict() | kept(state), assign=True)
        return model.eval()

    @classmethod
    def _without_memory(
        cls, saved: dict[str, Any], changes: dict[str, Any], state: Mapping[str, Tensor], folder
    ) -> Model:
        """The model on the meta device, where tensors take no memory. Any error from the saved
        configuration becomes a CheckpointError; an error from `changes` is raised as it is."""
        numbers = sum(x.numel() for x in state.values())

        def build(fields_: dict) -> Model:
            for name, x in fields_.items():  # layers and rotary tables take memory even on meta
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
                    f"the configuration in {folder} is not that of a {cls._kind()}: {error}"
                ) from error
            raise  # the saved configuration is right, so the error is from changes

    @classmethod
    def _kind(cls) -> str:
        """The model's name in config.json: that of the class that defines config_class, because
        fully_shard() makes a subclass."""
        return next(c.__name__ for c in cls.__mro__ if "config_class" in vars(c))

    def load_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Loads the weights in `folder`; if they do not fit it raises and changes nothing."""
        state, _ = checkpoint.load(folder)
        checkpoint.match(self.state_dict(), state, str(folder))
        self.load_state_dict(state)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of elements of all parameters. transformers' Trainer calls it with these
        arguments."""
        tables = (nn.Embedding, LearnedPositionalEncoding)
        skipped = {id(m.weight) for m in self.modules() if isinstance(m, tables)}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(p) in skipped)
        )

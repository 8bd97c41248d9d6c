"""fastattn under Hugging Face transformers.

import fastattn.hf
model = AutoModel.from_pretrained(name, attn_implementation="fastattn")
model = fastattn.hf.enable(model)  # a model that is already built
"""

from __future__ import annotations

from typing import TypeVar

import torch

try:
    from transformers.utils.versions import require_version

    # Before 5.4, mask functions had other arguments and the flash loader other results.
    require_version("transformers>=5.4")
except ImportError as error:
    raise ImportError(f'fastattn.hf: pip install "fastattn[hf]" first, because {error}') from error

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import flash
from .interface import HARMLESS, attention_forward, attention_forward_flash
from .masks import CompactMask, attention_mask
from .models import check_names, refusal

NAME = "fastattn"
# "flash" in the name enables the packed branches of vision models, "/" and "flash-attn" enable
# accelerate's sequence parallelism, and "2" the fast path of continuous batching. T5 and models
# derived from it accept only NAME.
FLASH_NAME = "fastattn/flash-attn2"
M = TypeVar("M", bound=PreTrainedModel)

__all__ = [
    "FLASH_NAME",
    "HARMLESS",
    "NAME",
    "CompactMask",
    "attention_forward",
    "attention_mask",
    "enable",
    "register",
]


def register() -> None:
    """Registers both names with transformers. Importing fastattn.hf does this.

    The attention function and the mask function must be registered together: for a name without a
    mask function, transformers makes no mask at all, and padding would be attended to silently.
    """
    flash.serve_loader("fastattn/")
    check_names(frozenset((NAME, FLASH_NAME)))
    for name, forward in ((NAME, attention_forward), (FLASH_NAME, attention_forward_flash)):
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, attention_mask)
        registered = (ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name))
        if registered != (forward, attention_mask):
            raise RuntimeError(
                f"transformers did not take {name!r}: its tables hold {registered}; this version "
                "of transformers is not one that fastattn.hf knows"
            )


def enable(model: M, implementation: str = NAME) -> M:
    """Switches a built model to fastattn, with every model inside it; returns the model.

    Args:
        model: any transformers model, or a module that holds some, such as peft's PeftModel; its
            weights and hooks stay. Saved configurations do not name fastattn, so call enable()
            again after reloading.
        implementation: "fastattn", or "fastattn/flash-attn2" where code goes by the name: packed
            vision branches, sentence-transformers' unpadding, sequence parallelism.

    model.set_attn_implementation("sdpa") switches back, for a PeftModel too.

    Raises:
        TypeError: model is neither a transformers model nor a module that holds one.
        NotImplementedError: a class, which is named, does not compute all of its attention through
            transformers' attention interface; then nothing is changed. Construction with
            attn_implementation="fastattn" raises the same error.
        ValueError: implementation is another name.
    """
    models = _models_in(model) if isinstance(model, torch.nn.Module) else []
    if not models:
        raise TypeError(
            f"model is of type {type(model).__name__}; accepted is a transformers PreTrainedModel, "
            "or a module that holds one"
        )
    if implementation not in (NAME, FLASH_NAME):
        raise ValueError(
            f"implementation is {implementation!r}; accepted are {NAME!r} and {FLASH_NAME!r}"
        )
    for inner in models:
        why = refusal(type(inner))
        if why is not None:
            raise NotImplementedError(why)
    before = [inner.config._attn_implementation for inner in models]
    for outer in _outermost(models):
        outer.set_attn_implementation(implementation)
    refused = [x for x in models if x.config._attn_implementation != implementation]
    if refused:
        taken = refused[0].config._attn_implementation
        for inner, name in zip(models, before):
            inner.config._attn_implementation_internal = name
        raise NotImplementedError(
            f"{type(refused[0]).__name__} takes {taken!r} instead of {implementation!r}"
        )
    return model


def _models_in(model: torch.nn.Module) -> list[PreTrainedModel]:
    return [inner for inner in model.modules() if isinstance(inner, PreTrainedModel)]


def _outermost(models: list[PreTrainedModel]) -> list[PreTrainedModel]:
    inner = {id(x) for model in models for x in _models_in(model) if x is not model}
    return [model for model in models if id(model) not in inner]


register()

"""fastattn under Hugging Face diffusers: importing this registers the attention backend "fastattn".

import fastattn.diffusers
transformer.set_attention_backend("fastattn")

In diffusers a backend applies to the attention processors that call dispatch_attention_fn (Flux,
Wan, Qwen-Image and most newer models); those of UNets, DiT and SD3 ignore it. The backend
"fastattn" also swaps the latter, until another backend is set.
"""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

try:
    from diffusers.models import attention_dispatch as theirs
    from diffusers.models.modeling_utils import ModelMixin
except ImportError as error:
    raise ImportError(
        "fastattn.diffusers needs a diffusers that has attention backends (0.36 or later); "
        f"fastattn.swap(model) serves the models of older ones: {error}"
    ) from error

from .backends.backend import caller_level
from .sdpa import scaled_dot_product_attention
from .swapping import is_swapped, swapped_class, unswap_object

NAME = "fastattn"
_BY_BACKEND = "_fastattn_by_backend"  # on a processor that set_attention_backend() swapped
THEIR_DISPATCH = theirs.dispatch_attention_fn


_SERVED = ("dropout_p", "is_causal", "scale", "enable_gqa")


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options
) -> Tensor:
    """The backend's function: attention over [B, S, H, D], as diffusers' processors call it.

    Args:
        query: [B, Sq, Hq, D]; key: [B, Skv, Hkv, D]; value: [B, Skv, Hkv, Dv].
        attn_mask: [B, Skv], or one that broadcasts to [B, Hq, Sq, Skv]; bool (True = attend) or
            float (added to the scores).
        options: dropout_p, is_causal, scale, enable_gqa of fastattn.scaled_dot_product_attention.

    Returns:
        [B, Sq, Hq, Dv].

    Raises:
        NotImplementedError: any other option, which is named, is not None or False: return_lse, the
            window of another backend, or a configuration of context parallelism.
    """
    for name, x in options.items():
        if name not in _SERVED and x is not None and x is not False:
            raise NotImplementedError(
                f"{name.lstrip('_')} reached diffusers' attention backend {NAME!r}, which does not "
                "serve it; use another backend for this model"
            )
    served = {name: options[name] for name in _SERVED if name in options}
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # a padding mask, as in diffusers
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask, **served).transpose(1, 2)


@functools.wraps(THEIR_DISPATCH)
def dispatch_attention_fn(*arguments, backend=None, **options) -> Tensor:
    """diffusers' function with the backend "fastattn", for swapped processors."""
    return THEIR_DISPATCH(*arguments, backend=_MEMBER, **options)


class _Everything(set):
    """The set of arguments that the backend accepts. It contains everything, because diffusers
    silently drops arguments that are not in it."""

    def __contains__(self, name) -> bool:
        return True


def _register():
    """Adds "fastattn" to diffusers' Enum and table of backends; returns the Enum's member."""
    names, table = theirs.AttentionBackendName, theirs._AttentionBackendRegistry
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[member._name_] = names._value2member_map_[NAME] = member
        names._member_names_.append(member._name_)
        type.__setattr__(names, member._name_, member)
        table.register(member)(attention)
        table._supported_arg_names[member] = _Everything(("query", "key", "value", *_SERVED))
    return names(NAME)


def _reaching_all(set_backend):
    """Wraps ModelMixin's method that sets a backend, so that it also reaches the processors that
    ignore backends."""

    @functools.wraps(set_backend)
    def reaching_all(self, *backend, **options) -> None:
        set_backend(self, *backend, **options)
        ours = NAME in (str(x).lower() for x in (*backend, *options.values()))
        left = {type(x).__name__: None for x in _processors(self) if not _switch(x, ours)}
        if left:
            warnings.warn(
                f"{', '.join(left)} of {type(self).__name__} ignores diffusers' backends, and "
                "swap() cannot serve it: its attention is computed as before",
                UserWarning,
                stacklevel=caller_level(),
            )

    return reaching_all


def _processors(model) -> list:
    """The processors that ignore backends, each once."""
    found = {id(x): x for x in (getattr(module, "processor", None) for module in model.modules())}
    return [x for x in found.values() if x is not None and not hasattr(x, "_attention_backend")]


def _switch(processor, ours: bool) -> bool:
    """Swaps a processor, or undoes an earlier swap by this function. Returns False if swap() cannot
    serve it."""
    if ours and not is_swapped(processor):
        cls, _ = swapped_class(processor)
        if cls is None:
            return False
        processor.__class__ = cls
        vars(processor)[_BY_BACKEND] = True
    elif not ours and vars(processor).pop(_BY_BACKEND, False):
        unswap_object(processor)
    return True


_MEMBER = _register()
for _method in ("set_attention_backend", "reset_attention_backend"):
    if hasattr(ModelMixin, _method):
        setattr(ModelMixin, _method, _reaching_all(getattr(ModelMixin, _method)))

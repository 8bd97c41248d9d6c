"""fastattn: attention for PyTorch, every variant on every device with every derivative.

out = fastattn.attention(q, k, v, causal=True)          # functional.py
out = fastattn.scaled_dot_product_attention(q, k, v)    # torch's signature: sdpa.py
fastattn.enable()                                       # for every call of SDPA: override.py
print(fastattn.swap(model))                             # for a built model, in place: swapping.py
print(fastattn.explain(q, k, v, causal=True))           # what would run, and why: explanation.py

fastattn.flash_attn, .hf and .models are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import masks, nn
from .core.spec import Spec
from .decoding import decode_attention, merge_states
from .explanation import Explanation, explain
from .functional import attention, varlen_attention
from .override import disable, enable, override_sdpa
from .sdpa import scaled_dot_product_attention
from .swapping import SwapReport, swap, unswap
from .weights import attention_weights

if TYPE_CHECKING:
    from . import flash_attn as flash_attn
    from . import hf as hf
    from . import models as models

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Spec",
    "SwapReport",
    "attention",
    "attention_weights",
    "decode_attention",
    "disable",
    "enable",
    "explain",
    "masks",
    "merge_states",
    "nn",
    "override_sdpa",
    "scaled_dot_product_attention",
    "swap",
    "unswap",
    "varlen_attention",
]

_LAZY = ("flash_attn", "hf", "models")

if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name

    def __getattr__(name: str):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return import_module(f"{__name__}.{name}")
        except ImportError as error:  # hasattr() expects an AttributeError
            raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY, "__version__"])

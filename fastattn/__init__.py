"""fastattn: attention for PyTorch, every variant on every device with every derivative.

out = fastattn.attention(q, k, v, causal=True)          # attention.py
out = fastattn.scaled_dot_product_attention(q, k, v)    # torch's signature: sdpa.py
fastattn.enable()                                       # every program that calls SDPA: override.py
print(fastattn.swap(model))                             # a built model, in place: swap.py
print(fastattn.explain(q, k, v, causal=True))           # what would run, and why: explain.py
"""

from . import nn
from .attention import attention, varlen_attention
from .cache import decode_attention, merge_states
from .explain import Explanation, explain
from .override import disable, enable, override_sdpa
from .sdpa import scaled_dot_product_attention
from .spec import Spec
from .swap import SwapReport, swap, unswap

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Spec",
    "SwapReport",
    "attention",
    "decode_attention",
    "disable",
    "enable",
    "explain",
    "merge_states",
    "nn",
    "override_sdpa",
    "scaled_dot_product_attention",
    "swap",
    "unswap",
    "varlen_attention",
]

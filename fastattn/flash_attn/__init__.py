"""FlashAttention 2's functions, on every device and dtype of fastattn.

from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.flash_attn.bert_padding import pad_input, unpad_input

sys.modules["flash_attn"] = fastattn.flash_attn  # for a program that imports flash_attn
"""

from . import bert_padding
from .absent import absent
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.4"  # the flash_attn release with this interface, for programs that check

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def __getattr__(name: str):
    raise absent(__name__, name)

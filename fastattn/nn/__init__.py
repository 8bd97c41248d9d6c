"""Modules: drop-in replacements for torch.nn's six attention classes, and blocks for new models.

Replacements: multihead.py, transformer.py. Blocks: attention.py, kv_cache.py, norm.py, rotary.py,
gated.py, positional.py, block.py, loss.py. Tensor parallelism: sharded.py.
"""

from .. import habits
from .attention import Attention
from .block import TransformerBlock
from .gated import MLP, GeGLU, SwiGLU
from .kv_cache import KVCache
from .loss import LinearCrossEntropy
from .multihead import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .positional import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from .rotary import RotaryEmbedding
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "MLP",
    "Attention",
    "GeGLU",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "LinearCrossEntropy",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "SwiGLU",
    "Transformer",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

for _name in __all__:
    habits.unscriptable(globals()[_name])

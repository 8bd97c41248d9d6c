"""fastattn.nn: building blocks for new models."""

from .attention import Attention
from .block import TransformerBlock
from .cache import KVCache
from .gated import MLP, GeGLU, SwiGLU
from .loss import LinearCrossEntropy
from .norm import LayerNorm, RMSNorm
from .positional import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from .rotary import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "GeGLU",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "LinearCrossEntropy",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "SwiGLU",
    "TransformerBlock",
]

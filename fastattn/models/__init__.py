"""fastattn.models: whole models made of fastattn.nn's blocks, small enough to read.

GPT             decoder-only language model: gpt.py, generation.py
BERT            bidirectional encoder with task heads: bert.py
EncoderDecoder  sequence-to-sequence model: encoder_decoder.py
FusionEncoder   text encoder with cross-attention to images or sound: fusion.py

Each takes its configuration, or the configuration's fields as keyword arguments. forward() has
transformers' argument names. base.py has what they share.
"""

from .base import Config, Model, ModelOutput
from .bert import BERT, BERTConfig
from .checkpoint import CheckpointError
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .fusion import FusionConfig, FusionEncoder
from .gpt import GPT, GPTConfig

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "CheckpointError",
    "Config",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FusionConfig",
    "FusionEncoder",
    "GPTConfig",
    "Model",
    "ModelOutput",
]

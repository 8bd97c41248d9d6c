"""fastattn.models: whole models made of fastattn.nn's blocks, small enough to read.

GPT             writes: gpt.py, generation.py
BERT            reads, with the heads it is trained and used with: bert.py
EncoderDecoder  reads one sequence and writes another: encoder_decoder.py
FusionEncoder   reads text beside images or sound: fusion.py

Each takes its configuration or the configuration's fields as keyword arguments, and transformers'
names in forward(). base.py has what they share.
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

"""Tiny models of each family that transformers' attention interface serves, and their inputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from inspect import signature

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.4")

from transformers import (  # noqa: E402
    BartConfig,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from fastattn.hf import interface  # noqa: E402

VOCABULARY, BATCH, LENGTH, SOURCE = 99, 2, 9, 7
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, **TOKENS,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "decoder_start_token_id": 1, "dropout": 0.0, **TOKENS,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One model and how to feed it."""

    model: str
    config: object
    calls: int = 2  # attention calls in a forward
    paddings: tuple[str, ...] = ("none", "right", "left")
    kind: str = "decoder"  # or encoder, seq2seq, speech, vision: what the inputs are
    output: str = "logits"


FAMILIES = {
    "bert": Family(
        "BertForMaskedLM",
        BertConfig(**DECODER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        kind="encoder",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, scale_attn_by_inverse_layer_idx=True, **TOKENS,
        ),
    ),
    "llama": Family("LlamaForCausalLM", LlamaConfig(**DECODER)),
    "qwen3": Family("Qwen3ForCausalLM", Qwen3Config(**DECODER, head_dim=16)),
    "mistral": Family("MistralForCausalLM", MistralConfig(**DECODER, sliding_window=4)),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        Gemma2Config(**DECODER, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        GptOssConfig(
            **DECODER, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
        ),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=1, **TOKENS,
        ),
        calls=6, kind="seq2seq",
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        BartConfig(**SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=None),
        calls=6, kind="seq2seq",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        WhisperConfig(
            **SEQ2SEQ, max_source_positions=20, max_target_positions=30, num_mel_bins=8,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        calls=6, kind="speech", paddings=("none",),
    ),
    "vit": Family(
        "ViTModel",
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        kind="vision", paddings=("none",), output="last_hidden_state",
    ),
}  # fmt: skip
GENERATES = [name for name, x in FAMILIES.items() if x.kind not in ("encoder", "vision")]


def build(name: str, implementation: str = "eager", seed: int = 0, **changes):
    """A model of the family with random weights large enough that attention matters."""
    family = FAMILIES[name]
    config = type(family.config).from_dict(family.config.to_dict() | changes)
    torch.manual_seed(seed)
    family = getattr(transformers, family.model)
    if not family._can_set_attn_implementation():
        pytest.skip(f"{family.__name__} came to the attention interface after this version")
    model = family._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("sinks"):
                parameter.normal_(0, 0.25)
    return model.eval()


def inputs_of(name: str, padding: str = "none") -> dict[str, torch.Tensor]:
    """Inputs of a forward; `padding` says at which end row 1 is padded."""
    generator = torch.Generator().manual_seed(1)
    kind = FAMILIES[name].kind

    def tokens(length):
        return torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)

    if kind == "vision":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)}
    if kind == "speech":
        features = torch.randn(BATCH, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens(LENGTH)}
    inputs = {"input_ids": tokens(LENGTH)}
    if padding != "none":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, slice(-3, None) if padding == "right" else slice(0, 3)] = 0
        inputs["attention_mask"] = mask
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = tokens(SOURCE)
    return inputs


def visible(name: str, inputs: dict, out: torch.Tensor) -> torch.Tensor:
    """The output rows that are not padding: [n, channels]."""
    mask = inputs.get("attention_mask")
    if mask is None or FAMILIES[name].kind == "seq2seq":
        return out.flatten(0, 1)
    return out[mask.bool()]


# The name of a forward's cache argument, which was renamed within 5.x.
CACHE = (
    "cache"
    if "cache" in signature(transformers.LlamaModel.forward).parameters
    else ("past_key_values")
)


class Counter:
    """Counts the calls that reach fastattn, so that a silent fall-back fails the test."""

    def __init__(self, monkeypatch):
        self.take()
        for name in ("attention", "varlen_attention"):
            monkeypatch.setattr(interface, name, self.counted(getattr(interface, name)))

    def counted(self, function):
        def count(*arguments, **options):
            self.names.append(function.__name__)
            self.options.append(options)
            if function.__name__ == "attention":
                self.lengths.append((arguments[0].shape[2], arguments[1].shape[2]))
            return function(*arguments, **options)

        return count

    def take(self) -> int:
        """Calls since the last time."""
        calls = len(getattr(self, "names", ()))
        self.names, self.options, self.lengths = [], [], []
        return calls

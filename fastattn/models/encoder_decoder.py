"""EncoderDecoder: a sequence-to-sequence model, for translation and summarisation.
Next hop: nn.TransformerBlock; generation.py for generate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks
from ..nn import RMSNorm, RotaryEmbedding, TransformerBlock
from ..nn.sharded import whole
from .base import Config, Model, ModelOutput
from .generation import Decoding, Generates
from .inputs import IGNORED, cross_entropy, head_loss, labels_like, padding, tokens


@dataclass(kw_only=True)
class EncoderDecoderConfig(Config):
    """The fields of Config, whose layers are the encoder's, and:

    Args:
        decoder_layers: blocks of the decoder; None: as many as layers.
        mlp: the mlp of TransformerBlock, default "swiglu".
        pad_token_id: the padding token, default 0.
        bos_token_id: the token that the decoder starts with, default 1.
        eos_token_id: the token that ends its output, default 2.
    """

    decoder_layers: int | None = None
    mlp: str = "swiglu"
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2


class EncoderDecoder(Generates, Model):
    """An encoder, and a decoder with cross-attention to its output: pre-norm blocks with rotary
    positions, and one embedding matrix for both sides and the head.

    EncoderDecoder(EncoderDecoderConfig(vocab_size=...)) or EncoderDecoder(vocab_size=..., ...).
    """

    config_class = EncoderDecoderConfig
    config: EncoderDecoderConfig
    config: EncoderDecoderConfig

    def build(self, config: EncoderDecoderConfig) -> None:
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.drop = nn.Dropout(c.dropout)
        rotary = RotaryEmbedding(c.dim // c.heads)
        shared = {"kv_heads": c.kv_heads, "hidden": c.hidden, "mlp": c.mlp, "dropout": c.dropout}
        self.encoder = nn.ModuleList(
            TransformerBlock(c.dim, c.heads, rotary=rotary.twin(), **shared)
            for _ in range(c.layers)
        )
        self.encoder_norm = RMSNorm(c.dim)
        self.decoder = nn.ModuleList(
            TransformerBlock(
                c.dim, c.heads, causal=True, context_dim=c.dim, rotary=rotary.twin(), **shared
            )
            for _ in range(c.layers if c.decoder_layers is None else c.decoder_layers)
        )
        self.norm = RMSNorm(c.dim)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        skip_logits: bool = False,
    ) -> ModelOutput:
        """ModelOutput with loss, logits [B, T, vocab_size] and the decoder's last_hidden_state.

        Args:
            input_ids: integers [B, S], the source.
            attention_mask: [B, S], 1 for a real token, 0 for padding.
            decoder_input_ids: integers [B, T]; None: labels shifted right by one after bos, with
                pad in place of -100.
            decoder_attention_mask: [B, T]; None: all are real. Padding at the end needs no mask.
            labels: integers [B, T], the target including its eos; -100 is ignored.
            skip_logits: computes the loss without the logits, which are then never in memory.

        Raises:
            ValueError: shapes, dtypes or values are not accepted.
        """
        c = self.config
        if labels is None and (decoder_input_ids is None or skip_logits):
            name = "skip_logits" if skip_logits else "input_ids"
            raise ValueError(f"{name} came without labels, so that there is nothing to compute; "
                             "pass decoder_input_ids or labels, or call generate()")  # fmt: skip
        if labels is not None:
            shape = (labels if decoder_input_ids is None else decoder_input_ids).shape
            labels = labels_like("labels", labels, shape, c.vocab_size)
        if decoder_input_ids is None:
            moved = F.pad(labels[:, :-1], (1, 0), value=c.bos_token_id)
            decoder_input_ids = moved.masked_fill(moved == IGNORED, c.pad_token_id)
        context, seen = self.encode(input_ids, attention_mask)
        x = self._decode(decoder_input_ids, decoder_attention_mask, context, seen)
        loss = None
        words = whole(self.embed.weight)
        logits = None if skip_logits else F.linear(x, words)
        if labels is not None and skip_logits:
            loss = head_loss(x, words, labels)
        elif labels is not None:
            loss = cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits, last_hidden_state=x)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(context [B, S, dim], its padding as context_mask or context_lens of decoder blocks)."""
        ids = tokens("input_ids", input_ids, self.config.vocab_size, self.config.max_len)
        options = padding("attention_mask", attention_mask, ids)
        x = self.drop(self.embed(ids))
        for block in self.encoder:
            x = block(x, **options)
        names = {"mask": "context_mask", "kv_lens": "context_lens"}
        return self.encoder_norm(x), {names[name]: mask for name, mask in options.items()}

    def _decode(self, ids, mask, context, seen, caches=None, context_caches=None):
        """The decoder's output [B, T, dim]."""
        ids = tokens("decoder_input_ids", ids, self.config.vocab_size, self.config.max_len)
        if context is not None and ids.shape[0] != context.shape[0]:
            raise ValueError(f"decoder_input_ids has shape {checks.show(ids)} and input_ids has "
                             f"{context.shape[0]} rows; the batch sizes must be equal")  # fmt: skip
        options = padding("decoder_attention_mask", mask, ids)
        x = self.drop(self.embed(ids))
        for i, block in enumerate(self.decoder):
            held = (
                {} if caches is None else {"cache": caches[i], "context_cache": context_caches[i]}
            )
            x = block(x, context, **options, **seen, **held)
        return self.norm(x)

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, room: int) -> Decoding:
        """The encoded source in the caches of cross-attention, for Generates.generate."""
        c = self.config
        if room > c.max_len:
            raise ValueError(f"max_new_tokens is {room}; accepted is at most max_len = {c.max_len}")
        context, seen = self.encode(input_ids, attention_mask)
        batch, length = context.shape[:2]
        caches = self.new_caches([b.attn for b in self.decoder], batch, room)
        held = self.new_caches([b.cross for b in self.decoder], batch, max(1, length))
        first = torch.full((batch, 1), c.bos_token_id, device=context.device)

        def step(new: Tensor, context: Tensor | None = None) -> Tensor:
            x = self._decode(new, None, context, seen, caches, held)
            return F.linear(x[:, -1], whole(self.embed.weight))

        def repeat(beams: int) -> None:
            seen.update({name: x.repeat_interleave(beams, 0) for name, x in seen.items()})

        logits = step(first, context)
        seen.pop("context_lens", None)  # the caches have these lengths now
        return Decoding(first, logits, step, caches, held, repeat)

"""GPT: a decoder-only language model. Next hop: nn.TransformerBlock; generation.py for generate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import KVCache, RotaryEmbedding, TransformerBlock
from ..nn.sharded import whole
from .base import Config, Model, ModelOutput
from .generation import Decoding, Generates, prompts
from .inputs import IGNORED, cross_entropy, head_loss, labels_like, padding, sequence_parts, tokens


@dataclass(kw_only=True)
class GPTConfig(Config):
    """The fields of Config and:

    Args:
        norm, mlp: those of TransformerBlock, default "rms" and "swiglu".
        qk_norm: RMSNorm of queries and keys, default False.
        window: how many tokens before itself a token sees; None: all.
        rotary_base: base of the rotary position embedding, default 10000.
        tie_embeddings: whether the head uses the embedding's matrix, default True.
        eos_token_id: the token at which generate() ends a sequence; None: no token does.
        pad_token_id: the token after the end, default 0.
    """

    norm: str = "rms"
    mlp: str = "swiglu"
    qk_norm: bool = False
    window: int | None = None
    rotary_base: float = 10000.0
    tie_embeddings: bool = True
    eos_token_id: int | None = None
    pad_token_id: int = 0


class GPT(Generates, Model):
    """Next-token logits by pre-norm blocks with rotary positions (Llama's architecture).

    GPT(GPTConfig(vocab_size=...)) or GPT(vocab_size=..., dim=..., ...).
    """

    config_class = GPTConfig
    config: GPTConfig
    config: GPTConfig

    def build(self, config: GPTConfig) -> None:
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.drop = nn.Dropout(c.dropout)
        rotary = RotaryEmbedding(c.dim // c.heads, c.rotary_base)
        window = None if c.window is None else (c.window, 0)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                *(c.dim, c.heads, c.kv_heads), causal=True, window=window, rotary=rotary.twin(),
                qk_norm=c.qk_norm, hidden=c.hidden, mlp=c.mlp, norm=c.norm, dropout=c.dropout,
            )
            for _ in range(c.layers)
        )  # fmt: skip
        self.norm = type(self.blocks[0].attn_norm)(c.dim)
        self.head = None if c.tie_embeddings else nn.Linear(c.dim, c.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: list[KVCache] | None = None,
        skip_logits: bool = False,
    ) -> ModelOutput:
        """ModelOutput with loss, logits and last_hidden_state.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S], 1 for a real token, 0 for padding.
            labels: integers [B, S], usually input_ids themselves: the model shifts them, so that
                token i is predicted from those before it. -100 is ignored, and so is the first
                token of each document.
            document_ids: [B, S] or [S] int32, non-decreasing: tokens see only their own document.
            cache: from make_caches(): input_ids continue the tokens in it.
            skip_logits: computes the loss without the logits, so that [B, S, vocab_size] is never
                in memory.

        Raises:
            ValueError: shapes, dtypes or values are not accepted, or labels came with a cache.
        """
        c = self.config
        input_ids = tokens("input_ids", input_ids, c.vocab_size, c.max_len)
        options = padding("attention_mask", attention_mask, input_ids)
        if cache is not None and (labels is not None or "mask" in options):
            what = "labels" if labels is not None else "an attention_mask with padding on the left"
            raise ValueError(f"{what} came with a cache; accepted is padding on the right, and no "
                             "labels")  # fmt: skip
        if skip_logits and labels is None:
            raise ValueError("skip_logits came without labels, so that nothing is left to compute; "
                             "pass labels")  # fmt: skip
        x = sequence_parts(self.drop(self.embed(input_ids)), input_ids)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[i]
            x = block(x, document_ids=document_ids, cache=layer_cache, **options)
        x = self.norm(x)  # [B, S, dim]
        head = self.embed if self.head is None else self.head
        loss = logits = None
        if not skip_logits:  # a separate head is called, because a plan may have wrapped it
            logits = F.linear(x, whole(head.weight)) if self.head is None else head(x)
        if labels is not None:
            targets = self._targets(labels, input_ids, document_ids)
            if skip_logits:
                loss = head_loss(x, whole(head.weight), targets)
            else:
                loss = cross_entropy(logits, targets)
        return ModelOutput(loss=loss, logits=logits, last_hidden_state=x)

    def _targets(self, labels, input_ids, document_ids):
        """The target of position i: token i + 1, or IGNORED if that begins another document."""
        labels = labels_like("labels", labels, input_ids.shape, self.config.vocab_size)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if document_ids is None:
            return targets
        ends = F.pad(document_ids[..., 1:] != document_ids[..., :-1], (0, 1), value=True)
        return targets.masked_fill(ends, IGNORED)

    # ---- generation ---------------------------------------------------------------------------

    def make_caches(self, batch: int, max_len: int | None = None) -> list[KVCache]:
        """Empty caches for `cache=`, one for each layer, with room for max_len tokens (None: the
        configuration's)."""
        layers = [block.attn for block in self.blocks]
        return self.new_caches(layers, batch, max_len or self.config.max_len)

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, room: int) -> Decoding:
        """The prompts in caches with room for `room` new tokens, for Generates.generate."""
        input_ids = tokens("input_ids", input_ids, self.config.vocab_size, self.config.max_len)
        ids, lens = prompts(input_ids, attention_mask)
        total = ids.shape[1] + room
        if total > self.config.max_len:
            raise ValueError(f"prompts of {ids.shape[1]} tokens and {room} new ones make {total}; "
                             f"accepted is at most max_len = {self.config.max_len}")  # fmt: skip
        caches = self.make_caches(ids.shape[0], total)
        real = torch.arange(ids.shape[1], device=ids.device) < lens[:, None]
        logits = self(ids, real, cache=caches).logits
        last = logits[torch.arange(ids.shape[0], device=ids.device), lens.long() - 1]

        def step(new: Tensor) -> Tensor:
            return self(new, cache=caches).logits[:, -1]

        return Decoding(input_ids, last, step, caches)

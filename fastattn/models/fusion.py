"""FusionEncoder: text that attends to another modality, such as image patches or audio frames.
Next hop: nn.TransformerBlock.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core import checks
from ..nn import LearnedPositionalEncoding, RMSNorm, RotaryEmbedding, TransformerBlock
from .base import Config, Model, ModelOutput
from .bert import label_loss
from .inputs import padding, tokens


@dataclass(kw_only=True)
class FusionConfig(Config):
    """The fields of Config and:

    Args:
        feature_dim: size of the other modality's vectors.
        max_features: number of learned positions for them; 0, the default: they already contain
            positions, or have no order.
        num_labels: labels of the classification head; 1 is regression, 0, the default, is no head.
        mlp: the mlp of TransformerBlock, default "swiglu".
    """

    feature_dim: int
    max_features: int = 0
    num_labels: int = 0
    mlp: str = "swiglu"


class FusionEncoder(Model):
    """In each block the text attends to itself, without a causal mask, and then to the features.

    FusionEncoder(FusionConfig(vocab_size=..., feature_dim=...)) or FusionEncoder(vocab_size=...,
    feature_dim=..., ...).
    """

    config_class = FusionConfig
    config: FusionConfig
    config: FusionConfig

    def build(self, config: FusionConfig) -> None:
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.features = nn.Linear(c.feature_dim, c.dim)
        self.feature_norm = RMSNorm(c.dim)
        self.feature_positions = None
        if c.max_features:
            self.feature_positions = LearnedPositionalEncoding(c.dim, c.max_features)
        self.drop = nn.Dropout(c.dropout)
        rotary = RotaryEmbedding(c.dim // c.heads)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                *(c.dim, c.heads, c.kv_heads), context_dim=c.dim, rotary=rotary.twin(),
                hidden=c.hidden, mlp=c.mlp, dropout=c.dropout,
            )
            for _ in range(c.layers)
        )  # fmt: skip
        self.norm = RMSNorm(c.dim)
        self.head = nn.Linear(c.dim, c.num_labels) if c.num_labels else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        features_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """ModelOutput with last_hidden_state [B, S, dim]; logits [B, num_labels] and loss.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S], 1 for a real token, 0 for padding.
            features: [B, F, feature_dim], floating.
            features_mask: [B, F], 1 for a real feature. A sequence without features attends to
                none.
            labels: see bert.label_loss; needs num_labels.

        Raises:
            ValueError: shapes, dtypes or values are not accepted.
        """
        c = self.config
        ids = tokens("input_ids", input_ids, c.vocab_size, c.max_len)
        text = padding("attention_mask", attention_mask, ids)
        if features is None:
            raise ValueError("features is None; accepted is a tensor [B, F, feature_dim]")
        wanted = (ids.shape[0], None, c.feature_dim)
        shape = tuple(checks.tensor("features", features).shape)
        if len(shape) != 3 or shape[::2] != wanted[::2] or not features.is_floating_point():
            raise ValueError(f"features is {features.dtype} {list(shape)}; accepted are floats "
                             f"[{wanted[0]}, F, {c.feature_dim}]")  # fmt: skip
        if labels is not None and self.head is None:
            raise ValueError("labels came to a FusionEncoder with num_labels=0, which has no head")
        names = {"mask": "context_mask", "kv_lens": "context_lens"}
        real = padding("features_mask", features_mask, features)
        seen = {names[name]: mask for name, mask in real.items()}
        context = self.features(features)
        if self.feature_positions is not None:
            context = self.feature_positions(context)
        context = self.feature_norm(context)  # [B, F, dim]
        x = self.drop(self.embed(ids))
        for block in self.blocks:
            x = block(x, context, **text, **seen)
        x = self.norm(x)
        logits = None if self.head is None else self.head(self._mean(x, attention_mask))
        loss = None if labels is None else label_loss(logits, labels)
        return ModelOutput(loss=loss, logits=logits, last_hidden_state=x)

    @staticmethod
    def _mean(x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mean over real tokens, [B, dim]."""
        if attention_mask is None:
            return x.mean(1)
        weights = (attention_mask != 0).to(x.dtype).unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)

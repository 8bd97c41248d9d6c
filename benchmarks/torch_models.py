"""Models for the end-to-end cases in plain torch, as users write them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPTBlock(nn.Module):
    """GPT-2's pre-norm layer."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.attn_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, dim]
        qkv = self.qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, D]
        p = self.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.dropout(self.out(out.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")))


class GPT(nn.Module):
    """Next-token loss of token ids."""

    def __init__(self, words: int, length: int, dim: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.words, self.places = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(GPTBlock(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:  # int64 [B, S] -> loss
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.words.weight.T  # [B, S, words]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class MaskedLM(nn.Module):
    """BERT's loss over the masked tokens, with the encoder of fastattn.benchmarks.demo.minilm."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, real: Tensor, masked: Tensor) -> Tensor:  # [B, S] each -> loss
        x = self.encoder.embed(ids)
        for layer in self.encoder.layers:
            x = layer(x, real[:, None, None])
        return F.cross_entropy(x[masked] @ self.encoder.words.weight.T, ids[masked])


Kept = tuple[Tensor, Tensor, int]  # keys, values [B, Hkv, capacity, D] and their number


class _Attention(nn.Module):
    """Llama's attention: grouped heads and rotary positions. Names are fastattn.nn.Attention's."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, kept: Kept | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        start = kept[2] if kept else 0
        q, k = rotate(q, start), rotate(k, start)
        if kept:  # the new keys are written at `start`, all up to them are read
            end = start + x.shape[1]
            for held, new in zip(kept, (k, v)):
                held[:, :, start:end] = new
            k, v = kept[0][:, :, :end], kept[1][:, :, :end]
        causal = x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


MAX_LEN = 8192


@cache
def angles(half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of rotary angles, [MAX_LEN, half]."""
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    phases = torch.arange(MAX_LEN, dtype=torch.float64)[:, None] * frequencies
    return phases.cos().to(dtype), phases.sin().to(dtype)


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary embedding in the half-split layout, at positions from `start`; x is [B, H, S, D]."""
    end = start + x.shape[2]
    cos, sin = (table[start:end] for table in angles(x.shape[-1] // 2, x.dtype))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Gated(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """One layer; its state_dict is fastattn.nn.TransformerBlock's."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = _Attention(dim, heads, kv_heads), _Gated(dim, hidden)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), kept)
        return x + self.mlp(self.mlp_norm(x))

"""Models for test_swap.py and test_swap_after.py: one of each kind that swap() meets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

D, H, S = 16, 2, 6


class Named(nn.MultiheadAttention):
    """No forward of its own: swapped, and its other methods stay."""

    def describe(self):
        return f"{self.num_heads} heads"


class Doubled(nn.MultiheadAttention):
    """A forward of its own: left alone."""

    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class OwnLayer(nn.TransformerEncoderLayer):
    """Left alone, but what it holds is swapped, and torch's fast path must not pass it by."""

    def forward(self, src, *args, **kwargs):
        return super().forward(src, *args, **kwargs)


class Block(nn.Module):
    """Attention the way timm writes it."""

    def __init__(self, dim=D, num_heads=H, qk_norm=True):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(dim, 3 * dim)
        norm = nn.LayerNorm if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        batch, n, _ = x.shape
        qkv = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p)
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            scores = scores if attn_mask is None else scores + attn_mask
            x = self.attn_drop(scores.softmax(-1)) @ v
        x = x.transpose(1, 2).reshape(batch, n, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(x))


class ImportedAttention(Block):
    """Calls the function by a name imported from torch."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(scaled_dot_product_attention(q, k, v))


class HiddenAttention(Block):
    """F is here, but attention goes another way."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.relu(self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v)))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"dim_feedforward": 32, "batch_first": True, "dropout": 0.0}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, **options), 1)
        self.named, self.doubled = (c(D, H, batch_first=True) for c in (Named, Doubled))
        self.own = OwnLayer(D, H, **options)
        self.block = Block()

    def forward(self, x):
        hidden = torch.arange(x.shape[1]) >= torch.tensor([[4], [6]])
        memory = self.encoder(x, src_key_padding_mask=hidden)
        x = self.decoder(x, memory, memory_key_padding_mask=hidden)
        x = x + self.named(x, x, x)[0] + self.doubled(x, x, x, need_weights=False)[0]
        return self.block(self.own(x))


def model(cls=Everything, *args):
    torch.manual_seed(0)
    return cls(*args).eval()


def x_of():
    torch.manual_seed(1)
    return torch.randn(2, S, D)

"""TransformerBlock: one pre-norm layer of a modern model. Next hop: attention.py, gated.py."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..fused.activation import activate
from . import sharded
from ._arguments import choice, probability
from .attention import Attention
from .gated import MLP, GeGLU, SwiGLU
from .kv_cache import KVCache
from .linear import plain
from .norm import LayerNorm, RMSNorm
from .rotary import RotaryEmbedding

NORMS = {"rms": RMSNorm, "layer": LayerNorm}
FEED_FORWARDS = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": partial(GeGLU, approximate="tanh"),
    "gelu": MLP,
    "gelu_tanh": partial(MLP, activation="gelu_tanh"),
    "relu": partial(MLP, activation="relu"),
    "relu2": partial(MLP, activation="relu2"),
    "silu": partial(MLP, activation="silu"),
}


class TransformerBlock(nn.Module):
    """x += attn(attn_norm(x)); x += cross(cross_norm(x), context); x += mlp(mlp_norm(x)).

    The middle step exists with context_dim. Each addition is fused with the norm that follows it.

    Args:
        dim, heads, kv_heads, head_dim, causal, window, rotary, qk_norm, sinks, softcap: those of
            Attention.
        context_dim: adds cross-attention to a context whose last dimension is context_dim.
        hidden: width of the feed-forward block; None: that block's default.
        mlp: "swiglu" (default), "geglu", "geglu_tanh", or a plain MLP's activation: "gelu",
            "gelu_tanh", "relu", "relu2", "silu".
        norm: "rms" (default) or "layer".
        eps: of the norms; None: RMSNorm's 1e-6 or LayerNorm's 1e-5.
        bias: of every projection, default False.
        dropout: probability in [0, 1) of dropping an element of a sublayer's output, in training.
        attention_dropout: that of dropping an attention weight; None: the same as dropout.

    Raises:
        ValueError or TypeError: an argument, which is named, is not accepted.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        rotary: RotaryEmbedding | bool | None = None,
        qk_norm: bool = False,
        sinks: bool = False,
        softcap: float = 0.0,
        hidden: int | None = None,
        mlp: str = "swiglu",
        norm: str = "rms",
        eps: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        norm = NORMS[choice("norm", norm, tuple(NORMS))]
        new_norm = partial(norm, dim, **({} if eps is None else {"eps": eps}), **place)
        self.dropout = probability("dropout", dropout)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        shared = {"kv_heads": kv_heads, "head_dim": head_dim, "dropout": attention_dropout}
        shared |= {"bias": bias, "qk_norm": qk_norm, "softcap": softcap, **place}
        self.attn_norm = new_norm()
        self.attn = Attention(
            dim, heads, causal=causal, window=window, rotary=rotary, sinks=sinks, **shared
        )
        cross = context_dim is not None
        self.cross_norm = new_norm() if cross else None
        self.cross = Attention(dim, heads, context_dim=context_dim, **shared) if cross else None
        self.mlp_norm = new_norm()
        feed_forward = FEED_FORWARDS[choice("mlp", mlp, tuple(FEED_FORWARDS))]
        self.mlp = feed_forward(dim, hidden, bias=bias, **place)

    def reset_parameters(self) -> None:
        """Initialises each submodule by its own reset_parameters()."""
        for child in self.children():
            child.reset_parameters()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        kv_lens: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_ranges: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        context_mask: Tensor | None = None,
        context_lens: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
        context_max_seqlen: int | None = None,
        cache: KVCache | None = None,
        context_cache: KVCache | None = None,
    ) -> Tensor:
        """One block of the residual stream: [B, S, dim] -> [B, S, dim].

        Args:
            x: [B, S, dim], or packed [T, dim] with cu_seqlens; the result has its shape.
            context, context_mask, context_lens, context_cu_seqlens, context_max_seqlen,
                context_cache: the cross-attention's context, mask, kv_lens, cu_seqlens, max_seqlen
                and cache.
            The other arguments are the self-attention's; see Attention.forward.
        """
        if self.cross is None:
            given = {"context": context, "context_mask": context_mask, "context_lens": context_lens,
                     "context_cu_seqlens": context_cu_seqlens, "context_cache": context_cache,
                     "context_max_seqlen": context_max_seqlen}  # fmt: skip
            for name in (name for name, x in given.items() if x is not None):
                raise ValueError(f"{name} came to a block without cross-attention; "
                                 "TransformerBlock(context_dim=...) adds it")  # fmt: skip
        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        p = self.dropout if self.training else 0.0
        added = self.attn(
            self.attn_norm(x), mask=mask, bias=bias, kv_lens=kv_lens, document_ids=document_ids,
            key_ranges=key_ranges, positions=positions, cache=cache, **packed,
        )  # fmt: skip
        if self.cross is not None:
            normed, x = _join(self.cross_norm, added, x, p)
            added = self.cross(
                normed, context, mask=context_mask, kv_lens=context_lens, cache=context_cache,
                context_cu_seqlens=context_cu_seqlens, context_max_seqlen=context_max_seqlen,
                **packed,
            )  # fmt: skip
        normed, x = _join(self.mlp_norm, added, x, p)
        return _add(self.mlp_norm, self.mlp(normed), x, p)

    def make_cache(self, batch: int, max_len: int, **place) -> KVCache:
        """An empty cache for the self-attention, from the arguments of Attention.make_cache."""
        return self.attn.make_cache(batch, max_len, **place)


def _join(norm: nn.Module, added: Tensor, x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(norm(y), y) of y = x + dropout(added): in one pass where the norm is fastattn.nn's without
    hooks. Hooks (of tensor-parallel plans too) and other norms take one tensor and return one."""
    if type(norm) in NORMS.values() and plain(norm, type(norm)):
        return norm(added, x, p)
    x = _add(norm, added, x, p)
    return norm(x), x


def _add(norm: nn.Module, added: Tensor, x: Tensor, p: float) -> Tensor:
    """x + dropout(added). Where sequence parallelism shards the norm, each process has other rows
    and needs its own dropout key."""
    added = sharded.alike(added, x)
    if p:
        mesh = None if sharded.is_sharded(added) else sharded.mesh_of(norm)
        key = None if mesh is None else sharded.own_key(mesh, added.device)
        added = activate(added, dropout_p=p, dropout_seed=key)
    return x + added

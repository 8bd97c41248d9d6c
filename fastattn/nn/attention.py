"""Attention: projections around fastattn.attention, with the options of modern models.
Next hop: ../functional.py, or kv_cache.KVCache when decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks
from ..functional import attention, varlen_attention
from . import sharded
from ._arguments import last_size, positive, probability
from .kv_cache import KVCache
from .norm import RMSNorm
from .rotary import RotaryEmbedding


class Attention(nn.Module):
    """Multi-head attention for new models. Parameter names are Llama's.

    out = o_proj(attention(rotary(q_norm(q_proj(x))), rotary(k_norm(k_proj(x))), v_proj(x)))

    Args:
        dim: size of the last dimension of input and output.
        heads: query heads.
        kv_heads: heads of keys and values, of which heads must be a multiple (GQA; 1 is MQA). None:
            heads.
        head_dim: channels of each head. None: dim / heads, of which dim must then be a multiple.
        context_dim: makes this cross-attention: keys and values are projected from a context whose
            last dimension is context_dim.
        causal: row i sees keys up to its own position. Self-attention only.
        window: (left, right) as fastattn.attention takes it. Self-attention only.
        dropout: probability that an attention weight is dropped in training, default 0.
        head_origin: (first, total) where this process has heads first, first + 1, ... of total
            (tensor parallelism), so that dropout drops what a single process would. It is also an
            attribute, to be set when the projections of a built module are sharded. None: this
            process has all heads.
        bias: whether q_proj, k_proj and v_proj have biases, default False.
        out_bias: whether o_proj has one; None: as bias.
        rotary: a RotaryEmbedding (it may be shared), or True for RotaryEmbedding(head_dim).
            Self-attention only.
        qk_norm: RMSNorm(head_dim) of queries and keys, before rotary (Qwen3's order).
        sinks: a learned logit for each head in the softmax's denominator (gpt-oss), initially 0.
        softcap: caps scores, s -> softcap * tanh(s / softcap); 0 is off.
        scale: multiplies q.k; None: 1 / sqrt(head_dim).
        eps: of the norms of qk_norm, default 1e-6.

    Raises:
        ValueError or TypeError: an argument, which is named, is not accepted.
    """

    attend = staticmethod(attention)  # an instance may replace it by one with the same arguments

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
        dropout: float = 0.0,
        head_origin: tuple[int, int] | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        rotary: RotaryEmbedding | bool | None = None,
        qk_norm: bool = False,
        sinks: bool = False,
        softcap: float = 0.0,
        scale: float | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("dim", dim), positive("heads", heads)
        kv_heads = heads if kv_heads is None else positive("kv_heads", kv_heads)
        if heads % kv_heads:
            raise ValueError(f"heads is {heads} and kv_heads {kv_heads}; heads must be a multiple "
                             "of kv_heads")  # fmt: skip
        if head_dim is None and dim % heads:
            raise ValueError(f"dim is {dim} and heads {heads}; dim must be a multiple of heads, or "
                             "head_dim must be given")  # fmt: skip
        head_dim = dim // heads if head_dim is None else positive("head_dim", head_dim)
        if context_dim is not None:
            positive("context_dim", context_dim)
            given = {"causal": causal, "window": window, "rotary": rotary}
            for name in (name for name, x in given.items() if x):
                raise ValueError(f"{name} came with context_dim={context_dim}; it is for "
                                 "self-attention")  # fmt: skip
        if rotary is True:
            rotary = RotaryEmbedding(head_dim)
        if rotary and rotary.dim > head_dim:
            raise ValueError(f"rotary rotates {rotary.dim} channels and head_dim is {head_dim}; "
                             "accepted are at most that many")  # fmt: skip
        checks.spec_of(head_dim, scale, causal, window, "start", softcap, dropout)
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.context_dim, self.causal, self.window = context_dim, causal, window
        self.dropout, self.softcap, self.scale = probability("dropout", dropout), softcap, scale
        self.head_origin = head_origin
        if head_origin is not None:
            checks.head_origin(head_origin, 1, 1)

        place = {"device": device, "dtype": dtype}
        source = dim if context_dim is None else context_dim
        out_bias = bias if out_bias is None else out_bias
        self.q_proj = nn.Linear(dim, heads * head_dim, bias, **place)
        self.k_proj = nn.Linear(source, kv_heads * head_dim, bias, **place)
        self.v_proj = nn.Linear(source, kv_heads * head_dim, bias, **place)
        self.o_proj = nn.Linear(heads * head_dim, dim, out_bias, **place)
        self.q_norm = RMSNorm(head_dim, eps, **place) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps, **place) if qk_norm else None
        self.rotary = rotary or None
        self.sinks = nn.Parameter(torch.zeros(heads, **place)) if sinks else None

    def reset_parameters(self) -> None:
        """Projections as torch.nn.Linear initialises them, norms 1, sinks 0."""
        for child in self.children():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

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
        context_cu_seqlens: Tensor | None = None,
        context_max_seqlen: int | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attention of the rows of x to x or, in cross-attention, to context.

        Args:
            x: [B, S, dim]; packed, with cu_seqlens: [T, dim].
            context: [B, Sk, context_dim] (packed: [Tk, context_dim]), for cross-attention only.
                May be None once the cache holds its keys and values.
            mask: bool, True = attend: [B, Sk] says which keys exist (padding), or four dimensions
                that broadcast to [B, heads, S, Sk].
            bias: float, broadcastable to [B, heads, S, Sk], added to the scores; differentiable.
            kv_lens: integers [B]: keys at or past kv_lens[b] do not exist (padding on the right).
                Cheaper than a mask. With a cache: how many of x's rows batch entry b has.
            document_ids: [S] or [B, S], non-decreasing: tokens see their own document only.
            key_ranges: (begin, end), int32, each broadcastable to [B, heads, S] and never
                decreasing along the rows: row i sees keys [begin, end) at most. fastattn.masks
                makes those of prefixes, chunks and blocks. With a cache they count its slots.
            cu_seqlens: int32 [N + 1]: x is N sequences one after the other, without padding.
            max_seqlen: at least the longest of them; None: read from cu_seqlens.
            context_cu_seqlens, context_max_seqlen: the context's; None: x's.
            positions: integers [S] or [B, S], for rotary only. None: 0, 1, ..., or from the
                cache's lengths on. Packed sequences and documents need none, because rotary
                attention depends only on differences of positions within a sequence.
            cache: for decoding, without gradients. Self-attention must be causal: x's keys and
                values are appended, and x attends to all that the cache holds; mask is then [B, n]
                over the first n slots, or broadcasts to [B, heads, S, max_len]. Cross-attention
                fills an empty cache from context, and later calls ignore context.

        Returns:
            [B, S, dim], or packed [T, dim].

        Raises:
            ValueError or TypeError: an argument, which is named, is not accepted.
        """
        last_size("x", x, self.dim)
        self._check(x, context, cu_seqlens, document_ids, positions, cache)
        packing = {"max_seqlen": max_seqlen, "context_cu_seqlens": context_cu_seqlens}
        self._check_packing(cu_seqlens, packing | {"context_max_seqlen": context_max_seqlen})
        if mask is not None and checks.tensor("mask", mask).dim() == 2:
            mask = self._key_mask(mask, x, cache)[:, None, None, :]
        options = {"mask": mask, "bias": bias, "sinks": self.sinks, "softcap": self.softcap}
        options |= {"scale": self.scale, "causal": self.causal, "window": self.window}
        options["key_ranges"] = key_ranges
        options["dropout_p"] = self.dropout if self.training else 0.0
        options["head_origin"] = self.head_origin
        q, mesh = self._heads("q_proj", x), None
        if q.shape[-3] != self.heads:
            mesh = self._check_part(q.shape[-3], options)
        q = self._normed(self.q_norm, q, mesh)
        if self.context_dim is not None and cache is not None:
            return self._project(self._cross_cached(q, context, cache, kv_lens, options, mesh))
        source = x if self.context_dim is None else context
        k, v = self._keys(source, q.shape[-3], mesh)
        if self.rotary is not None:
            if positions is None and cache is not None:
                positions = cache.positions(x.shape[1])
            q, k = self.rotary(q, k, positions=positions)
        if cache is not None:
            out = cache.attend(q, k, v, new_lens=kv_lens, **options)
        elif cu_seqlens is not None:
            longest = _longest(cu_seqlens, max_seqlen)
            ends, ends_max = context_cu_seqlens, context_max_seqlen
            ends, ends_max = (cu_seqlens, longest) if ends is None else (ends, ends_max)
            q, k, v = (y.transpose(0, 1) for y in (q, k, v))
            out = varlen_attention(
                *(q, k, v, cu_seqlens, ends, longest, _longest(ends, ends_max)),
                kv_lens=kv_lens, align="start", **options,
            )  # fmt: skip
            out = out.transpose(0, 1)
        else:
            options |= {"kv_lens": kv_lens, "document_ids": document_ids, "align": "start"}
            out = self.attend(q, k, v, **options)
        return self._project(out)

    def make_cache(
        self,
        batch: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kind: type[KVCache] = KVCache,
    ) -> KVCache:
        """An empty KVCache for this layer of `batch` sequences of at most max_len keys, by default
        on the device and in the dtype of its weights. Where the weights are sharded it has this
        process's heads."""
        weight = self.k_proj.weight
        place = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        here = sharded.is_sharded(weight) or self.head_origin is not None
        return kind(batch, None if here else self.kv_heads, max_len, self.head_dim, **place)

    def _heads(self, name, x):
        """[..., S, dim] -> [..., heads, S, head_dim], a view."""
        y = sharded.local(name, getattr(self, name)(x))
        if y.shape[-1] % self.head_dim:
            raise ValueError(
                f"{name} gives {y.shape[-1]} channels and head_dim is {self.head_dim}: a process "
                f"must have whole heads; accepted is a number of processes that divides kv_heads = "
                f"{self.kv_heads}"
            )
        return y.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def _keys(self, source, q_heads, mesh):
        """k and v, checked to have the key-value heads of q's q_heads heads."""
        k, v = self._heads("k_proj", source), self._heads("v_proj", source)
        if k.shape[-3] * self.heads != q_heads * self.kv_heads:
            raise ValueError(
                f"q_proj gives {q_heads} of {self.heads} heads and k_proj {k.shape[-3]} of "
                f"{self.kv_heads}; accepted is the same fraction of both, so that each process "
                "has the keys of its own heads"
            )
        return self._normed(self.k_norm, k, mesh), v

    def _normed(self, norm, x, mesh):
        """norm(x). With a mesh, whose processes have different heads, the gradients of norm's
        parameters are summed over the processes, so that their copies stay equal."""
        if norm is None:
            return x
        if mesh is None:
            return norm(x)
        y = sharded.call_shared(norm, x, mesh)
        return y.to_local() if sharded.is_sharded(y) else y

    def _check_part(self, heads, options):
        """The mesh whose processes have `heads` heads each, or None where it is unknown. Sets sinks
        and head_origin in options to those of this process."""
        if self.head_origin is None and options["dropout_p"]:
            raise ValueError(
                f"q_proj gives {heads} of {self.heads} heads and dropout is {self.dropout}: "
                "where the projections are sharded, head_origin = (first, total) says which heads "
                "are here, so that no two processes drop the same attention weights"
            )
        mesh = sharded.mesh_of(self.q_proj)
        if mesh is not None and self.sinks is not None:
            options["sinks"] = sharded.own_part(self.sinks, mesh)
        if mesh is not None and self.head_origin is None:  # masks and biases may have all heads
            options["head_origin"] = (mesh.get_local_rank() * heads, self.heads)
        return mesh

    def _project(self, out):
        return self.o_proj(out.transpose(-2, -3).flatten(-2))

    def _cross_cached(self, q, context, cache, kv_lens, options, mesh):
        k = v = None
        if not cache.filled:
            if context is None:
                raise ValueError("context is None and the cache is empty; the first call needs it")
            k, v = self._keys(context, q.shape[-3], mesh)
            if kv_lens is None:
                return cache.attend(q, k, v, **options)
            cache.reserve(k.shape[1])
            cache.check(q, cache_lens=kv_lens, **options)  # before the next call writes
            cache.attend(q[:, :, :0], k, v, new_lens=kv_lens)  # keys past kv_lens are forgotten
        return cache.attend(q, **options)

    def _key_mask(self, mask, x, cache):
        """The mask [B, n]; with a cache it is padded to [B, max_len]."""
        if cache is None:
            return mask
        missing = cache.max_len - mask.shape[1]
        if missing < 0:
            raise ValueError(f"mask has shape {checks.show(mask)} and the cache {cache.max_len} "
                             "slots; accepted are at most as many columns")  # fmt: skip
        added = x.shape[1] if self.context_dim is None else 0
        held = int(cache.lens.max()) + added if checks.has_values(cache.lens) else 0
        if held > mask.shape[1]:
            raise ValueError(f"mask has {mask.shape[1]} columns and the cache will hold {held} "
                             "keys; it must cover them")  # fmt: skip
        return nn.functional.pad(mask, (0, missing))

    def _check(self, x, context, cu_seqlens, document_ids, positions, cache):
        cross = self.context_dim is not None
        if x.dim() != (3 if cu_seqlens is None else 2):
            wanted = "[B, S, dim]" if cu_seqlens is None else "[T, dim] with cu_seqlens"
            raise ValueError(f"x has shape {checks.show(x)}; accepted is {wanted}")
        if context is not None and not cross:
            raise ValueError("context came to self-attention; Attention(context_dim=...) makes "
                             "cross-attention")  # fmt: skip
        if context is not None:
            last_size("context", context, self.context_dim)
        elif cross and cache is None:
            raise ValueError("context is None; cross-attention needs it, or a cache that holds it")
        if positions is not None and self.rotary is None:
            raise ValueError("positions came to an Attention without rotary; only rotary uses "
                             "them")  # fmt: skip
        if cu_seqlens is not None and document_ids is not None:
            raise ValueError("document_ids came with cu_seqlens, which separate documents already")
        if cache is None:
            return
        for name, given in (("cu_seqlens", cu_seqlens), ("document_ids", document_ids)):
            if given is not None:
                raise ValueError(f"{name} came with a cache, whose batch entries are one document "
                                 "each; accepted is None")  # fmt: skip
        if not cross and not self.causal:
            raise ValueError("a cache came to self-attention with causal=False; accepted is "
                             "causal self-attention, or cross-attention")  # fmt: skip
        if cache.batch != x.shape[0]:
            raise ValueError(f"the cache has batch size {cache.batch} and x {x.shape[0]}; they "
                             "must be equal")  # fmt: skip

    def _check_packing(self, cu_seqlens, others):
        for name in (name for name, x in others.items() if x is not None):
            if cu_seqlens is None:
                raise ValueError(f"{name} came without cu_seqlens; it is for packed sequences")
            if name.startswith("context") and self.context_dim is None:
                raise ValueError(f"{name} came to self-attention, whose keys are cu_seqlens'")
        if others["context_max_seqlen"] is not None and others["context_cu_seqlens"] is None:
            raise ValueError("context_max_seqlen came without context_cu_seqlens")

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}"
        shown += f", head_dim={self.head_dim}, causal={self.causal}, dropout={self.dropout}"
        if self.head_origin is not None:
            shown += f", head_origin={self.head_origin}"
        return shown if self.window is None else f"{shown}, window={self.window}"


def _longest(cu_seqlens: Tensor, given: int | None) -> int:
    """The length of the longest sequence; reading it synchronizes where it is not given."""
    if given is not None:
        return given
    lens = checks.tensor("cu_seqlens", cu_seqlens).diff()
    return int(lens.max()) if lens.numel() else 0

"""The functions that transformers' FlashAttention loader returns for the alias with "flash" in it.

Models and libraries go by the name of the implementation: one with "flash" in it gets the packed
branches of vision and omni models, unpadded batches in sentence-transformers and continuous
batching. transformers then loads that implementation's functions from a package or from the hub,
through transformers.modeling_flash_attention_utils._lazy_imports. That function is wrapped here:
for our names it returns the functions below, and every other name goes to the original. The loader
finds the supported options by parameter name, so the parameters have FlashAttention's names.
"""

from __future__ import annotations

from torch import Tensor
from transformers import modeling_flash_attention_utils as loader

from ..decoding import decode_attention
from ..functional import attention, varlen_attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """q [B, Sq, Hq, D], k and v [B, Skv, Hkv, D] -> [B, Sq, Hq, D]. Causal masks and windows are
    aligned to the end: the last row sees the last key."""
    options = _options(softmax_scale, causal, window_size, softcap, deterministic, s_aux)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, dropout_p=dropout_p, **options).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] or, with block_table, [blocks, size, Hkv, D]."""
    return varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k),
        page_table=block_table, dropout_p=dropout_p,
        **_options(softmax_scale, causal, window_size, softcap, deterministic, s_aux),
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Appends k and v [B, Snew, Hkv, D] to the cache in place and attends: [B, Sq, Hq, D].

    The cache is [B, Smax, Hkv, D] or, with block_table [B, max_blocks], [blocks, size, Hkv, D].
    cache_seqlens: keys in it before the call; None: it is full.
    """
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1]
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    k, v = (None if x is None else x.transpose(1, 2) for x in (k, v))
    out = decode_attention(
        q, k_cache, v_cache, cache_lens=cache_seqlens, k=k, v=v, page_table=block_table,
        **_options(softmax_scale, causal, window_size, softcap, None, s_aux),
    )  # fmt: skip
    return out.transpose(1, 2)


def _options(softmax_scale, causal, window_size, softcap, deterministic, s_aux) -> dict:
    left, right = window_size
    return {
        "scale": softmax_scale,
        "window": (left, 0 if causal else right),
        "softcap": softcap,
        "deterministic": deterministic,
        "sinks": s_aux,
    }


# ---- the loader ----------------------------------------------------------------------------------


def serve_loader(prefix: str) -> None:
    """Makes the loader return the functions above for names that start with `prefix`. A second call
    has no effect."""
    theirs = loader._lazy_imports
    if getattr(theirs, "fastattn", None) == prefix:
        return

    def _lazy_imports(implementation, *arguments, **options):
        if str(implementation).startswith(prefix):
            padding = (loader._pad_input, loader._unpad_input)
            return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, *padding
        return theirs(implementation, *arguments, **options)

    _lazy_imports.fastattn = prefix
    loader._lazy_imports = _lazy_imports

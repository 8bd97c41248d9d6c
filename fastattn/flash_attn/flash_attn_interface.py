"""FlashAttention 2's seven functions. Next hop: ../functional.py and ../decoding.py.

Tensors are [B, S, heads, D] here and [B, heads, S, D] in fastattn's own functions, which read the
transposed views without a copy. docs/flash_attn.md lists the differences from FlashAttention.

Imports are absolute so that the file also loads as flash_attn.flash_attn_interface, where the
package stands in for flash_attn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core import checks
from fastattn.decoding import decode_attention
from fastattn.flash_attn.absent import absent
from fastattn.flash_attn.arguments import (
    cache_shapes,
    call_named,
    dense_shapes,
    max_length,
    pair,
    undifferentiable,
    unpacked,
)
from fastattn.flash_attn.dropped import dense_weights, packed_weights, signed_weights
from fastattn.functional import attention, varlen_attention
from fastattn.habits import unscriptable

Result = Tensor | tuple[Tensor, Tensor, Tensor]


@unscriptable
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over [B, S, heads, D] tensors, with all derivatives of fastattn.attention.

    Args:
        q: [B, Sq, Hq, D] float32, bfloat16, float16 or float64; any strides, the last of them 1.
        k: [B, Skv, Hkv, D], Hq % Hkv == 0: query head h reads kv head h // (Hq // Hkv).
        v: [B, Skv, Hkv, Dv].
        dropout_p: probability in [0, 1) of dropping an attention weight.
        softmax_scale: None is 1 / sqrt(D).
        causal: row i sees keys j <= i + Skv - Sq (the last row sees the last key).
        window_size: (left, right), or a tensor or array of the two: i + Skv - Sq - left <= j <=
            i + Skv - Sq + right. A negative side is unbounded; causal makes the right side 0.
        softcap: s -> softcap * tanh(s / softcap) of the scaled scores; 0 is off.
        alibi_slopes: [Hq] or [B, Hq] float32: -slope * |i + Skv - Sq - j| is added to the scores.
        deterministic: either value; results are always bitwise reproducible.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out [B, Sq, Hq, Dv], contiguous. With return_attn_probs (out, softmax_lse, S_dmask):
        softmax_lse [B, Hq, Sq] float32 (float64 for float64), differentiable, the natural log of
        the softmax denominator. S_dmask, where dropout_p > 0, is [B, Hq, Sq, Skv] in q's dtype,
        Sq and Skv padded with zeros to multiples of 128: the attention weights before dropout,
        negative where dropped, without gradient, in O(Sq * Skv) memory; empty without dropout.
        A row that sees no key gives out = 0 and softmax_lse = +inf.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value.

    Source: FlashAttention-2 (Dao, arXiv:2307.08691), version 2.8's interface.
    """
    dense_shapes(q, k, v)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call(**more):
        return call_named(attention, q, k, v, **options, **more)

    def weights(lse):
        return dense_weights(q, k, lse, options)

    return _results(call, weights, (1, 2), q, dropout_p, return_attn_probs)


@unscriptable
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func() of kv [B, Skv, 2, Hkv, D]: k is kv[:, :, 0] and v is kv[:, :, 1].

    kv's gradient is packed too, by one copy.
    """
    k, v = unpacked("kv", kv, "[B, Skv, 2, kv_heads, D]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


@unscriptable
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func() of qkv [B, S, 3, heads, D], q, k and v in this order.

    qkv's gradient is packed too, by one copy.
    """
    q, k, v = unpacked("qkv", qkv, "[B, S, 3, heads, D]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


@unscriptable
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
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """flash_attn_func() over N sequences packed one after the other, without padding.

    Args:
        q: [Tq, Hq, D]. Rows past cu_seqlens_q[-1] give 0.
        k: [Tk, Hkv, D]; with block_table [blocks, block_size, Hkv, D], blocks of any size.
        v: as k, with Dv.
        cu_seqlens_q: [N + 1] int32: sequence n is rows cu_seqlens_q[n] : cu_seqlens_q[n + 1].
        cu_seqlens_k: [N + 1] int32, the same for keys; with block_table only the lengths count.
        max_seqlen_q, max_seqlen_k: the longest lengths or more, ints or tensors of one integer.
        block_table: [N, max_blocks] int32: key j of sequence n is slot j % block_size of block
            block_table[n, j // block_size]. Such a call has no gradient; backward raises.
        The other arguments are flash_attn_func's; alibi_slopes [Hq] or [N, Hq].

    Returns:
        out [Tq, Hq, Dv], contiguous. With return_attn_probs (out, softmax_lse [Hq, Tq], S_dmask);
        S_dmask, where dropout_p > 0, is [N, Hq, max_seqlen_q, max_seqlen_k], padded as above, with
        rows and keys counted from the first of each sequence.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value.
        NotImplementedError: in the backward pass of a call with block_table.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    longest = (max_length("max_seqlen_q", max_seqlen_q), max_length("max_seqlen_k", max_seqlen_k))
    packing = (cu_seqlens_q, cu_seqlens_k, *longest)

    attend = varlen_attention if block_table is None else undifferentiable(varlen_attention)

    def call(**more):
        return call_named(attend, q, k, v, *packing, page_table=block_table, **options, **more)

    def weights(_lse):
        return packed_weights(q, k, *packing, block_table, options)

    return _results(call, weights, None, q, dropout_p, return_attn_probs)


@unscriptable
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func() of kv [Tk, 2, Hkv, D]. kv's gradient is packed too, by one copy."""
    k, v = unpacked("kv", kv, "[Tk, 2, kv_heads, D]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@unscriptable
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func() of qkv [T, 3, heads, D], with one cu_seqlens and one max_seqlen.

    qkv's gradient is packed too, by one copy.
    """
    q, k, v = unpacked("qkv", qkv, "[T, 3, heads, D]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@unscriptable
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache in place, then attends to all its keys. Without gradients.

    Args:
        q: [B, Sq, Hq, D].
        k_cache: [Bc, Smax, Hkv, D], where Bc = B without cache_batch_idx; with block_table
            [blocks, block_size, Hkv, D], blocks of any size.
        v_cache: the same with Dv.
        k: [B, Snew, Hkv, D], written to slots cache_seqlens[b] + i; v: [B, Snew, Hkv, Dv].
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]: rotate the first rotary_dim channels of
            k at position cache_seqlens[b] + i, and those of q at the same positions with causal or
            a window, else all of them at cache_seqlens[b].
        cache_seqlens: [B] int32, or one int for all: keys in the cache before the call. None: the
            cache is full, and k must be None.
        cache_batch_idx: [B] int32: batch entry b is in row cache_batch_idx[b] of the cache.
        cache_leftpad: [B] int32: slots before it do not exist; positions count them.
        block_table: [B, max_blocks] int32: slot s of batch entry b is slot s % block_size of block
            block_table[b, s // block_size].
        rotary_interleaved: pairs are channels (2i, 2i + 1); False: (i, i + rotary_dim / 2).
        num_splits: splits of the keys, attended to in parallel and then merged (split-KV); 0: the
            kernel chooses.
        return_softmax_lse: also return softmax_lse.
        The other arguments are flash_attn_func's, with Skv the sequence's keys, new ones included.

    Returns:
        out [B, Sq, Hq, Dv], contiguous; with return_softmax_lse (out, softmax_lse [B, Hq, Sq]).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value.
        NotImplementedError: an input requires grad.
    """
    cache_shapes(q, k_cache, v_cache, k, v, block_table)
    checks.flag("return_softmax_lse", return_softmax_lse)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{'rotary_sin' if rotary_cos is None else 'rotary_cos'} came alone; "
                         "rotary_cos and rotary_sin go together")  # fmt: skip
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("k came without cache_seqlens, which says where it is written; "
                             "accepted are an int and an int32 tensor [B]")  # fmt: skip
        cache_seqlens = k_cache.shape[1]
        if block_table is not None:
            cache_seqlens *= block_table.shape[1]
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    k, v = (None if x is None else x.transpose(1, 2) for x in (k, v))
    out, lse = call_named(
        decode_attention, q, k_cache, v_cache, cache_lens=cache_seqlens, k=k, v=v,
        page_table=block_table, cache_leftpad=cache_leftpad, cache_batch_idx=cache_batch_idx,
        rotary=None if rotary_cos is None else (rotary_cos, rotary_sin),
        rotary_interleaved=rotary_interleaved, num_splits=num_splits, return_lse=True, **options,
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous()
    return (out, _unseen_is_inf(lse)) if return_softmax_lse else out


# ---- shared by the functions ---------------------------------------------------------------------


def _results(call, weights, swapped, q, dropout_p, return_attn_probs) -> Result:
    """out, or (out, softmax_lse, S_dmask). call(**dropout, return_lse=) computes attention,
    weights(lse) returns the first argument of signed_weights, and `swapped` are two dimensions of
    out to transpose."""

    def arranged(out):
        # A contiguous view, except for q of a packed tensor and for Dv != D.
        return (out if swapped is None else out.transpose(*swapped)).contiguous()

    if not checks.flag("return_attn_probs", return_attn_probs):
        return arranged(call(dropout_p=dropout_p))
    dropout = {"dropout_p": dropout_p}
    if checks.number("dropout_p", dropout_p) > 0:
        dropout["dropout_seed"] = checks.dropout_key(None, q.device)
    out, lse = call(**dropout, return_lse=True)
    if "dropout_seed" not in dropout:
        return arranged(out), _unseen_is_inf(lse), out.new_empty(0)
    with torch.no_grad():
        s_dmask = signed_weights(weights(lse), **dropout)
    return arranged(out), _unseen_is_inf(lse), s_dmask


def _unseen_is_inf(lse: Tensor) -> Tensor:
    """The lse of a row that sees no key is +inf in FlashAttention 2, and -inf in fastattn."""
    return torch.where(lse == -torch.inf, torch.inf, lse)


def _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic) -> dict:
    left, right = call_named(checks.window_of, False, pair(window_size))
    return {
        "scale": softmax_scale,
        "window": (left, 0 if checks.flag("causal", causal) else right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }


def __getattr__(name: str):
    raise absent(__name__, name)

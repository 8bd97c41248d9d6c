"""The attention functions that transformers' models call. Next hop: attention() and its siblings.

Models pass arbitrary keyword arguments. Those that are served are parameters of attention_forward,
and those that do not change the result are in HARMLESS. Any other that is not None raises, because
ignoring it could silently give a wrong result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from ..core import checks
from ..functional import attention, varlen_attention
from ..weights import attention_weights
from .masks import CompactMask

HARMLESS = frozenset(
    (
        "cache",  # already updated: key and value hold all the keys to see
        "cache_position",
        "is_first_iteration",
        "logits_indices",
        "logits_processor_args",  # continuous batching, like logits_indices
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",  # rotary: already applied to query and key
        "position_ids",
        "read_index",  # of a paged cache, already read
        "return_dict",
        "seq_idx",  # the documents of cu_seq_lens again, for state-space layers
        "token_type_ids",
        "use_cache",
        "write_index",
    )
)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    deterministic: bool | None = None,
    **others,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers' AttentionInterface.

    Args:
        module: the attention module; its is_causal applies where the call's is None.
        query: [B, Hq, Sq, D]; key: [B, Hkv, Skv, D]; value: [B, Hkv, Skv, Dv]; any strides.
        attention_mask: None (causal or full), a CompactMask, a bool mask (True = attend) or a float
            mask (added) that broadcasts to [B, Hq, Sq, Skv], or a padding mask [B, at most Skv],
            True or 1 where a key exists, on top of which is_causal and sliding_window apply.
        dropout: probability in [0, 1) of dropping an attention weight.
        scaling: None is 1 / sqrt(D).
        is_causal: applies with an attention_mask of None or [B, S]. Without a mask, causal
            attention of Sq > 1 rows over Skv > Sq keys is aligned to the first key (the prefill of
            a static cache).
        sliding_window: how many keys a row sees, its own included; on each side if not causal.
        softcap: score -> softcap * tanh(score / softcap). None is off.
        s_aux, sinks: [Hq], two names of attention()'s sinks.
        position_bias: added to the scores, broadcasts to [B, Hq, Sq, Skv]; differentiable.
        output_attentions: also return the attention weights.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, all four.
        deterministic: either value; the kernels are always deterministic.

    Returns:
        (out [B, Sq, Hq, Dv], contiguous; the attention weights [B, Hq, Sq, Skv], or None).

    Raises:
        TypeError: a keyword argument, which is named, is neither served nor in HARMLESS.
        TypeError, ValueError, NotImplementedError: as attention().
    """
    _refuse_unknown(others)
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    sinks = _one_of(s_aux, sinks)
    wants_weights = bool(output_attentions) or _captured()
    options = {
        "scale": scaling,
        "softcap": softcap or 0.0,
        "dropout_p": dropout,
        "sinks": sinks,
        "deterministic": deterministic,
    }
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(x is not None for x in lengths):
        _refuse_with_lengths(lengths, attention_mask, position_bias, wants_weights)
        options["window"] = _window(sliding_window, causal)
        return _packed(query, key, value, *lengths, options), None

    query, key, value = _one_batch(query, key, value)
    used, seen = _visible(attention_mask, query, key, causal, sliding_window)
    if position_bias is not None and not _zero_bias(module):
        bias = _cut(position_bias, used, "position_bias", query, key)
        seen["bias"] = bias + seen["bias"] if "bias" in seen else bias
    kv_len = key.shape[2]
    if used < kv_len:
        key, value = key[:, :, :used], value[:, :, :used]
    if not wants_weights:
        out = attention(query, key, value, **seen, **options)
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        options["dropout_seed"] = checks.dropout_key(None, query.device)
    out, lse = attention(query, key, value, return_lse=True, **seen, **options)
    del options["deterministic"]
    weights = attention_weights(query, key, lse, **seen, **options)
    weights = torch.nn.functional.pad(weights, (0, kv_len - used))
    return out.transpose(1, 2).contiguous(), weights


def attention_forward_flash(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """attention_forward for the alias with "flash" in it, which also finds packed documents by
    position_ids, as transformers' FlashAttention does: without padding and cu_seq_lens, a document
    of position_ids [1, S] begins wherever they do not count up by one.
    """
    if options.get("cu_seq_lens_q") is None and _may_be_packed(
        attention_mask, position_ids, query, key
    ):
        documents = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
        if bool(documents[0, -1] != 0):
            attention_mask = _with_documents(attention_mask, documents, module, query, options)
    return attention_forward(module, query, key, value, attention_mask, **options)


def _may_be_packed(mask, position_ids, query, key) -> bool:
    """Is this self-attention of one sequence whose mask is at most causal and a window?"""
    return (
        position_ids is not None
        and not torch.compiler.is_compiling()
        and key.shape[0] == 1
        and 1 < query.shape[2] == key.shape[2]
        and tuple(position_ids.shape) == (1, key.shape[2])
        and (mask is None or (isinstance(mask, CompactMask) and mask.plain))
    )


def _with_documents(mask, documents, module, query, options) -> CompactMask:
    if mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else bool(causal)
        sides = _window(options.get("sliding_window"), causal)
        left, right = (-1 if side is None else side for side in sides)
    else:
        left, right = mask.left, mask.right
    shape = (1, 1, *[documents.shape[1]] * 2)
    return CompactMask(shape, left, right, 0, None, documents, query.device)


# ---- keyword arguments ---------------------------------------------------------------------------


def _refuse_unknown(others) -> None:
    for name, x in others.items():
        if name not in HARMLESS and x is not None:
            raise TypeError(
                f"the model passes {name} (of type {type(x).__name__}) to its attention, and "
                "fastattn does not know what it does there; use another attn_implementation for "
                "this model"
            )


def _one_of(s_aux, sinks):
    if s_aux is not None and sinks is not None:
        raise ValueError("s_aux and sinks came together; they are two names of one argument")
    return sinks if s_aux is None else s_aux


def _captured() -> bool:
    """Does transformers collect attention weights now? Some modules get no output_attentions then,
    as GPT-2's."""
    # Dynamo cannot trace a ContextVar; transformers keeps a plain attribute for it.
    compiling = torch.compiler.is_compiling()
    collected = _active_collector.global_var if compiling else _active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


def _zero_bias(module) -> bool:
    """Is this T5's cross-attention, whose bias is all zeros and needs no gradient?"""
    return (
        getattr(module, "is_decoder", False)
        and getattr(module, "has_relative_attention_bias", True) is False
        and getattr(module, "is_causal", True) is False
    )


# ---- from transformers' masks to attention()'s options -------------------------------------------


def _window(sliding_window, causal) -> tuple[int | None, int | None]:
    """attention()'s window; sliding_window includes the row's own key."""
    reach = None if sliding_window is None else sliding_window - 1
    return (reach, 0 if causal else reach)


def _visible(mask, query, key, causal, sliding_window) -> tuple[int, dict]:
    """(the number of leading keys that any row may see, attention()'s options over those)."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None:
        seen = {"window": _window(sliding_window, causal)}
        if not causal or q_len == 1 or q_len == kv_len:
            return kv_len, seen
        return min(q_len, kv_len), seen | {"align": "start"}  # no row sees past the q_len-th key
    if isinstance(mask, CompactMask):
        if mask.given is None:
            return _compact(mask, query, key)
        mask = mask.given
    checks.on_device("attention_mask", mask, query.device)
    if mask.dim() == 2:
        return _padding(mask, query, key, _window(sliding_window, causal))
    name = "mask" if mask.dtype == torch.bool else "bias"
    if name == "bias" and not mask.is_floating_point():
        raise TypeError(
            f"attention_mask is {mask.dtype} with shape {checks.show(mask)}; accepted are bool "
            "(True = attend) and floating dtypes (added to the scores), or [B, S] of any of them"
        )
    return kv_len, {name: _cut(mask, kv_len, "attention_mask", query, key)}


def _compact(mask, query, key) -> tuple[int, dict]:
    batch, _, q_len, kv_len = mask.shape
    if mask.hides_nothing:  # with a cache, BERT makes it only as long as the new rows
        return key.shape[2], {"window": (None, None)}
    if (q_len, kv_len) != (query.shape[2], key.shape[2]) or batch not in (1, query.shape[0]):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)} and the call batch size "
            f"{query.shape[0]}, {query.shape[2]} queries and {key.shape[2]} keys; they must match"
        )
    left, right = (None if side < 0 else side for side in (mask.left, mask.right))
    seen = {"window": (left, right)}
    if mask.keys is not None:
        seen["mask"] = mask.keys[:, None, None]
    if mask.ranges is not None:
        seen["key_ranges"] = mask.ranges
    if mask.documents is not None:
        seen["document_ids"] = mask.documents.expand(query.shape[0], -1)
    return mask.offset + q_len, seen


def _padding(mask, query, key, window) -> tuple[int, dict]:
    """A padding mask [B, S]. A static cache has more than S keys; the others do not exist yet."""
    if mask.shape[0] not in (1, query.shape[0]) or not 1 <= mask.shape[1] <= key.shape[2]:
        raise ValueError(
            f"attention_mask has shape {checks.show(mask)}; accepted is [B, S] = "
            f"[{query.shape[0]}, at most {key.shape[2]}]"
        )
    return mask.shape[1], {"window": window, "mask": mask.bool()[:, None, None]}


def _cut(x, used, name, query, key) -> Tensor:
    """A mask or bias over the first `used` keys, checked: 4-D, each size 1 or full."""
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if x.dim() != 4 or any(n not in (1, m) for n, m in zip(x.shape, full)):
        raise ValueError(
            f"{name} has shape {checks.show(x)}; accepted is one that broadcasts to {list(full)} "
            "(batch, heads, queries, keys)"
        )
    return x[..., :used]


def _one_batch(query, key, value):
    """Expands batch sizes of 1: learned queries may come once for a whole batch of keys."""
    batch = max(query.shape[0], key.shape[0])
    return [
        x.expand(batch, -1, -1, -1) if x.shape[0] == 1 < batch else x for x in (query, key, value)
    ]


# ---- packed sequences ----------------------------------------------------------------------------

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _refuse_with_lengths(lengths, mask, position_bias, wants_weights) -> None:
    missing = [name for name, x in zip(_LENGTHS, lengths) if x is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing; packed sequences need {', '.join(_LENGTHS)}")
    padded = mask is not None
    if isinstance(mask, CompactMask):
        padded = mask.keys is not None or mask.given is not None
    if padded and not torch.compiler.is_compiling():  # traced, transformers always makes a mask
        raise ValueError(
            "attention_mask came with cu_seq_lens_q; packed sequences have no padding, and "
            "cu_seq_lens separate them: pass one of the two"
        )
    for name, given in (("position_bias", position_bias is not None),
                        ("output_attentions=True", wants_weights)):  # fmt: skip
        if given:
            raise NotImplementedError(
                f"{name} came with cu_seq_lens_q, and packed sequences do not support it; pad the "
                "batch instead"
            )


def _packed(query, key, value, cu_q, cu_k, max_q, max_k, options) -> Tensor:
    """out [B, Sq, Hq, Dv] of packed sequences; the batch size is usually 1, and else its rows are
    joined into one."""
    batch, _, q_len, _ = query.shape
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(*rows, cu_q, cu_k, int(max_q), int(max_k), **options)
    return out.unflatten(0, (batch, q_len)).contiguous()

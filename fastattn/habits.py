"""Helpful errors for habits from other libraries: argument names of their attention functions, and
torch.jit.script. Each error says in one sentence what to use instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from .backends.gpu import constant

F = TypeVar("F", bound=Callable[..., Any])

_MASK = "mask= is bool, True where a row sees a key, and bias= is added to the scores"
_PADDING = (
    "kv_lens= is each sequence's number of keys, and mask= is bool [B, 1, 1, S], True for a key"
)
_SCALE, _SOFTCAP, _SINKS = "scale= is its name", "softcap= is its name", "sinks= is its name"
_DROPOUT = "dropout_p= is its name"
_LSE = "return_lse=True returns (out, lse)"
_WINDOW = "window=(left, right) is how many keys a row sees on each side"
_TABLE = "page_table= is its name, in varlen_attention() and decode_attention()"
_PROBS = "fastattn.attention_weights(q, k, lse, ...) makes them from lse"
_OURS = {
    "is_causal": "causal= is its name, with align='start' for torch's diagonal from the top left",
    "attn_mask": _MASK,
    "attention_mask": _MASK,
    "key_padding_mask": _PADDING,
    "src_key_padding_mask": _PADDING,
    "attn_bias": "bias= is its name",
    "score_mod": "bias=, alibi_slopes= and softcap= change scores",
    "block_mask": "mask=, window=, document_ids= and key_ranges= hide keys",
    "dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "p": _DROPOUT,
    "enable_gqa": "k and v may always have fewer heads than q",
    "softmax_scale": _SCALE,
    "sm_scale": _SCALE,
    "scaling": _SCALE,
    "window_size": _WINDOW,
    "sliding_window": "window=(n - 1, 0) shows a row its own key and the n - 1 before it",
    "soft_cap": _SOFTCAP,
    "logits_soft_cap": _SOFTCAP,
    "s_aux": _SINKS,
    "sink": _SINKS,
    "return_attn_probs": _PROBS,
    "need_weights": _PROBS,
    "output_attentions": _PROBS,
    "return_softmax_lse": _LSE,
    "return_aux": _LSE,
    "block_table": _TABLE,
    "block_tables": _TABLE,
    "cache_seqlens": "cache_lens= is its name, in decode_attention()",
    "seqused_k": "kv_lens= is its name",
    "rotary_cos": "rotary=(cos, sin) is its form, in decode_attention()",
    "rotary_sin": "rotary=(cos, sin) is its form, in decode_attention()",
    "generator": "dropout_seed=(seed, offset) decides which weights are dropped",
    "cu_seqlens": "cu_seqlens_q= and cu_seqlens_k= are its names, in varlen_attention()",
}  # fmt: skip

_PUBLIC: list[Callable] = []


def public(function: F) -> F:
    """Decorates a public function that takes unknown keywords as **unknown and passes them to
    refuse_unknown(). They are removed from its visible signature."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    _PUBLIC.append(function)
    return unscriptable(function)


def refuse_unknown(function: Callable, unknown) -> None:
    """Raises TypeError for the first of these keywords that the function does not accept."""
    if sentence := _why_unknown(function, tuple(unknown)):
        raise TypeError(sentence)


@constant  # Dynamo cannot trace difflib
def _why_unknown(function: Callable, unknown: tuple[str, ...]) -> str | None:
    known = inspect.signature(function).parameters
    name = next((x for x in unknown if x not in known), None)
    if name is None:
        return None
    others = [f"{x.__name__}()" for x in _PUBLIC if name in inspect.signature(x).parameters]
    close = get_close_matches(name, known, n=1)
    if name in _OURS:
        why = f"; {_OURS[name]}"
    elif others:
        why = f"; it is one of {' and '.join(others)}"
    else:
        why = f"; did you mean {close[0]}=?" if close else ""
    return f"{function.__name__}() got an unexpected keyword argument {name!r}{why}"


# ---- torch.jit.script --------------------------------------------------------------------------

_NO_SCRIPT = (
    "torch.jit.script cannot compile fastattn; use torch.compile, torch.export or torch.jit.trace"
)


def unscriptable(x: F) -> F:
    """Makes torch.jit.script fail on a function or a module class with one clear sentence, wherever
    it is used, instead of showing the first line that it cannot compile."""
    if isinstance(x, type):
        x.__prepare_scriptable__ = _refuse_script  # type: ignore[attr-defined]
    else:
        x.__script_unsupported = _NO_SCRIPT  # type: ignore[attr-defined]
    return x


def _refuse_script(module):
    raise NotImplementedError(f"{type(module).__name__}: {_NO_SCRIPT}")

"""From a public function's arguments, by name, to a checked Call in normal form. Next hop: back to
functional.py, then backends/registry.py. What decode_attention() takes is checked in decoding.py.
"""

from __future__ import annotations

from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .backends import backend, registry
from .core import checks, quantization, ranges
from .core.call import Call
from .core.spec import NO_OPERANDS, Descales, Operands, Spec
from .core.statistics import Wanted
from .core.tensors import autocast_dtype, autocast_to

is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing

_PLAIN = {Tensor, torch.nn.Parameter}
PLANS: dict = {}  # (spec, rank, backend) of calls alike in everything but values and strides
SIMPLE_PLANS: dict = {}  # SimplePlans, of those of four dimensions without operands or dropout
_MAX_PLANS = 4096

# In eager mode alone: torch.compile does not know all of these.
_asked_of = itemgetter(
    *("scale", "causal", "window", "align", "softcap", "dropout_p", "return_lse"),
    *("deterministic", "backend"),
)
_operands_of = itemgetter(
    *("mask", "bias", "alibi_slopes", "sinks", "kv_lens", "document_ids", "key_ranges")
)


def _is_none(x) -> bool:
    return x is None


def dense_form(given: dict) -> tuple[Call, int, backend.Backend | None, tuple | None]:
    """Checks attention()'s arguments and returns (Call, rank of q, backend, key).

    backend is that of an earlier call which differed only in values and strides, or None; key is
    its key in PLANS. Looking the shapes up costs less than checking them.
    """
    q, k, v = given["q"], given["k"], given["v"]
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    key = plan = None
    float8 = (
        getattr(q, "dtype", None) == quantization.E4M3
        or given["q_descale"] is not None
        or given["k_descale"] is not None
        or given["v_descale"] is not None
    )
    plain = type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN
    asks = given["return_stats"] is not None
    if plain and not float8 and not asks and not is_compiling() and not _is_tracing():
        try:
            asked, window = _asked_of(given), given["window"]
            key = (
                q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
                asked, registry.forced(), tuple(map(_is_none, _operands_of(given))),
                # 1 == 1.0 == True, and not all are accepted
                tuple(map(type, asked)), None if window is None else tuple(map(type, window)),
            )  # fmt: skip
            plan = PLANS.get(key)
        except (TypeError, ValueError, RuntimeError):  # a list in window, a tensor without shape,
            key = None  # and the like: the checks below say what is wrong
    if plan is None:
        checks.same_kind(q=q, k=k, v=v, accepted=(quantization.E4M3,) if float8 else checks.DTYPES)
        rank, chosen = checks.dense_shapes(q, k, v), None
        spec = spec_of(q.shape[-1], given)
    else:
        spec, rank, chosen = plan
    if rank != 4:
        q, k, v = (x.unsqueeze(1) if rank == 3 else x[None, None] for x in (q, k, v))
    head_origin = given["head_origin"]
    if head_origin is not None:
        head_origin = checks.head_origin(head_origin, *q.shape[:2])
    if (
        not float8
        and given["mask"] is None
        and given["bias"] is None
        and given["alibi_slopes"] is None
        and given["sinks"] is None
        and given["kv_lens"] is None
        and given["document_ids"] is None
        and given["key_ranges"] is None
        and not spec.dropout_p
    ):
        call = Call(q, k, v, spec, NO_OPERANDS)
        return asking(call, given) if asks else call, rank, chosen, key

    batch, heads, q_len, _ = q.shape
    kv_len, device = k.shape[2], q.device
    full = (batch, heads, q_len, kv_len)
    kv_lens, document_ids, scales = given["kv_lens"], given["document_ids"], None
    if float8:
        scales = Descales(given["q_descale"], given["k_descale"], given["v_descale"])
        for name, x in zip(scales._fields, scales):
            quantization.check(f"{name}_descale", x, batch, k.shape[1], device)
        checks.no_gradient("float8_e4m3fn", q, k, v, given["bias"], given["sinks"], *scales)
    if kv_lens is not None:
        kv_lens = checks.int_vector("kv_lens", kv_lens, (batch,), device, "[B]")
        checks.lengths("kv_lens", kv_lens, 0, kv_len, "a number of keys in")
    if document_ids is not None:
        document_ids = checks.documents(document_ids, batch, q_len, kv_len, device)
    operands = Operands(
        **score_operands(given, head_origin, full, q, rank),
        kv_lens=kv_lens,
        document_ids=document_ids,
        dropout_seed=checks.dropout(spec, given["dropout_seed"], head_origin, device),
        descales=scales,
    )
    return asking(Call(q, k, v, spec, operands), given), rank, chosen, key


def asking(call: Call, given: dict) -> Call:
    """The call with the statistics that return_stats asks for, checked."""
    if given["return_stats"] is None:
        return call
    wanted = Wanted.parse(given["return_stats"])
    call = call.but(statistics=wanted)
    wanted.check(call)
    return call


def spec_of(head_dim: int, given: dict) -> Spec:
    """The call's numbers, checked, and its flags."""
    names = ("scale", "causal", "window", "align", "softcap", "dropout_p")
    spec = checks.spec_of(head_dim, *(given[name] for name in names))
    checks.flag("return_lse", given["return_lse"])
    if given["deterministic"] is not None:
        checks.flag("deterministic", given["deterministic"])
    return spec


def score_operands(given: dict, head_origin, full, q: Tensor, rank: int = 4) -> dict:
    """Operands of scores, checked against full = [batch, heads, rows, keys]. Where head_origin says
    that these heads are a part, operands may have every head."""
    mask, bias, slopes, sinks = (given[x] for x in ("mask", "bias", "alibi_slopes", "sinks"))
    key_ranges = given["key_ranges"]
    if head_origin is not None and head_origin[1] != full[1]:
        if isinstance(key_ranges, (tuple, list)):
            key_ranges = [_own_heads(x, -2, head_origin, full[1], rank) for x in key_ranges]
        mask, bias = (_own_heads(x, -3, head_origin, full[1], rank) for x in (mask, bias))
        slopes, sinks = (_own_heads(x, -1, head_origin, full[1]) for x in (slopes, sinks))
    if mask is not None:
        mask = checks.mask(mask, full, q.device, rank)
    if bias is not None:
        bias = checks.bias(bias, full, q, rank)
    if slopes is not None:
        slopes = checks.slopes(slopes, full[0], full[1], q.device)
    if sinks is not None:
        sinks = checks.sinks(sinks, full[1], q)
    own = {"mask": mask, "bias": bias, "alibi_slopes": slopes, "sinks": sinks}
    if key_ranges is not None:
        own |= ranges.normal_form(key_ranges, full, q.device, rank)
    return own


def _own_heads(x, dim, head_origin, heads, rank=4):
    """x, or of an x with every head in dimension dim those that are here. Where q is [B, S, D], an
    x whose first dimension is dim has entries there and no heads, and stays as it is."""
    first, total = head_origin
    if not isinstance(x, Tensor) or x.is_nested or x.dim() < -dim or x.shape[dim] != total:
        return x
    if rank == 3 and x.dim() == -dim:
        return x
    return x.narrow(dim, first, heads)


def varlen_form(given: dict) -> Call:
    """Checks varlen_attention()'s arguments."""
    q, k, v, page_table = (given[name] for name in ("q", "k", "v", "page_table"))
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    checks.same_kind(q=q, k=k, v=v)
    heads = checks.varlen_shapes(q, k, v, page_table is not None)
    spec = spec_of(q.shape[-1], given)
    if given["document_ids"] is not None:
        raise NotImplementedError(
            "document_ids came to varlen_attention, where cu_seqlens already keep sequences apart; "
            "give every document its own sequence"
        )
    longest = [checks.length(name, given[name]) for name in ("max_seqlen_q", "max_seqlen_k")]
    device, paged = q.device, page_table is not None
    cu_q = checks.offsets("cu_seqlens_q", given["cu_seqlens_q"], q.shape[0], longest[0], device)
    total_k = None if paged else k.shape[0]
    cu_k = checks.offsets("cu_seqlens_k", given["cu_seqlens_k"], total_k, longest[1], device)
    entries, head_origin, kv_lens = cu_q.shape[0] - 1, given["head_origin"], given["kv_lens"]
    if head_origin is not None:
        head_origin = checks.head_origin(head_origin, entries, heads)
    if cu_k.shape[0] != cu_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_k has {cu_k.shape[0]} entries and cu_seqlens_q {cu_q.shape[0]}; they must "
            "be equally many"
        )
    own_lens = None
    if checks.has_values(cu_k):
        ends = cu_k.tolist()
        own_lens = [end - begin for begin, end in pairwise(ends)]
    if kv_lens is not None:
        kv_lens = checks.int_vector("kv_lens", kv_lens, (entries,), device, "[sequences]")
        bound = longest[1] if own_lens is None else own_lens
        checks.lengths("kv_lens", kv_lens, 0, bound, "a number of the sequence's keys in")
    if paged:
        lens = cu_k[1:] - cu_k[:-1] if kv_lens is None else kv_lens
        page_table = checks.pages(page_table, entries, lens, k.shape[1], k.shape[0], device)
        checks.no_gradient("page_table", q, k, v, given["bias"], given["sinks"])
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    else:
        k, v = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    q = q.transpose(0, 1).unsqueeze(0)
    operands = Operands(
        **score_operands(given, head_origin, (entries, heads, *longest), q),
        kv_lens=kv_lens,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        page_table=page_table,
        dropout_seed=checks.dropout(spec, given["dropout_seed"], head_origin, device),
    )
    return asking(Call(q, k, v, spec, operands), given)


def autocast(*tensors):
    """q, k and v in the dtype of an enclosing torch.autocast for their device."""
    dtype = autocast_dtype(checks.tensor("q", tensors[0]))
    if dtype is None:
        return tensors
    return [autocast_to(checks.tensor("q, k or v", x), dtype) for x in tensors]


def simple_plan(q, k, v, asked: tuple) -> tuple[tuple | None, Any]:
    """(key, plan) in SIMPLE_PLANS of a call without operands; asked has its numbers, flags and
    backend. Looking a plan up costs less than checking the arguments, and it takes no dict of them.
    (None, None): the call is to be checked."""
    if (
        type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or torch._C._is_any_autocast_enabled()
        or is_compiling()
        or _is_tracing()
    ):
        return None, None
    try:
        window = asked[2]
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            asked, registry.forced(), *map(type, asked),  # 1 == 1.0 == True
            None if window is None else tuple(map(type, window)),
        )  # fmt: skip
        return key, SIMPLE_PLANS.get(key)
    except (TypeError, ValueError, RuntimeError):  # the checks say what is wrong
        return None, None


def remember(plans: dict, key: tuple, plan: tuple) -> None:
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan

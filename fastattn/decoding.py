"""decode_attention(): attention over a growing key-value cache. merge_states(): merges two partial
results. Next hops: fused/kv_append.py, then functional.py's run().
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import habits
from .backends import registry
from .context_parallel import refuse_context_parallel
from .core import checks, quantization
from .core.call import Call
from .core.memory import copied_if_overlapping
from .core.spec import OPERANDS, Descales, Operands
from .core.tensors import autocast_dtype, autocast_to, is_8_bit
from .forms import asking, score_operands, spec_of
from .functional import run, run_with_statistics
from .fused.kv_append import Append, check_rotary
from .fused.operator import has_kernel
from .options import Align, BackendName, CacheOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor | int,
    return_lse: Literal[False] = False,
    return_stats: None = None,
    **options: Unpack[CacheOptions],
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor | int,
    return_lse: Literal[True],
    return_stats: None = None,
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor | int,
    return_lse: bool,
    return_stats: None = None,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor | int,
    return_lse: Literal[False] = False,
    return_stats: Sequence[str],
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, dict[str, Any]]: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor | int,
    return_lse: Literal[True],
    return_stats: Sequence[str],
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor, dict[str, Any]]: ...
@habits.public
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor | int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: Align = "end",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: tuple[int, int] | Tensor | None = None,
    return_lse: bool = False,
    return_stats: Sequence[str] | None = None,
    deterministic: bool | None = None,
    backend: BackendName | None = None,
    **unknown,
) -> Tensor | tuple[Any, ...]:
    """Appends k and v to a cache in place, then attends to all it holds. No gradient.

    Batch entry b holds cache_lens[b] keys before the call and cache_lens[b] + Snew after it; q
    attends to the latter. With align="end" the diagonal ends at the last of them, so that with
    causal=True each of several new tokens sees the keys up to itself.

    Args:
        q: [B, Hq, Sq, D]: the new tokens' queries.
        k_cache: [Bc, Hkv, Smax, D], Bc = B unless cache_batch_idx says otherwise; with page_table
            [pages, Hkv, page_size, D]. Slots past an entry's length are never read.
        v_cache: the same with Dv.
        cache_lens: int32 [B], or one int for all: keys already in the cache, left padding included.
        k: [B, Hkv, Snew, D], written to slots cache_lens[b] + i. None: nothing is appended. A call
            that raises has written nothing. Caches that share memory with each other or are
            expanded are refused. So are, where values can be checked, tokens that do not fit, two
            new keys for one slot, and NaN for an int8 cache. On a GPU, where a check would wait,
            and in a compiled call the caller has to avoid these: tokens that do not fit are not
            written, and NaN becomes 0. k and the other operands may share the caches' memory:
            their values from before the call are used.
        v: [B, Hkv, Snew, Dv].
        page_table: int32 [B, max_pages]: slot s of entry b is slot s % page_size of page
            page_table[b, s // page_size].
        cache_leftpad: int32 [B]: slots before it do not exist. It moves neither the diagonal nor
            rotary positions, which count slots.
        cache_batch_idx: int32 [B]: entry b lives in row cache_batch_idx[b] of the cache.
        rotary: (cos, sin), each [positions, rotary_dim / 2], rotary_dim <= D and even: rotates the
            first rotary_dim channels of k (before it is stored) and of q. Key i is at position
            cache_lens[b] + i, and query i too with causal or a window; otherwise all queries are
            at cache_lens[b] (FlashAttention's rule).
        rotary_interleaved: pairs are channels (2i, 2i + 1), as in GPT-J; False: (i, i +
            rotary_dim / 2), as in GPT-NeoX and Llama.
        k_descale: fp32 [Hkv] or [B, Hkv] (with page_table or cache_batch_idx only [Hkv]: pages are
            shared); then k_cache and v_cache are both int8 or both float8_e4m3fn, q, k and v
            float32, bfloat16 or float16, and a key is the stored number times its head's scale. New
            keys are divided by it and rounded to nearest, clamped to [-128, 127] or [-448, 448].
            Triton reads the 8-bit cache; the other backends first copy the slots in use to q's
            dtype (an fp32 product, rounded once).
        v_descale: the same for values; give both or neither.
        num_splits: how many splits of the keys are attended to separately and then merged. None or
            0: the backend chooses. 1: the order of summation does not depend on the batch. A large
            number means the backend's maximum: on the CPU, splits of at least 32 keys whose results
            take at most 256 MiB together.
        kv_lens: refused: cache_lens has the lengths.
        document_ids: refused: each batch entry of the cache is one document.
        key_ranges: (begin, end), int32, each broadcastable to [B, Hq, Sq], in slots.

    Under torch.autocast q, k and v are cast to the cache's dtype, or, where that is 8-bit, to
    autocast's.
    The other arguments are attention()'s; mask and bias broadcast to [B, Hq, Sq, Smax] (with pages,
    Smax is max_pages * page_size).

    Returns:
        out [B, Hq, Sq, Dv] in q's dtype; with return_lse=True also lse [B, Hq, Sq]. Keys of
        statistics are slots: col_mass is [B, Hq, Smax].

    Rotary embeddings: RoFormer (Su et al., arXiv:2104.09864).
    """
    if unknown:
        habits.refuse_unknown(decode_attention, unknown)
    refuse_context_parallel()  # before anything is written
    call, append = cached_form({
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_lens": cache_lens, "k": k, "v": v,
        "page_table": page_table, "cache_leftpad": cache_leftpad,
        "cache_batch_idx": cache_batch_idx, "rotary": rotary,
        "rotary_interleaved": rotary_interleaved, "k_descale": k_descale, "v_descale": v_descale,
        "num_splits": num_splits, "scale": scale, "causal": causal, "window": window,
        "align": align, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes,
        "softcap": softcap, "sinks": sinks, "kv_lens": kv_lens, "document_ids": document_ids,
        "key_ranges": key_ranges, "head_origin": head_origin, "dropout_p": dropout_p,
        "dropout_seed": dropout_seed, "return_lse": return_lse, "return_stats": return_stats,
        "deterministic": deterministic,
    })  # fmt: skip
    chosen = registry.pick(backend, call)
    if append is not None:
        append.by_kernel() if chosen.name == "triton" else append.in_torch()
    if call.statistics is not None:
        (out, lse), found = run_with_statistics(call, chosen)
        return (out, lse, found) if return_lse else (out, found)
    out, lse = run(call, chosen)
    return (out, lse) if return_lse else out


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(decode_attention).parameters.items()
    if parameter.default is not parameter.empty
}


def decode_form(q, k_cache, v_cache, **given) -> Call:
    """The Call of decode_attention()'s arguments by name, with its defaults; a missing dropout seed
    is (0, 0) and does not advance the generator."""
    given = _DEFAULTS | given | {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if given["dropout_seed"] is None:
        given["dropout_seed"] = (0, 0)
    return cached_form(given)[0]


def check_decode(q, k_cache, v_cache, *, backend=None, **given) -> None:
    """Raises what decode_attention() would raise, and does nothing else."""
    registry.pick(backend, decode_form(q, k_cache, v_cache, **given))


def cached_form(given: dict) -> tuple[Call, Append | None]:
    """Checks decode_attention()'s arguments and returns (Call, Append or None)."""
    for name, instead in (
        ("kv_lens", "cache_lens says how many keys there are"),
        ("document_ids", "a cache row is one document"),
    ):
        if given[name] is not None:
            raise NotImplementedError(f"{name} came to decode_attention, where {instead}")
    q, k_cache, v_cache = given["q"], given["k_cache"], given["v_cache"]
    k, v, k_descale, v_descale = (given[x] for x in ("k", "v", "k_descale", "v_descale"))
    cache_lens, page_table, cache_leftpad, cache_batch_idx = (
        given[x] for x in ("cache_lens", "page_table", "cache_leftpad", "cache_batch_idx")
    )
    rotary, head_origin, num_splits = (given[x] for x in ("rotary", "head_origin", "num_splits"))
    if (k is None) != (v is None):
        raise ValueError(f"{'v' if k is None else 'k'} came alone; k and v are appended together")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    new = {} if k is None else {"k": k, "v": v}
    for name, x in (tensors | new).items():
        checks.tensor(name, x)
    narrow = _is_narrow(k_cache, v_cache, k_descale, v_descale)
    dtype = autocast_dtype(q)
    if dtype is not None:  # the cache cannot be cast, so q, k and v are
        dtype = dtype if narrow else k_cache.dtype
        tensors["q"] = q = autocast_to(q, dtype)
        new = {name: autocast_to(x, dtype) for name, x in new.items()}
        k, v = new.values() if new else (None, None)
    if narrow:
        checks.same_kind(q=q, **new)
        if q.dtype == torch.float64:
            raise TypeError("q is torch.float64 and the caches are 8-bit; accepted are float32, "
                            "bfloat16 and float16")  # fmt: skip
        for name in ("k_cache", "v_cache"):
            checks.on_device(name, tensors[name], q.device)
    else:
        checks.same_kind(**tensors, **new)
    checks.no_gradient("a cache", *tensors.values(), k, v, given["bias"], given["sinks"])
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {checks.show(x)}; accepted are four dimensions")
    if page_table is not None and cache_batch_idx is not None:
        raise ValueError("page_table and cache_batch_idx came together; a page table says it all")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"v_cache has shape {checks.show(v_cache)} and k_cache {checks.show(k_cache)}; all but "
            "the last sizes must be equal"
        )
    checks.head_counts(q.shape[1], k_cache.shape[1], v_cache.shape[1])
    checks.head_dims(q, k_cache, v_cache)
    batch, heads, q_len, head_dim = q.shape
    new_len = 0 if k is None else _new_keys(k, v, k_cache, v_cache, batch)
    spec = spec_of(head_dim, given)
    splits = 0
    if num_splits is not None:
        splits = checks.length("num_splits", num_splits, checks.MAX_SPLITS)
    device = q.device
    rows, _, page_size, _ = k_cache.shape

    if isinstance(cache_lens, Integral) and not isinstance(cache_lens, bool):
        cache_lens = checks.length("cache_lens", cache_lens)
        cache_lens = torch.full((batch,), cache_lens, dtype=torch.int32, device=device)
    cache_lens = checks.int_vector("cache_lens", cache_lens, (batch,), device, "[B], or an int")
    table, capacity = None, page_size
    if page_table is not None:
        capacity = checks.table(page_table, batch, device).shape[1] * page_size
    elif cache_batch_idx is not None:
        index = checks.int_vector("cache_batch_idx", cache_batch_idx, (batch,), device, "[B]")
        checks.lengths("cache_batch_idx", index, 0, rows - 1, "a row of the cache in")
        if k is not None and checks.has_values(index) and len(set(index.tolist())) < batch:
            raise ValueError("cache_batch_idx names a row twice; rows written to must be distinct")
        table = index.unsqueeze(1)  # each row of the cache is one page, unless it has no slots
        table = table if page_size else table[:, :0]
    elif rows != batch:
        raise ValueError(f"k_cache has batch size {rows} and q {batch}; they must be equal without "
                         "page_table or cache_batch_idx")  # fmt: skip
    checks.sizes(batch * heads, q_len, capacity)
    if head_origin is not None:
        head_origin = checks.head_origin(head_origin, batch, heads)
    checks.lengths(
        "cache_lens", cache_lens, 0, capacity - new_len,
        lambda: (f"{capacity} slots less {new_len} new keys" if new_len else "a number of keys")
        + ("" if page_table is None else " within a row of page_table")
        + (" in" if page_table is None and not new_len else ":"),
    )  # fmt: skip
    lens = cache_lens + new_len
    if cache_leftpad is not None:
        cache_leftpad = checks.int_vector("cache_leftpad", cache_leftpad, (batch,), device, "[B]")
        checks.lengths("cache_leftpad", cache_leftpad, 0, capacity, "a number of slots in")
    if page_table is not None:
        table = checks.pages(page_table, batch, lens, page_size, rows, device)
    if rotary is not None:
        moving = spec.left >= 0 or spec.right >= 0
        longest = max(new_len, q_len if moving else 1)
        rotary = check_rotary(rotary, given["rotary_interleaved"], q, cache_lens, longest)
        q = rotary.rotate(q, moving)
    shared = page_table is not None or cache_batch_idx is not None
    for name, x in (("k_descale", k_descale), ("v_descale", v_descale)):
        quantization.check(name, x, None if shared else batch, k_cache.shape[1], device)
        checks.no_gradient(name, x)
    operands = Operands(
        **score_operands(given, head_origin, (batch, heads, q_len, capacity), q),
        kv_lens=lens,
        kv_starts=cache_leftpad,
        page_table=table,
        dropout_seed=checks.dropout(spec, given["dropout_seed"], head_origin, device),
        descales=Descales(None, k_descale, v_descale) if narrow else None,
    )
    caches, append = (k_cache, v_cache), None
    statistics = asking(Call(q, *caches, spec, operands), given).statistics
    if k is not None and v is not None and new_len and batch:
        append = Append(k, v, *caches, cache_lens, table, rotary, (k_descale, v_descale)).checked()
        q = copied_if_overlapping(q, *caches)
        operands = _apart(operands, caches)
    return Call(q, *caches, spec, operands, splits, statistics), append


def _apart(operands, caches):
    """The operands, with copies of those that share the caches' memory, which is written first."""
    given = {name: getattr(operands, name) for name in OPERANDS}
    copies = {n: copied_if_overlapping(x, *caches) for n, x in given.items() if x is not None}
    changed = {name: x for name, x in copies.items() if x is not given[name]}
    return replace(operands, **changed) if changed else operands


def _is_narrow(k_cache, v_cache, k_descale, v_descale) -> bool:
    """Whether the caches are 8-bit. Raises unless both have one dtype and both scales are given, or
    neither is 8-bit and no scale is given."""
    scaled = k_descale is not None or v_descale is not None
    if not (scaled or is_8_bit(k_cache) or is_8_bit(v_cache)):
        return False
    if k_cache.dtype != v_cache.dtype or not is_8_bit(k_cache):
        raise TypeError(
            f"k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; accepted with k_descale and "
            "v_descale are int8 for both and float8_e4m3fn for both"
        )
    for name, x in (("k_descale", k_descale), ("v_descale", v_descale)):
        if x is None:
            raise ValueError(f"{name} is None and the caches are {k_cache.dtype}; 8-bit caches "
                             "come with k_descale and v_descale")  # fmt: skip
    return True


def _new_keys(k, v, k_cache, v_cache, batch) -> int:
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (batch, cache.shape[1], k.shape[2] if k.dim() == 4 else -1, cache.shape[3])
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name} has shape {checks.show(x)}; accepted is [B, kv_heads, Snew, head_dim] = "
                f"[{wanted[0]}, {wanted[1]}, Snew, {wanted[3]}], with one Snew for k and v"
            )
    return k.shape[2]


def _merges_by_kernel(*tensors) -> bool:
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    narrow = all(x.dtype in checks.DTYPES[:3] for x in tensors)
    return tensors[0].is_cuda and narrow and not wanted and has_kernel(*tensors)


@habits.unscriptable
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the attention over two disjoint sets of keys into the attention over both.

    (out, lse) is exactly what one call over all the keys would give, computed in float32 (float64
    for float64). It serves split-KV decoding, shared prefixes and ring attention. It is associative
    and commutative up to rounding; a sink must be in only one of the two calls.

    Args:
        out_a: [..., Dv], any dtype; out_b: the same shape.
        lse_a: [...], natural log, as return_lse=True gives it; lse_b: the same shape. A row of -inf
            saw no key, and its out is not read; where both are -inf, the result is 0 and -inf.

    Returns:
        out in out_a's dtype, and lse in float32 (float64 if any input is). Differentiable in all
        four, without NaN at -inf.
    """
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not checks.tensor(name, x).is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; accepted are floating dtypes")
        if x.device != out_a.device:
            raise ValueError(f"{name} is on {x.device} and out_a on {out_a.device}; one device is "
                             "accepted")  # fmt: skip
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b has shape {checks.show(out_b)} and out_a {checks.show(out_a)}; "
                         "they must be equal")  # fmt: skip
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        if x.shape != out_a.shape[:-1]:
            raise ValueError(f"{name} has shape {checks.show(x)}; accepted is out_a's without its "
                             f"last size, {list(out_a.shape[:-1])}")  # fmt: skip
    tensors = (out_a, lse_a, out_b, lse_b)
    if _merges_by_kernel(*tensors):
        from .kernels.combine import merge  # pyright: ignore[reportMissingImports]  # kernels/

        return merge(*tensors)
    double = torch.float64 in (out_a.dtype, out_b.dtype, lse_a.dtype, lse_b.dtype)
    dtype = torch.float64 if double else torch.float32
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    # -inf is replaced before any arithmetic, so that no inf - inf reaches the result or a gradient.
    dead_a, dead_b = lse_a == -torch.inf, lse_b == -torch.inf
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(dead_a & dead_b, 0.0, top)
    weight_a = torch.where(dead_a, 0.0, (torch.where(dead_a, 0.0, lse_a - top)).exp())
    weight_b = torch.where(dead_b, 0.0, (torch.where(dead_b, 0.0, lse_b - top)).exp())
    total = torch.where(dead_a & dead_b, 1.0, weight_a + weight_b)
    lse = torch.where(dead_a & dead_b, -torch.inf, top + total.log())
    out_a_, out_b_ = (
        torch.where(dead.unsqueeze(-1), 0.0, x.to(dtype))
        for dead, x in ((dead_a, out_a), (dead_b, out_b))
    )
    share_a, share_b = (weight_a / total).unsqueeze(-1), (weight_b / total).unsqueeze(-1)
    return (share_a * out_a_ + share_b * out_b_).to(out_a.dtype), lse

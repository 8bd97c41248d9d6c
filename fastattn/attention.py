"""attention() and varlen_attention(): a call is checked once and brought to normal form.
Next hop: backends.py, through autograd.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import backends, checks, descales, habits
from .autograd import attend
from .call import Call, Result
from .context_parallel import refuse_context_parallel
from .ops import autocast_dtype, autocast_to
from .options import Align, BackendName, DenseOptions, PackedOptions
from .reference import in_memory_order_of
from .spec import NO_OPERANDS, Descales, Operands

if TYPE_CHECKING:
    from typing_extensions import Unpack

is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing

_PLAIN = {Tensor, torch.nn.Parameter}
_PLANS: dict = {}  # (spec, rank, backend) of calls alike in everything but values and strides
_MAX_PLANS = 4096


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[DenseOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[DenseOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
@habits.public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: tuple[int, int] | Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: BackendName | None = None,
    **unknown,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with every option and every derivative, in memory linear in the lengths.

    out[i] = sum_j z_ij * softmax_j(s_ij) * v[j],
    s_ij = softcap * tanh(scale * q[i].k[j] / softcap) + bias_ij - slope * |i + o - j|,
    over the keys j that row i sees; z is dropout.

    Shapes: B batch, Hq and Hkv heads, Sq rows, Skv keys, D and Dv head dimensions (up to 65536
    on the CPU backend, any on the reference).

    Args:
        q: [B, Hq, Sq, D]; also [B, Sq, D] (one head) and [Sq, D], then k and v have that rank too.
            float32, bfloat16, float16 or float64; or float8_e4m3fn, see q_descale. Strides are
            free where the last is 1: memory of [B, S, H, D] seen as [B, H, S, D] is not copied.
            Accumulation is in float32 (float64 for float64), gradients included.
        k: [B, Hkv, Skv, D], Hq % Hkv == 0: query head h reads kv head h // (Hq // Hkv).
        v: [B, Hkv, Skv, Dv].
        scale: multiplies q.k; a number in [-1e30, 1e30]. None: 1 / sqrt(D).
        causal: the window's right side is 0. With a window that looks ahead it is refused.
        window: (left, right): row i sees keys j with i + o - left <= j <= i + o + right. None or a
            negative number on a side: unbounded.
        align: where the diagonal lies. "end": o = Skv - Sq, the last row sees the last key
            (FlashAttention 2's). "start": o = 0 (F.scaled_dot_product_attention's).
        mask: bool, broadcastable to [B, Hq, Sq, Skv], True = attend. Expanded masks cost nothing.
        bias: float, broadcastable to [B, Hq, Sq, Skv], added to the scores. Differentiable; its
            gradient is reduced over the broadcast dimensions in float32. -inf masks, and no
            finite number does. docs/backends.md says what size of scores keeps its meaning.
        alibi_slopes: [Hq] or [B, Hq] float32, ALiBi's distance penalty, up to 2e28 in size. No
            gradient.
        softcap: s -> softcap * tanh(s / softcap), before bias and mask; 0 is off. 1e-30 to 1e30.
        sinks: [Hq]: a logit that joins each row's softmax denominator and no output.
            Differentiable.
        kv_lens: [B] int32 in [0, Skv]: keys at or past kv_lens[b] do not exist and are never read.
            With align="end", o = kv_lens[b] - Sq.
        document_ids: [B, S] or [S] int32, non-decreasing, for self-attention: tokens see their own
            document only. The diagonal stays the whole row's.
        head_origin: (first, total): these are heads first, first + 1, ... of total, a part of the
            whole (tensor parallelism). Dropout counts heads of the whole, so that processes with
            one dropout_seed (or one state of their generators) drop what one process would. mask,
            bias, alibi_slopes and sinks may have all `total` heads; these are then taken from them.
            None: they are the whole.
        dropout_p: probability in [0, 1) that a weight is dropped; kept ones are divided by the
            exact keep probability, which is 1 - dropout_p rounded to a multiple of 1/65536.
        dropout_seed: (seed, offset), two 64-bit integers or an int64 tensor [2]: one key drops the
            same weights on every backend, device, dtype and D. None: drawn from the default
            generator of q's device. Without dropout it has no effect.
        q_descale: float32 [Hkv] or [B, Hkv]; q, k and v are then float8_e4m3fn, and q is what is
            stored times the scale of its kv head. None: 1. No gradient; out is bfloat16. Triton
            multiplies q.k in 8 bits on GPUs that can and weights with v in bfloat16; "cuda" does
            both in 8 bits, with weights rounded to float8; the other backends widen q, k and v to
            float32.
        k_descale: the same for k.
        v_descale: the same for v.
        return_lse: also return lse.
        deterministic: accepted for every value: every backend here always gives the same bits.
        backend: "cuda", "triton", "cpu" or "reference". None: the environment's FASTATTN_BACKEND,
            or the fastest that can run the call. One that cannot run it raises and says why.

    Returns:
        out [B, Hq, Sq, Dv] (q's rank) in q's dtype (bfloat16 for float8), in q's memory order where
        Dv = D and q is dense, else contiguous. With return_lse=True, (out, lse): lse [B, Hq, Sq]
        float32 (float64 for float64), the natural log of the softmax denominator, sink included;
        differentiable.
        A row that sees no key gives out = 0, lse = -inf and zero gradients.

    Under torch.autocast q, k and v are cast to its dtype (float64 and float8 are not); the operands
    stay.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value.
        NotImplementedError: the backend named cannot run the call, or a gradient does not exist.

    Sources: FlashAttention (Dao et al., arXiv:2205.14135) and FlashAttention-2 (arXiv:2307.08691)
    for the algorithm, ALiBi (Press et al., arXiv:2108.12409), soft-capping as in Gemma 2
    (arXiv:2408.00118), windows as in Longformer (arXiv:2004.05150) and Mistral, sinks as in
    StreamingLLM (arXiv:2309.17453) and gpt-oss, grouped heads as in GQA (arXiv:2305.13245).
    """
    if unknown:
        habits.refuse_unknown(attention, unknown)
    call, rank, row, key = normal_form(
        q, k, v, scale, causal, window, align, mask, bias, alibi_slopes, softcap, sinks, kv_lens,
        document_ids, head_origin, dropout_p, dropout_seed, q_descale, k_descale, v_descale,
        return_lse, deterministic, backend,
    )  # fmt: skip
    if row is None:
        row = backends.pick(backend, call)
        if key is not None:
            _remember(key, (call.spec, rank, row))
    out, lse = run(call, row)
    if rank != 4:
        out, lse = (x.squeeze(1) if rank == 3 else x[0, 0] for x in (out, lse))
    return (out, lse) if return_lse else out


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PackedOptions],
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool,
    **options: Unpack[PackedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@habits.public
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    page_table: Tensor | None = None,
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
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: tuple[int, int] | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: BackendName | None = None,
    **unknown,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention() over N sequences packed one after the other, without padding.

    Sequence n is rows cu_seqlens_q[n] : cu_seqlens_q[n + 1] of q, and keys
    cu_seqlens_k[n] : cu_seqlens_k[n + 1] of k and v. Each attends to itself only; with align="end"
    its diagonal ends at its own last key.

    Args:
        q: [Tq, Hq, D], Tq rows of all sequences. Rows past cu_seqlens_q[-1] give 0 (lse -inf).
        k: [Tk, Hkv, D]; with page_table [pages, page_size, Hkv, D].
        v: [Tk, Hkv, Dv]; with page_table [pages, page_size, Hkv, Dv].
        cu_seqlens_q: [N + 1] int32, from 0, never decreasing, at most Tq.
        cu_seqlens_k: [N + 1] int32, the same for keys. With page_table only its differences count.
        max_seqlen_q: at least the longest sequence's rows; the size of mask and bias.
        max_seqlen_k: at least the longest sequence's keys.
        page_table: [N, max_pages] int32: key j of sequence n is slot j % page_size of page
            page_table[n, j // page_size]. No gradients.
        mask: bool, broadcastable to [N, Hq, max_seqlen_q, max_seqlen_k], by position in sequence.
        bias: float, likewise.
        alibi_slopes: [Hq] or [N, Hq] float32.
        kv_lens: [N] int32: keys of sequence n at or past kv_lens[n] do not exist ("seqused_k").
        document_ids: refused: cu_seqlens say it.

    The other arguments are attention()'s. Dropout counts heads of sequences: n * Hq + h, or with
    head_origin n * total + first + h.

    Returns:
        out [Tq, Hq, Dv] in q's dtype; with return_lse=True also lse [Hq, Tq].
    """
    if unknown:
        habits.refuse_unknown(varlen_attention, unknown)
    call = packed_form(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, scale, causal,
        window, align, mask, bias, alibi_slopes, softcap, sinks, kv_lens, document_ids, head_origin,
        dropout_p, dropout_seed, return_lse, deterministic,
    )  # fmt: skip
    out, lse = run(call, backends.pick(backend, call))
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)  # select's gradient is a copy
    return (out, lse) if return_lse else out


def run(call: Call, row: backends.Backend) -> Result:
    """The result of a checked call, whatever its strides; out in q's memory order."""
    refuse_context_parallel()
    q = call.q
    try:
        result = attend(call, row)
        if q.is_contiguous() or q.stride(3) == 1:
            return result
        return Result(in_memory_order_of(q, result.out), result.lse)
    except RuntimeError:  # a layout, say, where a call alike but for it was remembered
        if call.operands.descales is None:
            checks.same_kind(q=q, k=call.k, v=call.v)
        raise


# ---- normal form -------------------------------------------------------------------------------


def normal_form(
    q, k, v, scale, causal, window, align, mask, bias, alibi_slopes, softcap, sinks, kv_lens,
    document_ids, head_origin, dropout_p, dropout_seed, q_descale, k_descale, v_descale,
    return_lse, deterministic, backend,
):  # fmt: skip
    """Checks attention()'s arguments; (Call, rank, row, key).

    row is the backend of an earlier call alike in all but values and strides, or None; key is where
    to remember it. Reading the shapes once and looking them up costs less than checking them.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    key = plan = None
    float8 = (
        getattr(q, "dtype", None) == descales.E4M3
        or q_descale is not None
        or k_descale is not None
        or v_descale is not None
    )
    plain = type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN
    if plain and not float8 and not is_compiling() and not _is_tracing():
        try:
            key = (
                q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
                scale, causal, window, align, softcap, dropout_p, return_lse, deterministic,
                backend, backends.forced(), mask is None, bias is None, alibi_slopes is None,
                sinks is None, kv_lens is None, document_ids is None,
                # 1 == 1.0 == True, and not all are accepted
                type(scale), type(causal), type(softcap), type(dropout_p), type(return_lse),
                type(deterministic), None if window is None else tuple(map(type, window)),
            )  # fmt: skip
            plan = _PLANS.get(key)
        except (TypeError, ValueError, RuntimeError):  # a list in window, a tensor without shape,
            key = None  # and the like: the checks below say what is wrong
    if plan is None:
        checks.same_kind(q=q, k=k, v=v, accepted=(descales.E4M3,) if float8 else checks.DTYPES)
        rank, row = checks.dense_shapes(q, k, v), None
        spec = checks.spec_of(q.shape[-1], scale, causal, window, align, softcap, dropout_p)
        checks.flag("return_lse", return_lse)
        checks.flag("deterministic", False if deterministic is None else deterministic)
    else:
        spec, rank, row = plan
    if rank != 4:
        q, k, v = (x.unsqueeze(1) if rank == 3 else x[None, None] for x in (q, k, v))
    if head_origin is not None:
        head_origin = checks.head_origin(head_origin, *q.shape[:2])
    if (
        not float8
        and mask is None
        and bias is None
        and alibi_slopes is None
        and sinks is None
        and kv_lens is None
        and document_ids is None
        and not spec.dropout_p
    ):
        return Call(q, k, v, spec, NO_OPERANDS), rank, row, key

    batch, heads, q_len, _ = q.shape
    kv_len, device = k.shape[2], q.device
    full = (batch, heads, q_len, kv_len)
    scales = None
    if float8:
        scales = Descales(q_descale, k_descale, v_descale)
        for name, x in zip(scales._fields, scales):
            descales.check(f"{name}_descale", x, batch, k.shape[1], device)
        checks.no_gradient("float8_e4m3fn", q, k, v, bias, sinks, *scales)
    if kv_lens is not None:
        kv_lens = checks.int_vector("kv_lens", kv_lens, (batch,), device, "[B]")
        checks.lengths("kv_lens", kv_lens, 0, kv_len, "a number of keys in")
    if document_ids is not None:
        document_ids = checks.documents(document_ids, batch, q_len, kv_len, device)
    operands = Operands(
        **score_operands(mask, bias, alibi_slopes, sinks, head_origin, full, q, rank),
        kv_lens=kv_lens,
        document_ids=document_ids,
        dropout_seed=checks.dropout(spec, dropout_seed, head_origin, device),
        descales=scales,
    )
    return Call(q, k, v, spec, operands), rank, row, key


def score_operands(mask, bias, alibi_slopes, sinks, head_origin, full, q, rank=4):
    """Operands of scores, checked against full = [batch, heads, rows, keys]. Where
    head_origin says that these heads are a part, operands may have every head."""
    if head_origin is not None and head_origin[1] != full[1]:
        mask, bias = (_own_heads(x, -3, head_origin, full[1]) for x in (mask, bias))
        alibi_slopes, sinks = (
            _own_heads(x, -1, head_origin, full[1]) for x in (alibi_slopes, sinks)
        )
    if mask is not None:
        mask = checks.mask(mask, full, q.device, rank)
    if bias is not None:
        bias = checks.bias(bias, full, q, rank)
    if alibi_slopes is not None:
        alibi_slopes = checks.slopes(alibi_slopes, *full[:2], q.device)
    if sinks is not None:
        sinks = checks.sinks(sinks, full[1], q)
    return {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}


def _own_heads(x, dim, head_origin, heads):
    """x, or of an x with every head in dimension dim those that are here."""
    first, total = head_origin
    if not isinstance(x, Tensor) or x.is_nested or x.dim() < -dim or x.shape[dim] != total:
        return x
    return x.narrow(dim, first, heads)


def packed_form(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, scale, causal,
    window, align, mask, bias, alibi_slopes, softcap, sinks, kv_lens, document_ids, head_origin,
    dropout_p, dropout_seed, return_lse, deterministic,
) -> Call:  # fmt: skip
    """Checks varlen_attention()'s arguments."""
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    checks.same_kind(q=q, k=k, v=v)
    heads = checks.packed_shapes(q, k, v, page_table is not None)
    spec = checks.spec_of(q.shape[-1], scale, causal, window, align, softcap, dropout_p)
    checks.flag("return_lse", return_lse)
    checks.flag("deterministic", False if deterministic is None else deterministic)
    if document_ids is not None:
        raise NotImplementedError(
            "document_ids came to varlen_attention, where cu_seqlens already keep sequences apart; "
            "give every document its own sequence"
        )
    longest = [
        checks.length(name, x)
        for name, x in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
    ]
    device, paged = q.device, page_table is not None
    cu_q = checks.offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], longest[0], device)
    total_k = None if paged else k.shape[0]
    cu_k = checks.offsets("cu_seqlens_k", cu_seqlens_k, total_k, longest[1], device)
    entries = cu_q.shape[0] - 1
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
        checks.no_gradient("page_table", q, k, v, bias, sinks)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    else:
        k, v = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    q = q.transpose(0, 1).unsqueeze(0)
    operands = Operands(
        **score_operands(
            mask, bias, alibi_slopes, sinks, head_origin, (entries, heads, *longest), q
        ),
        kv_lens=kv_lens,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        page_table=page_table,
        dropout_seed=checks.dropout(spec, dropout_seed, head_origin, device),
    )
    return Call(q, k, v, spec, operands)


def autocast(*tensors):
    """q, k and v in the dtype of an enclosing torch.autocast for their device."""
    dtype = autocast_dtype(checks.tensor("q", tensors[0]))
    if dtype is None:
        return tensors
    return [autocast_to(checks.tensor("q, k or v", x), dtype) for x in tensors]


def _remember(key, plan) -> None:
    if len(_PLANS) >= _MAX_PLANS:
        _PLANS.clear()
    _PLANS[key] = plan

"""attention() and varlen_attention(). Next hops: forms.py, which checks a call once and brings it
to normal form; backends/registry.py, which chooses the backend; and
backends/autograd.py, which calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from . import capturing, habits
from .backends import registry
from .backends.autograd import SimplePlan, attend, attend_simple
from .backends.backend import Backend
from .backends.statistics import attend_with_statistics
from .context_parallel import refuse_context_parallel
from .core import checks
from .core.call import Call, Result
from .core.reference import in_memory_order_of
from .core.spec import NO_OPERANDS
from .core.statistics import mapped
from .forms import PLANS, SIMPLE_PLANS, dense_form, remember, simple_plan, varlen_form
from .options import Align, BackendName, DenseOptions, PackedOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_stats: None = None,
    **options: Unpack[DenseOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: None = None,
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    return_stats: None = None,
    **options: Unpack[DenseOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_stats: Sequence[str],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, dict[str, Any]]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Sequence[str],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, Tensor, dict[str, Any]]: ...
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
    key_ranges: tuple[Tensor, Tensor] | None = None,
    head_origin: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: tuple[int, int] | Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    return_stats: Sequence[str] | None = None,
    deterministic: bool | None = None,
    backend: BackendName | None = None,
    **unknown,
) -> Tensor | tuple[Any, ...]:
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
        causal: sets the window's right side to 0; refused with a window that looks ahead.
        window: (left, right): row i sees keys j with i + o - left <= j <= i + o + right. None or a
            negative number on a side: unbounded.
        align: where the diagonal lies. "end": o = Skv - Sq, the last row sees the last key
            (FlashAttention 2's). "start": o = 0 (F.scaled_dot_product_attention's).
        mask: bool, broadcastable to [B, Hq, Sq, Skv], True = attend. Expanded masks cost nothing.
        bias: float, broadcastable to [B, Hq, Sq, Skv], added to the scores. Differentiable; its
            gradient is reduced over the broadcast dimensions in float32. -inf masks, and no
            finite number does. docs/backends.md says how large scores may be.
        alibi_slopes: [Hq] or [B, Hq] float32, ALiBi's distance penalty, up to 2e28 in size. No
            gradient.
        softcap: s -> softcap * tanh(s / softcap), before bias and mask; 0 is off. 1e-30 to 1e30.
        sinks: [Hq]: a logit that joins each row's softmax denominator and no output.
            Differentiable.
        kv_lens: [B] int32 in [0, Skv]: keys at or past kv_lens[b] do not exist and are never read.
            With align="end", o = kv_lens[b] - Sq.
        document_ids: [B, S] or [S] int32, non-decreasing, for self-attention: tokens see their own
            document only. The diagonal stays that of the whole sequence.
        key_ranges: (begin, end), int32 tensors, each broadcastable to [B, Hq, Sq] and neither
            decreasing along the rows: of the keys that all other options leave visible, row i
            sees begin <= j < end, as with a mask. Tiles of keys outside are never read.
            fastattn.masks.prefix, .chunked and .block_causal make them. On a GPU, where checking
            the values would wait, row i uses the largest of the numbers of rows 0 to i.
        head_origin: (first, total): q's heads are heads first, first + 1, ... of total (tensor
            parallelism). Dropout counts all `total` heads, so that processes with one dropout_seed
            (or one state of their generators) drop what a single process would. mask,
            bias, alibi_slopes, sinks and key_ranges may have all `total` heads, of which this
            call's are then used. None: q has all heads.
        dropout_p: probability in [0, 1) of dropping a softmax probability; kept ones are divided by
            the exact keep probability, which is 1 - dropout_p rounded to a multiple of 1/65536.
        dropout_seed: (seed, offset), two 64-bit integers or an int64 tensor [2]: one pair drops the
            same probabilities on every backend, device, dtype and D. None: drawn from the default
            generator of q's device. Without dropout it has no effect.
        q_descale: float32 [Hkv] or [B, Hkv]; q, k and v are then float8_e4m3fn, and q is the
            stored number times the scale of its kv head. None: 1. No gradient; out is bfloat16.
            Triton multiplies q.k in FP8 on GPUs that can, and P with v in bfloat16; "cuda" does
            both in FP8, with P rounded to FP8; the other backends widen q, k and v to float32.
        k_descale: the same for k.
        v_descale: the same for v.
        return_lse: also return lse.
        return_stats: names of statistics of the attention probabilities, which are then returned
            too: "max_logit", "entropy", "max", "argmax", "sink_mass", "diagonal_mass", "col_mass",
            "topk:K" and "pooled:N". docs/statistics.md says what each is and what it costs.
        deterministic: any value is accepted, because every backend always gives the same bits.
        backend: "cuda", "triton", "cpu" or "reference". None: the environment's FASTATTN_BACKEND,
            or the fastest that can run the call. A named one that cannot run it says why.

    Returns:
        out [B, Hq, Sq, Dv] (q's rank) in q's dtype (bfloat16 for float8), in q's memory order where
        Dv = D and q is dense, else contiguous. With return_lse=True, (out, lse): lse [B, Hq, Sq]
        float32 (float64 for float64), the natural log of the softmax denominator, sink included;
        differentiable. With return_stats, a dict of the statistics by name comes last: of rows
        [B, Hq, Sq], col_mass [B, Hq, Skv], topk a pair (probs, keys) of [B, Hq, Sq, K], pooled [B,
        Hq, N, N]. All but keys are differentiable.
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
    simple = None
    if (
        mask is None
        and bias is None
        and alibi_slopes is None
        and sinks is None
        and kv_lens is None
        and document_ids is None
        and key_ranges is None
        and q_descale is None
        and k_descale is None
        and v_descale is None
        and head_origin is None
        and return_stats is None
    ):
        asked = (
            scale,
            causal,
            window,
            align,
            softcap,
            dropout_p,
            return_lse,
            deterministic,
            backend,
        )
        simple, plan = simple_plan(q, k, v, asked)
        if plan is not None:
            out, lse = _run_simple(q, k, v, plan)
            return (out, lse) if return_lse else out
    call, rank, chosen, key = dense_form({
        "q": q, "k": k, "v": v, "scale": scale, "causal": causal, "window": window, "align": align,
        "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "softcap": softcap,
        "sinks": sinks, "kv_lens": kv_lens, "document_ids": document_ids,
        "key_ranges": key_ranges, "head_origin": head_origin, "dropout_p": dropout_p,
        "dropout_seed": dropout_seed, "q_descale": q_descale, "k_descale": k_descale,
        "v_descale": v_descale, "return_lse": return_lse, "return_stats": return_stats,
        "deterministic": deterministic, "backend": backend,
    })  # fmt: skip
    if chosen is None:
        chosen = registry.pick(backend, call)
        if key is not None:
            remember(PLANS, key, (call.spec, rank, chosen))
    if simple is not None and rank == 4 and call.operands is NO_OPERANDS:
        remember(SIMPLE_PLANS, simple, SimplePlan.of(call, chosen))
    if call.statistics is not None:
        (out, lse), found = run_with_statistics(call, chosen)
        if rank != 4:
            out, lse, found = mapped(
                lambda x: x.squeeze(1) if rank == 3 else x[0, 0], out, lse, found
            )
        return (out, lse, found) if return_lse else (out, found)
    out, lse = run(call, chosen)
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
    return_stats: None = None,
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
    return_stats: None = None,
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
    return_stats: None = None,
    **options: Unpack[PackedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    return_stats: Sequence[str],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, dict[str, Any]]: ...
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
    return_stats: Sequence[str],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor, dict[str, Any]]: ...
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
        document_ids: refused: cu_seqlens separate the sequences.
        key_ranges: (begin, end), int32, each broadcastable to [N, Hq, max_seqlen_q], rows and keys
            counted in their sequence. They may not decrease past a sequence's last row either.

    The other arguments are attention()'s. Dropout counts heads of sequences: n * Hq + h, or with
    head_origin n * total + first + h.

    Returns:
        out [Tq, Hq, Dv] in q's dtype; with return_lse=True also lse [Hq, Tq]. Statistics of rows
        are [Hq, Tq] as well, col_mass is [Hq, Tk], and keys count from the first of their sequence.
        "pooled:N" is refused, and with page_table "col_mass".
    """
    if unknown:
        habits.refuse_unknown(varlen_attention, unknown)
    call = varlen_form({
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "page_table": page_table,
        "scale": scale, "causal": causal, "window": window, "align": align, "mask": mask,
        "bias": bias, "alibi_slopes": alibi_slopes, "softcap": softcap, "sinks": sinks,
        "kv_lens": kv_lens, "document_ids": document_ids, "key_ranges": key_ranges,
        "head_origin": head_origin, "dropout_p": dropout_p, "dropout_seed": dropout_seed,
        "return_lse": return_lse, "return_stats": return_stats, "deterministic": deterministic,
    })  # fmt: skip
    chosen = registry.pick(backend, call)
    if call.statistics is not None:
        (out, lse), found = run_with_statistics(call, chosen)
        out, lse, found = mapped(lambda x: x.squeeze(0), out, lse, found)
        out = out.transpose(0, 1)
        return (out, lse, found) if return_lse else (out, found)
    out, lse = run(call, chosen)
    out, lse = (
        out.squeeze(0).transpose(0, 1),
        lse.squeeze(0),
    )  # not [0], whose backward copies
    return (out, lse) if return_lse else out


def run(call: Call, backend: Backend) -> Result:
    """The result of a checked call with any strides; out has q's memory order."""
    refuse_context_parallel()
    try:
        result = _in_order(call.q, attend(call, backend))
    except RuntimeError:  # perhaps a sparse layout, which the plan of a strided call did not check
        if call.operands.descales is None:
            checks.same_kind(q=call.q, k=call.k, v=call.v)
        raise
    if capturing.watched:
        capturing.show(call, result)
    return result


def run_with_statistics(call: Call, backend: Backend) -> tuple[Result, dict[str, Any]]:
    """run() of a call that asks for statistics, and these by name, in normal form."""
    refuse_context_parallel()
    result, found = attend_with_statistics(call, backend)
    result = _in_order(call.q, result)
    if capturing.watched:
        capturing.show(call.but(statistics=None), result)
    return result, found


def _run_simple(q: Tensor, k: Tensor, v: Tensor, plan: SimplePlan) -> Result:
    """run() of a call that `plan` was made for. Tensors that the kernel rejects (of a sparse
    layout, say) go through torch's dispatcher, which runs them or raises a clear error."""
    refuse_context_parallel()
    try:
        result = _in_order(q, attend_simple(q, k, v, plan))
    except RuntimeError:
        return run(Call(q, k, v, plan.spec, NO_OPERANDS), plan.backend)
    if capturing.watched:
        capturing.show(Call(q, k, v, plan.spec, NO_OPERANDS), Result(*result))
    return result


def _in_order(q: Tensor, result: Any) -> Result:
    if q.is_contiguous() or q.stride(3) == 1:
        return result
    return Result(in_memory_order_of(q, result[0]), result[1])

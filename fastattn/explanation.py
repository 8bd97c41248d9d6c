"""explain(): what a call would do, without running it. Asks the backends of registry.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from . import decoding, habits
from .backends import isa, registry
from .backends.backend import Backend
from .core.call import Call
from .core.philox import keep_probability
from .core.reference import Piece, pieces
from .core.spec import Spec
from .core.statistics import ROW_NAMES
from .core.work import bounds, count_pairs, flops
from .forms import dense_form, packed_form
from .functional import attention, varlen_attention
from .options import CacheOptions, DenseOptions, PackedOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Tiles:
    """A grid of the backend's tiles, block_q rows by block_kv keys, over all heads of the call."""

    block_q: int
    block_kv: int
    skipped: int  # not loaded: no row of the tile sees any of its keys
    full: int  # every row sees every key, so no mask is applied
    masked: int  # on an edge of the band


@dataclass(frozen=True, repr=False)
class Explanation:
    """What a call would do. str() is a table, and so is what a console or a notebook shows."""

    backend: str | None  # the one that would run; None when the one asked for cannot
    asked: str | None  # by backend= or FASTATTN_BACKEND
    reasons: dict[str, str | None]  # each backend's reason for not being able to run the call
    why_not_auto: dict[str, str]  # of those that could run it: why they do so only when named
    isa: str | None  # instruction set of the CPU kernels, where they would run
    function: str
    q: tuple[int, ...]  # shapes in the operators' normal form, [batch, heads, length, channels]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of k and v: a cache may be 8-bit
    device: torch.device
    spec: Spec
    operands: tuple[str, ...]  # the optional tensors of the call
    statistics: dict[str, str]  # those of return_stats, and the pass that computes each
    pairs: int  # (row, key) pairs inside band, lengths and key ranges, over all heads
    all_pairs: int  # rows times key slots, over all heads
    tiles: Tiles | None  # None where the backend has none
    flops_forward: int
    flops_backward: int | None  # None where there is no backward
    bytes_forward: int  # inputs read once and outputs written once
    keep_probability: float | None  # the exact probability that dropout keeps a value of P

    def __str__(self) -> str:
        return _table(self)

    __repr__ = __str__


@overload
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /,
    *,
    return_lse: bool = False,
    return_stats: Sequence[str] | None = None,
    **options: Unpack[DenseOptions],
) -> Explanation: ...
@overload
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    return_stats: Sequence[str] | None = None,
    **options: Unpack[PackedOptions],
) -> Explanation: ...
@overload
def explain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    /,
    *,
    cache_lens: Tensor | int,
    return_lse: bool = False,
    return_stats: Sequence[str] | None = None,
    **options: Unpack[CacheOptions],
) -> Explanation: ...
def explain(q: Tensor, keys: Tensor, values: Tensor, /, *args: Any, **call: Any) -> Explanation:
    """What would run for a call of attention(), varlen_attention() or decode_attention().

    Takes that call's arguments, the first three by position; cu_seqlens_q and cache_lens tell which
    function it is. They are checked as in the call. Nothing is computed or written, and no random
    numbers are drawn.

    The count covers pairs inside band, lengths, documents, sequences and key ranges; the values of
    a mask or bias are not read. A pair costs 2 (D + Dv) operations forward and 2 (3 D + 2 Dv)
    backward.
    """
    if "cache_lens" in call:
        function = decoding.decode_attention
    elif args or "cu_seqlens_q" in call:
        function = varlen_attention
    else:
        function = attention
    habits.refuse_unknown(function, call)
    try:
        bound = inspect.signature(function).bind(q, keys, values, *args, **call)
    except TypeError as error:
        raise TypeError(f"{function.__name__}() cannot be called so: {error}") from None
    bound.apply_defaults()
    arguments = bound.arguments
    if arguments["dropout_seed"] is None:
        arguments["dropout_seed"] = (0, 0)  # drawing one would advance the generator
    asked = registry.named(arguments["backend"])
    if function is attention:
        checked, *_ = dense_form(arguments)
    elif function is varlen_attention:
        arguments.pop("backend")
        checked = packed_form(arguments)
    else:
        checked = decoding.decode_form(**arguments)

    q, k, v, spec, operands = (getattr(checked, x) for x in ("q", "k", "v", "spec", "operands"))
    reasons = {backend.name: backend.why_not(checked) for backend in registry.BACKENDS}
    why_not_auto = {
        backend.name: reason
        for backend in registry.BACKENDS
        if reasons[backend.name] is None and (reason := backend.why_not_auto(checked))
    }
    if asked:
        chosen = asked if reasons[asked] is None else None
    else:
        chosen = registry.auto_select(checked).name
    backend = None if chosen is None else registry.BY_NAME[chosen]
    work = _Work(checked)
    pairs, head_dim, v_dim = count_pairs(checked), q.shape[3], v.shape[3]
    no_gradient = operands.paged or operands.descales or function is decoding.decode_attention
    return Explanation(
        backend=chosen,
        asked=asked,
        reasons=reasons,
        why_not_auto=why_not_auto,
        isa=isa.selected() if chosen == "cpu" else None,
        function=function.__name__,
        q=tuple(q.shape),
        k=tuple(k.shape),
        v=tuple(v.shape),
        dtype=q.dtype,
        kv_dtype=k.dtype,
        device=q.device,
        spec=spec,
        operands=tuple(operands.given()),
        statistics=_statistics(checked, backend),
        pairs=pairs,
        all_pairs=work.all_pairs(),
        tiles=work.tiles(*backend.tile) if backend and backend.tile else None,
        flops_forward=flops(pairs, head_dim, v_dim, "fwd"),
        flops_backward=flops(pairs, head_dim, v_dim, "bwd") if not no_gradient else None,
        bytes_forward=work.bytes_forward(),
        keep_probability=keep_probability(spec.dropout_p) if spec.dropout_p else None,
    )


def _statistics(call: Call, backend: Backend | None) -> dict[str, str]:
    """By which pass each statistic is computed."""
    wanted, passes = call.statistics, {}
    for name in () if wanted is None else wanted.names:
        kernel = backend is not None and backend.forward_statistics is not None
        if name in ("sink_mass", "diagonal_mass"):
            passes[name] = "from lse, in plain torch"
        elif name in ROW_NAMES:
            passes[name] = "in the forward pass" if kernel else "after it, in plain torch"
        else:
            kernel = backend is not None and backend.maps is not None
            passes[name] = "by a second pass" + ("" if kernel else ", in plain torch")
    return passes


def _signature() -> inspect.Signature:
    """All arguments of the three calls; those that only some of them require are optional."""
    own = inspect.signature(explain).parameters
    parameters = {name: own[name] for name in ("q", "keys", "values")}
    for function in (varlen_attention, attention, decoding.decode_attention):
        for parameter in list(inspect.signature(function).parameters.values())[3:]:
            if parameter.default is parameter.empty:
                annotation = f"{parameter.annotation} | None"
                parameter = parameter.replace(default=None, annotation=annotation)
            parameters.setdefault(parameter.name, parameter)
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)
    return inspect.Signature(ordered, return_annotation=Explanation)


explain.__signature__ = _signature()


class _Work:
    """The work of a call, from its band and the pieces into which lengths and documents cut it."""

    def __init__(self, call: Call):
        q, k, operands = call.q, call.k, call.operands
        self.call = call
        self.q, self.k, self.v, self.spec, self.operands = q, k, call.v, call.spec, operands
        self.pieces = list(pieces(q, k, operands))
        whole = len(self.pieces) == 1 and self.pieces[0].sequence is None
        self.copies = q.shape[0] if whole else 1  # batch entries that each piece stands for
        table = operands.page_table
        self.slots = k.shape[2] * (1 if table is None else table.shape[1])

    def keys_of(self, piece: Piece) -> int:
        """Key slots of the piece's sequence, filled or not."""
        cu = self.operands.cu_seqlens_k
        if cu is None or piece.sequence is None:
            return self.slots
        begin, end = cu[piece.sequence : piece.sequence + 2].tolist()
        return end - begin

    def heads_of(self, piece: Piece):
        """(times, lo, hi) for each head of the piece, or for each set of `times` equal heads: row i
        sees keys [lo[i], hi[i])."""
        lo, hi = (x.flatten(0, 1).tolist() for x in bounds(self.call, piece))
        times = self.copies * self.q.shape[1] // max(1, len(lo))
        return ((times, *one) for one in zip(lo, hi))

    def all_pairs(self) -> int:
        rows = sum(len(p.i) * self.keys_of(p) for p in self.pieces)
        return rows * self.copies * self.q.shape[1]

    def tiles(self, block_q: int, block_kv: int) -> Tiles:
        """As kv_range of csrc/spec.h does: the first and last row of a tile bound those between."""
        skipped = full = masked = 0
        for piece in self.pieces:
            keys = self.keys_of(piece)
            columns = -(-keys // block_kv)
            for times, lo, hi in self.heads_of(piece):
                for i in range(0, len(lo), block_q):
                    last = min(i + block_q, len(lo)) - 1
                    begin, full_begin, full_end, end = lo[i], lo[last], hi[i], hi[last]
                    touched = -(-end // block_kv) - begin // block_kv if begin < end else 0
                    whole = keys if full_end == keys else full_end // block_kv * block_kv
                    inside = max(0, -(-whole // block_kv) - -(-full_begin // block_kv))
                    skipped += times * (columns - touched)
                    full += times * min(inside, touched)
                    masked += times * (touched - min(inside, touched))
        return Tiles(block_q, block_kv, skipped, full, masked)

    def bytes_forward(self) -> int:
        """Bytes moved if inputs that some row sees are read once and outputs are written once."""
        size, kv_size = self.q.element_size(), self.k.element_size()
        rows = self.q.shape[0] * self.q.shape[1] * self.q.shape[2]
        keys = 0
        for piece in self.pieces:
            if len(piece.i) and self.k.shape[1]:
                lo, hi = bounds(self.call, piece)
                shape = (lo.shape[0], min(lo.shape[1], self.k.shape[1]), -1)
                first, last = lo[..., 0].view(shape).amin(2), hi[..., -1].view(shape).amax(2)
                times = self.copies * self.k.shape[1] // max(1, first.numel())
                keys += int((last - first).clamp(min=0).sum()) * times
        head_dim, v_dim = self.q.shape[3], self.v.shape[3]
        moved = keys * (head_dim + v_dim) * kv_size
        moved += rows * (head_dim * size + v_dim * max(2, size))  # the output of FP8 is bfloat16
        moved += rows * (8 if size == 8 else 4)
        for x in (self.operands.mask, self.operands.bias):
            if x is not None:  # an expanded dimension holds one element
                once = (n for n, stride in zip(x.shape, x.stride()) if stride)
                moved += math.prod(once) * x.element_size()
        return moved


# ---- the table ---------------------------------------------------------------------------------


def _table(x: Explanation) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    kv_dtype = "" if x.kv_dtype == x.dtype else f" of {str(x.kv_dtype).removeprefix('torch.')}"
    spec = [f"scale {x.spec.scale:.6g}"]
    if x.spec.softcap:
        spec.append(f"softcap {x.spec.softcap:g}")
    for side, n in (("left", x.spec.left), ("right", x.spec.right)):
        if n >= 0:
            spec.append(f"{side} {n}")
    if x.spec.left >= 0 or x.spec.right >= 0:
        spec.append(f"aligned to the {'end' if x.spec.align_end else 'start'}")
    share = f" ({x.pairs / x.all_pairs:.1%} of {x.all_pairs:,})" if x.all_pairs else ""
    rows = [
        ("call", f"{x.function} of {dtype} on {x.device}"),
        ("q", _shape(x.q)),
        ("k, v", f"{_shape(x.k)}, {_shape(x.v)}{kv_dtype}"),
        ("computes", ", ".join(spec)),
        ("operands", ", ".join(x.operands) or "none"),
    ]
    for name, how in x.statistics.items():
        rows.append((f"statistic {name}", how))
    if x.keep_probability is not None:
        rows.append(("dropout", f"keeps {x.keep_probability:.6f} of the probabilities"))
    unread = [n for n in ("mask", "bias") if n in x.operands]
    before = f", before the {' and the '.join(unread)}" if unread else ""
    rows.append(("visible pairs", f"{x.pairs:,}{share}{before}"))
    if x.tiles:
        t = x.tiles
        rows.append(
            (f"tiles {t.block_q} x {t.block_kv}",
             f"{t.full:,} full, {t.masked:,} masked, {t.skipped:,} skipped")
        )  # fmt: skip
    rows.append(("forward", f"{_count(x.flops_forward, 'FLOP')}, {_count(x.bytes_forward, 'B')}"))
    backward = "none" if x.flops_backward is None else _count(x.flops_backward, "FLOP")
    rows.append(("backward", backward))
    for name, reason in x.reasons.items():
        if name == x.backend:
            verdict = "runs" + (f" ({x.isa})" if x.isa else "")
        else:
            only = x.why_not_auto.get(name)
            could = f"only when named: {only}" if only else "could run"
            verdict = f"no: {reason}" if reason else could
            if name == x.asked:
                verdict = f"asked for, but {verdict}"
        rows.append((f"backend {name}", verdict))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _shape(shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _count(n: int, unit: str) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n} {unit}"

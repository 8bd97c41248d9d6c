"""The checks of public calls. An error is one sentence: the argument, what came, what is accepted.

Shapes, dtypes and devices are always checked, under torch.compile too. Values (lengths, offsets,
ids) are checked where reading them costs no synchronization: on CPU tensors in eager mode.
"""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor

from .spec import Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_LENGTH = 1 << 30  # lengths and windows are smaller, so that sums of two fit in int32
# Beyond these, scale * x, x / softcap or softcap * x overflows float32 and gives NaN (csrc/spec.h).
MAX_SCALE = 1e30
SOFTCAPS = 1e-30, 1e30
MAX_SLOPE = 2.0**94  # beyond it, a slope times a distance overflows
MAX_SPLITS = 1 << 20  # of a decode call's keys
MAX_HEADS = 1 << 31  # batch * heads, which is one 32-bit word of dropout's Philox counter
ALL_HEADS = ", or the same for every head of the model with head_origin = (first, total)"


# ---- numbers -----------------------------------------------------------------------------------


def spec_of(head_dim, scale, causal, window, align, softcap, dropout_p) -> Spec:
    """The Spec of a public call's numbers, all checked."""
    scale = default_scale(head_dim) if scale is None else scale_of(scale)
    left, right = window_of(causal, window)
    if align not in ("end", "start"):
        raise ValueError(f"align is {said(align)}; accepted are 'end' and 'start'")
    softcap = number("softcap", softcap)
    low, high = SOFTCAPS
    if not (softcap == 0 or low <= softcap <= high):
        raise ValueError(f"softcap is {softcap}; accepted are 0 (off) and [{low}, {high}]")
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; accepted is a number in [0, 1)")
    return Spec(scale, softcap, left, right, align == "end", dropout_p)


def default_scale(head_dim) -> float:
    return (int(head_dim) if isinstance(head_dim, Tensor) else head_dim) ** -0.5  # torch.jit.trace


def scale_of(x, name="scale") -> float:
    x = number(name, x)
    if not abs(x) <= MAX_SCALE:
        raise ValueError(
            f"{name} is {x}; accepted is a finite number in [-{MAX_SCALE}, {MAX_SCALE}], or None"
        )
    return x


def number(name, x) -> float:
    if isinstance(x, (bool, Tensor)) or not isinstance(x, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is of type {type(x).__name__}; accepted is a number")
    try:
        return float(x)
    except OverflowError:  # an int beyond the largest float
        return -math.inf if x <= 0 else math.inf


def flag(name, x) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} is of type {str(type(x))[8:-2]}; accepted are True and False")
    return x


def integer(name, x) -> int:
    if isinstance(x, bool) or not isinstance(x, (Integral, torch.SymInt)):
        raise TypeError(f"{name} is of type {type(x).__name__}; accepted is an int")
    return x if isinstance(x, (int, torch.SymInt)) else int(x)  # pyright: ignore[reportReturnType]


def said(x) -> str:
    """Any argument as an error message shows it: its repr, or its type if that is long."""
    text = f"of type {type(x).__name__}" if isinstance(x, Tensor) else repr(x)
    return text if len(text) < 80 and "\n" not in text else f"of type {type(x).__name__}"


def window_of(causal, window) -> tuple[int, int]:
    """(left, right) keys visible around the diagonal, -1 for unbounded."""
    if window is None:
        window = (None, None)
    elif not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window is {said(window)}; accepted is a pair (left, right), or None")
    left, right = (_side(name, side) for name, side in zip(("left", "right"), window))
    if not flag("causal", causal):
        return left, right
    if right > 0:
        raise ValueError(
            f"causal=True came with window={tuple(window)}, which looks {right} keys ahead; "
            "causal accepts a right side of 0, None or negative"
        )
    return left, 0


def _side(name, side) -> int:
    side = -1 if side is None else integer(f"window's {name} side", side)
    return -1 if side < 0 or side >= MAX_LENGTH else side  # as wide as any length: unbounded


# ---- q, k and v --------------------------------------------------------------------------------


def tensor(name, x, accepted="a torch.Tensor") -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; accepted is {accepted}")
    return x


def same_kind(accepted=DTYPES, **tensors) -> None:
    """Checks that the tensors (q, k and v, by name) have one accepted dtype and one device."""
    for name, x in tensors.items():
        tensor(name, x)
        if x.is_nested:
            raise TypeError(f"{name} is a NestedTensor; accepted is a strided one (or pack it for "
                            "varlen_attention)")  # fmt: skip
        strided(name, x)
    (first, q), *others = tensors.items()
    for name, x in others:
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and {first} is {q.dtype}; one dtype is accepted")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and {first} on {q.device}; one device is "
                             "accepted")  # fmt: skip
    if q.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        with_scales = "" if accepted is DTYPES else " with q_descale, k_descale or v_descale"
        raise TypeError(f"{first} is {q.dtype}; accepted{with_scales} "
                        f"{'are' if len(accepted) > 1 else 'is'} {names}")  # fmt: skip


def dense_shapes(q, k, v) -> int:
    """Checks [B, H, S, D], [B, S, D] or [S, D] shapes; returns the rank."""
    rank = q.dim()
    if rank not in (2, 3, 4):
        raise ValueError(
            f"q has shape {show(q)}; accepted are [B, heads, S, D], [B, S, D] and [S, D]"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {show(x)} and q {show(q)}; one rank is accepted")
        if rank > 2 and x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} has batch size {x.shape[0]} (shape {show(x)}) and q {q.shape[0]} "
                f"(shape {show(q)}); they must be equal"
            )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"v has length {v.shape[-2]} (shape {show(v)}) and k {k.shape[-2]} (shape {show(k)}); "
            "they must be equal"
        )
    heads = (q.shape[1], k.shape[1], v.shape[1]) if rank == 4 else (1, 1, 1)
    head_counts(*heads)
    head_dims(q, k, v)
    sizes((q.shape[0] if rank > 2 else 1) * heads[0], q.shape[-2], k.shape[-2])
    return rank


def varlen_shapes(q, k, v, paged) -> int:
    """Checks [T, heads, D], and paged k and v [pages, page_size, heads, D]; returns q's heads."""
    for name, x, wanted in (
        ("q", q, "[Tq, heads, D]"),
        ("k", k, "[pages, page_size, kv_heads, D]" if paged else "[Tk, kv_heads, D]"),
        ("v", v, "[pages, page_size, kv_heads, Dv]" if paged else "[Tk, kv_heads, Dv]"),
    ):
        if x.dim() != wanted.count(",") + 1:
            raise ValueError(f"{name} has shape {show(x)}; accepted is {wanted}")
    if k.shape[:-2] != v.shape[:-2]:
        raise ValueError(
            f"v has shape {show(v)} and k {show(k)}; all but the last two sizes must be equal"
        )
    head_counts(q.shape[1], k.shape[-2], v.shape[-2])
    head_dims(q, k, v)
    sizes(q.shape[1], q.shape[0], k.shape[0])
    return q.shape[1]


def length(name, x, limit=MAX_LENGTH) -> int:
    x = integer(name, x)
    if not 0 <= x < limit:
        raise ValueError(f"{name} is {x}; accepted is an int in [0, 2**{limit.bit_length() - 1})")
    return x


def no_gradient(name, *tensors) -> None:
    """Raises for inputs that require grad in a call that has no gradient."""
    wanted = (isinstance(x, Tensor) and x.requires_grad for x in tensors)
    if torch.is_grad_enabled() and any(wanted):
        raise NotImplementedError(
            f"{name} came with an input that requires grad, and calls with it have no gradient; "
            "use torch.no_grad(), or detach the inputs"
        )


def head_counts(heads, kv_heads, v_heads) -> None:
    if kv_heads != v_heads:
        raise ValueError(f"k has {kv_heads} heads and v {v_heads}; they must be equal")
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"q has {heads} heads and k {kv_heads}; q's heads must be a multiple of k's"
        )


def head_dims(q, k, v) -> None:
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k has head dimension {k.shape[-1]} (shape {show(k)}) and q {q.shape[-1]} "
            f"(shape {show(q)}); they must be equal"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] < 1:
            raise ValueError(f"{name} has head dimension 0 (shape {show(x)}); at least 1 is needed")


def sizes(batch_heads, q_len, kv_len) -> None:
    if q_len >= MAX_LENGTH or kv_len >= MAX_LENGTH:
        raise ValueError(f"lengths are {q_len} (q) and {kv_len} (k); they must be below 2**30")
    if batch_heads >= MAX_HEADS:
        raise ValueError(f"q has {batch_heads} heads over the batch; they must be below 2**31")


def show(x: Tensor) -> str:
    """A shape as an error message shows it. Call it only where something is wrong: formatting a
    size breaks torch.compile's graph, or specialises the graph to its value."""
    return "of sequences" if x.is_nested else str(list(x.shape))


# ---- operands: each function returns the normal form -------------------------------------------


def on_device(name, x, device) -> Tensor:
    strided(name, tensor(name, x))
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and q on {device}; one device is accepted")
    return x


def strided(name, x) -> None:
    if x.is_nested:
        raise TypeError(f"{name} is a NestedTensor; accepted is a strided one")
    if type(x).__name__ == "DTensor":  # by name: importing DTensor is slow
        raise TypeError(f"{name} is a DTensor; accepted is this process's shard of it, "
                        f"{name}.to_local(), with head_origin where its heads are "
                        "sharded")  # fmt: skip
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; accepted is torch.strided")


def no_grad(name, x) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name} requires grad and has no gradient here; pass {name}.detach(), or write it as "
            "a bias, which has one"
        )


def broadcast(name, x, full, rank=4) -> Tensor:
    """x as a 4-D view, each dimension 1 or as in full."""
    wide = x
    if rank == 3 and x.dim() == 3:  # 3-D calls have no dimension of heads
        wide = x.unsqueeze(1)
    while wide.dim() < 4:
        wide = wide.unsqueeze(0)
    if wide.dim() > 4 or any(n != 1 and n != m for n, m in zip(wide.shape, full)):
        forms = {(full[0], full[3]): ", None, None], or kv_lens", (full[0], *full[2:]): ", None]"}
        form = forms.get(tuple(x.shape))
        raise ValueError(
            f"{name} has shape {show(x)}; accepted is any that broadcasts to {list(full)} (batch, "
            f"heads, rows, keys){f', here {name}[:{form}' if form else ''}"
        )
    return wide


def mask(x, full, device, rank=4) -> Tensor:
    on_device("mask", x, device)
    if x.dtype != torch.bool:
        raise TypeError(f"mask is {x.dtype}; accepted is torch.bool (a float mask is a bias)")
    return broadcast("mask", x, full, rank)


def bias(x, full, q, rank=4) -> Tensor:
    on_device("bias", x, q.device)
    if x.dtype not in DTYPES:
        raise TypeError(f"bias is {x.dtype}; accepted are the floating dtypes of q, and float32")
    if x.dtype not in (q.dtype, torch.float32, torch.float64):
        x = x.float()
    return broadcast("bias", x, full, rank)


def slopes(x, batch, heads, device) -> Tensor:
    on_device("alibi_slopes", x, device)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"alibi_slopes is {x.dtype}; accepted is float32")
    if tuple(x.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes has shape {show(x)}; accepted are [heads] = [{heads}] and "
            f"[batch, heads] = [{batch}, {heads}]{ALL_HEADS}"
        )
    no_grad("alibi_slopes", x)
    x = x.float()
    if has_values(x) and (far := x[x.isfinite() & (x.abs() > MAX_SLOPE)]).numel():
        raise ValueError(
            f"alibi_slopes holds {float(far[0]):.3g}; accepted are slopes up to {MAX_SLOPE:.3g}, "
            "past which a slope times a distance leaves float32"
        )
    return x


def sinks(x, heads, q) -> Tensor:
    on_device("sinks", x, q.device)
    if x.dtype not in DTYPES or (x.dtype == torch.float64 and q.dtype != torch.float64):
        raise TypeError(f"sinks is {x.dtype} and q {q.dtype}; accepted are q's dtype and float32")
    if tuple(x.shape) != (heads,):
        wanted = f"[heads] = [{heads}]{ALL_HEADS}"
        raise ValueError(f"sinks has shape {show(x)}; accepted is {wanted}")
    if q.dtype == torch.float64:
        return x.double()
    return x if x.dtype == q.dtype else x.float()


def int_vector(name, x, shape, device, meaning) -> Tensor:
    """An integer tensor that must have this shape, as int32; `meaning` names it in the error."""
    on_device(name, x, device)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {x.dtype}; accepted is torch.int32")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {show(x)}; accepted is {meaning} = {list(shape)}")
    return int32(name, x)


def int32(name, x) -> Tensor:
    if x.dtype == torch.int32:
        return x
    if has_values(x) and x.numel() and (int(x.max()) > 2**31 - 1 or int(x.min()) < -(2**31)):
        raise ValueError(f"{name} holds {int(x.max())}; its values must fit in 32 bits")
    return x.clamp(-(2**31), 2**31 - 1).int()  # where values are not read, none may wrap


def has_values(x) -> bool:
    """May x's values be read? Not on a GPU, which would synchronize, nor under tracing."""
    return x.is_cpu and has_memory(x)


def has_memory(x) -> bool:
    """Does x have memory of its own? Not under tracing, functorch or a dispatch mode."""
    return (
        not (torch.compiler.is_compiling() or torch._C._is_tracing())
        and type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def lengths(name, x, low, high, accepted) -> None:
    """Checks that every value of a vector is in [low, high]; high may be a list, a bound for each.
    accepted is a text or, where it contains sizes, a function that returns one (see show)."""
    if not has_values(x):
        return
    values = x.tolist()
    bounds = high if isinstance(high, list) else [high] * len(values)
    for n, (value, bound) in enumerate(zip(values, bounds)):
        if not low <= value <= bound:
            what = accepted() if callable(accepted) else accepted
            raise ValueError(f"{name}[{n}] is {value}; accepted is {what} [{low}, {bound}]")


def documents(x, batch, q_len, kv_len, device) -> Tensor:
    on_device("document_ids", x, device)
    if q_len != kv_len:
        raise ValueError(
            f"document_ids came with {q_len} rows and {kv_len} keys; it is for self-attention, "
            "where they are equal"
        )
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"document_ids is {x.dtype}; accepted is torch.int32")
    if tuple(x.shape) not in ((q_len,), (batch, q_len)):
        raise ValueError(
            f"document_ids has shape {show(x)}; accepted are [S] = [{q_len}] and "
            f"[B, S] = [{batch}, {q_len}]"
        )
    x = int32("document_ids", x).expand(batch, q_len)
    if has_values(x) and bool((x[:, 1:] < x[:, :-1]).any()):
        raise ValueError("document_ids decreases along a row; accepted are non-decreasing ids")
    return x.contiguous()


def offsets(name, x, total, longest, device) -> Tensor:
    """cu_seqlens: int32 [N + 1] that starts at 0, never decreases and stays within the tensor."""
    on_device(name, x, device)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {x.dtype}; accepted is torch.int32")
    if x.dim() != 1 or x.shape[0] < 1:
        raise ValueError(f"{name} has shape {show(x)}; accepted is [sequences + 1]")
    x = int32(name, x)
    side = name[-1]
    if has_values(x):
        values = x.tolist()
        if values[0] != 0:
            raise ValueError(f"{name} starts at {values[0]}; it must start at 0")
        found = 0
        for n, (begin, end) in enumerate(pairwise(values)):
            if end < begin:
                raise ValueError(f"{name} decreases from {begin} to {end} at index {n + 1}; "
                                 "accepted are offsets that never decrease")  # fmt: skip
            found = max(found, end - begin)
        if total is not None and values[-1] > total:
            raise ValueError(f"{name} ends at {values[-1]} and {side} has {total} rows; "
                             "it must not go past them")  # fmt: skip
        if found > longest:
            raise ValueError(
                f"max_seqlen_{side} is {longest} and {name} has a sequence of {found}; it must be "
                "at least that"
            )
    return x.contiguous()


def table(x, sequences, device) -> Tensor:
    """page_table [sequences, max_pages]; its values are not checked."""
    on_device("page_table", x, device)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"page_table is {x.dtype}; accepted is torch.int32")
    if x.dim() != 2 or x.shape[0] != sequences:
        raise ValueError(f"page_table has shape {show(x)}; accepted is [sequences, max_pages] with "
                         f"sequences = {sequences}")  # fmt: skip
    return x


def pages(x, sequences, lens, page_size, n_pages, device) -> Tensor:
    """page_table [sequences, max_pages] as int32; pages past lens[n] keys may be anything."""
    table(x, sequences, device)
    if page_size < 1:
        raise ValueError("pages have size 0; at least 1 is needed")
    if has_values(x) and has_values(lens):
        used = (lens + page_size - 1) // page_size
        for n in (used > x.shape[1]).nonzero()[:1].flatten().tolist():
            raise ValueError(f"page_table row {n} has {x.shape[1]} pages of {page_size} keys and "
                             f"its sequence {int(lens[n])} keys; they must fit")  # fmt: skip
        in_use = torch.arange(x.shape[1]) < used.unsqueeze(1)
        wrong = in_use & ((x < 0) | (x >= n_pages))
        for n, i in wrong.nonzero()[:1].tolist():
            raise ValueError(f"page_table row {n} names page {int(x[n, i])}; accepted is "
                             f"[0, {n_pages - 1}]")  # fmt: skip
    return int32("page_table", x).contiguous()


def dropout(spec, seed, head_origin, device) -> Tensor | None:
    """The operand dropout_seed: int64 (seed, offset), and head_origin after it where it is given;
    None without dropout."""
    if not spec.dropout_p:
        return None
    key = dropout_key(seed, device)
    if head_origin is None:
        return key
    return torch.cat([key, *(key.new_full((1,), n) for n in head_origin)])


def head_origin(x, batch, heads) -> tuple[int, int]:
    """(first, total), checked: the call's heads are heads first, first + 1, ... of total."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"head_origin is {said(x)}; accepted is a pair (first, total), or None")
    first, total = (integer(f"head_origin's {name}", n) for name, n in zip(("first", "total"), x))
    if first < 0 or first + heads > total:
        raise ValueError(
            f"head_origin is {(first, total)} and q has {heads} heads; accepted is (first, total) "
            "with 0 <= first and first + heads <= total"
        )
    if batch * total >= MAX_HEADS:
        raise ValueError(
            f"head_origin says {total} heads, {batch * total} over the batch of {batch}; they must "
            "be below 2**31"
        )
    return first, total


def dropout_key(seed, device) -> Tensor:
    """(seed, offset) as an int64 [2] tensor; None draws it from the device's default generator."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        on_device("dropout_seed", seed, device)
        if tuple(seed.shape) != (2,) or seed.dtype != torch.int64:
            raise ValueError(f"dropout_seed is a {seed.dtype} tensor of shape {show(seed)}; "
                             "accepted is int64 [2] = (seed, offset)")  # fmt: skip
        return seed.contiguous()
    if not isinstance(seed, (tuple, list)) or len(seed) != 2:
        raise TypeError(f"dropout_seed is {said(seed)}; accepted is (seed, offset)")
    for x in seed:
        if not -(2**63) <= integer("dropout_seed", x) < 2**64:
            raise ValueError(f"dropout_seed holds {x}; accepted are 64-bit integers")
    return torch.tensor([x - 2**64 if x >= 2**63 else x for x in seed], device=device)

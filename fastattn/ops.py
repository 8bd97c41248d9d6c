"""The two operators, torch.ops.fastattn.flash_attn_fwd and _bwd, and the same by Triton, with
_triton after their names. Kernels: csrc/ops_cpu.cpp, csrc/ops_cuda.cu, kernels/launch.py.

Here are their schemas and everything torch asks of an operator besides the kernels: fake kernels,
autograd, vmap, autocast and FLOP formulas. Arguments come in the normal form that attention.py
makes: q [B, heads, q_len, D], k [B, kv_heads, kv_len, D], v [B, kv_heads, kv_len, v_dim], unit last
stride, one dtype; the eleven operands of `Operands` and the six numbers of `Spec`, in order.

Triton's forward operator also takes 8-bit tensors, with the three `Descales` at the end: q, k and v
(out is then bfloat16), or k and v alone; it has no gradient of these. flash_attn_fwd_float8 is the
CUDA kernels' forward of float8_e4m3fn q, k and v, with the same arguments.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import autograd, build_facts
from .gpu import constant, launcher
from .pairs import count_pairs
from .spec import OPERANDS, Operands, Spec

try:
    from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense
except ImportError:  # the name in older releases
    from torch._prims_common import is_non_overlapping_and_dense as is_dense

_LIBRARY = torch.library.Library("fastattn", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

_OPERANDS = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? kv_lens, "
    "Tensor? kv_starts, Tensor? document_ids, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? page_table, Tensor? dropout_seed"
)
_SPEC = "float scale, float softcap, int left, int right, bool align_end, float dropout_p"

FAMILIES = ("", "_triton")  # ends of the operators' names: each pair is made by other kernels
FLOAT8 = "_float8"  # and of a forward without a partner

_DESCALES = ", Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None"

for _end in (*FAMILIES, FLOAT8):
    _LIBRARY.define(
        f"flash_attn_fwd{_end}(Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC}, int num_splits"
        f"{_DESCALES if _end else ''}) -> (Tensor out, Tensor lse)",
        tags=_TAGS,
    )
for _end in FAMILIES:
    _LIBRARY.define(
        f"flash_attn_bwd{_end}(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q,"
        f" Tensor k, Tensor v, {_OPERANDS}, {_SPEC}, bool need_dbias, bool need_dsinks)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
        tags=_TAGS,
    )

forward = torch.ops.fastattn.flash_attn_fwd.default
backward = torch.ops.fastattn.flash_attn_bwd.default
forward_triton = torch.ops.fastattn.flash_attn_fwd_triton.default
backward_triton = torch.ops.fastattn.flash_attn_bwd_triton.default
forward_float8 = torch.ops.fastattn.flash_attn_fwd_float8.default
PAIRS = dict(zip(FAMILIES, ((forward, backward), (forward_triton, backward_triton))))
FORWARDS = {end: pair[0] for end, pair in PAIRS.items()} | {FLOAT8: forward_float8}


# ---- the native library ------------------------------------------------------------------------


def _native_path(kind: str) -> Path | None:
    """The kernels' library; FASTATTN_CPU_LIBRARY names another build of _cpu (a sanitizer's)."""
    named = os.environ.get("FASTATTN_CPU_LIBRARY")
    if named and kind == "CPU":
        return Path(named)
    return next(iter(sorted(Path(__file__).parent.glob(f"_{kind.lower()}.*so"))), None)


def _causes(error: BaseException | None) -> str:
    """What went wrong, and what made it so: torch's loader leaves the reason to the cause."""
    parts: list[str] = []
    while error is not None:
        parts.append(str(error).rstrip("."))
        error = error.__cause__ or error.__context__
    return ": ".join(dict.fromkeys(parts))


def _load(kind: str) -> tuple[ctypes.CDLL | None, str | None]:
    """(the library of the "CPU" or "CUDA" kernels, None), or (None, why there is none)."""
    path = _native_path(kind)
    if path is None:
        reason = build_facts.why_missing(f"_{kind.lower()}")
        return None, f"the native {kind} library is not built: {reason}"
    try:
        torch.ops.load_library(str(path))
        return ctypes.CDLL(str(path)), None
    except (OSError, RuntimeError) as error:
        return None, f"the native {kind} library {path} does not load: {_causes(error)}"


NATIVE, NATIVE_MISSING = _load("CPU")
CUDA, CUDA_MISSING = (
    (None, "this torch has no CUDA") if torch.version.cuda is None else _load("CUDA")
)


def cuda_fault() -> str | None:
    """Why a CUDA library that was built, for a torch that has CUDA, cannot be used; None where it
    can, or where nothing was built."""
    built = torch.version.cuda is not None and _native_path("CUDA") is not None
    return CUDA_MISSING if built else None


def cuda_question(name: str, *arguments) -> str | None:
    """The answer of one of the library's C functions that say what is wrong: None for nothing."""
    function = getattr(CUDA, name)
    function.restype = ctypes.c_char_p
    return function(*arguments).decode() or None


@constant
@functools.cache
def cuda_problem(index: int) -> str | None:
    """Why the CUDA library, where it is loaded, cannot use GPU `index`: an old driver, say."""
    return None if CUDA is None else cuda_question("fastattn_cuda_problem", index)


# ---- fake kernels: shapes, dtypes and strides of the results ----------------------------------


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit_stride(x: Tensor) -> Tensor:
    """What the kernels read: x, or a contiguous copy where its last stride is not 1."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


_FORWARD_TENSORS = ("q", "k", "v", *OPERANDS)
_BACKWARD_TENSORS = ("dout", "dlse", "out", "lse", *_FORWARD_TENSORS)


def _one_device(q: Tensor, names, tensors) -> None:
    """Also keeps CPU tensors from here: one meta tensor among them, and torch asks no kernel."""
    for name, x in zip(names, tensors):
        if x is not None and x.device != q.device:
            raise RuntimeError(f"fastattn: {name} is on {x.device} and q on {q.device}; one device "
                               "is accepted")  # fmt: skip


def is_8_bit(x: Tensor) -> bool:
    return x.dtype in (torch.int8, torch.float8_e4m3fn)


def _forward_fake(*args):
    _one_device(args[0], _FORWARD_TENSORS, args)
    _one_device(args[0], ("q_descale", "k_descale", "v_descale"), args[21:])
    q, _, v, *_ = args
    q = _unit_stride(q)
    same = q.shape[3] == v.shape[3] and is_dense(q)
    dtype = torch.bfloat16 if is_8_bit(q) else q.dtype
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_like(q, dtype=dtype) if same else q.new_empty(shape, dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=_accumulate(q.dtype))


def _backward_fake(*args):
    _one_device(args[4], _BACKWARD_TENSORS, args)
    _, _, _, _, q, k, v, _, bias, _, sinks, *_, need_dbias, need_dsinks = args
    dtype = _accumulate(q.dtype)
    dbias = q.new_empty(bias.shape if need_dbias else (0,), dtype=dtype)
    dsinks = q.new_empty(sinks.shape if need_dsinks else (0,), dtype=dtype)
    dq, dk, dv = (torch.empty_like(_unit_stride(x)) for x in (q, k, v))
    return dq, dk, dv, dbias, dsinks


# ---- autograd, for calls of the operators themselves (torch.compile, exported programs) --------
# fastattn.attention has its own way in eager mode, which is faster and has jvp: autograd.py.


def _forward_setup(ctx, inputs, output):
    if any(is_8_bit(x) for x in inputs[:3]):
        raise NotImplementedError(
            "fastattn: 8-bit q, k and v have no gradient, and an input requires grad"
        )
    ctx.arguments = len(inputs)
    ctx.save_for_backward(*inputs[:14], *output)
    ctx.spec = inputs[14:20]
    ctx.set_materialize_grads(False)


def _forward_grad(backward, ctx, dout, dlse):
    q, k, v, *operands, out, lse = ctx.saved_tensors
    nothing = (None,) * ctx.arguments
    if dout is None and dlse is None:
        return nothing
    dout = torch.zeros_like(out) if dout is None else dout
    _, bias, _, sinks, *_ = operands
    _, need_dbias, _, need_dsinks, *_ = ctx.needs_input_grad[3:]
    needs = (need_dbias, need_dsinks)
    grads = backward(dout, dlse, out, lse, q, k, v, *operands, *ctx.spec, *needs)
    dq, dk, dv, dbias, dsinks = grads
    dbias = dbias.to(bias.dtype) if need_dbias else None
    dsinks = dsinks.to(sinks.dtype) if need_dsinks else None
    return (dq, dk, dv, None, dbias, None, dsinks, *nothing[7:])


def _backward_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:18])
    ctx.numbers = inputs[18:]
    ctx.set_materialize_grads(False)


def _backward_grad(ctx, *cotangents):
    dout, dlse, _, _, q, k, v, mask, bias, slopes, sinks, *rest = ctx.saved_tensors
    *spec, need_dbias, need_dsinks = ctx.numbers
    function = autograd.reference_grads_of(
        Spec(*spec), (mask, slopes, *rest), need_dbias, need_dsinks
    )
    grads = autograd.pull_back(function, (dout, dlse, q, k, v, bias, sinks), cotangents)
    dout, dlse, dq, dk, dv, dbias, dsinks = grads
    return (dout, dlse, None, None, dq, dk, dv, None, dbias, None, dsinks, *(None,) * 15)


# ---- vmap --------------------------------------------------------------------------------------


def _forward_vmap(forward, info, in_dims, *args):
    numbers = args[14:21]
    if any(is_8_bit(x) for x in args[:3]):  # scales of each instance: one after the other
        return autograd.one_by_one(
            info.batch_size, (*in_dims[:14], *in_dims[21:]),
            lambda *x: forward(*x[:14], *numbers, *x[14:]), (*args[:14], *args[21:]),
        )  # fmt: skip
    return autograd.vmap_forward(
        info.batch_size, in_dims[:14], lambda *x: forward(*x, *numbers), args[:14], numbers[5]
    )


def _backward_vmap(backward, info, in_dims, *args):
    numbers = args[18:]
    return autograd.vmap_backward(
        info.batch_size, in_dims[:18], lambda *x: backward(*x, *numbers), args[:18], *numbers[5:]
    )


# ---- autocast: q, k and v go to the autocast dtype (fp64 and 8 bits stay); operands keep theirs --


def _register_autocast(end: str, device_type: str, key: str) -> None:
    forward = FORWARDS[end]
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast_forward(q, k, v, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return forward(*(autocast_to(x, dtype) for x in (q, k, v)), *rest)

    _LIBRARY.impl(f"flash_attn_fwd{end}", autocast_forward, key)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of an enclosing torch.autocast for x's device, if any; meta tensors have none."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def autocast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 or is_8_bit(x) else x.to(dtype)


# ---- all of that, for each forward and for each pair -------------------------------------------


for _end, _fwd in FORWARDS.items():
    _name, _bwd = f"fastattn::flash_attn_fwd{_end}", PAIRS.get(_end, (None, None))[1]
    torch.library.register_fake(_name, _forward_fake, lib=_LIBRARY)
    torch.library.register_autograd(  # without a partner, _forward_setup raises
        _name, functools.partial(_forward_grad, _bwd), setup_context=_forward_setup, lib=_LIBRARY
    )
    torch.library.register_vmap(_name, functools.partial(_forward_vmap, _fwd), lib=_LIBRARY)
    _register_autocast(_end, "cpu", "AutocastCPU")
    _register_autocast(_end, "cuda", "AutocastCUDA")
for _end, (_, _bwd) in PAIRS.items():
    _name = f"fastattn::flash_attn_bwd{_end}"
    torch.library.register_fake(_name, _backward_fake, lib=_LIBRARY)
    torch.library.register_autograd(
        _name, _backward_grad, setup_context=_backward_setup, lib=_LIBRARY
    )
    torch.library.register_vmap(_name, functools.partial(_backward_vmap, _bwd), lib=_LIBRARY)
for _key in ("CUDA", "CPU"):  # on the CPU by Triton's interpreter
    _LIBRARY.impl("flash_attn_fwd_triton", launcher("launch", "forward"), _key)
    _LIBRARY.impl("flash_attn_bwd_triton", launcher("launch", "backward"), _key)


# ---- FLOPs: two multiplications and additions for each visible pair and channel ----------------
# pairs.py counts them.


def _pairs(q, k, operands, left: int, right: int, align_end: bool) -> int:
    return count_pairs(q, k, Operands(*operands), left, right, align_end)


def forward_flops(q, k, v, *rest, out_val=None, **_) -> int:
    operands, (left, right, align_end) = rest[:11], rest[13:16]
    pairs = _pairs(q, k, operands, left, right, align_end)
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


def backward_flops(dout, dlse, out, lse, q, k, v, *rest, out_val=None, **_) -> int:
    *operands, _scale, _softcap, left, right, align_end, _dropout, _dbias, _dsinks = rest
    pairs = _pairs(q, k, operands, left, right, align_end)
    return 2 * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for fwd in FORWARDS.values():
        register_flop_formula(fwd.overloadpacket, get_raw=True)(forward_flops)
    for _, bwd in PAIRS.values():
        register_flop_formula(bwd.overloadpacket, get_raw=True)(backward_flops)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `action` right after module `name` is first imported."""

    def __init__(self, name, action):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.action()

        spec.loader.exec_module = exec_module
        return spec


# Importing the counter imports Triton where it is installed: half a second that importing fastattn
# would cost everyone, for those who count.
if "torch.utils.flop_counter" in sys.modules:
    _register_flops()
else:
    sys.meta_path.insert(0, _AfterImport("torch.utils.flop_counter", _register_flops))

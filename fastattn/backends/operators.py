"""The two operators, torch.ops.fastattn.flash_attn_fwd and _bwd, and the same by Triton, with
_triton after their names. Kernels: csrc/ops_cpu.cpp, csrc/cuda/ops.cu, kernels/launch.py.

Here are their schemas and everything torch asks of an operator besides the kernels: fake kernels,
autograd, vmap, autocast and FLOP formulas. Arguments come in the normal form that functional.py
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
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..core.call import Call, Gradients
from ..core.reference import AUTOCAST
from ..core.spec import (
    LEAVES,
    NO_OPERANDS,
    NUMBERS,
    OPERANDS,
    Operands,
    Spec,
    numbers_of,
    split_arguments,
)
from ..core.work import count_pairs
from . import autograd, build_facts
from .gpu import constant, launcher
from .vmap import one_by_one, vmap_backward, vmap_forward

try:
    from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense
except ImportError:  # the name in older releases
    from torch._prims_common import is_non_overlapping_and_dense as is_dense

_LIBRARY = torch.library.Library("fastattn", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

_OPERANDS = ", ".join(f"Tensor? {name}" for name in OPERANDS)
_SPEC = ", ".join(f"{x.type} {x.name}" for x in fields(Spec))  # float scale, ...
_NEEDS = ", ".join(f"bool need_d{name}" for name in LEAVES)
_GRADIENTS = ", ".join(f"Tensor {name}" for name in Gradients._fields)

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
        f" Tensor k, Tensor v, {_OPERANDS}, {_SPEC}, {_NEEDS}) -> ({_GRADIENTS})",
        tags=_TAGS,
    )

forward = torch.ops.fastattn.flash_attn_fwd.default
backward = torch.ops.fastattn.flash_attn_bwd.default
forward_triton = torch.ops.fastattn.flash_attn_fwd_triton.default
backward_triton = torch.ops.fastattn.flash_attn_bwd_triton.default
forward_float8 = torch.ops.fastattn.flash_attn_fwd_float8.default
PAIRS = dict(zip(FAMILIES, ((forward, backward), (forward_triton, backward_triton))))
FORWARDS = {end: pair[0] for end, pair in PAIRS.items()} | {FLOAT8: forward_float8}

_N, _M = len(OPERANDS), len(NUMBERS)
_NOTHING = (None,) * _N


def arguments(call: Call) -> tuple:
    """What all of these take of a call: q, k and v, the operands, the numbers."""
    x = call.operands
    tensors = _NOTHING if x is NO_OPERANDS else x.tensors()
    return call.q, call.k, call.v, *tensors, *numbers_of(call.spec)


@dataclass(slots=True)
class _Arguments:
    """An operator's arguments by name; `rest` is what follows `arguments`."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: tuple  # those of OPERANDS
    numbers: tuple  # those of NUMBERS
    rest: tuple

    @classmethod
    def of(cls, q, k, v, *rest) -> _Arguments:
        return cls(q, k, v, *split_arguments(rest))

    def call(self) -> Call:
        return Call(self.q, self.k, self.v, Spec(*self.numbers), Operands(*self.tensors))


# ---- the native library ------------------------------------------------------------------------


def _native_path(kind: str) -> Path | None:
    """The kernels' library; FASTATTN_CPU_LIBRARY names another build of _cpu (a sanitizer's)."""
    named = os.environ.get("FASTATTN_CPU_LIBRARY")
    if named and kind == "CPU":
        return Path(named)
    return next(iter(sorted(build_facts.HERE.glob(f"_{kind.lower()}.*so"))), None)


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
    x = _Arguments.of(*args)
    _one_device(x.q, _FORWARD_TENSORS, args)
    _one_device(x.q, ("q_descale", "k_descale", "v_descale"), x.rest[1:])
    q, v = _unit_stride(x.q), x.v
    same = q.shape[3] == v.shape[3] and is_dense(q)
    dtype = torch.bfloat16 if is_8_bit(q) else q.dtype
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_like(q, dtype=dtype) if same else q.new_empty(shape, dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=_accumulate(q.dtype))


def _backward_fake(dout, dlse, out, lse, *args):
    x = _Arguments.of(*args)
    _one_device(x.q, _BACKWARD_TENSORS, (dout, dlse, out, lse, *args))
    dtype, leaves = _accumulate(x.q.dtype), Operands(*x.tensors).leaves()
    own = (
        x.q.new_empty(leaf.shape if need else (0,), dtype=dtype)
        for leaf, need in zip(leaves, x.rest)
    )
    return *(torch.empty_like(_unit_stride(y)) for y in (x.q, x.k, x.v)), *own


# ---- autograd, for calls of the operators themselves (torch.compile, exported programs) --------
# fastattn.attention has its own way in eager mode, which is faster and has jvp: autograd.py.


def _forward_setup(ctx, inputs, output):
    x = _Arguments.of(*inputs)
    if any(is_8_bit(y) for y in (x.q, x.k, x.v)):
        raise NotImplementedError(
            "fastattn: 8-bit q, k and v have no gradient, and an input requires grad"
        )
    ctx.save_for_backward(x.q, x.k, x.v, *x.tensors, *output)
    ctx.numbers, ctx.rest = x.numbers, len(x.rest)
    ctx.set_materialize_grads(False)


def _forward_grad(backward, ctx, dout, dlse):
    q, k, v, *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * (3 + _N + _M + ctx.rest)
    dout = torch.zeros_like(out) if dout is None else dout
    needed = dict(zip(OPERANDS, ctx.needs_input_grad[3:]))
    needs = [needed[name] for name in LEAVES]
    grads = backward(dout, dlse, out, lse, q, k, v, *tensors, *ctx.numbers, *needs)
    own = {
        name: dx.to(x.dtype)
        for name, dx, x, need in zip(LEAVES, grads[3:], Operands(*tensors).leaves(), needs)
        if need
    }
    return *grads[:3], *(own.get(name) for name in OPERANDS), *(None,) * (_M + ctx.rest)


def _backward_setup(ctx, inputs, output):
    dout, dlse, _, _, *rest = inputs
    x = _Arguments.of(*rest)
    ctx.save_for_backward(dout, dlse, x.q, x.k, x.v, *x.tensors)
    ctx.numbers, ctx.needs = x.numbers, x.rest
    ctx.set_materialize_grads(False)


def _backward_grad(ctx, *cotangents):
    dout, dlse, q, k, v, *tensors = ctx.saved_tensors
    operands = Operands(*tensors)
    function = autograd.reference_grads_of(Spec(*ctx.numbers), operands.others(), ctx.needs)
    primals = (dout, dlse, q, k, v, *operands.leaves())
    dout, dlse, dq, dk, dv, *own = autograd.pull_back(function, primals, cotangents)
    own = dict(zip(LEAVES, own))
    tensors = (own.get(name) for name in OPERANDS)
    return dout, dlse, None, None, dq, dk, dv, *tensors, *(None,) * (_M + len(LEAVES))


# ---- vmap --------------------------------------------------------------------------------------


def _forward_vmap(forward, info, in_dims, *args):
    x, n = _Arguments.of(*args), 3 + _N
    if any(is_8_bit(y) for y in (x.q, x.k, x.v)):  # scales of each instance: one after the other
        num_splits, *descales = x.rest
        return one_by_one(
            info.batch_size, (*in_dims[:n], *in_dims[n + _M + 1 :]),
            lambda *y: forward(*y[:n], *x.numbers, num_splits, *y[n:]), (*args[:n], *descales),
        )  # fmt: skip
    rest = (*x.numbers, *x.rest)
    return vmap_forward(info.batch_size, in_dims[:n], lambda *y: forward(*y, *rest), args[:n])


def _backward_vmap(backward, info, in_dims, *args):
    n = 7 + _N
    rest, needs = args[n:], args[n + _M :]
    return vmap_backward(
        info.batch_size, in_dims[:n], lambda *y: backward(*y, *rest), args[:n], needs
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
    on = kind in AUTOCAST and torch.is_autocast_enabled(kind)
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
# core/work.py counts them.


def forward_flops(*args, out_val=None, **_) -> int:
    call = _Arguments.of(*args).call()
    return 2 * count_pairs(call) * (call.q.shape[-1] + call.v.shape[-1])


def backward_flops(dout, dlse, out, lse, *args, out_val=None, **_) -> int:
    call = _Arguments.of(*args).call()
    return 2 * count_pairs(call) * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


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

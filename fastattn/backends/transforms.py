"""The forward operators where torch.library's own derivatives do not exist: under torch.func's
transforms, and for tensors with tangents in torch.autograd.forward_ad's levels. torch.func.grad
would raise, and forward mode lose the tangents without a word. There, and so in torch.compile of
functions that use them, an operator is the autograd function of autograd.py.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import forward_ad

from ..core.call import Call
from ..core.spec import Operands, Spec
from . import cpu, cuda, triton
from .autograd import attend
from .schema import FAMILIES, LIBRARY, Arguments

_FUNCTORCH = "FuncTorchDynamicLayerFrontMode"  # where torch.func's transforms enter an operator


def _register(end: str) -> None:
    name = f"flash_attn_fwd{end}"
    torchs = torch.library.get_kernel(f"fastattn::{name}", _FUNCTORCH).call_boxed
    autograd = {
        key: torch.library.get_kernel(f"fastattn::{name}", key).call_boxed
        for key in ("AutogradCPU", "AutogradCUDA")
    }

    def of_duals(keys, *args):
        if not any(_is_dual(x) for x in args):
            return autograd["AutogradCUDA" if args[0].is_cuda else "AutogradCPU"](keys, *args)
        with _level_known():
            return transformed(keys, *args)

    def transformed(keys, *args):
        x = Arguments.of(*args)
        num_splits, *descales = x.rest
        if any(y is not None for y in descales):  # 8 bits have no gradient
            return torchs(keys, *args)
        backend = triton.BACKEND if end else cuda.BACKEND if x.q.is_cuda else cpu.BACKEND
        call = Call(x.q, x.k, x.v, Spec(*x.numbers), Operands(*x.tensors), num_splits)
        return tuple(attend(call, backend, eagerly=True))

    LIBRARY.impl(name, transformed, _FUNCTORCH, with_keyset=True)
    for key in autograd:
        LIBRARY.impl(name, of_duals, key, with_keyset=True)


def _is_dual(x) -> bool:
    return isinstance(x, torch.Tensor) and torch._VF._unpack_dual(x, level=0)[1] is not None


@contextlib.contextmanager
def _level_known():
    """In compiled code torch enters forward_ad's level without setting its number in Python."""
    level = forward_ad._current_level
    forward_ad._current_level = max(level, 0)
    try:
        yield
    finally:
        forward_ad._current_level = level


def _refuse_tangents(name: str) -> None:
    """Makes an operator without forward mode raise where torch.library would lose the tangents."""

    def register(key: str) -> None:
        torchs = torch.library.get_kernel(f"fastattn::{name}", key).call_boxed

        def refusing(keys, *args):
            if any(_is_dual(x) for x in args):
                raise NotImplementedError(
                    f"fastattn::{name} came with a tangent, which this operator would lose; call "
                    "fastattn.attention() or its neighbours instead, outside torch.compile"
                )
            return torchs(keys, *args)

        LIBRARY.impl(name, refusing, key, with_keyset=True)

    register("AutogradCPU")
    register("AutogradCUDA")


for _end in FAMILIES:
    _register(_end)
    for _name in ("bwd", "jvp", "jvp_bwd", "fwd_stats", "maps"):
        _refuse_tangents(f"flash_attn_{_name}{_end}")
_refuse_tangents("flash_attn_weights")

"""The forward operators under torch.func's transforms, where torch.library's own derivatives do not
exist: torch.func.grad raises, and torch.func.jvp would lose the tangents without a word. There, and
so in torch.compile of functions that use them, an operator is the autograd function of autograd.py.
"""

from __future__ import annotations

import torch

from ..core.call import Call
from ..core.spec import Operands, Spec
from . import cpu, cuda, triton
from .autograd import attend
from .schema import FAMILIES, LIBRARY, Arguments

_FUNCTORCH = "FuncTorchDynamicLayerFrontMode"  # where torch.func's transforms enter an operator


def _register(end: str) -> None:
    name = f"flash_attn_fwd{end}"
    torchs = torch.library.get_kernel(f"fastattn::{name}", _FUNCTORCH).call_boxed

    def transformed(keys, *args):
        x = Arguments.of(*args)
        num_splits, *descales = x.rest
        if any(y is not None for y in descales):  # 8 bits have no gradient
            return torchs(keys, *args)
        backend = triton.BACKEND if end else cuda.BACKEND if x.q.is_cuda else cpu.BACKEND
        call = Call(x.q, x.k, x.v, Spec(*x.numbers), Operands(*x.tensors), num_splits)
        return tuple(attend(call, backend, eagerly=True))

    LIBRARY.impl(name, transformed, _FUNCTORCH, with_keyset=True)


for _end in FAMILIES:
    _register(_end)

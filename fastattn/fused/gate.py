"""gate(): activation(gate) * up, the middle of a gated feed-forward block (GLU variants, arXiv
2002.05202). Kernels: csrc/cpu/ops_fused.cpp and kernels/gate.py. Next hop: operator.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.schema import LIBRARY, TAGS
from ..core import checks
from ..core.tensors import accumulate_dtype, empty_result
from ..core.transforms import pull_back
from .operator import (
    differentiable,
    floating,
    has_kernel,
    on_gpu,
    save_inputs,
    saved_inputs,
    through,
)

GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gate_reference(gate, up, activation):
    """activation(gate) * up, computed in fp32 (fp64 for fp64) and rounded once."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    gate, up = (x.to(accumulate_dtype(dtype)) for x in (gate, up))
    return (GATES[activation](gate) * up).to(dtype)


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of two tensors [..., hidden] of one shape, in their promoted dtype.
    activation is a key of GATES."""
    if floating("gate", gate).shape != floating("up", up).shape:
        raise ValueError(f"up has shape {checks.show(up)} and gate {checks.show(gate)}; they must "
                         "be equal")  # fmt: skip
    if gate.dim() == 0 or gate.dtype != up.dtype or not has_kernel(gate, up):
        return gate_reference(gate, up, activation)
    return _gate(gate, up, activation)


# ---- the operators -------------------------------------------------------------------------------


for _schema in (
    "gate_fwd(Tensor gate, Tensor up, str activation) -> Tensor",
    "gate_bwd(Tensor dout, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
):
    LIBRARY.define(_schema, tags=TAGS)
on_gpu("gate", "gate_fwd", "gate_bwd")


@torch.library.register_fake("fastattn::gate_fwd", lib=LIBRARY)
def _gate_fake(gate, up, activation):
    return empty_result(gate)


@torch.library.register_fake("fastattn::gate_bwd", lib=LIBRARY)
def _gate_backward_fake(dout, gate, up, activation):
    return empty_result(gate), empty_result(gate)


def _gate_gradient(ctx, dout):
    if dout is None:
        return None, None, None
    return *_gate_backward(dout, *saved_inputs(ctx)), None


def _gate_grads(dout, gate, up, activation):
    def gradients(dout, gate, up):
        def reference(gate, up):
            return (gate_reference(gate, up, activation),)

        return pull_back(reference, (gate, up), (dout,))

    return gradients


_gate = differentiable("gate_fwd", save_inputs, _gate_gradient)
_gate_backward = differentiable("gate_bwd", save_inputs, through(_gate_grads, 3))

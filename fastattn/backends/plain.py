"""The backend of plain torch, which runs any call on any device. Next hop: core/reference.py."""

from __future__ import annotations

from ..core.call import Gradients
from ..core.quantization import widened
from ..core.reference import reference
from .autograd import reference_grads_of
from .backend import Backend


def forward(call):
    if call.operands.descales is not None:
        return widened(forward, call)
    # It has no splits: every number of them is one.
    return reference(call.q, call.k, call.v, call.spec, call.operands)


def backward(call, result, dout, dlse, needs):
    grads = reference_grads_of(call.spec, call.operands.others(), needs)
    return Gradients(*grads(dout, dlse, call.q, call.k, call.v, *call.operands.leaves()))


def why_not(call):
    return None


BACKEND = Backend(
    "reference", "plain torch, O(S^2) memory, any device", why_not, forward, backward, why_not
)

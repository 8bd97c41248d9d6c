"""The backend of plain torch, which runs any call on any device. Next hop: core/reference.py."""

from __future__ import annotations

from functools import partial

from ..core.call import Gradients
from ..core.quantization import widened
from ..core.reference import reference
from ..core.spec import Operands
from ..core.tensors import accumulate_dtype, as_gradient_of
from ..core.transforms import pull_back
from .backend import Backend


def forward(call):
    if call.operands.descales is not None:
        return widened(forward, call)
    # It has no splits: every number of them is one.
    return reference(call.q, call.k, call.v, call.spec, call.operands)


def backward(call, result, dout, dlse, needs):
    others, accumulate = call.operands.others(), accumulate_dtype(call.q.dtype)

    def function(q, k, v, *leaves):
        return tuple(reference(q, k, v, call.spec, Operands.join(leaves, others)))

    leaves = (None if x is None else x.to(accumulate) for x in call.operands.leaves())
    grads = pull_back(function, (call.q, call.k, call.v, *leaves), (dout, dlse))
    empty = partial(call.q.new_empty, 0, dtype=accumulate)
    own = (dx if need and dx is not None else empty() for dx, need in zip(grads[3:], needs))
    return Gradients(*map(as_gradient_of, (call.q, call.k, call.v), grads[:3]), *own)


def why_not(call):
    return None


BACKEND = Backend(
    "reference", "plain torch, O(S^2) memory, any device", why_not, forward, backward, why_not
)

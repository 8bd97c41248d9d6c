"""vmap of the attention operators and of the autograd functions over them.

Dense calls fold vmap's dimension into the batch. Where that would change the result (a dropout mask
for each instance, varlen or paged operands, sinks for each instance), instances run one by one. The
metadata of each operand's field (core/spec.py) says how it is folded.
"""

from __future__ import annotations

from ..core.spec import LEAVES, OPERANDS, VMAP
from ..core.transforms import one_by_one

_SINKS_GRADIENT = LEAVES.index("sinks")


def vmap_forward(size, dims, call, tensors):
    """`call`'s results and their vmap dimensions. tensors are q, k, v and the operands, each with
    its vmap dimension in dims, or None."""
    operands, operand_dims = tensors[3:], dims[3:]
    if not _joins(operands, operand_dims):
        return one_by_one(size, dims, call, tensors)
    batch = _sizes(tensors[0], dims[0])[0]
    joined = [_join(x, d, size, batch) for x, d in zip(tensors[:3], dims[:3])]
    results = call(*joined, *_join_operands(operands, operand_dims, size, batch).values())
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0, 0)


def vmap_backward(size, dims, call, tensors, needs):
    """The same for a backward, whose tensors begin with dout, dlse, out and lse. needs says which
    of LEAVES need a gradient."""
    operands, operand_dims = tensors[7:], dims[7:]
    if needs[_SINKS_GRADIENT] or not _joins(operands, operand_dims):
        return one_by_one(size, dims, call, tensors)
    batch = _sizes(tensors[4], dims[4])[0]
    joined = [_join(x, dim, size, batch) for x, dim in zip(tensors[:7], dims[:7])]
    given = dict(zip(OPERANDS, zip(operands, operand_dims)))
    operands = _join_operands(operands, operand_dims, size, batch)
    bias, bias_dim = given["bias"]
    own_batch = 0 if bias is None else _sizes(bias, bias_dim)[0]
    need_dbias, _ = needs
    if need_dbias:  # each instance has its own gradient, so it needs its own bias
        operands["bias"] = _join(bias, bias_dim, size, batch)
    *grads, dbias, dsinks = call(*joined, *operands.values())
    grads = [x.unflatten(0, (size, batch)) for x in grads]
    if need_dbias:
        dbias = dbias.unflatten(0, (size, batch))
        dbias = dbias.sum(1, keepdim=True) if own_batch == 1 else dbias
    return (*grads, dbias, dsinks), (0, 0, 0, 0 if need_dbias else None, None)


def _joins(operands, dims) -> bool:
    """Whether one call can compute all instances."""
    return not any(
        x is not None and (VMAP[name] == "alone" or (VMAP[name] == "all" and dim is not None))
        for name, x, dim in zip(OPERANDS, operands, dims)
    )


def _sizes(x, dim):
    """An instance's shape."""
    return x.shape if dim is None else x.movedim(dim, 0).shape[1:]


def _join(x, dim, size, batch):
    """[size * batch, ...]. A batch of 1 is expanded, and copied only if flatten has to."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)


def _join_operands(operands, dims, size, batch) -> dict:
    """The operands of the joined batch by name; what all instances share stays as it is."""
    joined = {}
    for name, x, dim in zip(OPERANDS, operands, dims):
        if x is not None and VMAP[name] == "heads" and dim is not None and x.dim() == 2:
            x, dim = x.movedim(dim, 0).unsqueeze(1), 0  # each instance's are [heads]
        shared = x is None or (dim is None and _is_shared(VMAP[name], x))
        joined[name] = x if shared else _join(x, dim, size, batch)
    return joined


def _is_shared(rule: str, x) -> bool:
    """Whether an operand that all instances share can be passed to the joined call unchanged."""
    if rule == "broadcast":
        return x.shape[0] == 1
    return rule == "all" or (rule == "heads" and x.dim() == 1)

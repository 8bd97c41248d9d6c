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
    """`call`'s results and their vmap dimensions. tensors are q, k, v, the operands and, in forward
    mode, the five tangents, each with its vmap dimension in dims, or None."""
    if not _joins(tensors, dims, 0):
        return one_by_one(size, dims, call, tensors)
    joined, batch = _join_all(size, dims, tensors, 0)
    results = tuple(x.unflatten(0, (size, batch)) for x in call(*joined))
    return results, (0,) * len(results)


def vmap_backward(size, dims, call, tensors, needs, rows=4):
    """The same for a backward, whose tensors begin with `rows` that have q's rows: dout, dlse, out
    and lse, and for the backward of forward mode tout and tlse. needs says which of LEAVES need a
    gradient."""
    if needs[_SINKS_GRADIENT] or not _joins(tensors, dims, rows):
        return one_by_one(size, dims, call, tensors)
    need_dbias, _ = needs
    # Each instance has its own gradient of the bias, so it needs its own bias.
    joined, batch = _join_all(size, dims, tensors, rows, own_bias=need_dbias)
    *grads, dbias, dsinks = call(*joined)
    grads = [x.unflatten(0, (size, batch)) for x in grads]
    if need_dbias:
        at = rows + 3 + OPERANDS.index("bias")
        dbias = dbias.unflatten(0, (size, batch))
        shared = _sizes(tensors[at], dims[at])[0] == 1
        dbias = dbias.sum(1, keepdim=True) if shared else dbias
    return (*grads, dbias, dsinks), (0, 0, 0, 0 if need_dbias else None, None)


def _joins(tensors, dims, rows) -> bool:
    """Whether one call can compute all instances."""
    first, end = rows + 3, rows + 3 + len(OPERANDS)
    tangents = dims[end:]
    return not (tangents and tangents[-1] is not None) and not any(
        x is not None and (VMAP[name] == "alone" or (VMAP[name] == "all" and dim is not None))
        for name, x, dim in zip(OPERANDS, tensors[first:end], dims[first:end])
    )


def _join_all(size, dims, tensors, rows, own_bias=False):
    """(the tensors of the joined batch, an instance's batch size)."""
    first, end = rows + 3, rows + 3 + len(OPERANDS)
    batch = _sizes(tensors[rows], dims[rows])[0]

    def join(n):
        return _join(tensors[n], dims[n], size, batch)

    operands = _join_operands(tensors[first:end], dims[first:end], size, batch)
    tangents = []
    if len(tensors) > end:
        *_, tbias, tsinks = tensors[end:]
        at, bias = end + 3, first + OPERANDS.index("bias")
        # The bias and its tangent have one shape.
        own_bias = own_bias or dims[at] is not None or dims[bias] is not None
        shared = tbias is None or (not own_bias and tbias.shape[0] == 1)
        tangents = [join(end), join(end + 1), join(end + 2), tbias if shared else join(at), tsinks]
    if own_bias:
        operands["bias"] = join(first + OPERANDS.index("bias"))
    return [*map(join, range(first)), *operands.values(), *tangents], batch


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

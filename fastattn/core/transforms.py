"""Transforms of functions of tensors, some of which may be None: derivatives by torch.func.vjp
alone, and vmap by a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def of_tensors(function: Callable, args) -> tuple[Callable, tuple, list[int]]:
    """(the function of only those arguments that are not None, these arguments, their indices)."""
    places = [n for n, x in enumerate(args) if x is not None]

    def given(*tensors):
        full = [None] * len(args)
        for n, x in zip(places, tensors):
            full[n] = x
        return function(*full)

    return given, tuple(args[n] for n in places), places


def pull_back(function: Callable, primals, cotangents) -> tuple:
    """The gradient of each primal (None for None). A cotangent of None counts as zero."""
    given, tensors, places = of_tensors(function, primals)
    outputs, vjp = torch.func.vjp(given, *tensors)[:2]
    grads = vjp(tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents)))
    result: list[Any] = [None] * len(primals)
    for n, grad in zip(places, grads):
        result[n] = grad
    return tuple(result)


def push_forward(function: Callable, primals, tangents) -> tuple:
    """Tangents of the outputs, computed as the vjp of the vjp, because torch.func.jvp cannot run
    inside a forward-mode level that the user opened, and vjp can."""
    given, tensors, places = of_tensors(function, primals)
    outputs, vjp = torch.func.vjp(given, *tensors)[:2]
    _, transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(y) for y in outputs))[:2]
    chosen = (tangents[n] for n in places)
    (result,) = transposed(
        tuple(torch.zeros_like(x) if t is None else t for x, t in zip(tensors, chosen))
    )
    return result


def one_by_one(size, dims, call, tensors):
    """Each instance by itself, and the results stacked."""
    results = [
        call(*(x if dim is None else x.select(dim, n) for x, dim in zip(tensors, dims)))
        for n in range(size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*results))
    return stacked, (0,) * len(stacked)

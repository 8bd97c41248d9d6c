"""Checks of the blocks' constructor arguments; tensors are checked by core/checks.py."""

from __future__ import annotations

from ..core import checks


def positive(name: str, x: int) -> int:
    """x, checked to be an int of at least 1."""
    if checks.integer(name, x) < 1:
        raise ValueError(f"{name} is {x}; accepted is an int of at least 1")
    return x


def probability(name: str, x: float) -> float:
    """x, checked to be a dropout probability in [0, 1)."""
    if not 0 <= checks.number(name, x) < 1:
        raise ValueError(f"{name} is {x}; accepted is a number in [0, 1)")
    return x


def choice(name: str, x: str, accepted) -> str:
    """x, checked to be one of the accepted strings."""
    if x not in accepted:
        raise ValueError(f"{name} is {x!r}; accepted are {', '.join(map(repr, accepted))}")
    return x


def last_size(name: str, x, size: int) -> None:
    """Checks that x is a tensor whose last dimension is `size`."""
    if checks.tensor(name, x).dim() < 1 or x.shape[-1] != size:
        raise ValueError(f"{name} has shape {checks.show(x)}; accepted is [..., {size}]")

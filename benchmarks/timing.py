"""Interleaved timing for your own programs: the public name of measure/timing.py."""

from .measure.timing import (
    Comparison,
    Contender,
    Noise,
    Ratio,
    compare,
    noise_floor,
    quantile,
)

__all__ = ["Comparison", "Contender", "Noise", "Ratio", "compare", "noise_floor", "quantile"]

"""The pairs of tests/cases.py in a few cases of five options each, for backends that take long."""

from __future__ import annotations

from itertools import combinations

from cases import OPTIONS, combine


def _cover(size: int = 5):
    """A few cases of `size` options each, among which every pair that combine takes appears."""
    names = list(OPTIONS)[1:]
    missing = {pair for pair in combinations(names, 2) if combine("", *(OPTIONS[n] for n in pair))}
    while missing:
        chosen = list(min(missing))
        while len(chosen) < size:
            gains = []
            for name in names:
                together = sorted((*chosen, name), key=names.index)
                if name not in chosen and combine("", *(OPTIONS[n] for n in together)):
                    gains.append((len(missing & set(combinations(together, 2))), name))
            if not gains:
                break
            chosen.append(max(gains)[1])
        chosen.sort(key=names.index)
        missing -= set(combinations(chosen, 2))
        yield combine(f"pairwise/{'+'.join(chosen)}", *(OPTIONS[n] for n in chosen))


PAIRWISE = list(_cover())

"""The list of cases.py in few cases, for backends that take long: PAIRWISE has every pair of
options, nine in a case, and CROWDED twelve; KINDS every kind of mask, bias and layout, three in a
case; crossed() and thinned() thin products of lists."""

from __future__ import annotations

from itertools import combinations, cycle, product

import pytest
from case_tensors import BIASES, LAYOUTS, MASKS
from cases import OPTIONS, Case, combine


def _cover(size: int = 9):
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
CROWDED = list(_cover(12))  # every pair in the fewest cases, which say less about what is wrong

# Without a bias there are only masks that hide all keys, and few of them. There are as many rows
# as keys because the views of one projection need that, and more than a tile of either.
KINDS = [
    Case(f"kinds/{mask}+{bias}+{layout}", q_len=70, kv_len=70, mask=mask, bias=bias, layout=layout)
    for mask, bias, layout in zip(MASKS, cycle(BIASES), cycle(LAYOUTS))
]


def crossed(first, second, all_of_them: bool = False) -> list:
    """Parameters (a, b): each a with one b, each b in its turn; with --long all pairs."""
    return [
        pytest.param(
            a, b, marks=() if all_of_them or (i - j) % len(second) == 0 else pytest.mark.long
        )
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def thinned(*axes, all_of_them: bool = False) -> list:
    """For parametrize: all combinations of the axes' values, of which one in three always runs and
    the others with --long. With three axes, each pair of values is in a combination that runs."""
    lists = [list(axis) for axis in axes]
    params = []
    for places in product(*(range(len(axis)) for axis in lists)):
        values = [axis[place] for axis, place in zip(lists, places)]
        marks = [pytest.mark.long] if sum(places) % 3 and not all_of_them else []
        params.append(pytest.param(*values, marks=marks))
    return params

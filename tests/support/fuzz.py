"""A fuzzer: random calls of the three public functions against a float64 truth of its own.

    python tests/support/fuzz.py --minutes 1 --seed 0

A Case is a call as data: sizes, memory layouts, dtype, options, operands, and a seed for what the
tensors hold. The truth is plain loops over entries and heads in float64; of the package it uses
dropout's mask (philox.py) and nothing else. out, lse, every gradient and every cache are compared.
What fails is shrunk, field by field, and printed as lines that run. A refusal must be of a
documented type, and one sentence.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import fields, replace

if __name__ == "__main__":  # before the kernels are imported: Triton's run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from fuzz_cases import SIMPLEST, Case, build, draw, spoil
from fuzz_truth import truth

import fastattn

REFUSALS = (TypeError, ValueError, NotImplementedError)


# ---- comparing -----------------------------------------------------------------------------------

ERROR = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3}


class Wrong(AssertionError):
    """What comparing a case found."""


def compare(name, got, want, case, factor=1.0) -> None:
    if tuple(got.shape) != tuple(want.shape):
        raise Wrong(f"{name} has shape {list(got.shape)}, the truth {list(want.shape)}")
    got, want = got.detach().double(), want.detach().double()
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite], want[~finite]):
        raise Wrong(f"{name} is not finite in other places than the truth")
    if not finite.any():
        return
    size = 1.0 + want[finite].abs().max()
    error = (got - want)[finite].abs().max()
    if error > factor * ERROR[case.dtype] * size / (1 - case.dropout):
        raise Wrong(f"{name} is off by {error:.3g}, where the truth is at most {size - 1:.3g}")


FUNCTIONS = {
    "attention": fastattn.attention,
    "varlen": fastattn.varlen_attention,
    "decode": fastattn.decode_attention,
}


def check(case: Case) -> str:
    """ "right", or "refused: ..."; raises Wrong, or any other exception of the call."""
    t = build(case)
    for x in t.leaves.values():
        x.requires_grad_()
    if case.wrong:
        spoil(t)
    want = None if case.wrong else truth(t)
    try:
        results = FUNCTIONS[case.call](*t.positional, **t.named)
    except REFUSALS as error:
        text = str(error)
        if "\n" in text or len(text) < 20:
            raise Wrong(f"a refusal that is not one sentence: {text}") from error
        return f"refused: {text}"
    if case.wrong:
        raise Wrong(f"not refused, though {case.wrong} is wrong")
    out, lse, wide, caches = want
    got, got_lse = results if case.lse else (results, None)
    compare("out", got, out, case)
    if case.lse:
        compare("lse", got_lse, lse, case)
    if case.call == "decode":
        for name, x, y in zip(("k_cache", "v_cache"), t.positional[1:3], caches):
            compare(name, x, y, case, 0.5)
    if t.leaves and got.requires_grad:
        compare_gradients(case, t, (got, got_lse), (out, lse), wide)
    return "right"


SHARED = ("bias", "sinks")


def compare_gradients(case, t, got, want, wide) -> None:
    g = torch.Generator().manual_seed(case.seed + 1)
    factor = torch.randn(want[0].shape, generator=g, dtype=torch.float64)
    losses = []
    for out, lse in (got, want):
        loss = (out.double() * factor).sum()
        if case.lse:
            loss = loss + lse.double().masked_fill(lse == -math.inf, 0.0).sin().sum()
        losses.append(loss)
    mine = torch.autograd.grad(losses[0], list(t.leaves.values()), allow_unused=True)
    if not losses[1].requires_grad:  # no entries
        true = [torch.zeros_like(x) for x in wide.values()]
    else:
        true = torch.autograd.grad(losses[1], list(wide.values()), allow_unused=True)
    for name, a, b, leaf in zip(t.leaves, mine, true, wide.values()):
        b = torch.zeros_like(leaf) if b is None else b
        a = torch.zeros_like(leaf) if a is None else a
        # A gradient shared by many rows sums their rounding errors (core/tolerance.py).
        own = math.prod(b.shape[:-1] if b.dim() > 1 else b.shape)
        rows = want[1].numel() / max(1, own) if name in SHARED else 1.0
        compare(f"d{name}", a, b, case, 4.0 * max(1.0, rows) ** 0.5)


# ---- shrinking and reporting --------------------------------------------------------------------


def failure(case: Case) -> str | None:
    try:
        check(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def simpler(case: Case):
    """Cases with one field set to its simplest value, or closer to it."""
    for f in fields(case):
        x, least = getattr(case, f.name), getattr(SIMPLEST, f.name)
        if x == least:
            continue
        yield replace(case, **{f.name: least})
        if type(x) is int and f.name != "seed" and x > least:
            for smaller in {x // 2, x - 1} - {x, least}:
                yield replace(case, **{f.name: smaller})
    if case.documents:
        yield replace(case, q_len=case.q_len // 2, kv_len=case.q_len // 2)


def valid(case: Case) -> bool:
    """Whether build() makes a call of it that draw() could have drawn."""
    return (
        (case.call == "attention" or not case.documents)
        and (not case.documents or case.q_len == case.kv_len)
        and (case.call == "decode" or not (case.new or case.leftpad or case.rows or case.rotary))
        and (case.call != "decode" or not (case.kv_lens or case.grad))
        and not (case.page_size and (case.grad or case.rows or case.call == "attention"))
        and case.kv_len >= case.new
        and not (case.rotary and (case.dim < 2 or not case.new))
        and (case.call == "decode" or case.num_splits is None)
        and not (case.causal and case.window and (case.window[1] or 0) > 0)
    )


def shrink(case: Case, seconds: float = 30.0) -> Case:
    """The case with every irrelevant field set to its simplest value."""
    end, changed = time.monotonic() + seconds, True
    while changed and time.monotonic() < end:
        changed = False
        for other in simpler(case):
            if valid(other) and failure(other) is not None:
                case, changed = other, True
                break
    return case


def reproduction(case: Case) -> str:
    return (
        f"# {failure(case)}\n"
        'import sys\nsys.path.insert(0, "tests/support")\n'
        "from fuzz import Case, check\n"
        f"check(Case({case}))"
    )


def has(case: Case, option: str | None) -> bool:
    """Is the field `option` of the case other than in the simplest? None: any case will do."""
    return option is None or getattr(case, option) != getattr(SIMPLEST, option)


def fuzz(seed: int, seconds: float, most: int | None = None, option: str | None = None):
    """(the number of cases by outcome, reproduction or None), up to the first failure."""
    rng, counts, end = random.Random(seed), Counter(), time.monotonic() + seconds
    while time.monotonic() < end and (most is None or counts.total() < most):
        while not has(case := draw(rng), option):
            pass
        try:
            counts[check(case).partition(":")[0]] += 1
        except Exception:
            counts["wrong"] += 1
            return counts, reproduction(shrink(case))
    return counts, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options_of = [f.name for f in fields(Case)]
    parser.add_argument(
        "--option",
        choices=options_of,
        metavar="FIELD",
        help="only calls with this field of Case, such as ranges",
    )
    parser.add_argument("--keep-going", action="store_true", help="print every failure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed, end, failed = options.seed, time.monotonic() + 60 * options.minutes, False
    while (left := end - time.monotonic()) > 0:
        counts, found = fuzz(seed, left, option=options.option)
        print(f"seed {seed}: {', '.join(f'{n} {what}' for what, n in counts.items())}", flush=True)
        if found:
            print(found, flush=True)
            failed = True
            if not options.keep_going:
                break
        seed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

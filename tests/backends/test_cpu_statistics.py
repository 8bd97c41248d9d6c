"""Statistics on the CPU kernels against those of probabilities in float64: of the forward pass, of
the second pass, and the attention weights themselves."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, Case
from operator_calls import name_of
from statistics_calls import first_keys, true_statistics

from fastattn.backends import cpu, schema
from fastattn.core import probabilities
from fastattn.core.call import Call
from fastattn.core.spec import NO_OPERANDS, Operands, Spec

pytestmark = pytest.mark.native
TOPK = 3


def near(got, want, lse, what) -> None:
    """fp32 statistics have the roundings of lse, which grow with it."""
    exponent = max(1.0, float(lse[lse.isfinite()].abs().max())) if lse.isfinite().any() else 1.0
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(
        got.double(), want, rtol=100 * eps, atol=40 * eps * exponent, msg=lambda m: f"{what}: {m}"
    )


def check(case: Case, dtype, num_splits=0) -> None:
    problem = case.make(dtype)
    host, call = problem.to(torch.float64), Call(*problem, num_splits)
    paged = case.packed and case.page_size  # keys of several sequences have no order in common
    want = probabilities.first_pass(Call(*host), True, True)._asdict() if paged else None
    want = want or true_statistics(host)
    got = cpu.forward_statistics(call, True, True)
    plain = cpu.forward(call)
    assert torch.equal(got.out, plain.out) and torch.equal(got.lse, plain.lse)
    for name in ("lse", "max_logit", "entropy"):
        near(getattr(got, name), want[name], want["lse"], name)
    alone = cpu.forward_statistics(call, False, False)
    assert torch.equal(alone.max_logit, got.max_logit)
    assert alone.entropy.numel() == alone.argmax.numel() == 0
    dead = want["max_logit"] == -torch.inf
    assert torch.equal(got.argmax == -1, dead)
    if paged:
        return
    probs = want["probs"]
    if not probs.shape[-1]:
        return
    first = first_keys(host)
    there = probs.gather(3, (got.argmax + first).masked_fill(dead, 0)[..., None])[..., 0]
    assert (there.masked_fill(dead, 0) >= probs.amax(-1) * (1 - 1e-4)).all()

    made = cpu.maps(call, got.lse, True, TOPK, 0)
    near(made.col_mass, want["col_mass"], want["lse"], "col_mass")
    assert not made.col_mass[want["col_mass"] == 0].any()
    largest = torch.nn.functional.pad(probs, (0, TOPK)).topk(TOPK).values
    near(made.topk_probs, largest, want["lse"], "topk")
    none = made.topk_keys < 0
    assert not made.topk_probs[none].any()
    keys = (made.topk_keys + first[..., None]).masked_fill(none, 0)
    near(made.topk_probs, probs.gather(3, keys).masked_fill(none, 0), want["lse"], "topk keys")
    if case.packed:
        return
    n = min(4, *probs.shape[2:])
    pooled = cpu.maps(call, got.lse, False, 0, n).pooled if n else None
    if pooled is not None:
        near(pooled, pool(probs, n), want["lse"], "pooled")


def pool(probs, n):
    """The definition, by loops: bin of row i is i n // rows."""
    rows, keys = probs.shape[2:]
    maps = probs.new_zeros(*probs.shape[:2], n, n)
    for i in range(rows):
        for j in range(keys):
            maps[:, :, i * n // rows, j * n // keys] += probs[:, :, i, j]
    counts = torch.tensor([sum(i * n // rows == b for i in range(rows)) for b in range(n)])
    return maps / counts[:, None]


SMALL = [case for case in CASES if case.q_len * case.kv_len <= 10000 or case.packed]


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_single_precision(case):
    check(case, torch.float32)


@pytest.mark.parametrize("case", [c for c in SMALL if c.name.startswith("alone/")], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(case, dtype):
    check(case, dtype)


SPLIT = ("gqa/8_decode", "alone/sinks", "edge/kv_lens_zero+sinks", "pair/dropout+paged")


@pytest.mark.parametrize("num_splits", [2, 7])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in SPLIT], ids=name_of)
def test_splits_of_the_keys(case, num_splits):
    check(case, torch.float32, num_splits)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "case",
    [c for c in SMALL if not (c.packed or c.page_size) and c.name.startswith(("alone/", "pair/"))],
    ids=name_of,
)
def test_weights(case, average):
    problem = case.make(torch.float32)
    wide = Call(*problem.to(torch.float64))
    call, lse = Call(*problem), cpu.forward(Call(*problem)).lse
    truth = probabilities.first_pass(wide, False, False).lse
    for rows in (None, torch.tensor([case.q_len - 1, 0, 7, 0]) if case.q_len > 7 else None):
        got = schema.weights(lse, *schema.arguments(call), rows, average)
        want = probabilities.weights(wide, truth, rows, average)
        assert got.shape == want.shape
        near(got, want, truth, "weights")


# ---- any number of threads, the same bits --------------------------------------------------------


def test_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 3, 700, 32).unbind(0)
    call = Call(q, k, v, Spec(0.2, right=0), NO_OPERANDS)

    def all_of_it():
        first = cpu.forward_statistics(call, True, True)
        made = cpu.maps(call, first.lse, True, 5, 9)
        arguments = schema.arguments(call)
        return (*first, *made, schema.weights(first.lse, *arguments, None, True))

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(all_of_it())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


# ---- ties, NaN, infinities, large scores ---------------------------------------------------------


def call_of(scores, **operands) -> Call:
    """A call of one head whose scores are these [rows, keys]."""
    rows, keys = scores.shape
    q, k = torch.zeros(1, 1, rows, 4), torch.zeros(1, 1, keys, 4)
    return Call(q, k, k, Spec(1.0), Operands(bias=scores[None, None], **operands))


def first_and_maps(call, topk=0):
    first = cpu.forward_statistics(call, True, True)
    return first, cpu.maps(call, first.lse, True, topk, 0)


def test_of_equal_scores_the_first_key_counts():
    scores = torch.zeros(20, 200)
    scores[3, [150, 7, 99]] = 2.0
    scores[4, 120:] = 1.0
    first, made = first_and_maps(call_of(scores), topk=4)
    assert first.argmax[0, 0, :5].tolist() == [0, 0, 0, 7, 120]
    assert made.topk_keys[0, 0, 2].tolist() == [0, 1, 2, 3]
    assert made.topk_keys[0, 0, 3].tolist() == [7, 99, 150, 0]
    assert made.topk_keys[0, 0, 4].tolist() == [120, 121, 122, 123]
    torch.testing.assert_close(first.entropy[0, 0, 0], torch.tensor(math.log(200)))


def test_nan_and_infinity_stay_in_their_rows():
    scores = torch.randn(30, 150)
    scores[2, 140], scores[5, 3], scores[9] = torch.nan, torch.inf, -torch.inf
    mask = torch.ones(1, 1, 30, 150, dtype=torch.bool)
    mask[0, 0, 2, :50] = False
    call = call_of(scores, mask=mask)
    first, made = first_and_maps(call, topk=2)
    want = probabilities.first_pass(call, True, True)
    for name in ("max_logit", "entropy", "argmax"):
        torch.testing.assert_close(getattr(first, name), getattr(want, name), equal_nan=True)
    assert first.max_logit[0, 0, 2].isnan() and first.argmax[0, 0, 2] == -1
    assert first.max_logit[0, 0, 5] == torch.inf and first.argmax[0, 0, 5] == 3
    dead = (first.max_logit[0, 0, 9], first.entropy[0, 0, 9], first.argmax[0, 0, 9])
    assert [float(x) for x in dead] == [-torch.inf, 0.0, -1.0]
    assert made.topk_probs[0, 0, 2].isnan().all() and (made.topk_keys[0, 0, 2] == -1).all()
    assert not made.topk_probs[0, 0, 9].any() and (made.topk_keys[0, 0, 9] == -1).all()
    # what a row does not see stays as it was, also where the row is NaN
    assert made.col_mass[0, 0, :50].isfinite().all() or scores[5].isinf().any()
    weights = schema.weights(first.lse, *schema.arguments(call), None, False)[0, 0]
    assert (weights[2, :50] == 0).all() and weights[2, 50:].isnan().all() and not weights[9].any()


@pytest.mark.parametrize("sinks", [None, torch.tensor([2.0**20 + 1.0])])
def test_large_scores_have_probabilities_without_the_rounding_of_lse(sinks):
    """exp(score - lse) would have it, and it is 2^-4 here. Scores have their own rounding, so the
    statistics are compared with those of the weights that they have."""
    scores = torch.randn(40, 300).round() + 2.0**20
    call = call_of(scores, sinks=sinks)
    first, made = first_and_maps(call, topk=2)
    weights = schema.weights(first.lse, *schema.arguments(call), None, False).double()
    rest = 1 - weights.sum(-1)
    torch.testing.assert_close(rest.abs().max() < 1e-5, torch.tensor(sinks is None))
    assert (rest > -1e-5).all()
    rest = rest.clamp(min=1e-30)
    entropy = -(weights * weights.log()).sum(-1) - rest * rest.log() * (sinks is not None)
    torch.testing.assert_close(first.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.col_mass.double(), weights.sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.topk_probs.double(), weights.topk(2).values)


def test_lse_of_more_keys_gives_their_share():
    """After merge_states(), lse counts keys of other calls too."""
    q, k = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 200, 8)
    for scale in (0.3, 3e5):  # the second where lse is large
        call = Call(q, k, k, Spec(scale), NO_OPERANDS)
        part = call.but(k=k[:, :, :90], v=k[:, :, :90])
        lse = cpu.forward(call).lse
        whole, some = cpu.maps(call, lse, True, 0, 0), cpu.maps(part, lse, True, 0, 0)
        near = {"rtol": 1e-4, "atol": 1e-4} if scale < 1 else {"rtol": 0.0, "atol": 0.6}
        torch.testing.assert_close(some.col_mass, whole.col_mass[..., :90], **near)


# ---- what the operators refuse -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"pooled": 7}, r"pooled must be in \[0, 6\]"),
        ({"topk": -1}, "topk must be in"),
        ({"lse": torch.zeros(1, 1, 6)}, r"lse has shape \[1, 1, 6\], expected \[1, 2, 6\]"),
    ],
)
def test_the_second_pass_refuses(change, sentence):
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4)
    given = {"lse": torch.zeros(1, 2, 6), "col": True, "topk": 0, "pooled": 0} | change
    lse, *asked = given.values()
    arguments = schema.arguments(Call(q, k, k, Spec(1.0), NO_OPERANDS))
    with pytest.raises(RuntimeError, match=sentence):
        schema.MAPS[""](lse, *arguments, *asked)


def test_weights_refuse_rows_that_are_not_there():
    q = torch.randn(1, 2, 6, 4)
    arguments = schema.arguments(Call(q, q, q, Spec(1.0), NO_OPERANDS))
    with pytest.raises(RuntimeError, match=r"rows\[1\] is 6, outside \[0, 6\)"):
        schema.weights(torch.zeros(1, 2, 6), *arguments, torch.tensor([0, 6]), False)


# ---- what torch asks of operators ----------------------------------------------------------------

CHECKED = {
    "plain": {},
    "sinks and bias": {"sinks": torch.randn(4), "bias": torch.randn(1, 4, 6, 9)},
    "lengths": {"kv_lens": torch.tensor([9, 4], dtype=torch.int32)},
}


@pytest.mark.parametrize("end", ["", "_triton"])
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name, end):
    q, k = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(2, 2, 9, 5, requires_grad=True)
    call = Call(q, k, k.detach(), Spec(0.4, right=0), Operands(**CHECKED[name]))
    arguments, lse = schema.arguments(call), cpu.forward(call).lse.detach()
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    for operator, args in (
        (schema.FORWARD_STATISTICS[end], (*arguments, 0, True, True)),
        (schema.FORWARD_STATISTICS[end], (*arguments, 0, False, False)),
        (schema.MAPS[end], (lse, *arguments, True, 2, 3)),
        (schema.weights, (lse, *arguments, torch.tensor([0, 5, 5]), True)),
    ):
        if end == "" or operator is not schema.weights:
            torch.library.opcheck(operator, args, test_utils=tests)


def test_vmap_of_the_operators():
    q, k = torch.randn(3, 1, 2, 6, 4), torch.randn(3, 1, 2, 9, 4)

    def function(q, k):
        arguments = schema.arguments(Call(q, k, k, Spec(0.5), NO_OPERANDS))
        first = schema.FORWARD_STATISTICS[""](*arguments, 0, True, False)
        return first[2], first[3], schema.MAPS[""](first[1], *arguments, True, 0, 2)[0]

    got = torch.func.vmap(function)(q, k)
    for n in range(3):
        for x, y in zip(got, function(q[n], k[n])):
            torch.testing.assert_close(x[n], y)

"""Statistics on the Triton kernels against those of probabilities in float64: of the forward pass,
the gradient of the entropy, and the second pass."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, select
from operator_calls import cotangents_of, name_of, numbers
from pairwise import CROWDED, KINDS, crossed
from statistics_calls import entropy_of, first_keys, probabilities, true_statistics
from triton_calls import DEVICE, row

import fastattn
from fastattn.core.reference import reference
from fastattn.core.spec import LEAVES, Operands, Spec
from fastattn.core.tolerance import Tolerance

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
ON_GPU = DEVICE == "cuda"  # where nothing is left out
NAMES = ("out", "lse", "max_logit", "entropy", "argmax")


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def run(problem, num_splits=0, needs=(True, True), config=None):
    from fastattn.kernels import launch

    q, k, v, spec, x = problem
    arguments = (q, k, v, *x.tensors(), *numbers(spec), num_splits, *needs)
    return dict(zip(NAMES, launch.forward_stats(*arguments, config=config)))


def run_maps(problem, lse, need_col_mass=True, topk=0, pooled=0, config=None):
    from fastattn.kernels import launch_maps

    q, k, _, spec, x = problem
    arguments = (lse, q, k, k, *x.tensors(), *numbers(spec), need_col_mass, topk, pooled)
    return launch_maps.maps(*arguments, config=config)


def near(got, want, lse, what) -> None:
    """Statistics are computed in fp32 also for halves; they have the roundings of lse."""
    exponent = max(1.0, float(lse[lse.isfinite()].abs().max())) if lse.isfinite().any() else 1.0
    torch.testing.assert_close(
        got.cpu().double(), want, rtol=1e-5, atol=4e-6 * exponent, msg=lambda m: f"{what}: {m}"
    )


def check(case: Case, dtype=torch.float32, num_splits=0, config=None) -> None:
    """The statistics of the forward pass and, where keys have an order, their column mass."""
    problem = case.make(dtype, device=DEVICE)
    got = run(problem, num_splits, config=config)
    host = case.make(dtype).to(torch.float64)
    want = true_statistics(host)
    for name in ("lse", "max_logit", "entropy"):
        near(got[name], want[name], want["lse"], name)
    dead = want["max_logit"] == -torch.inf
    argmax = got["argmax"].cpu()
    assert argmax.dtype == torch.int64 and torch.equal(argmax == -1, dead)
    keys = (argmax + first_keys(host)).masked_fill(dead, 0)[..., None]
    if want["probs"].shape[-1]:
        there = want["probs"].gather(3, keys)[..., 0].masked_fill(dead, 0.0)
        largest = want["probs"].amax(-1)
        assert (there >= largest * (1 - 1e-4)).all()
    if not (case.packed and case.page_size):
        mass = run_maps(problem, got["lse"], config=config).col_mass
        near(mass, want["col_mass"], want["lse"], "col_mass")
        assert not mass.cpu()[want["col_mass"] == 0].any()


# ---- every case ---------------------------------------------------------------------------------

ONE_BY_ONE = select("alone", "mask", "bias", "layout", "ranges")
LIST = [*CROWDED[::2], *KINDS[1::3], *(ONE_BY_ONE if ON_GPU else ())]


@pytest.mark.parametrize("case", LIST, ids=name_of)
def test_single_precision(case):
    check(case)


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [c for c in (*CROWDED, *KINDS, *CASES) if c not in LIST], ids=name_of
)
def test_the_rest_of_the_list(case):
    check(case)


NAMED = {"dim/512", "size/17x130", "edge/no_keys+sinks", "edge/first_rows_dead+sinks",
         "gqa/3_few_rows"}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMED], ids=name_of)
def test_shapes_and_edges(case):
    check(case)


HALF = [c for c in CASES if c.name in {"alone/causal", "alone/sinks", "alone/softcap"}]


@pytest.mark.parametrize(
    "case, dtype", crossed(HALF, [torch.float16, torch.bfloat16], ON_GPU), ids=name_of
)
def test_halves(case, dtype):
    check(case, dtype)


SPLIT = [c for c in CASES if c.name in {
    "gqa/2_decode", "alone/sinks", "edge/kv_lens_zero+sinks", "pair/dropout+paged",
}]  # fmt: skip


@pytest.mark.parametrize("case, num_splits", crossed(SPLIT, [2, 7], ON_GPU), ids=name_of)
def test_parts_of_the_keys(case, num_splits):
    check(case, num_splits=num_splits)


# ---- what the cases do not say ------------------------------------------------------------------

SMALL = Case("", q_len=20, kv_len=40, bias="heads", sinks=True, softcap=1.5, dropout=0.3)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)], ids=str)
def test_what_is_not_needed_is_empty_and_changes_nothing(needs):
    from fastattn.kernels import launch

    problem = SMALL.make(torch.float32, device=DEVICE)
    got, all_of_them = run(problem, needs=needs), run(problem)
    for name, need in zip(NAMES, (True, True, True, *needs)):
        if need:
            assert torch.equal(got[name], all_of_them[name]), name
        else:
            assert got[name].shape == (0,) and got[name].dtype == all_of_them[name].dtype
    q, k, v, spec, x = problem
    plain = launch.forward(q, k, v, *x.tensors(), *numbers(spec), 0)
    assert torch.equal(plain[0], got["out"]) and torch.equal(plain[1], got["lse"])


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("left", [-1, 5])
def test_of_equal_scores_the_first_key_wins(num_splits, left):
    q, k = (torch.zeros(1, 1, n, 16, device=DEVICE) for n in (100, 100))
    spec = Spec(1.0, left=left, right=0)
    got = launch_stats(q, k, spec, num_splits, row(16, 16))
    first = (torch.arange(100) - left).clamp(min=0) if left >= 0 else torch.zeros(100).long()
    assert torch.equal(got["argmax"].cpu()[0, 0], first)
    assert not got["max_logit"].any()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_nan_among_the_scores_shows(num_splits):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 40, 16, device=DEVICE) for _ in range(2))
    k[:, :, 7] = torch.nan
    got = launch_stats(q, k, Spec(1.0, right=0), num_splits, row(16, 16))
    saw = torch.arange(40) >= 7
    for name in ("lse", "max_logit", "entropy"):
        assert torch.equal(got[name].cpu()[0, 0].isnan(), saw), name
    assert torch.equal(got["argmax"].cpu()[0, 0] == -1, saw)


def launch_stats(q, k, spec, num_splits, config):
    from fastattn.kernels import launch

    arguments = (*Operands().tensors(), *numbers(spec), num_splits, True, True)
    return dict(zip(NAMES, launch.forward_stats(q, k, k, *arguments, config=config)))


@pytest.mark.parametrize("asked", [(True, 2, 3), (False, 0, 0)], ids=str)
def test_operators(asked):
    q = torch.randn(1, 2, 9, 8, device=DEVICE)
    arguments = (q, q, q, *Operands().tensors(), *numbers(Spec(0.3)))
    checks = ("test_schema", "test_faketensor")
    statistics = torch.ops.fastattn.flash_attn_fwd_stats_triton.default
    torch.library.opcheck(statistics, (*arguments, 0, *map(bool, asked[1:])), test_utils=checks)
    maps = torch.ops.fastattn.flash_attn_maps_triton.default
    lse = statistics(*arguments, 0, False, False)[1]
    torch.library.opcheck(maps, (lse, *arguments, *asked), test_utils=checks)


def test_entropy_of_peaked_and_of_far_scores():
    """No cancellation: one key that has almost all of P, and scores far from zero."""
    q = torch.tensor([1.0, 20.0, 300.0], device=DEVICE).view(1, 1, 3, 1)
    k = torch.linspace(0, 1, 50, device=DEVICE).view(1, 1, 50, 1) + 100
    got = launch_stats(q, k, Spec(1.0), 1, row(16, 16))
    scores = (q.double() * k.double().mT).cpu()
    probs = scores.softmax(-1)
    want = -(probs * scores.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(got["entropy"].cpu().double(), want, rtol=2e-3, atol=1e-6)
    near(got["max_logit"], scores.amax(-1), scores, "max_logit")


# ---- the second pass ----------------------------------------------------------------------------

MAPPED = [c for c in CASES if c.name in {
    "pair/sinks+dropout", "alone/kv_lens", "alone/paged",
}]  # fmt: skip


@pytest.mark.parametrize("case", MAPPED, ids=name_of)
def test_largest_probabilities_and_pooled_maps(case):
    problem = case.make(torch.float32, device=DEVICE)
    host = case.make(torch.float32).to(torch.float64)
    want = true_statistics(host)
    lse = want["lse"].to(DEVICE, torch.float32)
    got = run_maps(problem, lse, True, topk=5, pooled=7)
    largest = want["probs"].sort(-1, descending=True).values[..., :5]
    near(got.topk_probs, largest, want["lse"], "topk_probs")
    there = want["probs"].gather(3, got.topk_keys.cpu().clamp(min=0))
    near(torch.where(got.topk_keys.cpu() < 0, 0.0, there), largest, want["lse"], "topk_keys")
    rows, keys = want["probs"].shape[2:]
    down, across = (torch.arange(n) * 7 // n == torch.arange(7)[:, None] for n in (rows, keys))
    down = down.double() / down.sum(1, keepdim=True)
    near(got.pooled, down @ want["probs"] @ across.double().mT, want["lse"], "pooled")
    near(got.col_mass, want["col_mass"], want["lse"], "col_mass")


def test_lse_of_more_keys_than_these():
    """After merge_states(), P is the probabilities over the keys of all merged calls."""
    problem = SMALL.make(torch.float32, device=DEVICE)
    want = true_statistics(SMALL.make(torch.float32).to(torch.float64))
    lse = want["lse"].to(DEVICE, torch.float32)
    part, whole = (run_maps(problem, x, True, 3, 4) for x in (lse + 0.75, lse))
    for name in ("col_mass", "topk_probs", "pooled"):
        want = getattr(whole, name) * 0.4723665527  # exp(-0.75)
        torch.testing.assert_close(getattr(part, name), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(part.topk_keys, whole.topk_keys)


def test_the_public_call_and_its_gradients():
    """The doors reach these kernels: values and gradients are those of the reference backend."""
    q, k, v = SMALL.make(torch.float32, device=DEVICE)[:3]
    names = ("max_logit", "entropy", "argmax", "col_mass", "topk:3", "pooled:4")

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, found = fastattn.attention(
            *leaves, causal=True, backend=backend, return_stats=names, softcap=2.0
        )
        loss = out.square().sum() + found["entropy"].square().sum() + found["col_mass"].cos().sum()
        grads = torch.autograd.grad(loss, leaves)
        return (
            out,
            *(found[name] for name in names[:4]),
            *found["topk:3"],
            found["pooled:4"],
            *grads,
        )

    for got, want in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_column_mass_of_packed_pages_is_refused():
    case = next(c for c in CASES if c.name == "pair/packed+paged")
    problem = case.make(torch.float32, device=DEVICE)
    with pytest.raises(NotImplementedError, match="packed sequences came with page_table"):
        run_maps(problem, problem.q.new_zeros(problem.q.shape[:3]))


# ---- the gradient of the entropy ----------------------------------------------------------------


def true_gradients(problem, dout, dlse, dentropy):
    """Gradients of <dout, out> + <dlse, lse> + <dentropy, entropy> in the problem's dtype."""
    leaves = dict(zip(("q", "k", "v", *LEAVES), (*problem[:3], *problem.operands.leaves())))
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items() if x is not None}
    operands = replace(problem.operands, **{n: leaves[n] for n in LEAVES if n in leaves})
    moved = problem._replace(q=leaves["q"], k=leaves["k"], v=leaves["v"], operands=operands)
    out, lse = reference(*moved)
    probs, undropped_lse = probabilities(moved)
    entropy = entropy_of(moved, probs, undropped_lse)
    outputs, cotangents = (out, lse, entropy), (dout, dlse, dentropy)
    cotangents = [c.to(y.dtype) for c, y in zip(cotangents, outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return dict(zip((f"d{name}" for name in leaves), grads)), entropy.detach(), lse.detach()


def check_gradient(case: Case, dtype=torch.float32) -> None:
    from fastattn.kernels import launch

    host, problem = case.make(dtype), case.make(dtype, device=DEVICE)
    dout, dlse = cotangents_of(case, host, True)
    draw = torch.Generator().manual_seed(3)
    dentropy = torch.randn(dlse.shape, generator=draw).to(dlse)
    want, entropy, true_lse = true_gradients(host.to(torch.float64), dout, dlse, dentropy)
    wide = host.to(torch.promote_types(dtype, torch.float32))
    plain, _, _ = true_gradients(wide, dout, dlse, dentropy)
    plain = {name: x.to(dtype) if name in ("dq", "dk", "dv") else x for name, x in plain.items()}

    q, k, v, spec, x = problem
    arguments = (q, k, v, *x.tensors(), *numbers(spec))
    out, lse = launch.forward(*arguments, 0)
    into_lse = (dlse - dentropy * entropy).to(dlse.dtype)
    needs = (x.bias is not None, x.sinks is not None)
    to = [y.to(DEVICE) for y in (dout, into_lse, dentropy)]
    grads = launch.backward(*to[:2], out, lse, *arguments, *needs, to[2])
    tolerance = Tolerance(
        *host[:3], spec.scale, true_lse, dout, into_lse.abs() + dentropy.abs(), probs_rounded=True
    )
    for name, got in zip(("dq", "dk", "dv", "dbias", "dsinks"), grads):
        if name in want:
            comparison = tolerance.compare(name, got.cpu(), want[name], plain[name])
            assert comparison.passed, f"{name}: {comparison}"


TRAINED = [c for c in (*CROWDED, *KINDS, *CASES) if c.has_backward and c.entries]
GRADIENT = [c for c in TRAINED if c.name in {
    "bias/minus_inf", "pair/sinks+packed", "pair/mask+key_ranges",
}]  # fmt: skip


@pytest.mark.parametrize("case", GRADIENT, ids=name_of)
def test_gradient_of_the_entropy(case):
    check_gradient(case)


@pytest.mark.long
@pytest.mark.parametrize("case", [c for c in TRAINED if c not in GRADIENT], ids=name_of)
def test_gradient_of_the_entropy_of_the_rest(case):
    check_gradient(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_gradient_of_the_entropy_in_halves(dtype):
    check_gradient(SMALL, dtype)

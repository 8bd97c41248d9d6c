"""The Triton backend against float64: every option, alone and in pairs, forward and backward.

Without a GPU the kernels are interpreted (with products in fp32, kernels/tile.py), which takes a
second or more per case. So each case combines several options, and together they cover every
option, pair and kind (tests/support/pairwise.py). `pytest --long` runs the whole list one by one.
"""

from __future__ import annotations

import importlib.util
from itertools import combinations

import pytest
import torch
from case_tensors import BIASES, LAYOUTS, MASKS
from cases import CASES, OPTIONS, select
from operator_calls import cotangents_of, name_of, numbers
from pairwise import KINDS, PAIRWISE, crossed, thinned
from triton_calls import DEVICE, check, row, run_triton

import fastattn
from fastattn.core.spec import Operands, Spec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


# ---- every case ---------------------------------------------------------------------------------

ON_GPU = DEVICE == "cuda"  # where nothing is left out
ONE_BY_ONE = select("alone", "mask", "bias", "layout")
LIST = [*PAIRWISE, *KINDS, *select("gqa")]
MANY = [*select("edge", "everything"), *(ONE_BY_ONE if ON_GPU else ())]


@pytest.mark.parametrize("case", [*LIST, *thinned(MANY, all_of_them=ON_GPU)], ids=name_of)
def test_single_precision(case):
    check(case, torch.float32)


@pytest.mark.long
@pytest.mark.parametrize("case", [c for c in CASES if c not in LIST and c not in MANY], ids=name_of)
def test_the_rest_of_the_list(case):
    check(case, torch.float32)


@pytest.mark.parametrize("case", thinned([c for c in CASES if c.name in {
    "dim/1", "dim/20", "dim/80", "dim/256", "dim/512", "dim/192,128", "dim/80,33", "dim/512,1",
    "size/17x130", "size/65", "size/257x65_causal", "long/rows", "long/packed+bias_heads",
}], all_of_them=ON_GPU), ids=name_of)  # fmt: skip
def test_shapes(case):
    check(case, torch.float32)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    "case, dtype", thinned(select("alone"), HALVES, all_of_them=ON_GPU), ids=name_of
)
def test_halves(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [c for c in CASES if c.name == "bias/fp32"], ids=name_of)
def test_a_bias_wider_than_the_queries(case, dtype):
    check(case, dtype)


SPLIT = [c for c in CASES if c.name in {
    "gqa/8_decode", "alone/sinks", "alone/v_dim", "long/keys+alibi", "long/keys+few_rows",
    "pair/dropout+paged", "everything/paged", "edge/kv_lens_zero+sinks", "dim/512,1",
}]  # fmt: skip


@pytest.mark.parametrize("case, num_splits", crossed(SPLIT, [2, 7], ON_GPU), ids=name_of)
def test_parts_of_the_keys(case, num_splits):
    check(case, torch.float32, num_splits)


TILED = [c for c in CASES if c.name in {
    "alone/window", "alone/documents", "alone/packed", "alone/dropout", "mask/blocks", "bias/t5",
}]  # fmt: skip
TILES = [(16, 16), (64, 32), (16, 128)]


@pytest.mark.parametrize("case, tile", crossed(TILED, TILES, ON_GPU), ids=name_of)
def test_tiles_of_other_sizes(case, tile):
    check(case, torch.float32, config=row(*tile))


def test_pairwise_covers_every_pair():
    named = {c.name.removeprefix("pair/") for c in select("pair")}
    covered = {
        "+".join(pair)
        for c in PAIRWISE
        for pair in combinations(c.name.removeprefix("pairwise/").split("+"), 2)
    }
    assert named == covered & named and len(named) > 150
    alone = {name for c in PAIRWISE for name in c.name.removeprefix("pairwise/").split("+")}
    assert alone == set(OPTIONS) - {"plain"}


def test_kinds_are_all_there():
    """Each mask, bias and layout; no bias only with a mask that hides everything."""
    assert {c.mask for c in KINDS} == set(MASKS) and {c.layout for c in KINDS} == set(LAYOUTS)
    assert {c.bias for c in KINDS if c.mask != "nothing"} == set(BIASES)


# ---- what the cases do not say ------------------------------------------------------------------


def test_dropout_keeps_what_the_reference_keeps():
    from fastattn.core.philox import keep_mask

    q = torch.zeros(2, 3, 70, 16)
    v = torch.eye(90, 90).expand(2, 3, 90, 90)
    k = torch.zeros(2, 3, 90, 16)
    out = fastattn.attention(
        *(x.to(DEVICE) for x in (q, k, v)), dropout_p=0.4, dropout_seed=(2**63 - 7, -3),
        backend="triton",
    )  # fmt: skip
    kept = keep_mask((2**63 - 7, -3), 6, 70, 90, 0.4).view(2, 3, 70, 90)
    assert torch.equal(out.cpu() != 0, kept)


def test_nan_of_another_document_or_past_the_lengths_reaches_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 60, 16, device=DEVICE)
    bad = x.clone()
    bad[:, :, 20:31] = torch.nan
    ids = torch.tensor([[0] * 20 + [1] * 11 + [2] * 29], dtype=torch.int32, device=DEVICE)
    grads = []
    for tensor in (x, bad):
        leaf = tensor.clone().requires_grad_()
        out = fastattn.attention(leaf, leaf, leaf, document_ids=ids, causal=True, backend="triton")
        out.sum().backward()
        grads += [(out.detach(), leaf.grad)]
    outside = [*range(20), *range(31, 60)]
    for clean, dirty in zip(*grads):
        assert torch.equal(clean[:, :, outside], dirty[:, :, outside])
    assert grads[1][0][:, :, 20:31].isnan().all()


def test_the_same_bits_every_time():
    case = next(c for c in CASES if c.name == "pair/bias+dropout")
    problem = case.make(torch.float32, device=DEVICE)
    first, second = (
        run_triton(problem, cotangents_of(case, case.make(torch.float32), True)) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lengths_out_of_range_read_nothing_outside():
    """Values on a GPU are not checked: the kernel clamps lengths to the valid range."""
    q, k = torch.randn(2, 1, 5, 16, device=DEVICE), torch.randn(2, 1, 40, 16, device=DEVICE)
    lens = torch.tensor([-3, 1000], dtype=torch.int32, device=DEVICE)
    right = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    spec = numbers(Spec(0.25))
    from fastattn.kernels import launch

    out, lse = launch.forward(q, k, k, *Operands(kv_lens=lens).tensors(), *spec, 0)
    want, want_lse = launch.forward(q, k, k, *Operands(kv_lens=right).tensors(), *spec, 0)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_operators():
    q = torch.randn(1, 2, 9, 8, device=DEVICE, requires_grad=True)
    operator = torch.ops.fastattn.flash_attn_fwd_triton.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operator, (q, q, q, *(None,) * 13, *numbers(Spec(0.3)), 0), test_utils=checks
    )
    out, lse = (x.detach() for x in operator(q, q, q, *(None,) * 13, *numbers(Spec(0.3)), 0))
    arguments = (torch.ones_like(out), None, out, lse, *(q.detach(),) * 3, *(None,) * 13)
    torch.library.opcheck(
        torch.ops.fastattn.flash_attn_bwd_triton.default,
        (*arguments, *numbers(Spec(0.3)), False, False),
        test_utils=checks,
    )


def test_derivatives_of_every_kind():
    q, k, v = (torch.randn(1, 2, 6, 4, device=DEVICE, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend="triton")

    def expected(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend="reference")

    for transform in (
        lambda f: torch.func.vmap(f)(*(x.unsqueeze(0).repeat(3, 1, 1, 1, 1) for x in (q, k, v))),
        lambda f: torch.func.jvp(f, (q, k, v), (k, v, q))[1],
        lambda f: torch.autograd.grad(
            torch.autograd.grad(f(q, k, v).square().sum(), q, create_graph=True)[0].sum(), k
        )[0],
    ):
        torch.testing.assert_close(transform(function), transform(expected), rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break():
    def loss(q, k):
        return fastattn.attention(q, k, k, window=(5, 0), backend="triton").square().sum()

    q, k = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k), (q, k))
    want = torch.autograd.grad(loss(q, k), (q, k))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, dim, sentence",
    [
        (torch.float64, 16, "q is torch.float64; the kernels take float32, bfloat16 and float16"),
        (torch.float32, 1025, r"1025 \(q, k\) and 1025 \(v\); the kernels go to 1024"),
    ],
)
def test_refused(dtype, dim, sentence):
    x = torch.zeros(1, 1, 2, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"backend='triton' cannot run.*{sentence}"):
        fastattn.attention(x, x, x, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="tensors of a GPU machine's CPU are another case")
def test_on_a_cpu_it_is_never_chosen_unasked(monkeypatch):
    x = torch.zeros(1, 1, 2, 16)
    assert fastattn.explain(x, x, x).backend in ("cpu", "reference")
    assert fastattn.explain(x, x, x, backend="triton").backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = fastattn.explain(x, x, x).reasons["triton"]
    assert reason.startswith("q is on cpu and this backend runs on GPUs")

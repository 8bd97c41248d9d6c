"""Forward mode on the Triton kernels against torch's forward AD of the reference in float64."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, select
from jvp_calls import PRIMALS, RESULTS, compare, tangents_of
from operator_calls import name_of, numbers
from pairwise import CROWDED, KINDS, crossed
from triton_calls import DEVICE, row

from fastattn.core.spec import Spec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
ON_GPU = DEVICE == "cuda"  # where nothing is left out


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def run(problem, tangents, config=None):
    from fastattn.kernels import launch_jvp

    q, k, v, spec, operands = problem
    tangents = {name: x.to(DEVICE) for name, x in tangents.items()}
    results = launch_jvp.jvp(
        q, k, v, *operands.tensors(), *numbers(spec), *map(tangents.get, PRIMALS), config=config
    )
    return dict(zip(RESULTS, results))


def check(case: Case, dtype=torch.float32, without=(), config=None) -> None:
    tangents = tangents_of(case.make(dtype), without)
    problem = case.make(dtype, device=DEVICE)
    got = run(problem, tangents, config)
    compare(case.make(dtype), tangents, got, probs_rounded=True)
    for name, primal in (("tout", "out"), ("tlse", "lse")):
        assert got[name].dtype == got[primal].dtype and got[name].stride() == got[primal].stride()


# ---- every case ---------------------------------------------------------------------------------

ONE_BY_ONE = select("alone", "mask", "bias", "layout", "ranges")
LIST = [*CROWDED, *KINDS[::3], *(ONE_BY_ONE if ON_GPU else ())]


@pytest.mark.parametrize("case", LIST, ids=name_of)
def test_single_precision(case):
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("case", [c for c in (*KINDS, *CASES) if c not in LIST], ids=name_of)
def test_the_rest_of_the_list(case):
    check(case)


NAMED = {"dim/1", "dim/512", "dim/1,512", "size/17x130", "edge/no_keys+sinks",
         "edge/first_rows_dead+sinks"}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMED], ids=name_of)
def test_shapes_and_edges(case):
    check(case)


HALVES = [torch.float16, torch.bfloat16]


HALF = select("alone") if ON_GPU else [c for c in CASES if c.name in {
    "alone/causal", "alone/softcap", "alone/bias", "alone/dropout", "alone/v_dim",
}]  # fmt: skip


@pytest.mark.parametrize("case, dtype", crossed(HALF, HALVES, ON_GPU), ids=name_of)
def test_halves(case, dtype):
    check(case, dtype)


SMALL = Case("", q_len=20, kv_len=40, bias="heads", sinks=True, softcap=1.5, dropout=0.3)


@pytest.mark.parametrize("given", PRIMALS)
def test_one_tangent_alone(given):
    check(SMALL, without=set(PRIMALS) - {given})


@pytest.mark.parametrize("absent", PRIMALS)
def test_one_tangent_absent(absent):
    check(SMALL, without={absent})


def test_no_tangent_gives_zero():
    problem = SMALL.make(torch.float32, device=DEVICE)
    got = run(problem, {})
    assert not got["tout"].any() and not got["tlse"].any()


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (16, 128)], ids=str)
def test_tiles_of_other_sizes(tile):
    check(replace(SMALL, q_len=70, kv_len=90, window=(30, 5), batch=1), config=row(*tile))


# ---- what the cases do not say ------------------------------------------------------------------


def test_tangents_of_any_strides():
    problem = SMALL.make(torch.float32, device=DEVICE)
    tangents = tangents_of(SMALL.make(torch.float32))
    want = run(problem, tangents)
    strided = {
        name: x.mT.contiguous().mT if x.dim() == 4 else x.repeat_interleave(2)[::2]
        for name, x in tangents.items()
    }
    got = run(problem, strided)
    assert all(torch.equal(got[name], want[name]) for name in RESULTS)


def test_results_are_those_of_the_forward():
    from fastattn.kernels import launch

    problem = SMALL.make(torch.float32, device=DEVICE)
    got = run(problem, tangents_of(SMALL.make(torch.float32)), row(32, 32))
    q, k, v, spec, operands = problem
    arguments = (q, k, v, *operands.tensors(), *numbers(spec), 0)
    out, lse = launch.forward(*arguments, config=row(32, 32))
    torch.testing.assert_close(got["out"], out)
    torch.testing.assert_close(got["lse"], lse)


def test_operator():
    q, k = (torch.randn(2, 2, n, 16, device=DEVICE).transpose(1, 2) for n in (2, 2))
    arguments = (q, k, k, *(None,) * 13, *numbers(Spec(0.3)), k, None, q, None, None)
    operator = torch.ops.fastattn.flash_attn_jvp_triton.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "tangents, sentence",
    [
        ({"q": (1, 2, 3, 8)}, r"tq has shape \[1, 2, 3, 8\] and q \[1, 2, 4, 8\]"),
        ({"bias": (1, 1, 1, 1)}, r"tbias has shape \[1, 1, 1, 1\] and bias None"),
    ],
)
def test_refused(tangents, sentence):
    from fastattn.kernels import launch_jvp

    x = torch.zeros(1, 2, 4, 8, device=DEVICE)
    given = {name: torch.zeros(shape, device=DEVICE) for name, shape in tangents.items()}
    with pytest.raises(RuntimeError, match=sentence):
        launch_jvp.jvp(x, x, x, *(None,) * 13, *numbers(Spec(0.3)), *map(given.get, PRIMALS))


def test_a_tangent_of_another_dtype_is_refused():
    from fastattn.kernels import launch_jvp

    x = torch.zeros(1, 2, 4, 8, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"tk is torch\.float16 and k torch\.float32"):
        tangents = (None, x.half(), None, None, None)
        launch_jvp.jvp(x, x, x, *(None,) * 13, *numbers(Spec(0.3)), *tangents)

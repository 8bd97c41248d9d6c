"""Every case on the C++ kernels of forward mode and of its backward, against float64.

The operators are called directly, in their normal form. Errors are held to core/tolerance.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from cases import CASES, Case, Problem, select
from derivative_calls import (
    ABSENT,
    CPU,
    NAMES,
    check,
    primals_of,
    run_truth,
    tangents_of,
)
from hypothesis import given
from hypothesis import strategies as st
from native_calls import (
    FUZZ,
    LENIENT,
    REFUSALS,
    SPOILERS,
    assert_close,
    calls,
    paged,
    plain,
    refused,
)
from operator_calls import cotangents_of, name_of, numbers

from fastattn.backends import isa as cpu_isa
from fastattn.core.reference import reference
from fastattn.core.spec import Operands, Spec

pytestmark = pytest.mark.native

HALVES = (torch.bfloat16, torch.float16)
LARGE = ("alone", "dim", "edge", "everything", "gqa", "long", "size")  # run in halves
SMALL = ("alone", "everything", "gqa")  # run on all instruction sets

ISAS = cpu_isa.supported()
DEFAULT_ISA = cpu_isa.selected()


# ---- every case ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_case(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", select(*LARGE), ids=name_of)
def test_halves(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != DEFAULT_ISA])
@pytest.mark.parametrize("case", select(*SMALL), ids=name_of)
def test_other_instruction_sets(case, isa, dtype, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    check(case, dtype)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != DEFAULT_ISA])
def test_double_precision_on_other_instruction_sets(isa, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    for case in select("everything"):
        check(case, torch.float64)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_bias_in_single_precision_beside_halves(dtype):
    check(next(c for c in CASES if c.name == "bias/fp32"), dtype, names=NAMES)


@pytest.mark.parametrize("scale", [3e3, -1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_scores_so_large_that_lse_is_rounded(dtype, scale):
    """The backward's probabilities would be wrong by the rounding of lse; see `exact`."""
    check(Case("huge", scale=scale, sinks=True, causal=True), dtype, names=NAMES)


@pytest.mark.parametrize("case", select("everything"), ids=name_of)
def test_every_set_of_tangents(case):
    """A tangent that is absent is one of zeros."""
    problem = case.make(torch.float64)
    every = tangents_of(problem)
    names = [name for name, x in every.items() if x is not None]
    cotangents = cotangents_of(case, problem, True)
    for count in range(len(names) + 1):
        for some in combinations(names, count):
            absent = {name: every[name] if name in some else None for name in NAMES}
            zero = {name: every[name] if name in some else _zeros(every[name]) for name in NAMES}
            with_zeros = CPU.run(problem, zero, cotangents)
            for name, x in CPU.run(problem, absent, cotangents).items():
                torch.testing.assert_close(
                    x, with_zeros[name], rtol=1e-11, atol=1e-11, msg=f"{some} {name}"
                )


def _zeros(x):
    return None if x is None else x.nan_to_num() * 0


@pytest.mark.parametrize("case", select("alone"), ids=name_of)
def test_the_results_are_those_of_the_forward(case):
    """The same bits where the forward neither decodes nor splits the keys."""
    problem = case.make(torch.float32)
    q, k, v, spec, operands = problem
    forward = torch.ops.fastattn.flash_attn_fwd
    out, lse = forward(q, k, v, *operands.tensors(), *numbers(spec), 1)
    got = CPU.run(problem, tangents_of(problem), None)
    for name, want in (("out", out), ("lse", lse)):
        torch.testing.assert_close(got[name], want)
        few_rows = case.packed or case.documents  # in some of them
        assert few_rows or torch.equal(got[name], want), name


@pytest.mark.parametrize("case", [c for c in select("everything") if c.has_backward], ids=name_of)
def test_it_is_the_backward_of_the_backward(case):
    """With the cotangents of dq, dk, dv, dbias and dsinks as tangents, the operators' results are
    the gradients of the backward: of dout, of dlse and of the primals."""
    problem = case.make(torch.float64)
    directions = tangents_of(problem)
    dout, dlse = (x.requires_grad_() for x in cotangents_of(case, problem, True))
    got = CPU.run(problem, directions, (dout.detach(), dlse.detach()))

    leaves = {name: x.detach().requires_grad_() for name, x in primals_of(problem).items()}
    changed = {name: leaves[name] for name in NAMES[3:] if name in leaves}
    q, k, v = (leaves[name] for name in NAMES[:3])
    results = reference(q, k, v, problem.spec, replace(problem.operands, **changed))
    inputs = list(leaves.values())
    first = torch.autograd.grad(results, inputs, (dout, dlse), create_graph=True)
    product = sum((x * directions[n].nan_to_num()).sum() for n, x in zip(leaves, first))
    second = torch.autograd.grad(product, [dout, dlse, *inputs])
    for name, want in zip(("tout", "tlse", *(f"d{n}" for n in leaves)), second, strict=True):
        dead = got["lse"] == -torch.inf
        if name == "tlse":
            want = torch.where(dead, 0.0, want)
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-9, msg=name)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", select("alone", "long", "bias", "everything"), ids=name_of)
def test_same_bits_for_any_number_of_threads(case, dtype):
    problem = case.make(dtype)
    tangents, cotangents = tangents_of(problem), cotangents_of(case, problem, True)
    torch.set_num_threads(2)
    two = CPU.run(problem, tangents, cotangents)
    again = CPU.run(problem, tangents, cotangents)
    torch.set_num_threads(1)
    one = CPU.run(problem, tangents, cotangents)
    for name, result in two.items():
        assert torch.equal(result, again[name]), f"{name} differs from run to run"
        assert torch.equal(result, one[name]), f"{name} depends on the number of threads"


@pytest.mark.parametrize(
    "case", [c for c in CASES if (c.bias or c.sinks) and c.has_backward][::4], ids=name_of
)
def test_gradients_not_asked_for(case):
    """dq, dk and dv do not depend on whether the bias and the sinks need a gradient."""
    problem = case.make(torch.float64)
    tangents, cotangents = tangents_of(problem), cotangents_of(case, problem, False)
    want = CPU.run(problem, tangents, cotangents)
    got = CPU.run(problem, tangents, cotangents, needs=(False, False))
    assert not got.keys() & {"dbias", "dsinks"}
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-12, atol=1e-12)


# ---- NaN and memory order ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nan_in_what_does_not_exist_changes_nothing(dtype):
    """The same bits with NaN as with zeros in keys, values, bias and pages that do not exist, and
    in the tangents of these."""
    for case in select("alone", "everything"):
        problem = case.make(dtype)
        tangents = tangents_of(problem)
        clean = Problem(*(x.nan_to_num(nan=0.0) for x in problem[:3]), *problem[3:])
        if problem.operands.bias is not None:
            bias = torch.where(problem.operands.bias.isnan(), 0.0, problem.operands.bias)
            clean = clean._replace(operands=replace(problem.operands, bias=bias))
        zeros = {n: None if x is None else x.nan_to_num(nan=0.0) for n, x in tangents.items()}
        cotangents = cotangents_of(case, problem, True)
        with_nan = CPU.run(problem, tangents, cotangents)
        without = CPU.run(clean, zeros, cotangents)
        for name, x in with_nan.items():
            assert torch.equal(x, without[name]), f"{case.name}: {name}"


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("which", ["k", "tk", "tbias"])
def test_nan_in_a_key_that_the_mask_hides(which, softcap):
    """It reaches no score: everything but that key's own gradients is as with zeros there. (A
    hidden value is multiplied by a probability of 0, which NaN survives, as in the forward.)"""
    problem = Case("", batch=1, mask="full", bias="full", softcap=softcap).make(torch.float32)
    problem.operands.mask[..., 20] = False
    tangents, cotangents = tangents_of(problem), cotangents_of(Case(""), problem, True)
    cotangents = (cotangents[0][:1], cotangents[1][:1])
    want = CPU.run(problem, tangents, cotangents)
    spoiled = {"k": problem.k[..., 20, :], "tk": tangents["k"][..., 20, :]}
    spoiled["tbias"] = tangents["bias"][..., 20]
    spoiled[which].fill_(torch.nan)
    for name, x in CPU.run(problem, tangents, cotangents).items():
        if name == "dq" and which != "tbias":  # dS K multiplies NaN by 0, as in the backward
            continue
        assert torch.equal(x, want[name]), name


@pytest.mark.parametrize("which", NAMES[:3])
def test_tangents_in_any_memory_order(which):
    problem = Case("", causal=True).make(torch.float32)
    tangents = tangents_of(problem)
    cotangents = cotangents_of(Case(""), problem, True)
    want = CPU.run(problem, tangents, cotangents)
    x = tangents[which]
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan)
    wide[..., ::2] = x
    others = (wide[..., ::2], x.transpose(1, 3).contiguous().transpose(1, 3))
    for strided in (*others, x.transpose(0, 2).contiguous().transpose(0, 2)):
        for name, y in CPU.run(problem, tangents | {which: strided}, cotangents).items():
            assert torch.equal(y, want[name]), name
    one = torch.ones(()).expand(x.shape)
    want = CPU.run(problem, tangents | {which: one.contiguous()}, cotangents)
    for name, y in CPU.run(problem, tangents | {which: one}, cotangents).items():
        assert torch.equal(y, want[name]), name


@pytest.mark.parametrize("which", ["bias", "sinks"])
def test_tangents_of_operands_in_single_precision_beside_halves(which):
    problem = Case("", bias="full", sinks=True).make(torch.bfloat16)
    tangents = tangents_of(problem)
    cotangents = cotangents_of(Case(""), problem, True)
    want = CPU.run(problem, tangents, cotangents)
    wide = tangents | {which: tangents[which].float()}
    for name, x in CPU.run(problem, wide, cotangents).items():
        assert torch.equal(x, want[name]), name


# ---- memory --------------------------------------------------------------------------------------

PEAK = """
import resource, torch
import fastattn

torch.set_num_threads(1)
operators = torch.ops.fastattn

def second_derivatives(S):
    q, k, v, tq, tk, tv, dout = (torch.randn(1, 2, S, 64) for _ in range(7))
    shared = (q, k, v, *[None] * 13, 0.125, 0.0, -1, 0, True, 0.0)
    tangents = (tq, tk, tv, None, None)
    results = operators.flash_attn_jvp(*shared, *tangents)
    operators.flash_attn_jvp_bwd(dout, None, *results, *shared, *tangents, False, False)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

second_derivatives(200)
before = peak()
second_derivatives(8192)
print(peak() - before)
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer takes memory")
def test_memory_is_linear_in_the_lengths():
    """At S 8192, one S x S matrix of floats for two heads would be 512 MiB. The inputs and results
    are 50 MB, and the gradients' sums four times k and v, 67 MB."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 180 * 2**20


# ---- random and hostile arguments ----------------------------------------------------------------


def problem_of(call) -> Problem:
    return Problem(call.q, call.k, call.v, call.spec(), call.operands())


@FUZZ
@given(calls(), st.data())
def test_random_calls_are_right(call, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_ISA", data.draw(st.sampled_from(ISAS)))
        torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
        problem = problem_of(call)
        names = [name for name in NAMES if data.draw(st.booleans())]
        tangents = tangents_of(problem, names, data.draw(st.integers(0, 1000)))
        cotangents = None
        if "page_table" not in call.tensors:
            cotangents = cotangents_of(Case(""), problem, data.draw(st.booleans()))
        got = CPU.run(problem, tangents, cotangents)
    want = run_truth(problem.to(torch.float64), tangents, cotangents)
    for name, truth in want.items():
        if name in got and name == "dbias" and got[name].shape != truth.shape:
            truth = truth.sum_to_size(got[name].shape)
        scale = 8 if call.q.dtype in HALVES and name[0] in "dt" else 2
        assert_close(got[name] / scale, truth / scale, call.q.dtype, name)


@pytest.mark.parametrize("name", sorted(SPOILERS.keys() - LENIENT - {"num_splits -1"}))
def test_hostile_calls_are_refused(name):
    call = SPOILERS[name]()
    assert refused(lambda: CPU.jvp(call.q, call.k, call.v, *call.shared(), *[None] * 5))


TANGENT_SPOILERS = {
    "tq too short": lambda q, k, v: {"q": q[:, :, :5]},
    "tq of rank 3": lambda q, k, v: {"q": q[0]},
    "tq in double": lambda q, k, v: {"q": q.double()},
    "tq on meta": lambda q, k, v: {"q": q.to("meta")},
    "tk of q": lambda q, k, v: {"k": q},
    "tk of one head": lambda q, k, v: {"k": k[:, :1]},
    "tk in half": lambda q, k, v: {"k": k.half()},
    "tv of another width": lambda q, k, v: {"v": v[..., :8]},
    "tv in integers": lambda q, k, v: {"v": v.int()},
    "tv on meta": lambda q, k, v: {"v": v.to("meta")},
    "tbias without bias": lambda q, k, v: {"bias": torch.zeros(1, 1, 7, 33)},
    "tsinks without sinks": lambda q, k, v: {"sinks": torch.zeros(4)},
}


@pytest.mark.parametrize("name", sorted(TANGENT_SPOILERS))
def test_hostile_tangents_are_refused(name):
    """By both operators, in a sentence that names the tangent."""
    problem = problem_of(plain())
    tangents = ABSENT | TANGENT_SPOILERS[name](*problem[:3])
    results = CPU.run(problem, ABSENT, None).values()
    shared = (*problem[:3], *problem.operands.tensors(), *numbers(problem.spec))
    dtout = torch.ones_like(problem.q)
    refuse(lambda: CPU.run(problem, tangents, None).values(), name)
    last = (*shared, *tangents.values(), False, False)
    refuse(lambda: CPU.jvp_bwd(dtout, None, *results, *last), name)


def refuse(run, name):
    """A tensor on meta makes a call on meta, if torch takes it; everything else is refused."""
    if name.endswith("on meta"):
        assert refused(run)
        return
    with pytest.raises(REFUSALS, match=name.split()[0]):
        run()


@pytest.mark.parametrize("wrong", [(1, 1, 7, 1), (7, 33)])
def test_a_tangent_of_the_bias_has_its_shape(wrong):
    """Without broadcasting, which would be the derivative along something else."""
    problem = problem_of(plain())
    problem = problem._replace(operands=Operands(bias=torch.zeros(1, 1, 7, 33)))
    with pytest.raises(REFUSALS, match=r"tbias has shape .*bias, whose tangent it is"):
        CPU.run(problem, ABSENT | {"bias": torch.zeros(wrong)}, None)
    with pytest.raises(REFUSALS, match=r"tbias must have the dtype of bias or float32"):
        CPU.run(problem, ABSENT | {"bias": torch.zeros(1, 1, 7, 33).half()}, None)


BACKWARD_SPOILERS = {
    "dtout too short": {"dtout": lambda x: x[:, :, :5]},
    "dtout in double": {"dtout": lambda x: x.double()},
    "dtlse in half": {"dtlse": lambda x: x.half()},
    "tout of rank 3": {"tout": lambda x: x[0]},
    "tout of another width": {"tout": lambda x: x[..., :8]},
    "tout on meta": {"tout": lambda x: x.to("meta")},
    "tlse too short": {"tlse": lambda x: x[:, :, :5]},
    "tlse in double": {"tlse": lambda x: x.double()},
    "out in half": {"out": lambda x: x.half()},
    "lse of rank 2": {"lse": lambda x: x[0]},
}


@pytest.mark.parametrize("name", sorted(BACKWARD_SPOILERS))
def test_backward_refuses_what_is_not_of_forward_mode(name):
    problem = problem_of(plain())
    results = CPU.run(problem, tangents_of(problem), None)
    given_ = {"dtout": torch.ones_like(problem.q), "dtlse": torch.ones_like(results["lse"])}
    given_ |= results
    ((which, spoil),) = BACKWARD_SPOILERS[name].items()
    given_[which] = spoil(given_[which])
    shared = (*problem[:3], *problem.operands.tensors(), *numbers(problem.spec))
    last = (*shared, *[None] * 5, False, False)
    refuse(lambda: CPU.jvp_bwd(*given_.values(), *last), name)


def test_backward_of_pages_is_refused():
    problem = problem_of(paged())
    results = CPU.run(problem, ABSENT, None).values()
    shared = (*problem[:3], *problem.operands.tensors(), *numbers(problem.spec))
    with pytest.raises(REFUSALS, match="paged keys have no gradient"):
        CPU.jvp_bwd(torch.ones_like(problem.q), None, *results, *shared, *[None] * 5, False, False)


@pytest.mark.parametrize(
    "shape", [(0, 4, 7, 33), (2, 0, 7, 33), (2, 4, 0, 33), (2, 4, 7, 0), (2, 4, 0, 0)]
)
def test_zero_sizes(shape):
    batch, heads, q_len, kv_len = shape
    q, k = torch.randn(batch, heads, q_len, 16), torch.randn(batch, heads, kv_len, 16)
    problem = Problem(q, k, k.clone(), Spec(0.25), Operands())
    got = CPU.run(problem, tangents_of(problem), (torch.ones_like(q), None))
    assert got["tout"].shape == q.shape and got["tlse"].shape == q.shape[:3]
    for name in ("out", "tout", "tlse", "dq", "dk", "dv"):
        assert (got[name] == 0).all(), name

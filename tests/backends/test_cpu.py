"""Every case on the C++ kernels, forward and every gradient, against float64.

The operators are called directly, in their normal form. Errors are held to core/tolerance.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, Problem, select
from cpu_calls import backward, check, forward, run_kernels
from operator_calls import cotangents_of, name_of

import fastattn
from fastattn.backends import isa as cpu_isa
from fastattn.core.philox import keep_mask
from fastattn.core.spec import Operands, Spec

pytestmark = pytest.mark.native

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
LARGE = ("alone", "dim", "edge", "everything", "gqa", "long", "size")  # run in all dtypes
SMALL = ("alone", "everything", "gqa")  # run on all instruction sets

ISAS = cpu_isa.supported()
DEFAULT_ISA = cpu_isa.selected()


# ---- every case ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_single_precision(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=name_of)
@pytest.mark.parametrize("case", select(*LARGE), ids=name_of)
def test_other_dtypes(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_bias_in_single_precision_beside_halves(dtype):
    check(next(c for c in CASES if c.name == "bias/fp32"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != DEFAULT_ISA])
@pytest.mark.parametrize("case", select(*SMALL), ids=name_of)
def test_other_instruction_sets(case, isa, dtype, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    check(case, dtype)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != DEFAULT_ISA])
@pytest.mark.parametrize("case", select("dim", "long"), ids=name_of)
def test_shapes_on_other_instruction_sets(case, isa, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", isa)
    check(case, torch.bfloat16 if isa.endswith("bf16") else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_instruction_sets_are_obeyed(dtype, monkeypatch):
    """They round differently: with or without fused multiply-add and the bf16 dot product."""
    problem = Case("", head_dim=64).make(dtype)
    lse = {}
    for isa in ISAS:
        monkeypatch.setenv("FASTATTN_ISA", isa)
        lse[isa] = forward(problem)[1]
    if DEFAULT_ISA != "portable":
        assert not torch.equal(lse[DEFAULT_ISA], lse["portable"])
    assert torch.equal(lse["portable"], lse["portable_bf16"]) == (dtype == torch.float32)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", "mmx")
    with pytest.raises((ValueError, RuntimeError), match=r"FASTATTN_ISA=mmx.*portable"):
        forward(Case("").make(torch.float32))


@pytest.mark.parametrize("case", [c for c in CASES if c.function], ids=name_of)
def test_public_functions_make_the_same_call(case):
    problem = case.make(torch.float32)
    tensors, kwargs = case.call(problem)
    function = getattr(fastattn, case.function)
    out, lse = function(*tensors, **kwargs, return_lse=True, backend="cpu")
    if case.packed:
        out, lse = out.transpose(0, 1)[None], lse[None]
    want_out, want_lse = forward(problem)
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)


@pytest.mark.parametrize(
    "case", [c for c in CASES if (c.bias or c.sinks) and c.has_backward][::4], ids=name_of
)
def test_gradients_not_asked_for(case):
    """dq, dk and dv do not depend on whether the bias and the sinks need a gradient."""
    problem = case.make(torch.float64)
    dout, _ = cotangents_of(case, problem, False)
    out, lse = forward(problem)
    want = backward(problem, dout, None, out, lse)
    got = backward(problem, dout, None, out, lse, needs=(False, False))
    assert list(got) == ["dq", "dk", "dv"]
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-12, atol=1e-12)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", select("alone", "long", "bias", "everything"), ids=name_of)
def test_same_bits_for_any_number_of_threads(case, dtype):
    problem = case.make(dtype)
    cotangents = cotangents_of(case, problem, True)
    torch.set_num_threads(2)
    two = run_kernels(problem, cotangents)
    again = run_kernels(problem, cotangents)
    torch.set_num_threads(1)
    one = run_kernels(problem, cotangents)
    for name, result in two.items():
        assert torch.equal(result, again[name]), f"{name} differs from run to run"
        assert torch.equal(result, one[name]), f"{name} depends on the number of threads"


@pytest.mark.parametrize("num_splits", [1, 2, 7, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name.startswith("long/keys") or c.name.endswith(("_decode", "/paged"))],
    ids=name_of,
)
def test_any_number_of_splits(case, dtype, num_splits):
    check(replace(case, name=""), dtype, num_splits)


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [(0, 0), (-1, 5), (2**40 + 3, 2**33 + 1), (-(2**63), 2**63 - 1)])
@pytest.mark.parametrize("shape", [(1, 37, 130), (3, 200, 97), (2, 1, 600), (4, 16, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dropout_mask_is_the_reference_one(dtype, shape, seed):
    """If v is the identity, out is the probs after dropout."""
    heads, q_len, kv_len = shape
    p = 0.35
    q, k = torch.randn(2, heads, q_len, 4), torch.randn(2, heads, kv_len, 4)
    v = torch.eye(kv_len).expand(2, heads, kv_len, kv_len)
    operands = Operands(dropout_seed=torch.tensor(seed))
    spec = Spec(0.1, dropout_p=p)
    out, _ = forward(Problem(q.to(dtype), k.to(dtype), v.to(dtype), spec, operands))
    kept = keep_mask(seed, 2 * heads, q_len, kv_len, p)
    assert torch.equal(out != 0, kept.view(2, heads, q_len, kv_len))


def test_dropout_mask_is_the_same_on_every_instruction_set(monkeypatch):
    q = torch.randn(1, 2, 50, 4)
    v = torch.eye(50).expand(1, 2, 50, 50)
    operands = Operands(dropout_seed=torch.tensor([1, 2]))
    problem = Problem(q, q, v, Spec(0.1, dropout_p=0.5), operands)
    kept = keep_mask((1, 2), 2, 50, 50, 0.5)
    for isa in ISAS:
        monkeypatch.setenv("FASTATTN_ISA", isa)
        assert torch.equal(forward(problem)[0][0] != 0, kept), isa


def test_dropout_of_packed_sequences_counts_heads_of_sequences():
    lengths = ((7, 20), (0, 3), (18, 33))
    problem = Case("", packed=lengths, heads=3, dropout=0.4, scale=0.1).make(torch.float32)
    longest = max(n for _, n in lengths)
    eye = torch.cat([torch.eye(n, longest) for _, n in lengths])
    v = torch.zeros(1, 3, problem.k.shape[2], longest)
    v[:, :, : len(eye)] = eye
    out, _ = forward(problem._replace(v=v))
    kept = keep_mask(problem.operands.dropout_seed, 9, 18, longest, 0.4)
    row = 0
    for n, (q_len, kv_len) in enumerate(lengths):
        weights = out[0, :, row : row + q_len, :kv_len]
        assert torch.equal(weights != 0, kept[3 * n : 3 * n + 3, :q_len, :kv_len])
        row += q_len


# ---- NaN, memory order, offsets ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("index", range(3), ids="qkv")
@pytest.mark.parametrize("q_len", [1, 40])
def test_visible_nan_propagates(dtype, index, q_len):
    problem = Case("", batch=1, q_len=q_len, kv_len=40).make(dtype)
    problem[index][0, 0, 0] = torch.nan
    out, lse = forward(problem)
    touched = out[0, 0, :1] if index == 0 else out[0, 0]
    assert touched.isnan().any(-1).all()
    assert index == 2 or lse[0, 0, 0].isnan()
    assert out[0, 1].isfinite().all() and lse[0, 1].isfinite().all()
    assert index > 0 or out[0, 0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_stays_in_its_document(dtype):
    case = next(c for c in CASES if c.name == "alone/documents")
    problem = case.make(dtype)
    problem.k[0, 0, 60], problem.v[0, 0, 60] = torch.nan, torch.nan
    own = problem.operands.document_ids[0] == problem.operands.document_ids[0, 60]
    dout, dlse = cotangents_of(case, problem, True)
    results = run_kernels(problem, (dout, dlse))
    for name, x in results.items():
        assert x[0, 0][own].isnan().any(), name
        assert x[0, 0][~own].isfinite().all(), name
        assert x[0, 1].isfinite().all() and x[1].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nan_in_what_does_not_exist_changes_nothing(dtype):
    """The same bits with NaN as with zeros in keys, values, bias and pages that do not exist."""
    for case in select("alone", "everything"):
        problem = case.make(dtype)
        clean = Problem(*(torch.where(x.isnan(), 0.0, x) for x in problem[:3]), *problem[3:])
        if problem.operands.bias is not None:
            bias = torch.where(problem.operands.bias.isnan(), 0.0, problem.operands.bias)
            clean = clean._replace(operands=replace(problem.operands, bias=bias))
        cotangents = cotangents_of(case, problem, True)
        with_nan, without = (run_kernels(p, cotangents) for p in (problem, clean))
        for name, x in with_nan.items():
            assert torch.equal(x, without[name]), f"{case.name}: {name}"


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
def test_dout_in_any_memory_order(order):
    case = Case("", causal=True, sinks=True)
    problem = case.make(torch.float32)
    dout, dlse = cotangents_of(case, problem, True)
    want = run_kernels(problem, (dout, dlse))
    inverse = sorted(range(4), key=order.__getitem__)
    moved = dout.permute(order).contiguous().permute(inverse)
    for name, x in run_kernels(problem, (moved, dlse)).items():
        assert torch.equal(x, want[name]), name
    ones = torch.ones(()).expand(dout.shape)  # the gradient that out.sum().backward() passes
    want = run_kernels(problem, (ones.contiguous(), None))
    for name, x in run_kernels(problem, (ones, None)).items():
        assert torch.equal(x, want[name]), name


@pytest.mark.parametrize("kv_lens", [(), (6, 4)])
def test_mask_of_packed_sequences_may_be_larger_than_the_longest(kv_lens):
    """varlen_attention's max_seqlen is an upper bound, and mask and bias have its size."""
    case = Case("", packed=((5, 9), (7, 4)), kv_lens=kv_lens, mask="full", bias="full")
    small = case.make(torch.float32)
    mask, bias = (
        torch.nn.functional.pad(x, (0, 6, 0, 3)) for x in (small.operands.mask, small.operands.bias)
    )
    large = small._replace(operands=replace(small.operands, mask=mask, bias=bias))
    for a, b in zip(forward(small), forward(large), strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_two_to_the_31():
    """Rows of k, v and the mask are more than 2^31 elements apart; only what is read is
    allocated."""
    step, keys = 2**26 + 64, 33
    try:
        memory = torch.empty(step * (keys - 1) + 64, dtype=torch.float16)
        flags = torch.empty(step * (keys - 1) + 64, dtype=torch.bool)
    except RuntimeError:
        pytest.skip("the system does not lend 14 GB of address space")
    assert step * (keys - 1) > 2**31
    k = memory.as_strided((1, 1, keys, 64), (0, 0, step, 1))
    mask = flags.as_strided((1, 1, 20, keys), (0, 0, 1, step))
    k.copy_(torch.randn(1, 1, keys, 64))
    mask.copy_(torch.rand(1, 1, 20, keys) < 0.5)
    q, dout = (torch.randn(1, 1, 20, 64).half() for _ in range(2))
    far = Problem(q, k, k, Spec(0.125), Operands(mask=mask))
    near = Problem(q, k.contiguous(), k.contiguous(), Spec(0.125), Operands(mask=mask.contiguous()))
    want = run_kernels(near, (dout, None))
    for name, x in run_kernels(far, (dout, None)).items():
        assert torch.equal(x, want[name]), name


# ---- memory --------------------------------------------------------------------------------------

PEAK = """
import resource, sys
import torch
import fastattn

torch.set_num_threads(2)
full = sys.argv[1] == "full"

def step(S, D=16):
    q, k, v = (torch.randn(1, 1, S, D, requires_grad=True) for _ in range(3))
    options = {}
    if full:
        options = dict(
            mask=(torch.rand(1, 1, 1, S) < 0.5).expand(1, 1, S, S),
            bias=torch.randn(1, 1, 1, S, requires_grad=True),
            kv_lens=torch.tensor([S - 5], dtype=torch.int32),
            softcap=5.0,
            dropout_p=0.1,
        )
    fastattn.attention(q, k, v, backend="cpu", **options).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

step(200)
before = peak()
step(16384)
print(peak() - before)
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer takes memory")
@pytest.mark.parametrize("options", ["plain", "full"])
def test_memory_is_linear_in_the_lengths(options):
    """At these lengths one byte per score would be 256 MiB; q, k, v and gradients are 6 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, options], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 96 * 2**20


@pytest.mark.parametrize("batch, heads", [(0, 2), (2, 0)])
def test_bias_gradient_of_an_empty_call_is_zero(batch, heads):
    """No item covers its elements, so no kernel sets them."""
    q, k, v = (torch.randn(batch, heads, rows, 8) for rows in (50, 70, 70))
    bias = torch.randn(1, 1, 50, 70, requires_grad=True)
    poison = torch.full((50 * 70,), torch.nan)  # memory that the gradient will probably reuse
    del poison
    out = fastattn.attention(q, k, v, bias=bias, backend="cpu")
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert torch.equal(gradient, torch.zeros_like(bias))


def test_large_bias_gradient():
    """More than 4 MB, in huge pages if the system has them; the second entry accumulates into
    it."""
    q, k, v = (torch.randn(2, 2, rows, 8) for rows in (800, 700, 700))
    bias = torch.randn(1, 2, 800, 700, requires_grad=True)
    found = [
        torch.autograd.grad(fastattn.attention(q, k, v, bias=bias, backend=x).square().sum(), bias)
        for x in ("cpu", "reference")
    ]
    torch.testing.assert_close(*found)

"""The fused operators' Triton kernels, interpreted on the CPU or run on a GPU: the cases of
test_fused.py and test_fused_dropout.py, with the operators' CPU kernels replaced by Triton's."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
import sys

import fused_cases as cases
import pytest
import test_fused as T
import test_fused_dropout as D
import torch
from fresh_python import ROOT
from fused_cases import LAYOUTS, LOSSES, OPS, check, exact_norm, randn, table
from pairwise import thinned
from torch._subclasses import FakeTensorMode

from fastattn.backends import gpu
from fastattn.core.philox import keep_probability, keep_rows, keep_threshold, philox4x32
from fastattn.fused import gate as fused_gate
from fastattn.fused import linear_cross_entropy as fused_loss
from fastattn.fused import norm as fused
from fastattn.fused import operator
from fastattn.fused import rope as fused_rope
from fastattn.fused.linear_cross_entropy import linear_cross_entropy

triton = pytest.importorskip("triton", minversion="3.5")
import triton.language as tl  # noqa: E402
from fastattn.kernels import activate, gate, norm, rope, rows  # noqa: E402
from fastattn.kernels import linear_cross_entropy as loss_kernels  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, interpreting
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),
]
INTERPRETED = not torch.cuda.is_available()  # conftest.py
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNELS = {
    "norm_fwd": norm.norm_fwd,
    "norm_bwd": norm.norm_bwd,
    "rotate": rope.rotate,
    "gate_fwd": gate.gate_fwd,
    "gate_bwd": gate.gate_bwd,
    "activate_fwd": activate.activate_fwd,
    "activate_bwd": activate.activate_bwd,
    "cross_entropy_": loss_kernels.cross_entropy_,
}


def on_device(function):
    """The function, on copies of its arguments on the GPU if there is one."""
    if INTERPRETED:
        return function

    def run(*args):
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
        out = function(*moved)
        if function is loss_kernels.cross_entropy_:
            args[0].copy_(moved[0])
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    return run


@pytest.fixture
def calls(monkeypatch):
    """Replaces the CPU's kernels by Triton's; returns the names of those that ran."""
    seen = []

    def counted(name, function, *args):
        seen.append(name)
        return on_device(function)(*args)

    monkeypatch.setattr(norm, "MAX_PARTIALS", 4)  # fewer programs take less time to interpret
    monkeypatch.setattr(fused, "SMALL_LAYER_NORM", 0)
    monkeypatch.setattr(operator, "NATIVE_MISSING", None)
    monkeypatch.setattr(fused_loss, "NATIVE_MISSING", None)
    with torch.library._scoped_library("fastattn", "IMPL") as library:
        for name, function in KERNELS.items():
            kernel = functools.partial(counted, name, function)
            library.impl(name, kernel, "CPU", allow_override=True)
        yield seen
    assert seen, "no Triton kernel ran"


# ---- against float64 ----------------------------------------------------------------------------


def check_norms(dtype, dims):
    for dim, lead in zip(dims, ((5,), (3, 2), (), (2,))):
        x, residual = randn(*lead, dim, dtype=dtype), randn(*lead, dim, dtype=dtype)
        weight, bias = randn(dim, dtype=dtype), randn(dim, dtype=dtype)
        check(cases.ours_norm, cases.torch_norm, (x, residual, weight, bias), dtype, exact_norm)
        check(cases.ours_norm, cases.torch_norm, (x + 3, None, weight, bias), dtype, exact_norm)
        rms = {"center": False}
        check(
            cases.ours_norm, cases.torch_norm, (x, residual, weight, None), dtype, exact_norm, **rms
        )
        check(cases.ours_norm, cases.torch_norm, (x, None, None, None), dtype, exact_norm, **rms)
        if lead:
            check(D.ours_norm, D.torch_norm, (x, residual, weight, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype, calls):
    # a float64 LayerNorm of one column is exact here, and off by autograd's rounding in torch
    check_norms(dtype, (3 if dtype == torch.float64 else 1, 63, 65, 1000))
    assert {"norm_fwd", "norm_bwd"} == set(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_norm(dtype, calls, monkeypatch):
    """Rows that fit into no block, by column blocks of 128 and 64."""
    monkeypatch.setattr(norm, "MAX_FORWARD", 64)
    monkeypatch.setattr(norm, "MAX_BACKWARD", 64)
    monkeypatch.setattr(norm, "WIDE", 128)
    check_norms(dtype, (65, 300))


def test_wide_variance_does_not_cancel(calls, monkeypatch):
    monkeypatch.setattr(norm, "MAX_FORWARD", 64)
    monkeypatch.setattr(norm, "WIDE", 64)
    x = torch.randn(3, 400) + torch.tensor([0.0, 3e3, -1e4])[:, None]
    y, _ = fused.norm(x, None, None, None, 1e-5, True)
    right, _ = fused.norm_reference(x.double(), None, None, None, 1e-5, True)
    torch.testing.assert_close(y.double(), right, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(dtype, interleaved, calls):
    for dim in (2, 7, 33, 64, 130):
        x = randn(2, 5, 3, dim, dtype=dtype)
        check(cases.ours_rotate, cases.torch_rotate, (x,), dtype, interleaved=interleaved)
        check(
            cases.ours_rotate,
            cases.torch_rotate,
            (x.transpose(1, 2),),
            dtype,
            interleaved=interleaved,
        )
    x = randn(1, 1, 2, 1000, dtype=dtype)  # more pairs than one program takes
    check(cases.ours_rotate, cases.torch_rotate, (x,), dtype, interleaved=interleaved)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rotate_at_positions(kind, calls):
    x, angles = torch.randn(2, 3, 4, 8), torch.randn(9, 3)
    cos, sin = angles.cos(), angles.sin()
    for positions in ([8, 0, 3, 3], [[0, 1, 2, 8], [5, 5, 0, 7]]):
        places = torch.tensor(positions, dtype=kind)
        for interleaved in (False, True):
            right = fused_rope.rotate_reference(x, cos, sin, places, interleaved)
            got = fused_rope.rotate(x, cos, sin, places, interleaved)
            torch.testing.assert_close(got, right)
            back = OPS.rotate(got, cos, sin, places, interleaved, True)
            torch.testing.assert_close(back, x)
    past = fused_rope.rotate(x, cos, sin, torch.tensor([0, 9, -1, 1], dtype=kind), False)
    assert past[..., 1:3, :6].isnan().all() and past.isnan().sum() == 2 * 3 * 2 * 6


@pytest.mark.parametrize("dtype, activation", thinned(DTYPES, fused_gate.GATES))
def test_gate(dtype, activation, calls):
    for shape in ((1,), (3, 63), (2, 3, 65), (2, 1000)):
        inputs = [4 * randn(*shape, dtype=dtype) for _ in range(2)]
        check(cases.ours_gate, cases.torch_gate, inputs, dtype, activation=activation)


@pytest.mark.parametrize("dtype, activation", thinned(DTYPES, D.ACTIVATIONS))
def test_activate(dtype, activation, calls):
    for shape in ((1,), (3, 63), (2, 3, 65), (2, 1000)):
        x, bias = 3 * randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
        for b, p in ((bias, D.P), (None, D.P), (bias, 0.0)):
            options = {"activation": activation, "p": p}
            check(D.ours_activate, D.torch_activate, (x, b), dtype, **options)


def test_activations_over_the_whole_range(calls):
    T.test_gate_over_the_whole_range()


COUNTED = [("all", True), *((name, False) for name in LOSSES)]


@pytest.mark.parametrize("dtype, loss", thinned(DTYPES, COUNTED))
def test_linear_cross_entropy(dtype, loss, calls, monkeypatch):
    """With ignored rows, both as on a GPU, where they are not counted or skipped, and as
    elsewhere."""
    name, count = loss
    monkeypatch.setattr(fused_loss, "_can_count", lambda x: count)
    monkeypatch.setattr(loss_kernels, "BLOCK", 128)  # the longest row takes two steps
    T.test_linear_cross_entropy(dtype, name)


def test_uncounted_rows_in_plain_torch(monkeypatch):
    """What a GPU without Triton computes."""
    monkeypatch.setattr(fused_loss, "_can_count", lambda x: False)
    monkeypatch.setattr(fused_loss, "NATIVE_MISSING", "no kernels")
    for name in LOSSES:
        T.test_linear_cross_entropy(torch.float64, name)
    T.test_ignored_rows_are_never_read()


def test_ignored_rows_are_never_read(calls, monkeypatch):
    monkeypatch.setattr(fused_loss, "_can_count", lambda x: False)
    T.test_ignored_rows_are_never_read()


def test_a_label_past_the_head_is_nan(calls):
    logits = torch.randn(3, 7)
    loss, _ = OPS.cross_entropy_(logits, torch.tensor([7, 2, -5]), None, -100, 0.0, 0.0, 0.0)
    assert loss.isnan().tolist() == [True, False, True]


def test_an_ignored_rows_nan_leaves_no_gradient(calls):
    logits = torch.randn(2, 7)
    logits[1] = float("nan")
    labels = torch.tensor([3, -100])
    loss, _ = OPS.cross_entropy_(logits, labels, torch.ones(2), -100, 0.1, 0.1, 2.0)
    assert loss[1] == 0 and (logits[1] == 0).all() and logits[0].abs().min() > 0


# ---- layouts, sizes, edges ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_strides(layout, calls):
    T.test_strides(layout)
    D.test_strides(layout)


def test_dense_inputs_are_read_in_place_and_keep_their_order(calls):
    T.test_dense_inputs_are_read_in_place_and_keep_their_order()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty(dtype, calls):
    T.test_empty(dtype)
    D.test_empty()


def test_nan_and_inf_stay_in_their_row(calls):
    T.test_nan_and_inf_stay_in_their_row()
    D.test_nan_stays_where_it_is()


def test_sums_over_many_rows(calls, monkeypatch):
    """More tiles than programs, and more programs than one step of the second sum takes."""
    x, dy = torch.randn(300, 8), torch.randn(300, 8)
    mean, rstd = x.mean(-1), torch.rsqrt(x.var(-1, unbiased=False) + 1e-5)
    normal = (x - mean[:, None]) * rstd[:, None]
    right = (dy.double() * normal).sum(0), dy.double().sum(0)
    for parts in (256, 3, 1):
        monkeypatch.setattr(norm, "MAX_PARTIALS", parts)
        monkeypatch.setattr(activate, "MAX_PARTIALS", parts)
        found = OPS.norm_bwd(dy, None, x, None, mean, rstd, 1e-5, True, True, True)[1:3]
        found += OPS.activate_bwd(dy, None, None, None, 0.0, "identity", True)[1:]
        for got, want in zip(found, (*right, right[1])):
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def test_offsets_have_64_bits(calls):
    """Rows 2^30 elements apart, so the third begins beyond 2^31. Only accessed memory is
    allocated."""
    apart = 2**30 + 64
    memory = torch.empty(2 * apart + 64, dtype=torch.float16)
    x = memory.as_strided((3, 64), (apart, 1)).copy_(torch.randn(3, 64))
    near, weight = x.clone(), torch.ones(64, dtype=torch.float16)

    def results(x):
        y, _, mean, rstd = OPS.norm_fwd(x, None, weight, None, 1e-5, True)
        back = OPS.norm_bwd(near, x, x, weight, mean, rstd, 1e-5, True, True, False)
        rotated = fused_rope.rotate(x.view(3, 1, 1, 64), *table(x[:1]), None, False)
        rotated = (rotated, fused_rope.rotate(x, *table(x), None, True))
        gates = (fused_gate.gate(x, x, "silu"), *OPS.gate_bwd(near, x, x, "silu"))
        return [y, *back[:2], *rotated, *gates, OPS.activate_fwd(x, None, D.SEED, 0.5, "gelu")]

    for far, close in zip(results(x), results(near)):
        assert torch.equal(far, close)


# ---- dropout's bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [D.SEED, torch.tensor([-5, -(2**50) - 7]), torch.tensor([0, 0])])
def test_the_mask_is_the_twins(seed, calls):
    for shape in ((1,), (3, 7), (5, 64), (2, 3, 65), (4, 1000)):
        kept = keep_rows(seed, torch.Size(shape[:-1]).numel(), shape[-1], D.P).view(shape)
        x = torch.ones(shape)
        out = OPS.activate_fwd(x, None, seed, D.P, "identity")
        assert torch.equal(out != 0, kept)
        torch.testing.assert_close(out, kept / keep_probability(D.P), rtol=1e-6, atol=0)
        _, summed, _, _ = OPS.norm_fwd(x, -x, None, None, 1e-5, False, seed, D.P)
        assert torch.equal(summed != -1, kept)
        # the backward passes drop the same
        dx, _ = OPS.activate_bwd(x, None, None, seed, D.P, "identity", False)
        assert torch.equal(dx, out)
        stats = torch.ones(kept.shape[:-1].numel())
        zeros = torch.zeros(shape)
        call = (stats[:0], stats, 1e-5, False, False, False, seed, D.P)
        _, _, _, dkept = OPS.norm_bwd(zeros, x, x, None, *call)
        assert torch.equal(dkept, out)


def _drop_at(out, seed, threshold, row, first, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    lane = tl.arange(0, BLOCK_R)[:, None]
    values = tl.full([BLOCK_R, BLOCK_N], 1.0, tl.float32)
    values = rows.dropped(values, seed, threshold, lane.to(tl.int64) + row, first, BLOCK_R, BLOCK_N)
    tl.store(out + lane * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], values)


@pytest.mark.parametrize("row", [0, 2**31 - 1, 2**32 - 1, 2**40 + 5])
def test_the_mask_far_down(row, monkeypatch):
    """Row numbers are 64-bit; compared with Philox itself."""
    if INTERPRETED:  # decided when a kernel is created, as conftest.py does for the others
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    drop_at = triton.jit(_drop_at)
    seed, offset = D.SEED.tolist()
    out, on = torch.empty(2, 64), "cpu" if INTERPRETED else "cuda"
    out = out.to(on)
    drop_at[(1,)](out, D.SEED.to(on), keep_threshold(0.5), row, 128, BLOCK_R=2, BLOCK_N=64)
    key = (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32))
    for r in range(2):
        for column in range(64):
            low, high = (row + r) & 0xFFFFFFFF, (row + r) >> 32
            words = philox4x32((16 + column % 8, low, high, offset & 0xFFFFFFFF), key)
            bits = words[column // 16] >> (16 * (column // 8 % 2)) & 0xFFFF
            assert (out[r, column] != 0).item() == (bits < 32768)


# ---- where they run -----------------------------------------------------------------------------


def test_fastattn_imports_without_triton():
    code = "import sys, fastattn.fused.linear_cross_entropy; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_why_a_gpu_has_no_kernels(monkeypatch):
    missing = gpu.triton_missing.__wrapped__
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.0")
    assert missing() == "Triton is 3.4.0; accepted is 3.5 or newer"

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert missing() == "Triton is not installed (pip install triton)"


@pytest.mark.parametrize("found, sentence", [
    ((9, 0), None), ((7, 5), "a T4 is older than compute capability 8.0"),
])  # fmt: skip
def test_why_not_this_gpu(found, sentence, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a T4")
    assert gpu.gpu_missing.__wrapped__(0) == sentence


def test_every_operator_has_a_gpu_kernel():
    texts = "".join(path.read_text() for path in (ROOT / "fastattn/fused").glob("*.py"))
    named = re.findall(r'^(?:operator\.)?on_gpu\("\w+", (.*)\)', texts, re.MULTILINE)
    assert set(re.findall(r'"(\w+)"', "".join(named))) == set(KERNELS)
    for name in KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}", "CUDA")


def test_fake_tensors_ask_no_gpu():
    """As on a machine that traces for a GPU that it does not have."""
    with FakeTensorMode():
        x, head = torch.empty(4, 8, device="cuda"), torch.empty(9, 8, device="cuda")
        assert not operator.has_kernel(x, None)
        outs = [*fused.norm(x, x, None, None, 1e-5, True), fused_gate.gate(x, x, "silu")]
        outs += [OPS.norm_fwd(x, x, None, None, 1e-5, False)[0], D.activate(x, None, 0.5)]
        assert all(out.shape == x.shape and out.is_cuda for out in outs)
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        assert linear_cross_entropy(x, head, labels).is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """The calls reach the kernels there, wait for nothing, and can be captured in a graph."""
    assert gpu.gpu_missing(0) is None
    inputs = [torch.randn(64, 512), torch.randn(64, 512), torch.randn(512), torch.randn(300, 512)]
    labels = torch.randint(0, 300, (64,))
    labels[::3] = -100

    def step(x, gate, weight, head, labels, cos, sin):
        y, summed = fused.norm(x, gate, weight, None, 1e-5, False)
        y = fused_rope.rotate(fused_gate.gate(y, summed, "silu"), cos, sin, None, False)
        loss = linear_cross_entropy(D.activate(y, weight, 0.0, "gelu"), head, labels)
        return loss, *torch.autograd.grad(loss, (x, gate, weight, head))

    rest = labels, *table(inputs[0])
    right = step(*(x.requires_grad_() for x in inputs), *rest)
    leaves = [x.detach().cuda().requires_grad_() for x in inputs]
    rest = [x.cuda() for x in rest]
    assert "norm_fwd" in fused.norm(*leaves[:3], None, 1e-5, False)[0].grad_fn.name()
    step(*leaves, *rest)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(*leaves, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*leaves, *rest)
    graph.replay()
    for got, again, want in zip(found, captured, right):
        torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again, got)


# ---- bad input ----------------------------------------------------------------------------------

_X = torch.randn(4, 6)
_ANGLES = torch.randn(4, 3)
ERRORS = {
    **{name: (call, words) for name, (call, kind, words) in D.ERRORS.items()
       if kind is RuntimeError and name != "saved shape"},
    "saved's shape": (lambda: OPS.activate_bwd(_X, _X[:2], None, D.SEED, 0.1, "gelu", False),
                      r"saved is torch.float32 \[2, 6\]"),
    "gate": (lambda: OPS.gate_fwd(_X, _X, "elu"), "activation is 'elu'; accepted are silu"),
    "activation": (lambda: OPS.activate_fwd(_X, None, None, 0.0, "elu"), "accepted are identity"),
    "up": (lambda: OPS.gate_fwd(_X, _X[:2], "silu"), r"up is torch.float32 \[2, 6\]"),
    "up's dtype": (lambda: OPS.gate_fwd(_X, _X.half(), "silu"), "up is torch.float16"),
    "weight": (lambda: OPS.norm_fwd(_X, None, _X[0, :3], None, 1e-5, True), "weight has shape"),
    "rstd": (lambda: OPS.norm_bwd(_X, None, _X, None, _X[:, 0], _X[0], 1e-5, True, True, True),
             "those of the forward pass"),
    "integers": (lambda: OPS.gate_fwd(_X.int(), _X.int(), "silu"), "a tensor is torch.int32"),
    "table": (lambda: OPS.rotate(_X[None, None], _ANGLES.double(), _ANGLES, None, False, False),
              r"cos is torch.float64 \[4, 3\]"),
    "pairs": (lambda: OPS.rotate(_X[None, None, :, :4], _ANGLES, _ANGLES, None, False, False),
              "x has 4 channels and 3 pairs"),
    "rows": (lambda: OPS.rotate(_X[None, None], _ANGLES[:3], _ANGLES[:3], None, False, False),
             "cos has 3 rows and x 4"),
    "positions": (lambda: OPS.rotate(_X[None, None], _ANGLES, _ANGLES, torch.ones(3), True, True),
                  r"positions is torch.float32 \[3\]"),
    "labels": (lambda: OPS.cross_entropy_(_X, torch.ones(3).long(), None, 0, 0.0, 0.0, 0.0),
               r"labels is torch.int64 \[3\]"),
    "logits": (lambda: OPS.cross_entropy_(_X.T, torch.ones(6).long(), None, 0, 0.0, 0.0, 0.0),
               r"logits must be \[N, V\], contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors(name, calls):
    call, words = ERRORS[name]
    with pytest.raises(RuntimeError, match=words):
        call()

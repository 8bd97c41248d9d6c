"""The self-tests of the CUDA kernels (fastattn/backends/proof_steps.py), run on the CPU kernels:
each passes, and each detects the faults that it is for. Some also run the CUDA kernels on the
emulator."""

from __future__ import annotations

import emulated
import pytest
import torch
from cases import Problem

from fastattn.backends import library, proof_device, proof_steps
from fastattn.backends.proof_steps import STEPS, Case, Failed, OnCpu
from fastattn.core.call import Gradients, Result
from fastattn.core.spec import NO_OPERANDS, Spec

pytestmark = pytest.mark.skipif(
    library.NATIVE_MISSING is not None, reason=f"no CPU kernels: {library.NATIVE_MISSING}"
)


@pytest.mark.parametrize("step", STEPS)
def test_right_kernels_pass(step):
    assert STEPS[step](OnCpu()), "a step says what it has seen"


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
def test_right_kernels_pass_with_the_gpus_head_dimensions(step):
    device = OnCpu()
    device.dims = proof_device.DIMS
    assert STEPS[step](device)


class Faulty(OnCpu):
    """Kernels with one planted fault, in a result of forward or backward."""

    def __init__(self, forward=None, backward=None):
        self.change, self.change_back, self.calls = forward, backward, 0

    def forward(self, call):
        self.calls += 1
        result = super().forward(call)
        return Result(*self.change(self, call, *result)) if self.change else result

    def backward(self, call, *rest, **options):
        self.calls += 1
        grads = super().backward(call, *rest, **options)
        return Gradients(*self.change_back(self, call, *grads)) if self.change_back else grads


def scaled(d, call, out, lse):
    return out * 1.05, lse


def wrong_lse(d, call, out, lse):
    return out, lse + 0.05


def last_row_lost(d, call, out, lse):
    out[:, :, -1] = 0
    return out, lse


def nan_once(d, call, out, lse):
    out[0, 0, 0, 0] = torch.nan
    return out, lse


def no_mask(d, call, out, lse):
    """Only causal calls are wrong."""
    if call.spec.right != 0:
        return out, lse
    return OnCpu.forward(d, call.but(spec=Spec(call.spec.scale, call.spec.softcap)))


def unsteady(d, call, out, lse):
    """In one of three runs one bit differs, by too little to exceed the tolerance."""
    if d.calls % 3 == 0:
        out.view(torch.int16)[0, 0, 0, 0] ^= 1
    return out, lse


def lens_ignored(d, call, out, lse):
    x = call.operands
    if x.kv_lens is None and x.cu_seqlens_q is None and x.document_ids is None:
        return out, lse
    return OnCpu.forward(d, call.but(operands=NO_OPERANDS))


def later_sequences_lost(d, call, out, lse):
    if call.operands.cu_seqlens_q is not None:
        out[:, :, -7:] = 0
    return out, lse


def gradient(n: int, change):
    def changed(d, call, *grads):
        grads = list(grads)
        grads[n] = change(grads[n])
        return tuple(grads)

    return changed


def unsteady_gradient(d, call, *grads):
    if d.calls % 4 == 0:
        grads[0].view(torch.int16)[0, 0, 0, 0] ^= 1
    return grads


FAULTS = [
    ("one tile", {"forward": scaled}),
    ("one tile", {"forward": nan_once}),
    ("loops", {"forward": last_row_lost}),
    ("loops", {"forward": no_mask}),
    ("all shapes", {"forward": wrong_lse}),
    ("all shapes", {"forward": no_mask}),
    ("graphs", {"forward": unsteady}),
    ("backward", {"backward": gradient(0, lambda x: x * 1.1)}),
    ("backward", {"backward": gradient(1, torch.zeros_like)}),
    ("backward", {"backward": gradient(2, lambda x: x.roll(1, 2))}),
    ("backward", {"backward": gradient(4, lambda x: -x)}),
    ("orders", {"forward": unsteady}),
    ("orders", {"backward": unsteady_gradient}),
    ("orders", {"backward": gradient(1, lambda x: x * torch.nan)}),
    ("graphs of gradients", {"backward": unsteady_gradient}),
    ("lengths", {"forward": lens_ignored}),
    ("lengths", {"forward": later_sequences_lost}),
    ("gradients of lengths", {"backward": gradient(1, lambda x: x + 1e-2)}),
    ("pages", {"forward": scaled}),
    ("float8", {"forward": scaled}),
    ("float8", {"forward": wrong_lse}),
]


@pytest.mark.parametrize("step, fault", FAULTS, ids=[f"{s}-{n}" for n, (s, _) in enumerate(FAULTS)])
def test_faults_are_seen(step, fault):
    with pytest.raises(Failed):
        STEPS[step](Faulty(**fault))


def test_every_step_has_a_fault_that_it_sees():
    """Except the first two, which only a driver can answer: see below."""
    assert {step for step, _ in FAULTS} == set(STEPS) - {"driver", "tensor maps"}


def test_what_the_driver_says_is_what_the_step_says(capsys):
    class Refusing(OnCpu):
        def problem(self):
            return "the NVIDIA driver serves CUDA up to 12.2"

        def tensor_map(self, x, rows):
            return None if x.stride(1) > x.stride(2) else "cuTensorMapEncodeTiled failed"

    with pytest.raises(Failed, match=r"up to 12\.2"):
        STEPS["driver"](Refusing())
    with pytest.raises(Failed, match=r"bshd: cuTensorMapEncodeTiled failed"):
        STEPS["tensor maps"](Refusing())


def test_a_failure_names_the_call_and_the_error(monkeypatch, capsys):
    monkeypatch.setattr(proof_steps, "OnCpu", lambda: Faulty(forward=scaled))
    assert proof_steps.main(["one tile", "--device", "cpu"]) == 1
    said = capsys.readouterr().out.strip()
    assert said.startswith("failed: out of [1, 1, 64, 128] of bfloat16, 1 kv heads, 64 keys")
    assert "error" in said and "allowed" in said


# ---- the CUDA kernels' own source --------------------------------------------------------------


class Emulated(OnCpu):
    """sm_90's kernels for many rows and sm_80's for few, as csrc/cuda/ops.cu chooses."""

    heads = 2

    def forward(self, call):
        many = call.q.shape[2] > 64 and not call.operands.paged
        arch, splits = ("sm90", 0) if many else ("sm80", call.num_splits)
        return Result(*emulated.forward(problem_of(call), seed=1, arch=arch, num_splits=splits))

    def backward(self, call, result, dout, dlse=None, *, sinks=False):
        grads = emulated.backward(problem_of(call), dout, dlse, *result, seed=1)
        return Gradients(*grads[:3], None, grads[3])


def problem_of(call) -> Problem:
    return Problem(call.q, call.k, call.v, call.spec, call.operands)


@pytest.mark.skipif(emulated.why_not() is not None, reason=f"no emulator: {emulated.why_not()}")
def test_the_cuda_kernels_pass_on_the_emulator():
    """The tolerance rule fits them, and so does the way in which the steps call them."""
    device = Emulated()
    for case in (
        Case(64, 64, splits=1),
        Case(64, 200, splits=4),
        Case(130, 150, 64, heads=2, kv_heads=1, numbers={"right": 0}),
        Case(150, 150, 64, batch=2, heads=2, layout="qkv", operands=proof_steps.kv_lens),
        Case(80, 80, 64, batch=2, heads=2, layout="expanded"),
    ):
        if case.layout == "expanded":  # which csrc/cuda/ops.cu copies
            with pytest.raises(emulated.Fault, match="of an expanded tensor"):
                proof_steps.check(device, case)
        else:
            assert proof_steps.check(device, case) <= 1
    for operands in (None, proof_steps.packed, proof_steps.sinks):
        case = Case(130, 150, 64, heads=2, numbers={"right": 0}, operands=operands)
        assert proof_steps.check(device, case, gradients=True) <= 1
    case = Case(100, 100, 64, torch.float8_e4m3fn, heads=2, operands=proof_steps.descales)
    out, _ = device.forward(case.call(*case.tensors("cpu")))
    assert out.isfinite().all()

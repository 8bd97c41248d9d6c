"""How the CUDA backward kernels are tested: gradients on the emulator against the reference's."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import emulated
import torch
from cases import Case
from cuda_cases import plain_attention

from fastattn.core.reference import reference
from fastattn.core.tolerance import allowed_error


class Kernel(NamedTuple):
    """The backward of an architecture and head dimension. more: additional arguments of its
    function in tests/emulator."""

    arch: str
    dim: int
    more: tuple = ()

    def __call__(self, *arguments, **options):
        return emulated.backward(*arguments, **options, arch=self.arch, more=self.more)


def gradients(attention, problem, dout, dlse):
    """out, lse and (dq, dk, dv, dsinks); an empty row's lse is -inf and has no gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in problem[:3]]
    problem = problem._replace(q=inputs[0], k=inputs[1], v=inputs[2])
    if problem.operands.sinks is not None:
        inputs.append(problem.operands.sinks.detach().clone().requires_grad_())
        problem = problem._replace(operands=replace(problem.operands, sinks=inputs[3]))
    out, lse = attention(problem)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * dlse.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def check(
    kernel: Kernel, case: Case, dtype: torch.dtype, seed: int, with_dlse=True, deterministic=True
) -> None:
    """At most three times the error of plain attention's gradients in dtype, plus a rounding."""
    problem = replace(case, head_dim=kernel.dim).make(dtype, seed)
    draw = torch.Generator().manual_seed(seed)
    dout = torch.randn(problem.q.shape, generator=draw).to(dtype)
    dlse = torch.randn(problem.q.shape[:3], generator=draw) if with_dlse else None
    wide = problem.to(torch.float64)
    out, lse, expected = gradients(lambda p: reference(*p), wide, dout, dlse)
    _, _, plain = gradients(plain_attention, problem, dout, dlse)
    if case.packed:  # rows of no sequence
        dout[:, :, sum(rows for rows, _ in case.packed) :] = torch.nan
    given = (out.to(dtype), lse.float().contiguous())
    got = kernel(problem, dout, dlse, *given, seed=seed, deterministic=deterministic)
    for name, x, true, rough in zip(("dq", "dk", "dv", "dsinks"), got, expected, plain):
        # dscores of an only key are 0, less the rounding of two fp32 sums over D, for each row
        rounding = 4e-5 if kernel.dim == 256 else 1e-5
        rounding += 2 * torch.finfo(dtype).eps * true.abs().max()
        limit = allowed_error("gradient", (rough.double() - true).abs().max(), rounding)
        assert (x.double() - true).abs().max() <= limit, name


def same_bits(kernel: Kernel, packed: tuple = ()) -> None:
    """Sums into dq are in one order, those into dsinks in a tree: no bit depends on timing."""
    shape = {"heads": 4, "kv_heads": 2, "q_len": 200, "kv_len": 300, "head_dim": kernel.dim}
    problem = Case("cuda/bits", causal=True, sinks=True, packed=packed, **shape).make(torch.float16)
    out, lse = reference(*problem)
    dout = torch.randn_like(out)
    runs = [kernel(problem, dout, None, out, lse, seed=seed) for seed in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, runs[0]))


def sequences_are_apart(kernel: Kernel) -> None:
    """NaN in the rows, keys and cotangents of one sequence changes no bit of the others."""
    packed = ((70, 90), (100, 60), (40, 140))
    case = Case("cuda/packed", packed=packed, head_dim=kernel.dim, causal=True)
    problem = case.make(torch.float16)
    out, lse = reference(*problem)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).half()
    expected = kernel(problem, dout, None, out, lse, seed=1)
    own, theirs = slice(70, 170), slice(90, 150)
    for x, middle in ((problem.q, own), (problem.k, theirs), (problem.v, theirs), (dout, own)):
        x[:, :, middle] = torch.nan
    got = kernel(problem, dout, None, out, lse, seed=1)
    for x, y, middle in zip(got, expected, (own, theirs, theirs)):
        for others in (slice(0, middle.start), slice(middle.stop, None)):
            assert torch.equal(x[:, :, others], y[:, :, others])

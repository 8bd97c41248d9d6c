"""The CUDA backward kernels, on the emulator, against the reference's gradients in float64."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from cases import Case
from cuda_cases import DIMS, MASKS, OPTIONS, PACKED, SHAPES, plain_attention

from fastattn.reference import reference

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"no emulator here: {emulated.why_not()}"
)


def gradients(attention, problem, dout, dlse):
    """out, lse and (dq, dk, dv, dsinks); a dead row's lse is -inf and passes nothing on."""
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


def check(case: Case, dtype: torch.dtype, seed: int, with_dlse=True, turns=True) -> None:
    """Within three times the error of plain attention's gradients in dtype, and a rounding."""
    problem = case.make(dtype, seed)
    draw = torch.Generator().manual_seed(seed)
    dout = torch.randn(problem.q.shape, generator=draw).to(dtype)
    dlse = torch.randn(problem.q.shape[:3], generator=draw) if with_dlse else None
    wide = problem.to(torch.float64)
    out, lse, expected = gradients(lambda p: reference(*p), wide, dout, dlse)
    _, _, plain = gradients(plain_attention, problem, dout, dlse)
    if case.packed:  # rows of no sequence
        dout[:, :, sum(rows for rows, _ in case.packed) :] = torch.nan
    got = emulated.backward(problem, dout, dlse, out.to(dtype), lse.float().contiguous(), seed,
                             turns=turns)  # fmt: skip
    for name, x, true, rough in zip(("dq", "dk", "dv", "dsinks"), got, expected, plain):
        limit = 3 * (rough.double() - true).abs().max()
        # dscores of an only key are 0, less the rounding of two fp32 sums over D, for each row
        limit += 2 * torch.finfo(dtype).eps * true.abs().max() + 4e-5
        assert (x.double() - true).abs().max() <= limit, name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", DIMS)
def test_masks(dim, shape, mask):
    seed = DIMS.index(dim) + list(SHAPES).index(shape) + list(MASKS).index(mask)
    case = Case(f"cuda/{shape}-{mask}", head_dim=dim, **SHAPES[shape], **MASKS[mask])
    check(case, torch.bfloat16 if seed % 2 else torch.float16, seed, with_dlse=seed % 3 > 0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dim", DIMS)
def test_options(dim, option):
    seed = DIMS.index(dim) + list(OPTIONS).index(option)
    case = Case(f"cuda/{option}", head_dim=dim, **OPTIONS[option])
    check(case, torch.float16 if seed % 2 else torch.bfloat16, seed)


@pytest.mark.parametrize("turns", (True, False), ids=("turns", "any-order"))
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dim", DIMS)
def test_packed_sequences(dim, name, turns):
    seed = DIMS.index(dim) + list(PACKED).index(name) + turns
    case = Case("cuda/packed", head_dim=dim, **PACKED[name])
    check(case, torch.float16 if seed % 2 else torch.bfloat16, seed, turns=turns)


@pytest.mark.parametrize("dim", DIMS)
def test_packed_sequences_do_not_see_each_other(dim):
    """NaN in one sequence, in rows, keys and cotangents alike, changes no bit of the others."""
    case = Case("cuda/packed", packed=((70, 90), (100, 60), (40, 140)), head_dim=dim, causal=True)
    problem = case.make(torch.float16)
    out, lse = reference(*problem)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).half()
    expected = emulated.backward(problem, dout, None, out, lse, seed=1)
    own, theirs = slice(70, 170), slice(90, 150)
    for x, middle in ((problem.q, own), (problem.k, theirs), (problem.v, theirs), (dout, own)):
        x[:, :, middle] = torch.nan
    got = emulated.backward(problem, dout, None, out, lse, seed=1)
    for x, y, middle in zip(got, expected, (own, theirs, theirs)):
        for others in (slice(0, middle.start), slice(middle.stop, None)):
            assert torch.equal(x[:, :, others], y[:, :, others])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", DIMS)
def test_without_turns(dim, seed):
    case = Case("cuda/no-turns", batch=1, q_len=260, kv_len=390, head_dim=dim, causal=True)
    check(case, torch.bfloat16, seed, turns=False)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dim", DIMS)
def test_moments_of_asynchronous_work(dim, seed):
    mask = {"window": (200, 0)} if seed % 2 else {"causal": True}
    case = Case("cuda/seeds", batch=1, q_len=260, kv_len=390, head_dim=dim, **mask)
    check(case, torch.bfloat16, seed)


@pytest.mark.parametrize("packed", ((), ((90, 200), (110, 100))), ids=("batch", "packed"))
@pytest.mark.parametrize("dim", DIMS)
def test_every_schedule_gives_the_same_bits(dim, packed):
    """Sums into dq are taken in turns, those into dsinks in a tree: no bit depends on time."""
    shape = {"heads": 4, "kv_heads": 2, "q_len": 200, "kv_len": 300, "head_dim": dim}
    case = Case("cuda/bits", causal=True, sinks=True, packed=packed, **shape)
    problem = case.make(torch.float16)
    out, lse = reference(*problem)
    dout = torch.randn_like(out)
    runs = [emulated.backward(problem, dout, None, out, lse, seed) for seed in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, runs[0]))

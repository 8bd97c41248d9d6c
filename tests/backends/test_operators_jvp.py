"""The operators of forward mode and of its backward as torch sees them: opcheck, fake kernels,
vmap, autocast, FLOPs, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from operator_calls import name_of, numbers
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fastattn.backends import operators_jvp, schema
from fastattn.core.reference import reference
from fastattn.core.spec import LEAVES, OPERANDS, Operands, Spec
from fastattn.core.transforms import push_forward

JVP, JVP_BWD = schema.jvp, schema.jvp_bwd
FIRST = 3 + len(OPERANDS)

CASES = [
    Case("plain", q_len=3, kv_len=5, head_dim=4),
    Case("gqa, v_dim, bshd", heads=4, kv_heads=2, q_len=3, kv_len=5, head_dim=4, v_dim=3,
         layout="bshd", causal=True),
    Case("mask, bias, sinks", q_len=3, kv_len=5, head_dim=4, mask="entries", bias="heads",
         sinks=True, alibi="batch", softcap=2.0),
    Case("dropout, lengths", q_len=3, kv_len=5, head_dim=4, dropout=0.4, kv_lens=(5, 2),
         kv_starts=(1, 0), layout="ragged"),
    Case("packed", head_dim=4, packed=((2, 3), (1, 0), (3, 4)), bias="plane"),
]  # fmt: skip


def made(case: Case, dtype=torch.float64):
    """(tensors before the numbers, the numbers, a tangent of each input that may have one)."""
    problem = case.make(dtype)
    tensors = [*problem[:3], *problem.operands.tensors()]
    tensors = [x.nan_to_num() if x is not None and x.is_floating_point() else x for x in tensors]
    leaves = Operands(*tensors[3:]).leaves()
    tangents = [None if x is None else torch.randn_like(x) for x in (*tensors[:3], *leaves)]
    return tensors, numbers(problem.spec), tangents


def wanting_grad(tensors):
    return [
        x.clone().requires_grad_() if x is not None and x.is_floating_point() and n != 5 else x
        for n, x in enumerate(tensors)  # index 5: ALiBi's slopes, which have no gradient
    ]


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck_jvp(case):
    tensors, spec, tangents = made(case)
    opcheck(JVP, (*tensors, *spec, *tangents))
    if case.name in ("plain", "mask, bias, sinks"):  # the others differ in what the kernels do
        opcheck(JVP, (*wanting_grad(tensors), *spec, *wanting_grad(tangents)))


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck_jvp_bwd(case):
    tensors, spec, tangents = made(case)
    results = JVP(*tensors, *spec, *tangents)
    needs = [x is not None for x in Operands(*tensors[3:]).leaves()]
    cotangents = (torch.randn_like(results[2]), torch.randn_like(results[3]))
    opcheck(JVP_BWD, (*cotangents, *results, *tensors, *spec, *tangents, *needs))
    no_dtlse = (cotangents[0], None, *results, *tensors, *spec, *tangents[:1], *[None] * 4)
    opcheck(JVP_BWD, (*no_dtlse, *[False] * len(needs)))


def functions(case):
    """(the operator's (out, lse, tout, tlse) of its inputs, the same of the reference, inputs)."""
    tensors, spec, tangents = made(case)
    at = [n for n, name in enumerate(OPERANDS, 3) if name in LEAVES and tensors[n] is not None]
    inputs = [*tensors[:3], *(tensors[n] for n in at), *(t for t in tangents if t is not None)]
    n, given = 3 + len(at), [t is not None for t in tangents]

    def all_tensors(primals):
        full = list(tensors)
        for place, x in zip((0, 1, 2, *at), primals):
            full[place] = x
        return full

    def operator(*x):
        left = iter(x[n:])
        return JVP(*all_tensors(x[:n]), *spec, *(next(left) if y else None for y in given))

    def attend(*primals):
        full = all_tensors(primals)
        out, lse = reference(*full[:3], Spec(*spec), Operands(*full[3:]))
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    def exact(*x):
        return *attend(*x[:n]), *push_forward(attend, x[:n], x[n:])

    return operator, exact, [x.requires_grad_() for x in inputs]


@pytest.mark.native
@pytest.mark.parametrize("case", CASES[2:], ids=name_of)
def test_direct_calls_have_three_derivatives(case):
    operator, exact, inputs = functions(case)
    found = []
    for function in (operator, exact):
        torch.manual_seed(0)
        results = function(*inputs)
        dead = results[1] == -torch.inf
        loss = sum(x.sin().sum() for x in (results[0], results[2], results[3]))
        loss = loss + results[1].masked_fill(dead, 0).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), inputs)
        found.append((*first, *second))
    torch.testing.assert_close(*found)


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_vmap_and_loop_agree(case):
    """Over tangents, over q and its cotangent, and over all at once; packed calls and dropout run
    one by one."""
    tensors, spec, tangents = made(case)
    many = [None if t is None else torch.stack((t, 2 * t.flip(-1))) for t in tangents]
    q2 = torch.stack((tensors[0], tensors[0].flip(-1)))
    needs = [x is not None for x in Operands(*tensors[3:]).leaves()]

    def both(q, *tangents):
        results = JVP(q, *tensors[1:], *spec, *tangents)
        cotangents = (results[0].sin(), torch.ones_like(results[3]))
        grads = JVP_BWD(*cotangents, *results, q, *tensors[1:], *spec, *tangents, *needs)
        return *results, *grads

    for over_q in (None, 0):
        for some in (range(5), (0,), (3, 4), ()):
            if over_q is None and not some:
                continue
            dims = [0 if n in some and many[n] is not None else None for n in range(5)]
            args = [many[n] if d == 0 else tangents[n] for n, d in enumerate(dims)]
            if over_q is None and not any(d == 0 for d in dims):
                continue
            q = q2 if over_q == 0 else tensors[0]
            got = torch.vmap(both, in_dims=(over_q, *dims))(q, *args)
            for n in range(2):
                one = [x[n] if d == 0 else x for x, d in zip(args, dims)]
                want = both(q[n] if over_q == 0 else q, *one)
                for mine, x in zip(got, want, strict=True):
                    torch.testing.assert_close(mine[n], x)


@pytest.mark.native
def test_autocast_and_flops():
    tensors, spec, tangents = made(CASES[0], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse, tout, tlse = JVP(*tensors, *spec, *tangents)
    assert out.dtype == tout.dtype == torch.bfloat16 and lse.dtype == tlse.dtype == torch.float32
    pairs, dim = 2 * 2 * 3 * 5, 4
    with FlopCounterMode(display=False) as mode:
        results = JVP(*tensors, *spec, *tangents)
    assert mode.get_total_flops() == 2 * pairs * (3 * dim + 3 * dim)
    with FlopCounterMode(display=False) as mode:
        JVP(*tensors, *spec, tangents[0], *[None] * 4)
    assert mode.get_total_flops() == 2 * pairs * (2 * dim + 2 * dim)
    cotangents = (results[2], None)
    with FlopCounterMode(display=False) as mode:
        JVP_BWD(*cotangents, *results, *tensors, *spec, *tangents, False, False)
    assert mode.get_total_flops() == 2 * pairs * (7 * dim + 3 * dim)


@pytest.mark.native
def test_plain_torch_gives_what_the_kernels_give():
    """The kernels that run where no library has one: the same shapes, dtypes and strides."""
    for case in CASES:
        tensors, spec, tangents = made(case, torch.float32)
        results = JVP(*tensors, *spec, *tangents)
        plain = operators_jvp.plain_jvp(*tensors, *spec, *tangents)
        needs = [x is not None for x in Operands(*tensors[3:]).leaves()]
        rest = (*tensors, *spec, *tangents, *needs)
        cotangents = (torch.ones_like(results[2]), torch.ones_like(results[3]))
        pairs = zip(
            (*results, *JVP_BWD(*cotangents, *results, *rest)),
            (*plain, *operators_jvp.plain_jvp_bwd(*cotangents, *results, *rest)),
            strict=True,
        )
        for x, y in pairs:
            assert x.stride() == y.stride()
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.native
@pytest.mark.parametrize("name", ["tq", "tk", "tv"])
def test_wrong_tangents_are_named(name):
    tensors, spec, tangents = made(CASES[0], torch.float32)
    n = ("tq", "tk", "tv").index(name)
    for bad in (tangents[n][..., :2], tangents[n].double()):
        args = [bad if m == n else t for m, t in enumerate(tangents)]
        with pytest.raises((RuntimeError, ValueError, TypeError), match=name):
            JVP(*tensors, *spec, *args)
        meta = [None if x is None else x.to("meta") for x in (*tensors, *args)]
        with pytest.raises((RuntimeError, ValueError, TypeError), match=name):
            JVP(*meta[:FIRST], *spec, *meta[FIRST:])

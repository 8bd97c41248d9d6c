"""Forward mode, second and third derivatives: what they cost, in which programs they work, and what
is refused. test_derivatives.py has torch's own checks of their values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import Case, select
from operator_calls import name_of, numbers
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.core import derivatives
from fastattn.core.call import Call, Tangents
from fastattn.core.reference import reference
from fastattn.core.spec import OPERANDS, Operands, Spec
from fastattn.core.transforms import pull_back, push_forward

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.native)]


def qkv(batch=1, heads=2, q_len=5, kv_len=5, dim=4, dtype=torch.float64):
    shapes = ((heads, q_len), (heads, kv_len), (heads, kv_len))
    return [torch.randn(batch, *shape, dim, dtype=dtype) for shape in shapes]


# ---- the formulas, against derivatives of the reference ------------------------------------------

EVERY = select("alone", "everything") + [
    case for case in select("edge") if case.name.endswith(("+sinks", "nothing", "minus_inf"))
]


def direction(problem):
    """Random tangents of a problem's inputs."""
    draw = torch.Generator().manual_seed(2)
    inputs = (*problem[:3], *problem.operands.leaves())
    return [
        None if x is None else torch.randn(x.shape, generator=draw, dtype=torch.float64)
        for x in inputs
    ]


@pytest.mark.parametrize("case", [x for x in EVERY if x.has_backward], ids=name_of)
@pytest.mark.parametrize("given", ["all", "some"])
def test_formulas_are_derivatives_of_the_reference(case: Case, given, monkeypatch):
    monkeypatch.setattr(derivatives, "CHUNK", 2000)  # several chunks of each sequence
    monkeypatch.setattr(derivatives, "LEAST_ROWS", 8)
    problem = case.make(torch.float64)
    leaves, others = problem.operands.leaves(), problem.operands.others()
    tangents = direction(problem)
    if given == "some":  # absent tangents are zero
        tangents = [None if n in (0, 2, 4) else x for n, x in enumerate(tangents)]

    def exact(q, k, v, *leaves):
        return tuple(reference(q, k, v, problem.spec, Operands.join(leaves, others)))

    inputs = (*problem[:3], *leaves)
    out, lse = exact(*inputs)
    dead = lse == -torch.inf
    got = derivatives.jvp(Call(*problem), Tangents(*tangents))
    pushed = push_forward(exact, inputs, tangents)
    assert torch.equal(got.lse == -torch.inf, dead)
    for mine, want in ((got.out, out), (got.tout, pushed[0])):
        torch.testing.assert_close(mine, want)
    for mine, want in ((got.lse, lse), (got.tlse, pushed[1])):
        torch.testing.assert_close(mine.masked_fill(dead, 0), want.masked_fill(dead, 0))
    assert not got.tout[dead].any() and not got.tlse[dead].any()

    dtout, dtlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(dead, 0)

    def tangents_of(*inputs):
        return push_forward(exact, inputs, tangents)

    grads = derivatives.jvp_bwd(Call(*problem), Tangents(*tangents), dtout, dtlse, (True, True))
    for mine, want in zip(grads, pull_back(tangents_of, inputs, (dtout, dtlse))):
        if want is None:
            assert mine.shape == (0,)
        else:  # what nothing sees is NaN in these cases, and its gradient 0
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, want.nan_to_num())


@pytest.mark.parametrize("name", ["everything/dense", "everything/packed"])
def test_third_derivatives_are_those_of_the_reference(name, monkeypatch):
    (case,) = (x for x in select("everything") if x.name == name)
    monkeypatch.setattr(derivatives, "CHUNK", 20000)
    problem = case.make(torch.float64)
    others, tangents = problem.operands.others(), direction(problem)
    inputs = [x.nan_to_num() for x in (*problem[:3], *problem.operands.leaves())]
    out, lse = reference(*problem[:3], problem.spec, problem.operands)
    dtout, dtlse = torch.randn_like(out), torch.randn_like(lse)

    def exact(q, k, v, *leaves):
        out, lse = reference(q, k, v, problem.spec, Operands.join(leaves, others))
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    def expected(*inputs):
        return pull_back(lambda *x: push_forward(exact, x, tangents), inputs, (dtout, dtlse))

    def chunked(q, k, v, *leaves):
        call = Call(q, k, v, problem.spec, Operands.join(leaves, others))
        return tuple(derivatives.jvp_bwd(call, Tangents(*tangents), dtout, dtlse, (True, True)))

    cotangents = [torch.randn_like(x) for x in inputs]
    got = pull_back(chunked, inputs, cotangents)
    for mine, want in zip(got, pull_back(expected, inputs, cotangents)):
        torch.testing.assert_close(mine, want)


# ---- how many passes -----------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The names of fastattn's operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("fastattn::"):
            self.names.append(name.removeprefix("fastattn::flash_attn_"))
        return function(*args, **(kwargs or {}))


@pytest.mark.native
def test_forward_mode_is_one_pass():
    q, k, v = qkv()

    def loss(q):
        return fastattn.attention(q, k, v).square().sum()

    with Calls() as calls, forward_ad.dual_level():
        loss(forward_ad.make_dual(q, q))
    assert calls.names == ["jvp"]
    with Calls() as calls:
        torch.func.jvp(loss, (q,), (q,))
    assert calls.names == ["jvp"]
    with Calls() as calls:
        torch.func.vmap(lambda t: torch.func.jvp(loss, (q,), (t,))[1])(torch.stack((q, q)))
    assert calls.names == ["jvp"]
    with Calls() as calls:  # the outer transform's tangents are not seen by the inner forward
        torch.func.jvp(torch.func.grad(loss), (q,), (q,))
    assert sorted(calls.names) == ["bwd", "bwd", "fwd", "jvp", "jvp_bwd"]
    leaf = q.clone().requires_grad_()
    with Calls() as calls, forward_ad.dual_level():
        torch.autograd.grad(loss(forward_ad.make_dual(leaf, q)), leaf)
    assert sorted(calls.names) == ["bwd", "bwd", "jvp", "jvp_bwd"]
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with Calls() as calls:
        grad.sum().backward()
    assert sorted(calls.names) == ["bwd", "jvp", "jvp_bwd"]


# ---- programs ------------------------------------------------------------------------------------


def plain(q, k, v):
    """Causal attention in torch's operations."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def causal(q, k, v):
    return fastattn.attention(q, k, v, causal=True)


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def hessian_vector(attend, q, k, v):
    """Forward over reverse."""
    gradient = torch.func.grad(lambda q: attend(q, k, v).square().sum())
    return torch.func.jvp(gradient, (q,), (v,))[1]


def mean_flow(attend, q, k, v):
    """The gradient of a loss of a tangent, as consistency models have it."""

    def loss(w):
        u, du = torch.func.jvp(lambda q: attend(w * q, k, v), (q,), (v,))
        return (u - du).square().sum()

    return torch.func.grad(loss)(k)


def gradient_penalty(attend, q, k, v):
    leaf, weight = q.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
    score = attend(leaf, k, weight).square().sum()
    (grad,) = torch.autograd.grad(score, leaf, create_graph=True)
    (grad.norm() - 1).square().backward()
    return weight.grad


def maml(attend, q, k, v):
    """Gradients through two steps of gradient descent."""
    start = v.detach().clone().requires_grad_()
    weight = start
    for _ in range(2):
        loss = (attend(q, k, weight) - q).square().mean()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        weight = weight - 0.1 * grad
    return torch.autograd.grad((attend(q, k, weight) - q).square().mean(), start)[0]


def dual(attend, q, k, v):
    """A Hessian-vector product by torch.autograd's own forward over reverse."""
    leaf = q.detach().clone().requires_grad_()
    with forward_ad.dual_level():
        out = attend(forward_ad.make_dual(leaf, v), k, v)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        return forward_ad.unpack_dual(grad).tangent


def hessian(attend, q, k, v):
    return torch.func.hessian(lambda q: attend(q, k, v).square().sum())(q)


def jacobians(attend, q, k, v):
    forward, reverse = (
        f(lambda q: attend(q, k, v)) for f in (torch.func.jacfwd, torch.func.jacrev)
    )
    return torch.stack((forward(q), reverse(q)))


def reentrant(attend, q, k, v):
    leaf = q.detach().clone().requires_grad_()
    out = checkpoint(lambda q: hessian_vector(attend, q, k, v), leaf, use_reentrant=True)
    out.square().sum().backward()
    return leaf.grad


def checkpointed(attend, q, k, v):
    """A tangent and a gradient penalty, of which nothing is kept but the inputs."""
    leaf = q.detach().clone().requires_grad_()

    def tangent(q):
        return torch.func.jvp(lambda q: attend(q, k, v), (q,), (v,))[1]

    out = checkpoint(tangent, leaf, use_reentrant=False) + checkpoint(
        attend, leaf, k, v, use_reentrant=False
    )
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    grad.square().sum().backward()
    return leaf.grad


PROGRAMS = [hessian_vector, mean_flow, gradient_penalty, maml, dual, hessian, jacobians, reentrant,
            checkpointed]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_programs(program, backend):
    q, k, v = qkv(q_len=4, kv_len=4)

    def ours(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend=backend)

    torch.testing.assert_close(program(ours, q, k, v), program(plain, q, k, v))


@pytest.mark.native
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda x: x.__name__)
def test_programs_under_override_sdpa(program):
    """torch's own kernel on the CPU has no second derivative and no forward mode."""
    q, k, v = qkv(q_len=4, kv_len=4)
    with fastattn.override_sdpa():
        got = program(sdpa, q, k, v)
    torch.testing.assert_close(got, program(plain, q, k, v))


@pytest.mark.native
@pytest.mark.parametrize(
    "program", [hessian_vector, mean_flow, jacobians], ids=lambda x: x.__name__
)
def test_programs_in_torch_compile(program):
    q, k, v = qkv(q_len=4, kv_len=4)
    compiled = torch.compile(lambda *x: program(causal, *x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), program(plain, q, k, v))


@pytest.mark.native
def test_training_of_compiled_derivatives():
    """torch.compile has no double backward of its own, so that the first derivative is taken inside
    the compiled function, and the second by backward()."""
    q, k, v = qkv(q_len=4, kv_len=4)

    def penalty(attend, q, v):
        grad = torch.func.grad(lambda q: attend(q, k, v).square().sum())(q)
        return grad.square().sum()

    def flow(attend, q, v):
        out, tangent = torch.func.jvp(lambda q: attend(q, k, v), (q,), (v,))
        return (out - tangent).square().sum()

    for loss in (penalty, flow):
        results = []
        for attend in (causal, plain):
            leaves = [x.clone().requires_grad_() for x in (q, v)]
            function = loss
            if attend is causal:
                function = torch.compile(loss, fullgraph=True, backend="aot_eager")
            function(attend, *leaves).backward()
            results.append([x.grad for x in leaves])
        torch.testing.assert_close(*results)


# ---- dtypes, memory, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
def test_tangents_have_the_dtype_of_their_results(backend, dtype):
    q, k, v = qkv(q_len=20, kv_len=30, dim=16)
    half = [x.to(dtype) for x in (q, k, v)]
    bias = torch.randn(1, 2, 20, 30, dtype=dtype)

    def ours(q, k, v, bias):
        return fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend)

    inputs = (*half, bias)
    (out, lse), (tout, tlse) = torch.func.jvp(ours, inputs, inputs)
    assert out.dtype == tout.dtype == dtype and lse.dtype == tlse.dtype == torch.float32
    wide = tuple(x.double() for x in inputs)
    _, (exact, exact_lse) = torch.func.jvp(ours, wide, wide)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(tout.double(), exact, atol=8 * eps, rtol=8 * eps)
    torch.testing.assert_close(tlse.double(), exact_lse, atol=1e-4, rtol=1e-4)


PEAKS = """
import torch, fastattn

def field(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def above(call):  # bytes taken beside what was held before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = field("VmRSS")
    call()
    return field("VmHWM") - before

torch.set_num_threads(1)
BACKEND, LENGTH = {backend!r}, {length}
def run(length):
    leaves = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    def grads(order):
        y = fastattn.attention(*leaves, causal=True, backend=BACKEND)
        for _ in range(order - 1):
            y = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)[0]
        return torch.autograd.grad(y.square().sum(), leaves)
    return grads
def pushed(length):
    q, k, v = (torch.randn(1, 1, length, 16) for _ in range(3))
    f = lambda *x: fastattn.attention(*x, causal=True, backend=BACKEND)
    return torch.func.jvp(f, (q, k, v), (q, k, v))
run(64)(3)
pushed(64)
print(above(lambda: pushed(LENGTH)), above(lambda: run(LENGTH)(2)), above(lambda: run(LENGTH)(3)))
"""


@pytest.mark.native
def test_no_order_stores_all_scores():
    """One plane of scores is 64 MiB here; torch's operations store more than ten for the second
    order, and a hundred for the third."""
    length = 4096
    script = PEAKS.format(backend="cpu", length=length)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    forward_mode, second, third = map(int, done.stdout.split())
    plane = 4 * length * length
    assert forward_mode < 1.5 * plane and second < 2 * plane and third < 4 * plane, done.stdout


def test_forward_mode_of_decoding():
    """Caches are buffers, whose keys and values may have tangents, in pages too."""
    q, k, v = qkv(batch=2, q_len=1, kv_len=8)
    lens = torch.tensor([8, 5], dtype=torch.int32)
    table = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)

    def paged(x):  # [B, heads, 8, D] -> four pages of four keys, of which the table swaps pairs
        return x.unflatten(2, (2, 4)).flip(2).transpose(1, 2).flatten(0, 1)

    def decode(q, k, v):
        return fastattn.decode_attention(q, k, v, cache_lens=lens)

    def from_pages(q, k, v):
        return fastattn.decode_attention(q, paged(k), paged(v), cache_lens=lens, page_table=table)

    def exact(q, k, v):
        hidden = torch.arange(8) >= lens[:, None, None, None]
        return (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    want = torch.func.jvp(exact, (q, k, v), tangents)
    for function in (decode, from_pages):
        torch.testing.assert_close(torch.func.jvp(function, (q, k, v), tangents), want)


def test_what_has_no_tangent_is_refused():
    q, k, v = qkv()
    slopes = torch.tensor([0.3, 0.1])
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="alibi_slopes came with"),
    ):
        fastattn.attention(q, k, v, alibi_slopes=forward_ad.make_dual(slopes, slopes))
    with pytest.raises(NotImplementedError, match="alibi_slopes came with a tangent"):
        torch.func.jvp(lambda x: fastattn.attention(q, k, v, alibi_slopes=x), (slopes,), (slopes,))


@pytest.mark.parametrize(
    ("tangents", "error", "sentence"),
    [
        ({"q": torch.zeros(1, 2, 5, 3)}, ValueError, r"tq has shape \[1, 2, 5, 3\] and q"),
        ({"k": torch.zeros(1, 2, 5, 4)}, TypeError, "tk is torch.float32 and k torch.float64"),
        ({"bias": torch.zeros(1)}, ValueError, "tbias, a tangent of bias, came without bias"),
    ],
)
def test_wrong_tangents_are_named(tangents, error, sentence):
    call = Call(*qkv(), fastattn.core.spec.Spec(1.0), Operands())
    with pytest.raises(error, match=sentence):
        derivatives.jvp(call, Tangents(**tangents))


# ---- levels of forward_ad that attention() does not see ------------------------------------------


def _tangent_of_out(attend, q, k, v, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attend(forward_ad.make_dual(q, t), k, v)).tangent


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_level_inside_compiled_code(compiler):
    """The compiled graph enters the level in C++ and calls the operator with dual tensors."""
    q, k, v, t = torch.randn(4, 1, 2, 9, 8).unbind()

    def function(*tensors):
        return _tangent_of_out(fastattn.attention, *tensors)

    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, t), function(q, k, v, t))


def test_the_operator_itself_takes_tangents():
    q, k, v, t = torch.randn(4, 1, 2, 9, 8).unbind()
    want = _tangent_of_out(fastattn.attention, q, k, v, t)
    rest = (*(None,) * len(OPERANDS), *numbers(Spec(8**-0.5)), 0)

    def operator(*tensors):
        return torch.ops.fastattn.flash_attn_fwd(*tensors, *rest)[0]

    torch.testing.assert_close(_tangent_of_out(operator, q, k, v, t), want)


def test_other_operators_refuse_tangents():
    """torch.library would lose them without a word."""
    q, k, v, t = torch.randn(4, 1, 2, 9, 8).unbind()
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    call = (k, v, *(None,) * len(OPERANDS), *numbers(Spec(8**-0.5)))
    ops, tangents = torch.ops.fastattn, (None,) * 5
    calls = {
        "flash_attn_bwd": lambda q: ops.flash_attn_bwd(out, None, out, lse, q, *call, False, False),
        "flash_attn_jvp": lambda q: ops.flash_attn_jvp(q, *call, *tangents),
        "flash_attn_fwd_stats": lambda q: ops.flash_attn_fwd_stats(q, *call, 0, True, False),
        "flash_attn_maps": lambda q: ops.flash_attn_maps(lse, q, *call, True, 0, 0),
        "flash_attn_weights": lambda q: ops.flash_attn_weights(lse, q, *call, None, False),
    }
    for name, operator in calls.items():
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name} came with"):
            operator(forward_ad.make_dual(q, t))

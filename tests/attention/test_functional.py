"""attention() and varlen_attention() as users call them: the normal form of a call, autocast,
checkpointing, compile and export, and the choice of a backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import CASES, Case, select
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastattn
from fastattn.core.philox import keep_mask, keep_probability
from fastattn.core.reference import reference

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.native)]
PUBLIC = [c for c in CASES if c.function is not None and not c.name.startswith("long")]
DIFFERENTIABLE = [
    c for c in select("alone") if c.has_backward and c.function not in (None, "decode_attention")
]


def name_of(x) -> str:
    return x.name if isinstance(x, Case) else str(x).removeprefix("torch.")


def call(case: Case, problem, **more):
    tensors, options = case.call(problem)
    return getattr(fastattn, case.function)(*tensors, **options, **more)


def normal(case: Case, out, lse):
    """The public results in the operators' normal form."""
    return (out.transpose(0, 1)[None], lse[None]) if case.packed else (out, lse)


def qkv(*, batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, dim=8, v_dim=None, dtype=torch.float32):
    q = torch.randn(batch, heads, q_len, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, kv_len, dim, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, kv_len, v_dim or dim, dtype=dtype)


# ---- the normal form ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", PUBLIC, ids=name_of)
def test_every_case_means_what_its_normal_form_means(case):
    problem = case.make(torch.float32)
    out, lse = normal(case, *call(case, problem, return_lse=True, backend="reference"))
    want_out, want_lse = reference(*problem)
    torch.testing.assert_close(out, want_out, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_gradients_agree_with_the_references(case, dtype):
    results = {}
    for backend in ("cpu", "reference"):
        problem = case.make(dtype)
        leaves = {n: getattr(problem, n).requires_grad_() for n in "qkv"}
        for name in ("bias", "sinks"):
            if (x := getattr(problem.operands, name)) is not None:
                leaves[name] = x.requires_grad_()
        out, lse = call(case, problem, return_lse=True, backend=backend)
        torch.manual_seed(1)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
        results[backend] = dict(zip(leaves, grads)) | {"out": out, "lse": lse}
    for name, want in results["reference"].items():
        got = results["cpu"][name]
        assert got.dtype == want.dtype and got.shape == want.shape
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks(backend):
    q, k, v = qkv(heads=1, kv_heads=1)
    mask = torch.rand(2, 5, 7) > 0.4
    want, lse = fastattn.attention(q, k, v, mask=mask[:, None], return_lse=True, backend=backend)
    three = (q[:, 0], k[:, 0], v[:, 0])
    out, lse3 = fastattn.attention(*three, mask=mask, return_lse=True, backend=backend)
    assert torch.equal(out, want[:, 0]) and torch.equal(lse3, lse[:, 0])
    two = (q[1, 0], k[1, 0], v[1, 0])
    out, lse2 = fastattn.attention(*two, mask=mask[1], return_lse=True, backend=backend)
    torch.testing.assert_close(out, want[1, 0])
    torch.testing.assert_close(lse2, lse[1, 0])


ORDERS = {
    "contiguous": lambda x: x,
    "bshd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride not 1": lambda x: x.mT.contiguous().mT,
    "not dense": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("v_dim", [8, 6])
def test_out_has_the_memory_order_of_q(order, v_dim, backend):
    q, k, v = qkv(v_dim=v_dim)
    q, k = ORDERS[order](q), ORDERS[order](k)
    out = fastattn.attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, fastattn.attention(q.contiguous(), k.contiguous(), v))
    dense = order not in ("not dense", "expanded")
    same = v_dim == 8 and dense
    assert out.stride() == (q.stride() if same else torch.empty(out.shape).stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_causal_and_align(backend):
    q, k, v = qkv(q_len=9, kv_len=6)
    i, j = torch.arange(9)[:, None], torch.arange(6)
    for align, offset in (("end", -3), ("start", 0)):
        for window in (None, (2, None), (None, 1), (-1, 1), (0, 0), (3, -5), (2**40, 2)):
            for causal in (False, True):
                left, right = (-1 if x is None else x for x in window or (None, None))
                if causal and right > 0:
                    continue
                right = 0 if causal else right
                seen = torch.ones(9, 6, dtype=torch.bool)
                seen &= (j >= i + offset - left) if left >= 0 else seen
                seen &= (j <= i + offset + right) if right >= 0 else seen
                options = {"causal": causal, "window": window, "align": align}
                out = fastattn.attention(q, k, v, **options, backend=backend)
                torch.testing.assert_close(out, fastattn.attention(q, k, v, mask=seen))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_seed(backend):
    q, k, v = qkv(kv_heads=4)
    weights = torch.softmax(q @ k.mT / 8**0.5, -1)
    for seed in ((3, 4), (-7, 2**40), (2**64 - 1, 0)):
        out = fastattn.attention(q, k, v, dropout_p=0.4, dropout_seed=seed, backend=backend)
        signed = tuple(x - 2**64 if x >= 2**63 else x for x in seed)
        kept = keep_mask(signed, 8, 5, 7, 0.4).view(2, 4, 5, 7)
        torch.testing.assert_close(out, (weights * kept / keep_probability(0.4)) @ v)
        options = {"dropout_p": 0.4, "dropout_seed": torch.tensor(signed), "backend": backend}
        assert torch.equal(out, fastattn.attention(q, k, v, **options))
    torch.manual_seed(5)
    first = fastattn.attention(q, k, v, dropout_p=0.4, backend=backend)
    other = fastattn.attention(q, k, v, dropout_p=0.4, backend=backend)
    torch.manual_seed(5)
    drawn = torch.randint(0, 2**63 - 1, (2,))  # one draw from the default generator
    after = torch.rand(3)
    given = fastattn.attention(q, k, v, dropout_p=0.4, dropout_seed=drawn, backend=backend)
    torch.manual_seed(5)
    again = fastattn.attention(q, k, v, dropout_p=0.4, backend=backend)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(first, again) and torch.equal(first, given)
    assert not torch.equal(first, other)


def test_dropout_seed_without_dropout_has_no_effect_and_draws_nothing():
    q, k, v = qkv()
    state = torch.get_rng_state()
    assert torch.equal(
        fastattn.attention(q, k, v), fastattn.attention(q, k, v, dropout_seed=(1, 2))
    )
    assert torch.equal(state, torch.get_rng_state())


def test_a_second_call_alike_is_checked_by_values_too():
    q, k, v = qkv()
    for lens in ([0, 7], [3, 1]):
        fastattn.attention(q, k, v, kv_lens=torch.tensor(lens, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"kv_lens\[1\] is 8"):
        fastattn.attention(q, k, v, kv_lens=torch.tensor([3, 8], dtype=torch.int32))


# ---- what torch wraps around a call -------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    q, k, v = qkv()
    q.requires_grad_()
    bias = torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastattn.attention(q, k, v, bias=bias, backend=backend)
        out.float().sum().backward()
        exact = fastattn.attention(*(x.double() for x in (q, k, v)), backend=backend)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float64
    assert q.grad.dtype == bias.grad.dtype == torch.float32
    halves = (x.detach().bfloat16() for x in (q, k, v))
    assert torch.equal(out, fastattn.attention(*halves, bias=bias, backend=backend))
    with torch.autocast("cpu", enabled=False):
        assert fastattn.attention(q, k, v, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_recomputes_the_same_dropout(use_reentrant, backend):
    def block(q, k, v):
        out = fastattn.attention(q, k, v, dropout_p=0.5, causal=True, backend=backend)
        return torch.nn.functional.dropout(out, 0.5)

    results = []
    for run in (block, lambda *x: checkpoint(block, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaves = [x.requires_grad_() for x in qkv()]
        out = run(*leaves)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for got, want in zip(*results):
        assert torch.equal(got, want)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_function(q, k, v, bias, sinks, lens):
    out, lse = fastattn.attention(
        q, k, v, causal=True, window=(6, None), bias=bias, sinks=sinks, kv_lens=lens, softcap=9.0,
        return_lse=True,
    )  # fmt: skip
    return (out * out).sum() + lse.exp().sum(), out


@pytest.mark.native
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compile(compiler, fresh_dynamo):
    lens = torch.tensor([7, 5], dtype=torch.int32)
    results = []
    for f in (
        compiled_function,
        torch.compile(compiled_function, backend=compiler, fullgraph=True),
    ):
        torch.manual_seed(0)
        leaves = [*qkv(), torch.randn(4, 1, 7), torch.randn(4)]
        leaves = [x.requires_grad_() for x in leaves]
        loss, out = f(*leaves, lens)
        results.append([out, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


@pytest.mark.native
def test_compile_with_dynamic_shapes_dropout_and_autocast(fresh_dynamo):
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def f(q, k, v):
        return fastattn.attention(q, k, v, causal=True, dropout_p=0.5).float().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for length in (5, 6, 9):
            torch.manual_seed(length)
            leaves = [x.requires_grad_() for x in qkv(q_len=length)]
            torch.manual_seed(2)
            got = torch.autograd.grad(f(*leaves), leaves)
            torch.manual_seed(2)
            out = fastattn.attention(*leaves, causal=True, dropout_p=0.5)
            want = torch.autograd.grad(out.float().sum(), leaves)
            for a, b in zip(got, want):
                assert torch.equal(a, b)


@pytest.mark.native
def test_compile_packed_sequences(fresh_dynamo):
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (9, 12, 12))
    cu = (torch.tensor([0, 3, 9]), torch.tensor([0, 5, 12]))

    def f(q, k, v, cu_q, cu_k):
        return fastattn.varlen_attention(q, k, v, cu_q, cu_k, 6, 7, causal=True)

    got = torch.compile(f, backend="aot_eager", fullgraph=True)(q, k, v, *cu)
    assert torch.equal(got, f(q, k, v, *cu))


def test_compile_of_the_reference_is_traced_through(fresh_dynamo):
    q, k, v = qkv()

    def f(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend="reference")

    torch.testing.assert_close(
        torch.compile(f, backend="aot_eager", fullgraph=True)(q, k, v), f(q, k, v)
    )


# ---- choosing a backend -------------------------------------------------------------------------


def test_environment_names_a_backend(monkeypatch):
    q, k, v = qkv()
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="FASTATTN_BACKEND='cuda' cannot run this call"):
        fastattn.attention(q, k, v)
    fastattn.attention(q, k, v, backend="reference")  # the argument wins
    monkeypatch.setenv("FASTATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTATTN_BACKEND is 'fast'; accepted are 'cuda'"):
        fastattn.attention(q, k, v)
    monkeypatch.setenv("FASTATTN_BACKEND", "")
    fastattn.attention(q, k, v)


def test_log_prints_each_decision_once(monkeypatch, capfd):
    monkeypatch.setenv("FASTATTN_LOG", "1")
    q, k, v = qkv(dim=11)
    for _ in range(3):
        fastattn.attention(q, k, v, scale=0.123, backend="reference")
        fastattn.attention(q, k, v, scale=0.123, bias=torch.zeros(5, 7), backend="reference")
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "reference runs q [2, 4, 5, 11]" in lines[0] and "scale=0.123" in lines[0]
    assert "with bias" in lines[1] and "not cuda: " in lines[1]


def test_large_head_dims_run():
    q, k, v = qkv(dim=600, v_dim=3)
    want = torch.softmax(q @ k.repeat_interleave(2, 1).mT / 600**0.5, -1)
    torch.testing.assert_close(fastattn.attention(q, k, v), want @ v.repeat_interleave(2, 1))


@pytest.mark.native
def test_spec_and_operands_are_what_the_operator_gets():
    """The public call and the operator in normal form give the same bits."""
    case = select("everything")[0]
    assert case.name == "everything/dense" and case.function == "attention"
    problem = case.make(torch.float32)
    out = call(case, problem)
    spec = problem.spec
    numbers = (spec.scale, spec.softcap, spec.left, spec.right, spec.align_end, spec.dropout_p)
    operator = torch.ops.fastattn.flash_attn_fwd
    want, _ = operator(*problem[:3], *problem.operands.tensors(), *numbers, 0)
    assert torch.equal(out, want)


@pytest.mark.native
def test_export_and_fake_tensors():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, lens):
            return fastattn.attention(q, k, v, causal=True, kv_lens=lens)

    q, k, v = qkv()
    lens = torch.tensor([3, 7], dtype=torch.int32)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        Module(), (q, k, v, lens), dynamic_shapes=({2: rows}, None, None, None)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fastattn.flash_attn_fwd.default" in targets
    longer = torch.randn(2, 4, 9, 8)
    want = fastattn.attention(longer, k, v, causal=True, kv_lens=lens)
    assert torch.equal(program.module()(longer, k, v, lens), want)
    with FakeTensorMode():
        q, k, v = qkv()
        q.requires_grad_()
        out = fastattn.attention(q, k, v, dropout_p=0.5)
        out.sum().backward()
        assert out.shape == q.grad.shape == (2, 4, 5, 8)


@pytest.mark.native
def test_selective_checkpoint_keeps_the_attention():
    """If the checkpoint policy names it, attention runs once: recomputation uses the saved
    result."""

    class Ran(TorchDispatchMode):  # below checkpoint's own mode, which supplies the saved results
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.count += "flash_attn_fwd" in str(op)
            return op(*args, **(kwargs or {}))

    def policy(keeps: bool, ctx, op, *args, **kwargs):
        keeps = keeps and "flash_attn" in str(op)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    for keeps, times in ((True, 1), (False, 2)):
        q, k, v = (x.requires_grad_() for x in qkv())
        with Ran() as ran:
            out = checkpoint(
                lambda q, k, v: fastattn.attention(q * 2, k, v, dropout_p=0.5).sin(),
                *(q, k, v),
                use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, partial(policy, keeps)),
            )
            out.sum().backward()
        assert ran.count == times
        assert q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_another_layout_is_refused_also_where_a_call_alike_was_remembered():
    q = torch.randn(1, 2, 8, 16)
    expected = fastattn.attention(q, q, q)
    for other in (q.to_mkldnn(), q.to_sparse()):
        with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
            fastattn.attention(other, q, q)
        with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
            fastattn.attention(q, other, other)
    assert torch.equal(fastattn.attention(q, q, q), expected)

"""Every derivative of attention(), through torch's own checks and transforms; and vmap."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastattn

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.native)]


def qkv(*, batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, dim=8, v_dim=None, dtype=torch.float32):
    q = torch.randn(batch, heads, q_len, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, kv_len, dim, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, kv_len, v_dim or dim, dtype=dtype)


# ---- derivatives -------------------------------------------------------------------------------


def differentiable(name):
    """(function of fp64 leaves, leaves) for one kind of call; the functions return out and lse."""
    q, k, v = qkv(batch=2, heads=2, kv_heads=1, q_len=3, kv_len=4, dim=2, v_dim=3)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    extra = {}
    options = {
        "plain": {},
        "causal": {"causal": True, "window": (2, None)},
        "dead rows": {"causal": True, "window": (0, None), "kv_lens": [1, 4]},
        "softcap": {"softcap": 0.7, "scale": -0.9},
        "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1]), "align": "start"},
        "mask": {"mask": torch.rand(2, 1, 3, 4) > 0.4},
        "bias": {"softcap": 2.0},
        "sinks": {"causal": True},
        "dropout": {"dropout_p": 0.4, "dropout_seed": (1, 2)},
        "documents": {"document_ids": torch.tensor([[0, 0, 3], [1, 2, 2]])},
    }[name]
    if name == "documents":
        leaves[1], leaves[2] = (x.detach()[:, :, :3].requires_grad_() for x in leaves[1:])
    if name in ("bias", "dropout"):
        leaves.append(torch.randn(1, 2, 3, 1, dtype=torch.float64, requires_grad=True))
        extra["bias"] = 3
    if name in ("sinks", "dead rows"):
        leaves.append(torch.randn(2, dtype=torch.float64, requires_grad=True))
        extra["sinks"] = 3
    if "kv_lens" in options:
        options = {**options, "kv_lens": torch.tensor(options["kv_lens"], dtype=torch.int32)}

    def function(*leaves):
        tensors = {n: leaves[at] for n, at in extra.items()}
        out, lse = fastattn.attention(*leaves[:3], **options, **tensors, return_lse=True)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return function, leaves


KINDS = ["plain", "causal", "dead rows", "softcap", "alibi", "mask", "bias", "sinks", "dropout",
         "documents"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    function, leaves = differentiable(kind)
    assert gradcheck(
        function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True,
        check_batched_forward_grad=kind != "dropout",
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind):
    function, leaves = differentiable(kind)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_gradcheck_of_packed_sequences():
    q, k, v = (torch.randn(n, 2, 2, dtype=torch.float64, requires_grad=True) for n in (6, 7, 7))
    cu = (torch.tensor([0, 3, 3, 5]), torch.tensor([0, 2, 4, 7]))

    def function(q, k, v):
        out, lse = fastattn.varlen_attention(q, k, v, *cu, 3, 3, causal=True, return_lse=True)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    assert gradcheck(function, (q, k, v), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, (q, k, v), fast_mode=True)


def test_transforms_agree_with_plain_torch():
    """torch.func's transforms, nested, on a call and on the same formula in torch operations."""
    q, k, v = qkv(batch=1, heads=1, kv_heads=1, q_len=3, kv_len=3, dim=2, dtype=torch.float64)

    def ours(q, k, v):
        return fastattn.attention(q, k, v, softcap=3.0, causal=True).sin().sum()

    def plain(q, k, v):
        scores = 3 * torch.tanh(q @ k.mT / 2**0.5 / 3)
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ v).sin().sum()

    func, args = torch.func, (0, 1, 2)
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    for transform in (
        lambda f: func.grad(f, args)(q, k, v),
        lambda f: func.jvp(f, (q, k, v), tangents),
        lambda f: func.jvp(func.grad(f, args), (q, k, v), tangents),  # forward over reverse
        lambda f: func.grad(lambda *x: func.jvp(f, x, tangents)[1], args)(q, k, v),
        lambda f: func.hessian(f)(q, k, v),
        lambda f: func.jacrev(func.jacrev(f))(q, k, v),
        lambda f: func.vmap(func.grad(f, args))(*(x.expand(3, *x.shape) for x in (q, k, v))),
        lambda f: func.grad(lambda *x: sum(func.grad(f, args)(*x)[0].flatten() ** 3))(q, k, v),
    ):
        torch.testing.assert_close(transform(ours), transform(plain))


def test_forward_mode_levels_that_users_open():
    q, k, v = qkv(kv_heads=4, dtype=torch.float64)
    tangent = torch.randn_like(q)
    want = torch.func.jvp(lambda q: fastattn.attention(q, k, v), (q,), (tangent,))[1]
    with forward_ad.dual_level():
        out = fastattn.attention(forward_ad.make_dual(q, tangent), k, v)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, want)
        assert forward_ad.unpack_dual(fastattn.attention(q, k, v)).tangent is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_inputs_that_need_gradients_get_them(backend):
    q, k, v = qkv()
    bias, sinks = torch.randn(1, 4, 1, 7), torch.randn(4)
    for wanted in ("q", "k", "v", "bias", "sinks"):
        tensors = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        out, lse = fastattn.attention(**tensors, return_lse=True, backend=backend)
        for result in (out, lse):
            if result is lse and wanted == "v":
                continue
            (grad,) = torch.autograd.grad(result.sum(), tensors[wanted], retain_graph=True)
            assert grad.shape == tensors[wanted].shape and grad.isfinite().all()
    with torch.no_grad():
        q = q.clone().requires_grad_()
        assert not fastattn.attention(q, k, v, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_bias_and_sinks_get_gradients_in_their_dtype(backend):
    q, k, v = (x.bfloat16() for x in qkv(q_len=40, kv_len=50))
    bias = torch.randn(1, 4, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    out = fastattn.attention(q, k, v, bias=bias, sinks=sinks, backend=backend)
    out.float().square().sum().backward()
    assert bias.grad.dtype == sinks.grad.dtype == torch.bfloat16
    wide = [x.double() for x in (q, k, v)]
    bias64, sinks64 = (x.detach().double().requires_grad_() for x in (bias, sinks))
    exact = fastattn.attention(*wide, bias=bias64, sinks=sinks64)
    exact.backward(2 * out.detach().double())
    torch.testing.assert_close(sinks.grad.double(), sinks64.grad, rtol=0.03, atol=0.03)
    torch.testing.assert_close(bias.grad.double(), bias64.grad, rtol=0.03, atol=0.03)


def test_an_operand_changed_before_backward_is_noticed():
    q, k, v = qkv()
    q.requires_grad_()
    mask = torch.ones(5, 7, dtype=torch.bool)
    out = fastattn.attention(q, k, v, mask=mask)
    mask[0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- vmap ---------------------------------------------------------------------------------------

VMAPPED = {
    "q, k, v": {},
    "bias": {"bias": (3, 1, 4, 5, 7)},
    "bias of each entry": {"bias": (3, 2, 4, 1, 7)},
    "mask": {"mask": (3, 2, 1, 5, 7)},
    "slopes": {"alibi_slopes": (3, 4)},
    "slopes of each entry": {"alibi_slopes": (3, 2, 4)},
    "lengths": {"kv_lens": (3, 2)},
    "sinks": {"sinks": (3, 4)},
}


@pytest.mark.parametrize(
    ("operand", "batched"),
    [
        (operand, batched)
        for operand in VMAPPED
        for batched in ("all", "q", "k and v", "operand")
        if batched != "operand" or VMAPPED[operand]
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(operand, batched, backend):
    q, k, v = (torch.randn(2, *x.shape[:1], 3, *x.shape[1:])[0] for x in qkv())  # vmap over dim 1
    shared = {"bias": torch.randn(5, 7), "mask": torch.rand(2, 4, 5, 7) > 0.3}
    (name, shape), *_ = VMAPPED[operand].items() or [(None, None)]
    x = torch.rand(shape) if shape else None
    if name == "mask":
        x = x > 0.4
    elif name == "kv_lens":
        x = (1 + 6 * x).int()
    over_q, over_kv = batched in ("all", "q"), batched in ("all", "k and v")
    dims = (1 if over_q else None, 1 if over_kv else None, 1 if over_kv else None,
            0 if name and batched in ("all", "operand") else None)  # fmt: skip
    args = [a if d is not None else a.select(1, 0) for a, d in zip((q, k, v), dims)]
    args.append(x if x is None or dims[3] is not None else x[0])

    def out_and_grads(q, k, v, x):
        leaves = {"q": q, "k": k, "v": v}
        if name in ("bias", "sinks"):
            leaves[name] = x

        def loss(leaves):
            fixed = shared | ({name: x} if name and name not in leaves else {})
            options = fixed | {n: y for n, y in leaves.items() if n not in "qkv"}
            out, lse = fastattn.attention(
                leaves["q"], leaves["k"], leaves["v"], **options, return_lse=True, backend=backend
            )
            return (out * out).sum() + lse.sum(), out

        grads, out = torch.func.grad(loss, has_aux=True)(leaves)
        return out, grads

    got = torch.vmap(out_and_grads, in_dims=dims)(*args)
    for n in range(3):
        one = [a if d is None else a.select(d, n) for a, d in zip(args, dims)]
        want = out_and_grads(*one)
        mine = torch.utils._pytree.tree_map(lambda x, n=n: x[n], got)
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_dropout(backend):
    q, k, v = qkv(batch=1)
    many = q.expand(4, *q.shape)

    def f(q):
        return fastattn.attention(q, k, v, dropout_p=0.5, backend=backend)

    same = torch.vmap(f, randomness="same")(many)
    different = torch.vmap(f, randomness="different")(many)
    assert all(torch.equal(x, same[0]) for x in same)
    assert len({tuple(x.flatten().tolist()) for x in different}) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(many)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_packed_sequences(backend):
    q, k, v = (torch.randn(3, n, 2, 4) for n in (5, 6, 6))
    cu = (torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6]))

    def f(q, k, v):
        return fastattn.varlen_attention(q, k, v, *cu, 3, 4, causal=True, backend=backend)

    want = torch.stack([f(*x) for x in zip(q, k, v)])
    torch.testing.assert_close(torch.vmap(f)(q, k, v), want)


@pytest.mark.parametrize("operand", ["kv_lens", "document_ids"])
def test_further_derivatives_under_vmap_of_values_that_are_read(operand):
    """Each instance has its own lengths or documents, in every order of derivative."""
    q, k, v = qkv(batch=1, q_len=4, kv_len=4, dtype=torch.float64)
    xs = {
        "kv_lens": torch.tensor([[1], [3]]),
        "document_ids": torch.tensor([[[0, 0, 1, 1]], [[0] * 4]]),
    }[operand]

    def loss(q, x):
        return fastattn.attention(q, k, v, **{operand: x}).square().sum()

    def pushed(q, x):
        return torch.func.jvp(lambda q: loss(q, x), (q,), (q,))[1]

    def second(q, x):
        return torch.func.grad(lambda q: torch.func.grad(loss)(q, x).square().sum())(q)

    def third(q, x):
        return torch.func.grad(lambda q: second(q, x).square().sum())(q)

    for derivative in (pushed, second, third):
        many = torch.vmap(derivative, in_dims=(None, 0))(q, xs)
        shared = torch.vmap(derivative, in_dims=(0, None))(torch.stack((2 * q, q)), xs[0])
        for n in range(2):
            torch.testing.assert_close(many[n], derivative(q, xs[n]))
        torch.testing.assert_close(shared[1], many[0])

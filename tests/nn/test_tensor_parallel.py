"""Tensor parallelism: a rank has some of the heads, and head_origin says which. Dropout then drops
what one process would drop, on every backend, forward and backward."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastattn
from fastattn.core.philox import keep_mask
from fastattn.nn import Attention, TransformerBlock

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.native), "triton"]
KEY = (2**63 - 7, -3)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def device_of(backend):
    """The backend that runs it; skips the test if it cannot, in which case explain() gives a
    reason."""
    gpu = backend == "triton" and torch.cuda.is_available()
    q = torch.zeros(1, 1, 1, 16, device="cuda" if gpu else "cpu")
    if reason := fastattn.explain(q, q, q, backend=backend).reasons[backend]:
        pytest.skip(reason)
    return q.device


def tensors(batch, heads, kv_heads, q_len, kv_len, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, heads, q_len, 16), *[(batch, kv_heads, kv_len, 16)] * 2]
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


def parts(x, n):
    """x's heads split into n parts, [B, heads, ...]."""
    return x.chunk(n, 1)


# ---- the calls: the whole is its parts, side by side --------------------------------------------


def with_grads(call, q, k, v):
    """call's out and its gradients, all with heads in dimension 1."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = call(q, k, v)
    weight = torch.linspace(0.5, 1.5, out[0, 0].numel(), device=out.device).view(out[0, 0].shape)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [18, 3])  # 3: heads of one kv head share a tile
def test_dense_parts(backend, q_len):
    device = device_of(backend)
    options = {"dropout_p": 0.4, "dropout_seed": KEY, "causal": True, "backend": backend}
    q, k, v = tensors(2, 4, 2, q_len, 19, device)
    whole = with_grads(lambda *x: fastattn.attention(*x, **options), q, k, v)
    found = [
        with_grads(
            lambda *x, n=n: fastattn.attention(*x, head_origin=(2 * n, 4), **options),
            *(parts(x, 2)[n] for x in (q, k, v)),
        )
        for n in range(2)
    ]
    for want, *got in zip(whole, *found):
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_parts(backend):
    """Sequences count too: head h of sequence n is number n * total + first + h."""
    device = device_of(backend)
    cu = torch.tensor([0, 3, 3, 20], dtype=torch.int32, device=device)
    options = {"dropout_p": 0.4, "dropout_seed": KEY, "backend": backend}

    def call(q, k, v, **more):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out = fastattn.varlen_attention(q, k, v, cu, cu, 17, 17, **more, **options)
        return out.transpose(0, 1)[None]

    q, k, v = tensors(1, 4, 2, 20, 20, device)
    whole = with_grads(call, q, k, v)
    found = [
        with_grads(
            lambda *x, n=n: call(*x, head_origin=(2 * n, 4)), *(parts(x, 2)[n] for x in (q, k, v))
        )
        for n in range(2)
    ]
    for want, *got in zip(whole, *found):
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mask", "bias", "key_ranges"])
def test_entries_of_three_dimensions_are_not_taken_for_heads(name):
    """q [B, S, D] is one head; a mask [B, Sq, Skv] has entries in front, here as many as `total`
    has heads, and an operand with a dimension of heads gives this one its own."""
    q, k, v = (x[:, 0] for x in tensors(4, 1, 1, 5, 7, "cpu"))
    draw = torch.Generator().manual_seed(2)
    entries, heads = torch.rand(4, 5, 7, generator=draw), torch.rand(1, 4, 5, 7, generator=draw)
    make = {
        "mask": lambda x: x < 0.6,
        "bias": lambda x: x,
        "key_ranges": lambda x: ((x[..., 0] * 3).int().cummax(-1).values,
                                 (x[..., 1] * 8).int().cummax(-1).values),
    }[name]  # fmt: skip
    for given, own in ((entries, entries), (heads, heads[:, 1:2].expand(4, 1, -1, -1)[:, 0])):
        got = fastattn.attention(q, k, v, **{name: make(given)}, head_origin=(1, 4))
        want = fastattn.attention(q, k, v, **{name: make(own)})
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_parts(backend):
    device = device_of(backend)
    q, k, v = tensors(2, 4, 2, 2, 20, device)
    lens = torch.tensor([20, 11], dtype=torch.int32, device=device)
    options = {"cache_lens": lens, "dropout_p": 0.4, "dropout_seed": KEY, "backend": backend}
    whole = fastattn.decode_attention(q, k, v, **options)
    found = [
        fastattn.decode_attention(
            *(parts(x, 2)[n] for x in (q, k, v)), head_origin=(2 * n, 4), **options
        )
        for n in range(2)
    ]
    torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_is_said_by_keep_mask(backend):
    """One of many heads, in the second batch entry, against the mask itself."""
    device = device_of(backend)
    q, k = (torch.zeros(2, 1, n, 16, device=device) for n in (18, 32))
    v = torch.eye(32, device=device).expand(2, 1, -1, -1)
    options = {"dropout_p": 0.5, "dropout_seed": KEY, "backend": backend}
    out = fastattn.attention(q, k, v, head_origin=(5, 7), **options)
    kept = keep_mask(KEY, 2 * 7, 18, 32, 0.5).view(2, 7, 18, 32)[:, 5:6]
    assert torch.equal(out.cpu() != 0, kept)


@pytest.mark.parametrize("transform", ["vmap", "vmap over keys", "jvp", "second", "compile"])
def test_transforms(transform):
    """vmap, forward mode, double backward and torch.compile see the same heads as eager mode."""
    q, k, v = (x.double() for x in tensors(3, 2, 1, 6, 9))
    seed = torch.tensor(KEY)

    def call(q, k, v, seed=seed):
        return fastattn.attention(q, k, v, dropout_p=0.4, dropout_seed=seed, head_origin=(3, 8))

    def whole(q, k, v, seed=seed):  # all eight heads; 3 and 4 are compared
        q, k, v = (x.repeat(1, 8 // x.shape[1], 1, 1) for x in (q, k, v))
        q = torch.cat([q[:, 1:], q[:, :1]], 1)  # heads 3 and 4 are q's 0 and 1
        return fastattn.attention(q, k, v, dropout_p=0.4, dropout_seed=seed)[:, 3:5]

    torch.testing.assert_close(call(q, k, v), whole(q, k, v))
    if transform.startswith("vmap"):
        seeds = torch.tensor([[1, 2], [3, 4]])
        each = (None, None, None, 0 if transform == "vmap over keys" else None)
        arguments = (q, k, v, seeds if each[3] == 0 else seed)
        if each[3] is None:
            each, arguments = (0, None, None, None), (torch.stack([q, -q]), k, v, seed)
        found, want = (torch.vmap(f, each)(*arguments) for f in (call, whole))
    elif transform == "jvp":
        tangents = tuple(x.sin() for x in (q, k, v))
        found, want = (torch.func.jvp(f, (q, k, v), tangents)[1] for f in (call, whole))
    elif transform == "second":

        def second(f):
            inner = torch.func.grad(lambda *x: f(*x).square().sum())
            return torch.func.grad(lambda *x: inner(*x).square().sum(), (0, 1, 2))(q, k, v)

        found, want = second(call), second(whole)
    else:
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        found, want = compiled(q, k, v), whole(q, k, v)
    torch.testing.assert_close(found, want)


def test_weights_drop_the_same():
    from fastattn.weights import attention_weights

    q, k, v = tensors(2, 4, 2, 7, 20)
    dropout = {"dropout_p": 0.4, "dropout_seed": torch.tensor(KEY), "head_origin": (8, 12)}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **dropout)
    weights = attention_weights(q, k, lse, **dropout)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)


def test_without_dropout_it_has_no_effect_and_draws_nothing():
    q, k, v = tensors(2, 4, 2, 7, 20)
    before = torch.get_rng_state()
    out = fastattn.attention(q, k, v, head_origin=(4, 12))
    assert torch.equal(out, fastattn.attention(q, k, v))
    assert torch.equal(before, torch.get_rng_state())


def test_no_origin_is_the_whole_and_draws_the_same_key():
    q, k, v = tensors(2, 4, 2, 7, 20)
    outs = []
    for origin in (None, (0, 4), [0, 4]):
        torch.manual_seed(3)
        outs.append(fastattn.attention(q, k, v, dropout_p=0.3, head_origin=origin))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "origin, error, words",
    [
        (3, TypeError, "head_origin is 3; accepted is a pair"),
        ((1, 2, 3), TypeError, "accepted is a pair"),
        ((0.0, 8), TypeError, "head_origin's first is of type float"),
        ((0, True), TypeError, "head_origin's total is of type bool"),
        ((-1, 8), ValueError, r"head_origin is \(-1, 8\) and q has 4 heads"),
        ((5, 8), ValueError, r"first \+ heads <= total"),
        ((0, 3), ValueError, r"first \+ heads <= total"),
        ((0, 2**30), ValueError, r"2147483648 over the batch of 2; .*below 2\*\*31"),
        ((2**70, 2**71), ValueError, "below"),
    ],
)
def test_bad_origins(origin, error, words, dropout_p):
    q, k, v = tensors(2, 4, 2, 5, 5)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    options = {"head_origin": origin, "dropout_p": dropout_p}
    for call in (
        lambda: fastattn.attention(q, k, v, **options),
        lambda: fastattn.attention(q, k, v, **options),  # what is remembered is no way around
        lambda: fastattn.varlen_attention(*packed, cu, cu, 5, 5, **options),
        lambda: fastattn.decode_attention(q, k, v, cache_lens=5, **options),
        lambda: fastattn.explain(q, k, v, **options),
    ):
        with pytest.raises(error, match=words):
            call()


def test_a_bad_origin_is_said_before_the_cache_is_written():
    q, k, v = tensors(1, 2, 2, 1, 8)
    before = k.clone()
    new = torch.ones(1, 2, 1, 16)
    with pytest.raises(ValueError, match="head_origin"):
        fastattn.decode_attention(q, k, v, cache_lens=3, k=new, v=new, head_origin=(1, 2))
    assert torch.equal(k, before)


@pytest.mark.native
@pytest.mark.parametrize(
    "numbers", [(1, 2, -1, 8), (1, 2, 7, 8), (1, 2, 0, 2**31), (1, 2, 2**62, 2**63 - 1), (1, 2, 3)]
)
def test_the_operator_refuses_bad_numbers(numbers):
    from fastattn.backends.registry import BY_NAME
    from fastattn.core.call import Call
    from fastattn.core.spec import Operands, Spec

    q, k, v = tensors(2, 4, 2, 5, 5)
    operands = Operands(dropout_seed=torch.tensor(numbers))
    with pytest.raises(RuntimeError, match="dropout_seed"):
        BY_NAME["cpu"].forward(Call(q, k, v, Spec(0.25, dropout_p=0.1), operands))


def test_explain_takes_it():
    q, k, v = tensors(1, 4, 2, 5, 5)
    found = fastattn.explain(q, k, v, head_origin=(4, 8), dropout_p=0.1)
    assert found.operands == ("dropout_seed",)
    reason = fastattn.explain(q, k, v, head_origin=(4, 8), dropout_p=0.1).reasons["cuda"]
    assert reason  # the CUDA kernels have no dropout, with or without head_origin


# ---- modules ------------------------------------------------------------------------------------


def test_the_modules_argument():
    layer = Attention(32, 4, dropout=0.5, head_origin=(4, 8))
    assert layer.head_origin == (4, 8)
    x = torch.randn(2, 5, 32)
    outs = []
    for origin in ((4, 8), (0, 8), None, (0, 4)):
        layer.head_origin = origin
        torch.manual_seed(0)
        outs.append(layer(x))
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[2], outs[3])
    assert torch.equal(layer.eval()(x), Attention.forward(layer, x))
    with pytest.raises(TypeError, match="head_origin is 4; accepted is a pair"):
        Attention(32, 4, head_origin=4)
    with pytest.raises(ValueError, match="head_origin"):
        Attention(32, 4, head_origin=(8, 8))
    layer.train().head_origin = (6, 8)
    with pytest.raises(ValueError, match=r"head_origin is \(6, 8\) and q has 4 heads"):
        layer(x)


def test_torchs_attention_cannot_and_says_so():
    from fastattn.models.torch_attention import torch_attention

    q, k, v = tensors(1, 4, 2, 5, 5)
    torch_attention(q, k, v, head_origin=(0, 8))
    with pytest.raises(NotImplementedError, match="head_origin came with"):
        torch_attention(q, k, v, head_origin=(0, 8), dropout_p=0.1)


# ---- two processes ------------------------------------------------------------------------------

BLOCKS = {
    "gated": {"kv_heads": 2, "mlp": "swiglu", "rotary": True},
    "cross": {"mlp": "gelu", "bias": True, "norm": "layer", "context_dim": 24},
}


def plan_of(block):
    """torch's plan for a block: projections to heads by columns, projections from heads by rows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    rows = ("o_proj", "down_proj")
    return {
        name: RowwiseParallel() if name.endswith(rows) else ColwiseParallel()
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def step(block, inputs, packed):
    """(out, gradients of the inputs, gradients of the parameters) of one training step."""
    torch.manual_seed(11)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = block(*inputs, **packed)
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), [*inputs, *block.parameters()])
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in grads]
    return [out.detach(), *whole]


def rank(index, world, folder):
    """One process: runs the step alone, then its part of the step with two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=index, world_size=world)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import parallelize_module

        mesh = init_device_mesh("cpu", (world,))
        for more in BLOCKS.values():
            torch.manual_seed(0)
            block = TransformerBlock(32, 4, dropout=0.2, attention_dropout=0.4, **more)
            context = [torch.randn(2, 7, 24)] if "context_dim" in more else []
            inputs = [torch.randn(2, 9, 32), *context]
            cu = torch.tensor([0, 4, 9], dtype=torch.int32)
            cases = [(inputs, {})]
            if not context:
                cases.append(([inputs[0][0]], {"cu_seqlens": cu}))
            alone = [step(block, *case) for case in cases]
            parallelize_module(block, mesh, plan_of(block))
            with pytest.raises(ValueError, match=r"q_proj gives 2 of 4 heads and dropout is 0\.4"):
                block(*inputs)
            for module in block.modules():
                if isinstance(module, Attention):
                    module.head_origin = (index * module.heads // world, module.heads)
            for case, want in zip(cases, alone):
                for got, one in zip(step(block, *case), want, strict=True):
                    torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-5)
            for module in block.modules():  # the earlier fault: each rank dropped as rank 0 does
                if isinstance(module, Attention):
                    module.head_origin = (0, module.heads)
            assert (step(block, *cases[0])[0] - alone[0][0]).abs().max() > 1e-3
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_drop_what_one_does(tmp_path):
    """A block sharded by torch's plans gives what one process gives, forward and gradients."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        mp.spawn(rank, (2, str(tmp_path)), nprocs=2)

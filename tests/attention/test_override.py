"""The switch that serves every SDPA call of a program: what fastattn serves, what it leaves to
torch, and that disabling it restores everything."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import math, qkv
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import scaled_dot_product_attention as sdpa

OURS = "AttentionBackward"  # grad_fn of fastattn's own autograd
FLASH = "ScaledDotProductFlashAttentionForCpuBackward0"  # of torch's CPU flash operator
BORROWED = "ScaledDotProductEfficientAttentionBackward0"  # of aten's operator with our kernels


@pytest.fixture(autouse=True)
def torch_again():
    """A test that leaves the switch on must not affect the others."""
    yield
    for _ in range(9):
        fastattn.disable()


def operator_of(out) -> str:
    """The autograd node that made out, behind views."""
    node = out.grad_fn
    while node.name() in ("TransposeBackward0", "ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    return node.name()


def state() -> tuple:
    """Which kernels run, and the tag of compiled programs in caches."""
    q, k, v = qkv(2, 3, 4, 8, grad=True)
    calls = ({}, {"dropout_p": 0.1}, {"attn_mask": torch.ones(4, 4, dtype=torch.bool)})
    served = [operator_of(F.scaled_dot_product_attention(q, k, v, **call)) for call in calls]
    mapped = torch.func.vmap(F.scaled_dot_product_attention)(*(x.detach()[None] for x in (q, k, v)))
    shape = tuple(mapped.shape)
    return served, shape, torch.compiler.config.cache_key_tag, F.scaled_dot_product_attention


@pytest.mark.native
def test_switch_serves_and_restores_exactly():
    before = state()
    q, k, v = qkv(2, 3, 4, 8, grad=True)
    math_call = operator_of(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))
    assert math_call not in (OURS, BORROWED, FLASH)
    for _ in range(3):
        with fastattn.override_sdpa():
            assert state() != before
            assert operator_of(F.scaled_dot_product_attention(q, k, v)) == BORROWED
            assert operator_of(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)) == OURS
        assert state() == before
        call = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        assert operator_of(call) == math_call


@pytest.mark.native
def test_both_ways_run_our_kernels():
    """The same bits as fastattn's own call, forward and backward; torch's differ by rounding."""
    q, k, v = qkv(2, 6, 70, 24, kv=(2, 2, 90, 24), grad=True)
    keys = torch.rand(2, 1, 1, 90) > 0.3
    for options in (
        {},
        {"is_causal": True},
        {"attn_mask": keys},
        {"attn_mask": torch.randn(70, 90)},
        {"attn_mask": keys, "is_causal": True, "scale": 0.1},
    ):
        results = []
        for on in (False, True):
            if on:
                fastattn.enable()
                out = F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=True)
                assert operator_of(out) == (OURS if "attn_mask" in options else BORROWED)
            else:
                out = sdpa(q, k, v, **options, enable_gqa=True)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
        fastattn.disable()
        for got, want in zip(*results):
            assert torch.equal(got, want)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["no mask", "causal", "keys", "dead rows", "float"])
def test_a_result_outlives_the_switch(kind):
    """The backward after the block is right, whichever kernel runs it."""
    q, k, v = qkv(2, 3, 40, 16, grad=True)
    masks = {
        "keys": torch.rand(2, 1, 1, 40) > 0.3,
        "dead rows": (torch.rand(40, 40) > 0.5) & (torch.arange(40) % 3 > 0)[:, None],
        "float": torch.randn(40, 40).masked_fill(torch.arange(40)[:, None] == 5, -torch.inf),
    }
    options = {"attn_mask": masks.get(kind), "is_causal": kind == "causal"}
    want = sdpa(q, k, v, **options)
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(q, k, v, **options)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(got, torch.autograd.grad(want, (q, k, v), dout))


@pytest.mark.native
def test_switch_counts():
    before = state()
    fastattn.enable()
    with fastattn.override_sdpa():
        fastattn.enable()
        fastattn.disable()
        fastattn.disable()
        assert state() != before  # the block's own enable() still holds
    assert state() == before
    fastattn.disable()  # one disable() too many has no effect
    fastattn.enable()
    assert state() != before
    fastattn.disable()
    assert state() == before
    with pytest.raises(KeyError), fastattn.override_sdpa():
        raise KeyError
    assert state() == before


@pytest.mark.native
def test_every_thread_is_served():
    q, k, v = qkv(2, 3, 4, 8, grad=True)
    seen = []

    def call():
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        seen.append((operator_of(out), torch.compiler.config.cache_key_tag))

    def run():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    worker = threading.Event()
    late = threading.Thread(target=lambda: (worker.wait(), call()))
    late.start()
    with fastattn.override_sdpa():
        run()
        worker.set()
        late.join()
    run()
    assert seen[:2] == [(OURS, "fastattn-sdpa")] * 2
    assert seen[2][0] != OURS and seen[2][1] == ""


@pytest.mark.native
def test_threads_may_switch_at_the_same_time():
    before = state()
    q, k, v = qkv(1, 2, 4, 8)
    want = math(q, k, v)
    wrong = []

    def work():
        for _ in range(20):
            with fastattn.override_sdpa():
                out = F.scaled_dot_product_attention(q, k, v)
                if not torch.allclose(out, want, atol=1e-5):
                    wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and state() == before


@pytest.mark.native
def test_contexts_without_flash_are_torchs():
    q, k, v = qkv(2, 3, 4, 8, grad=True)
    with fastattn.override_sdpa():
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            assert operator_of(out) not in (OURS, BORROWED, FLASH)
            torch.manual_seed(0)
            inside = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # where torch has no such kernel
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            assert operator_of(out) == OURS
    torch.manual_seed(0)
    assert torch.equal(inside, F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))


def nodes(out) -> set[str]:
    """Names of all autograd nodes behind out."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(node.name())
            waiting += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.native
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_modules_are_served(dropout):
    mha = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True)
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
    results = []
    for on in (False, True):
        if on:
            fastattn.enable()
        mha.zero_grad()
        out, _ = mha(x, x, x, key_padding_mask=padding, need_weights=False)
        served = {OURS, BORROWED, FLASH} & nodes(out)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in mha.parameters())])
    assert served == {OURS}
    if dropout == 0:
        torch.testing.assert_close(*results)
    assert all(x.isfinite().all() for x in results[1])
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    out = layer(x, src_key_padding_mask=padding)
    fastattn.disable()
    torch.testing.assert_close(out, layer(x, src_key_padding_mask=padding))


@pytest.mark.native
def test_learned_bias_dropout_and_5d_have_gradients():
    q, k, v = qkv(2, 2, 3, 4, 8, grad=True, dtype=torch.float64)
    bias = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    want = math(q, k, v, bias)
    dout = torch.randn_like(want)
    want = torch.autograd.grad(want, (q, k, v, bias), dout)
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(q, k, v, bias)
        got = torch.autograd.grad(out, (q, k, v, bias), dout)
    torch.testing.assert_close(got, want)


@pytest.mark.native
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputation_is_served(use_reentrant):
    def block(x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    grads = []
    with fastattn.override_sdpa():
        for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
            torch.manual_seed(0)
            x = torch.randn(2, 3, 4, 8, requires_grad=True)
            run(x).square().sum().backward()
            grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.native
def test_transforms_are_served():
    q, k, v = qkv(1, 2, 3, 2, dtype=torch.float64)
    func = torch.func

    def loss(q):
        return F.scaled_dot_product_attention(q, k, v).sin().sum()

    def plain(q):
        return (torch.softmax(q @ k.mT / 2**0.5, -1) @ v).sin().sum()

    with fastattn.override_sdpa(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")  # no batching rule
        for transform in (
            lambda f: func.grad(f)(q),
            lambda f: func.hessian(f)(q),
            lambda f: func.jvp(f, (q,), (k,))[1],
            lambda f: func.vmap(func.grad(f))(torch.stack([q, k])),
            lambda f: func.grad(lambda q: func.grad(f)(q).sin().sum())(q),
        ):
            torch.testing.assert_close(transform(loss), transform(plain))
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(func.grad(loss)(q), func.grad(plain)(q))
    torch.testing.assert_close(func.grad(loss)(q), func.grad(plain)(q))


@pytest.mark.native
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["dropout in training", "3-D mask in inference"])
def test_compiled_functions_follow_the_switch(compiler, kind):
    """Also with torch's on-disk cache of compiled graphs, which inference without dropout uses."""
    torch._dynamo.reset()
    training = kind == "dropout in training"

    @torch.compile(backend=compiler, fullgraph=True)
    def f(q, k, v, mask):
        options = {"dropout_p": 0.5} if training else {"attn_mask": mask}
        return F.scaled_dot_product_attention(q, k, v, **options)

    q, k, v = qkv(2, 3, 4, 8, grad=training)
    mask = torch.rand(3, 4, 4) > 0.3
    served = {"fastattn::flash_attn_fwd"} | ({"fastattn::flash_attn_bwd"} if training else set())
    ran = []
    for on in (False, True, False, True, False):
        if on:
            fastattn.enable()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = f(q, k, v, mask)
            if training:
                out.sum().backward()
        ran.append(served <= {event.key for event in profile.key_averages()})
        if on:
            fastattn.disable()
    torch._dynamo.reset()
    assert ran == [False, True, False, True, False]


@pytest.mark.native
def test_compiled_calls_of_the_flash_operator():
    torch._dynamo.reset()
    q, k, v = qkv(2, 3, 40, 8, grad=True)
    mask = torch.rand(2, 1, 1, 40) > 0.4
    want = sdpa(q, k, v, mask)
    with fastattn.override_sdpa():
        f = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
        out = f(q, k, v, mask)
        got = torch.autograd.grad(out.sum(), (q, k, v))
    torch._dynamo.reset()
    assert torch.equal(out, want)
    for a, b in zip(got, torch.autograd.grad(want.sum(), (q, k, v))):
        assert torch.equal(a, b)


@pytest.mark.native
def test_autocast_inference_mode_and_meta_while_on():
    q, k, v = qkv(2, 3, 4, 8)
    with fastattn.override_sdpa():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            assert out.dtype == torch.bfloat16
        with torch.inference_mode():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), math(q, k, v))
        meta = (x.to("meta") for x in (q, k, v))
        assert F.scaled_dot_product_attention(*meta).device.type == "meta"


@pytest.mark.native
def test_environment_names_the_backend_of_served_calls(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    q, k, v = qkv(2, 3, 4, 8, grad=True)
    with fastattn.override_sdpa():
        assert operator_of(F.scaled_dot_product_attention(q, k, v)) == OURS


@pytest.mark.native
def test_deepcopied_modules_and_other_dtypes_are_left_whole():
    layer = copy.deepcopy(nn.MultiheadAttention(16, 2))
    with fastattn.override_sdpa():
        x = torch.randn(5, 16)
        assert layer(x, x, x)[0].shape == (5, 16)
        with pytest.raises(RuntimeError, match="expected scalar type Float but found Long"):
            F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4, dtype=torch.long)] * 3)


def test_switch_prints_nothing_and_says_when_it_cannot_serve(tmp_path):
    code = """
import torch, fastattn
q = torch.randn(1, 2, 4, 8, requires_grad=True)
for _ in range(2):
    with fastattn.override_sdpa():
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
print(out.grad_fn.name())
"""
    none = str(tmp_path / "none.so")
    for library in ({}, {"FASTATTN_CPU_LIBRARY": none}):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | library,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        missing = library or fastattn.backends.library.NATIVE_MISSING
        assert run.stdout.strip() == (FLASH if missing else BORROWED)
        if library:
            assert run.stderr.count("fastattn.enable() leaves CPU calls to torch") == 1
            assert "<string>:5" in run.stderr  # the caller's line
        elif not fastattn.backends.library.NATIVE_MISSING:
            assert run.stderr == ""

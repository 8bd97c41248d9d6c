"""What only a GPU can test: backends at real sizes, on streams and devices, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.backends import library
from fastattn.core.tolerance import Tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ("cuda", "triton")


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def run(q, k, v, dout, backend, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention(*leaves, **options, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads)))


def skip_what_is_refused(backend, q, k, v, **options):
    """Except a library that was built but does not load."""
    reason = fastattn.explain(q, k, v, **options, backend=backend).reasons[backend]
    if backend == "cuda" and (
        fault := library.cuda_fault() or library.cuda_problem(q.get_device())
    ):
        pytest.fail(fault)
    if reason is not None:
        pytest.skip(reason)


def test_what_was_built_can_be_used():
    assert library.cuda_fault() is None
    assert library.CUDA is None or library.cuda_problem(0) is None


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (700, 0)}], ids=str)
@pytest.mark.parametrize("length", [1024, 4096, 4001])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_sizes(backend, dtype, dim, length, options):
    torch.manual_seed(0)
    q, dout = (draw(1, 4, length, dim, dtype=dtype) for _ in range(2))
    k, v = (draw(1, 2, length, dim, dtype=dtype) for _ in range(2))
    skip_what_is_refused(backend, q, k, v, **options)
    got = run(q, k, v, dout, backend, **options)
    want = run(*(x.double() for x in (q, k, v, dout)), "reference", **options)
    plain = run(*(x.float() for x in (q, k, v, dout)), "reference", **options)
    tolerance = Tolerance(q, k, v, dim**-0.5, want["lse"], dout, probs_rounded=True)
    for name, result in got.items():
        rounded = plain[name] if name == "lse" else plain[name].to(dtype)
        comparison = tolerance.compare(name, result, want[name], rounded)
        assert comparison.passed, f"{name}: {comparison}"


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float8_at_real_sizes(backend, dim, options):
    """The error comes from rounding each prob to float8; the rounding of products is negligible."""
    torch.manual_seed(0)
    q, k, v = (draw(1, heads, 4001, dim).to(torch.float8_e4m3fn) for heads in (4, 2, 2))
    scale = torch.rand(2, device="cuda") + 0.5
    skip_what_is_refused(backend, q, k, v, q_descale=scale, **options)
    options = options | {"return_lse": True}
    out, lse = fastattn.attention(q, k, v, q_descale=scale, **options, backend=backend)
    q, k, v = (x.double() for x in (q, k, v))
    q = q * scale.double().repeat_interleave(2)[:, None, None]
    want, want_lse = fastattn.attention(q, k, v, **options, backend="reference")
    # probs^2 v^2: with twice the scores, except for the denominator
    options = options | {"scale": 2 * dim**-0.5, "backend": "reference"}
    squares, lse2 = fastattn.attention(q, k, v.square(), **options)
    squares = squares * (lse2 - 2 * want_lse).exp()[..., None]
    rounded = 2**-4 * 3**-0.5 * squares.mean().sqrt() + 2**-9 * want.square().mean().sqrt()
    assert (out - want).square().mean().sqrt() <= rounded
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_streams_and_no_waiting(backend):
    q = draw(2, 4, 512, 64)
    lens = torch.tensor([512, 100], dtype=torch.int32, device="cuda")
    options = {"causal": True, "kv_lens": lens}
    skip_what_is_refused(backend, q, q, q, **options)
    fastattn.attention(q, q, q, **options, backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = fastattn.attention(q, q, q, **options, backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fastattn.attention(q, q, q, **options, backend=backend)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    lens.copy_(torch.tensor([30, 512], device="cuda"))
    graph.replay()
    again = fastattn.attention(q, q, q, **options, backend=backend)
    torch.testing.assert_close(out, again, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend):
    rows = 2**31 // (16 * 128) + 100
    if torch.cuda.get_device_properties(0).total_memory < 24 * rows * 16 * 128:
        pytest.skip("too little memory")
    q = torch.zeros(1, rows, 16, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    q[:, :, -64:] = draw(1, 16, 64, 128)
    tail = q[:, :, -64:].contiguous()
    skip_what_is_refused(backend, q, q, q, window=(15, 0))
    out = fastattn.attention(q, q, q, window=(15, 0), backend=backend)
    want = fastattn.attention(tail, tail, tail, window=(15, 0), backend="reference")
    torch.testing.assert_close(out[:, :, -40:], want[:, :, -40:], rtol=2e-2, atol=2e-2)

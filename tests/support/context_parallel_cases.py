"""One of two processes (gloo) under torch's context_parallel: what fastattn's calls answer there.
Run by tests/attention/test_context_parallel.py; prints "right" when every call did what it must."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import _context_parallel, context_parallel

import fastattn

attention_module = _context_parallel._attention


def calls():
    """{name: call} of every function that attends, each on this rank's shard."""
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    cu = torch.tensor([0, 8], dtype=torch.int32)
    cache = [torch.full((1, 2, 16, 4), 7.0) for _ in range(2)]
    step = [torch.randn(1, 2, 1, 4) for _ in range(3)]
    mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    fastattn.swap(mha)
    own = fastattn.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 8, 8)

    def decode():
        for x in cache:
            x.fill_(7)
        try:
            return fastattn.decode_attention(step[0], *cache, cache_lens=3, k=step[1], v=step[2])
        finally:
            assert all(bool((x == 7).all()) == active() for x in cache), "the cache was written"

    def under_enable():
        with fastattn.override_sdpa():
            return F.scaled_dot_product_attention(q, k, v)

    return {
        "attention": lambda: fastattn.attention(q, k, v),
        "attention with gradients": lambda: fastattn.attention(q.clone().requires_grad_(), k, v),
        "varlen_attention": lambda: fastattn.varlen_attention(*packed, cu, cu, 8, 8),
        "decode_attention": decode,
        "scaled_dot_product_attention": lambda: fastattn.scaled_dot_product_attention(q, k, v),
        "a swapped module": lambda: mha(x, x, x, need_weights=False),
        "a module": lambda: own(x, x, x),
        "under enable()": under_enable,
        "compiled": lambda: compiled(q, k, v),
        "transformed": lambda: torch.func.vmap(fastattn.attention)(q[None], k[None], v[None]),
    }


@torch.compile(backend="eager", fullgraph=True)
def compiled(q, k, v):
    return fastattn.attention(q, k, v)


def active() -> bool:
    return fastattn.context_parallel._is_active()


def refuses(call) -> bool:
    try:
        call()
    except NotImplementedError as error:
        return "context_parallel is active" in str(error)
    except torch._dynamo.exc.TorchDynamoException as error:  # what tracing raised, wrapped
        return "context_parallel is active" in str(error)
    return False


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    todo = calls()
    for name, call in todo.items():
        assert not refuses(call), f"{name} refuses outside"
    with context_parallel(mesh, buffers=[torch.randn(1, 2, 16, 4)], buffer_seq_dims=[2]):
        assert active()
        for name, call in todo.items():
            assert refuses(call), f"{name} does not refuse"
    assert not active()
    attention_module._enable_context_parallel_dispatcher()  # the other way to enable it
    for name in ("attention", "a swapped module"):
        assert refuses(todo[name]), f"{name} does not refuse"
    attention_module._disable_context_parallel_dispatcher()
    for name, call in calls().items():
        assert not refuses(call), f"{name} refuses afterwards"
    dist.destroy_process_group()
    print("right")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
    sys.exit(0)

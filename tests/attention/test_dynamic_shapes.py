"""torch.compile(fullgraph=True) with lengths that change: every public call, every operand, three
lengths each.

The compiled function must agree with the eager one, forward and backward, and may be compiled at
most twice: for the first length, and for all others. Code that uses a length unnecessarily (in the
text of an error, in int() of a size) breaks the graph at the second length or causes a third
compilation.
"""

from __future__ import annotations

import pytest
import torch
from dynamic_cases import CASES, LENGTHS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.native


def tensors(x):
    if isinstance(x, Tensor):
        return [x]
    return [t for y in x for t in tensors(y)] if isinstance(x, (tuple, list)) else []


def run(function, arguments, grad):
    """The results, and the gradients of everything that requires one."""
    if not grad:
        with torch.no_grad():
            return tensors(function(*arguments))
    out = tensors(function(*arguments))
    leaves = [x for x in tensors(arguments) if x.requires_grad]
    loss = sum((x.float() ** 2).nan_to_num(0, 0, 0).sum() for x in out if x.requires_grad)
    grads = torch.autograd.grad(loss, list(dict.fromkeys(leaves)))
    return [x.detach() for x in out] + list(grads)


def mark(arguments, longer):
    """Marks every size that differs from the next length's as dynamic."""
    for x, y in zip(tensors(arguments), tensors(longer)):
        for n, (a, b) in enumerate(zip(x.shape, y.shape)):
            if a != b:
                torch._dynamo.mark_dynamic(x, n)


def check(name, mode, backend):
    made = CASES[name]
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    dynamic = True if mode == "dynamic" else None
    compiled = torch.compile(made.function, fullgraph=True, backend=counter, dynamic=dynamic)
    for n, length in enumerate(LENGTHS):
        torch.manual_seed(n)
        arguments = made.make(length)
        if mode == "marked":
            mark(arguments, made.make(length + 3))
        want = run(made.function, arguments, made.grad)
        got = run(compiled, arguments, made.grad)
        for a, b in zip(got, want, strict=True):
            if made.random:
                assert a.shape == b.shape and a.dtype == b.dtype
            else:
                torch.testing.assert_close(a, b)
    assert counter.frame_count <= made.compilations


MODES = ("automatic", "dynamic", "marked")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


QUICK = (
    "attention mask", "attention bias", "attention softcap", "attention document_ids",
    "attention key_ranges", "attention masks.prefix", "attention masks.chunked",
    "decode key_ranges", "Attention key_ranges",
    "attention of everything", "varlen mask", "varlen bias", "varlen dropout_seed",
    "varlen page_table", "decode mask", "decode rotary", "decode page_table", "decode int8",
    "sdpa float mask", "sdpa gqa", "flash_attn_func", "flash_attn_with_kvcache",
    "Attention mask", "Attention with a cache and a mask", "TransformerBlock bias",
    "MultiheadAttention bool none", "MultiheadAttention float 3d", "TransformerEncoderLayer",
    "SinusoidalPositionalEncoding", "LinearCrossEntropy", "hf float mask", "hf weights",
)  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_three_lengths(name):
    """Some cases, each with one of the three ways to make a size dynamic; all combinations with
    --long."""
    check(name, MODES[list(CASES).index(name) % 3], "eager")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_three_lengths_in_every_way(name, mode, backend):
    check(name, mode, backend)


@pytest.mark.long
@pytest.mark.parametrize("name", ["attention of everything", "varlen bias", "decode mask",
                                  "sdpa float mask", "MultiheadAttention bool 3d"])  # fmt: skip
def test_three_lengths_by_inductor(name):
    check(name, "automatic", "inductor")

"""attention_weights(): every option, rows and heads, derivatives, compilation, errors. The CPU
kernel's numbers for each case: tests/backends/test_cpu_statistics.py."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.core.philox import keep_mask, keep_probability

B, H, S, K, D = 2, 4, 9, 13, 6
SEED = (17, 4)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "start": {"causal": True, "align": "start", "window": (2, None)},
    "mask": {"mask": torch.rand(B, 1, S, K, generator=torch.Generator().manual_seed(1)) > 0.4},
    "bias": {"bias": torch.randn(H, S, K, dtype=torch.float64)},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    "softcap": {"softcap": 1.5, "scale": -0.7},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "kv_lens": {"kv_lens": torch.tensor([7, 0], dtype=torch.int32), "causal": True},
    "key_ranges": {"key_ranges": (torch.arange(S).int() // 2, torch.arange(S).int() + 4)},
    "dropout": {"dropout_p": 0.4, "dropout_seed": SEED},
}
LISTS = {
    "all": {},
    "rows": {"rows": torch.tensor([8, 0, 3, 3])},
    "slice": {"rows": slice(1, None, 3), "heads": slice(1, 3)},
    "heads": {"heads": torch.tensor([3, 0])},
    "average": {"average": True, "heads": torch.tensor([0, 2])},
}


def inputs(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return (
        torch.randn(B, H, S, D, dtype=dtype), torch.randn(B, 2, K, D, dtype=dtype),
        torch.randn(B, 2, K, D, dtype=dtype),
    )  # fmt: skip


def truth(q, k, options):
    """The weights of all rows and heads: attention over the unit vectors of the keys."""
    unit = torch.eye(K, dtype=q.dtype).expand(B, 2, -1, -1)
    return fastattn.attention(q, k, unit, backend="reference", **options)


def chosen(weights, rows=None, heads=None, average=False):
    weights = weights if heads is None else weights[:, heads]
    weights = weights if rows is None else weights[:, :, rows]
    return weights.mean(1) if average else weights


@pytest.mark.parametrize("which", LISTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, which):
    q, k, v = inputs()
    options, listed = OPTIONS[name], LISTS[which]
    _, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    got = fastattn.attention_weights(q, k, lse, **listed, **options)
    torch.testing.assert_close(got, chosen(truth(q, k, options), **listed))


def test_documents():
    ids = torch.tensor([[0, 0, 1, 1, 1, 4, 4, 4, 5], [2] * 9], dtype=torch.int32)
    q = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    _, lse = fastattn.attention(q, q, q, document_ids=ids, causal=True, return_lse=True)
    got = fastattn.attention_weights(q, q, lse, document_ids=ids, causal=True)
    unit = torch.eye(9, dtype=q.dtype).expand(2, 3, -1, -1)
    want = fastattn.attention(q, q, unit, document_ids=ids, causal=True)
    torch.testing.assert_close(got, want)
    rows = torch.tensor([8, 2, 5])
    some = fastattn.attention_weights(q, q, lse, rows=rows, document_ids=ids, causal=True)
    torch.testing.assert_close(some, want[:, :, rows])


def test_ranks_and_heads_of_a_whole():
    q = torch.randn(2, 5, 4)
    _, lse = fastattn.attention(q, q, q, return_lse=True)
    assert fastattn.attention_weights(q, q, lse).shape == (2, 5, 5)
    assert fastattn.attention_weights(q[0], q[0], lse[0], rows=slice(2)).shape == (2, 5)
    q = torch.zeros(1, 2, 20, 4)  # of six heads, those from the third on
    lse = torch.full((1, 2, 20), 20.0).log()
    got = fastattn.attention_weights(
        q, q, lse, head_origin=(2, 6), heads=torch.tensor([1]), dropout_p=0.5, dropout_seed=SEED
    )
    kept = keep_mask(SEED, 6, 20, 20, 0.5)[3:4]
    torch.testing.assert_close(got[0], kept / (20 * keep_probability(0.5)))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", ["causal", "bias", "sinks", "softcap", "dropout"])
def test_derivatives(name, average):
    q, k, v = (x[:1, :, :4] for x in inputs())
    options = dict(OPTIONS[name])
    bias = options.pop("bias", None)
    bias = None if bias is None else bias[:, :4, :4].clone().requires_grad_()
    lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, **options)[1].detach()
    leaves = [x.detach().requires_grad_() for x in (q, k, lse)]
    leaves += [] if bias is None else [bias]

    def function(q, k, lse, bias=None):
        rows = torch.tensor([3, 1, 1])
        more = {"rows": rows, "average": average, "bias": bias}
        return fastattn.attention_weights(q, k, lse, **more, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    torch.testing.assert_close(
        torch.func.jvp(function, tuple(leaves), tuple(map(torch.ones_like, leaves)))[0],
        function(*leaves),
    )


def test_vmap():
    q = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    lse = torch.stack([fastattn.attention(x, x, x, return_lse=True)[1] for x in q])
    got = torch.func.vmap(fastattn.attention_weights)(q, q, lse)
    want = [fastattn.attention_weights(x, x, y) for x, y in zip(q, lse)]
    torch.testing.assert_close(got, torch.stack(want))


def test_compiles_whole():
    q, k, v = (x.float() for x in inputs())
    _, lse = fastattn.attention(q, k, v, return_lse=True)
    rows = torch.tensor([1, 5])

    def function(q, k, lse, rows):
        lens = torch.tensor([7, 0], dtype=torch.int32)
        options = {"rows": rows, "causal": True, "kv_lens": lens}
        return fastattn.attention_weights(q, k, lse, **options).square()

    q.requires_grad_()
    want, compiled = (
        function(q, k, lse, rows),
        torch.compile(function, backend="aot_eager", fullgraph=True),
    )
    got = compiled(q, k, lse, rows)
    torch.testing.assert_close(got, want)
    for one, two in zip(*(torch.autograd.grad(x.sum(), q) for x in (got, want))):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"rows": [0, 1]}, TypeError, r"rows is \[0, 1\]; accepted are an int64 tensor"),
        ({"rows": torch.tensor([0, 9])}, ValueError, r"rows has 0 and 9; accepted are numbers in"),
        ({"heads": torch.tensor([0.0])}, TypeError, "heads is of type Tensor; accepted are"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p came without dropout_seed"),
        ({"average": 1}, TypeError, "average is of type int"),
        ({"return_lse": True}, TypeError, "unexpected keyword argument 'return_lse'"),
    ],
)
def test_what_is_refused(change, error, sentence):
    q, k, v = inputs()
    _, lse = fastattn.attention(q, k, v, return_lse=True)
    with pytest.raises(error, match=sentence):
        fastattn.attention_weights(q, k, lse, **change)
    with pytest.raises(ValueError, match=r"lse is torch.float64 of shape \[4, 9\]"):
        fastattn.attention_weights(q, k, lse[0])

"""nn.MultiheadAttention on nested tensors, strided and jagged, against each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastattn import nn as fnn

pytestmark = pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
E, H = 12, 3


def nested(layout, lengths=(3, 6), dtype=torch.float64):
    torch.manual_seed(5)
    rows = [torch.randn(n, E, dtype=dtype) for n in lengths]
    return torch.nested.as_nested_tensor([x.requires_grad_() for x in rows], layout=layout), rows


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_nested_is_each_sequence_alone(layout, causal):
    ours = fnn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    rows, others = nested(layout)[1], nested(layout, (4, 2))[1]
    for keys in (rows, others):
        leaves = [*rows, *(others if keys is others else ()), *ours.parameters()]
        want = [ours(x, y, y, is_causal=causal)[0] for x, y in zip(rows, keys)]
        grads = torch.autograd.grad(torch.cat(want).sin().sum(), leaves)
        for need_weights in (False, True):
            q = torch.nested.as_nested_tensor(rows, layout=layout)
            key = q if keys is rows else torch.nested.as_nested_tensor(keys, layout=layout)
            out, _ = ours(q, key, key, is_causal=causal, need_weights=need_weights)
            assert out.is_nested and out.layout == layout
            torch.testing.assert_close(list(out.unbind()), want)
            loss = torch.cat(out.unbind()).sin().sum()
            torch.testing.assert_close(torch.autograd.grad(loss, leaves), grads)


@pytest.mark.parametrize("average", [True, False])
def test_nested_weights_as_torch_gives_them(average):
    theirs = nn.MultiheadAttention(E, 4, batch_first=True).eval()
    ours = fnn.MultiheadAttention(E, 4, batch_first=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x, _ = nested(torch.strided, dtype=torch.float32)
    with torch.no_grad():
        want, got = (m(x, x, x, average_attn_weights=average) for m in (theirs, ours))
    torch.testing.assert_close(list(got[0].unbind()), list(want[0].unbind()))
    torch.testing.assert_close(got[1], want[1])


def test_nested_dropout_of_packed_sequences():
    module = fnn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x, _ = nested(torch.jagged, dtype=torch.float32)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(module(x, x, x, need_weights=False)[0].values())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_nested_refusals():
    ours = fnn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    x, _ = nested(torch.strided)
    jagged, _ = nested(torch.jagged)
    dense = torch.randn(2, 6, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="key_padding_mask came with nested tensors"):
        ours(x, x, x, key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask came with nested tensors"):
        ours(x, x, x, attn_mask=torch.zeros(6, 6, dtype=torch.bool))
    for other in (dense, jagged):
        with pytest.raises(ValueError, match=r"key is not a nested tensor of torch.strided layout"):
            ours(x, other, other)
    with pytest.raises(RuntimeError, match="query has 2 sequences and key 1"):
        one, _ = nested(torch.strided, (4,))
        ours(x, one, one)
    with pytest.raises(NotImplementedError, match="add_bias_kv"):
        fnn.MultiheadAttention(E, H, add_bias_kv=True)(x, x, x)

"""fastattn.flash_attn.bert_padding: what it returns, gradients, and refusals."""

from __future__ import annotations

import pytest
import torch

from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_qkvpacked_func
from fastattn.flash_attn.bert_padding import (
    index_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_unpad_and_pad(dtype, shape):
    x = torch.randn(3, 4, *shape, requires_grad=True)
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, (3 * MASK).to(dtype))
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.dtype == torch.int64 and indices.tolist() == [0, 1, 2, 9, 10]
    assert torch.equal(cu_seqlens, ints(0, 3, 3, 5)) and torch.equal(seqused, ints(3, 0, 2))
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert type(longest) is int and longest == 3
    padded = pad_input(tokens, indices, 3, 4)
    visible = MASK.bool().view(3, 4, *[1] * len(shape))
    assert torch.equal(padded, torch.where(visible, x, 0.0))
    factor = torch.randn_like(padded)
    (grad,) = torch.autograd.grad((padded * factor).sum(), x)
    assert torch.equal(grad, torch.where(visible, factor, 0.0))


def test_unused_tokens_have_a_place_and_are_not_counted():
    unused = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1]])  # one is used, too
    x = torch.randn(3, 4, 2)
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK, unused)
    assert indices.tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 4, 5, 8] and longest == 4
    assert seqused.tolist() == [3, 0, 2]


def test_nothing_to_keep():
    for batch in (0, 2):
        x, mask = torch.randn(batch, 3, 5), torch.zeros(batch, 3, dtype=torch.bool)
        tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, mask)
        assert tokens.shape == (0, 5) and indices.shape == (0,) and longest == 0
        assert cu_seqlens.tolist() == [0] * (batch + 1) and seqused.tolist() == [0] * batch
        assert not pad_input(tokens, indices, batch, 3).any()
        *_, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, mask.int())
        assert cu_seqlens.tolist() == [0] and longest == 0


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2, requires_grad=True)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert type(longest) is int and longest == 6
    tokens.sum().backward()
    assert torch.equal(x.grad[..., 0], torch.tensor([[1.0] * 5 + [0], [1] * 5 + [0], [1] * 6]))


def test_index_first_axis():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 0, 3])
    assert torch.equal(index_first_axis(x, indices), x[indices])
    assert torch.equal(index_first_axis(x, indices.int()), x[indices])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    assert torch.autograd.gradcheck(lambda x: pad_input(x, torch.tensor([5, 0, 1, 3]), 2, 3), x)


def test_padded_attention_by_way_of_packed():
    """The purpose of all this: unpad, attend, pad gives what each entry alone gives."""
    qkv = torch.randn(3, 4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    tokens, indices, cu_seqlens, longest, _ = unpad_input(qkv, MASK)
    packed = flash_attn_varlen_qkvpacked_func(tokens, cu_seqlens, longest, causal=True)
    out = pad_input(packed, indices, 3, 4)
    want = torch.zeros_like(out)
    for n in (0, 2):
        alone = qkv[n : n + 1, MASK[n].bool()].unbind(2)
        want[n, MASK[n].bool()] = flash_attn_func(*alone, causal=True)[0]
    torch.testing.assert_close(out, want)
    factor = torch.randn_like(out)
    got, want = (torch.autograd.grad((x * factor).sum(), qkv)[0] for x in (out, want))
    torch.testing.assert_close(got, want)


X = torch.zeros(3, 4, 5)
REFUSED = [
    (unpad_input, (1, MASK), TypeError, "hidden_states is of type int"),
    (unpad_input, (X[0, 0], MASK), ValueError, r"hidden_states has shape \[5\].*\[B, S, ...\]"),
    (unpad_input, (X, None), TypeError, "attention_mask is of type NoneType"),
    (unpad_input, (X, MASK.float()), TypeError, "attention_mask is torch.float32; accepted"),
    (unpad_input, (X, MASK[:, :2]), ValueError, r"attention_mask has shape \[3, 2\].*\[3, 4\]"),
    (unpad_input, (X, MASK, MASK[0]), ValueError, r"unused_mask has shape \[4\].*\[3, 4\]"),
    (unpad_input, (X, MASK.to("meta")), ValueError, "attention_mask is on meta"),
    (unpad_input_for_concatenated_sequences, (X, MASK.bool()), TypeError, "length is torch.bool"),
    (
        unpad_input_for_concatenated_sequences,
        (X, 2 * MASK),
        ValueError,
        r"sum to \[6, 0, 4\]",
    ),
    (unpad_input_for_concatenated_sequences, (X, -MASK), ValueError, "not negative"),
    (pad_input, (X, torch.arange(3), 2, -1), ValueError, "seqlen is -1"),
    (pad_input, (X, torch.arange(3), "2", 2), TypeError, "batch is of type str"),
    (pad_input, (X, torch.arange(2), 2, 2), ValueError, r"indices has shape \[2\] and hidden_st"),
    (pad_input, (X, torch.arange(3), 1, 2), ValueError, r"indices reach from 0 to 2.*\[0, 1\]"),
    (pad_input, (X, torch.rand(3), 2, 2), TypeError, "indices is torch.float32"),
    (
        index_first_axis,
        (X, torch.tensor([[1]])),
        TypeError,
        r"of shape \[1, 1\]; accepted",
    ),
    (index_first_axis, (X, torch.tensor([-1])), ValueError, r"from -1 to -1; accepted is \[0, 2\]"),
    (index_first_axis, (X, [1]), TypeError, "indices is of type list"),
]


@pytest.mark.parametrize(
    "function, arguments, kind, sentence",
    REFUSED,
    ids=lambda x: getattr(x, "__name__", str(x))[:30],
)
def test_refusals(function, arguments, kind, sentence):
    with pytest.raises(kind, match=sentence):
        function(*arguments)

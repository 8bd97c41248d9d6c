"""What users try from habit: other libraries' arguments, masks of their shapes, TorchScript."""

from __future__ import annotations

import inspect
import io

import pytest
import torch
from torch import nn

import fastattn
import fastattn.flash_attn
from fastattn import nn as fnn
from fastattn.habits import _OURS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
B, H, S, D = 2, 3, 5, 8
Q = torch.randn(B, H, S, D)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
PACKED = torch.randn(5, H, D)
FUNCTIONS = {
    "attention": ((Q, Q, Q), {}),
    "varlen_attention": ((PACKED, PACKED, PACKED, CU, CU, 3, 3), {}),
    "decode_attention": ((Q, Q, Q), {"cache_lens": 5}),
}

# ---- keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name, ours", [
    ("is_causal", "causal= is its name, with align='start'"), ("attn_mask", "mask= is bool"),
    ("key_padding_mask", "kv_lens= is each"), ("dropout", "dropout_p= is its name"),
    ("enable_gqa", "fewer heads than q"), ("window_size", r"window=\(left, right\)"),
    ("softmax_scale", "scale= is its name"), ("s_aux", "sinks= is its name"),
    ("causl", "did you mean causal="), ("seqused_k", "kv_lens= is its name"),
])  # fmt: skip
def test_keywords_of_other_libraries(function, name, ours):
    """One sentence that begins like Python's and names our argument; explain() says the same."""
    args, options = FUNCTIONS[function]
    for call in (getattr(fastattn, function), fastattn.explain):
        sentence = rf"^{function}\(\) got an unexpected keyword argument '{name}'; .*{ours}"
        with pytest.raises(TypeError, match=sentence) as caught:
            call(*args, **options, **{name: None})
        assert "\n" not in str(caught.value)


def test_keywords_of_ours_that_another_function_takes():
    with pytest.raises(TypeError, match=r"it is one of varlen_attention\(\) and decode_attention"):
        fastattn.attention(Q, Q, Q, page_table=None)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'$"):
        fastattn.attention(Q, Q, Q, nonsense=1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_sentence_is_in_what_dynamo_says(function):
    args, options = FUNCTIONS[function]
    call = torch.compile(getattr(fastattn, function), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=rf"{function}\(\) got an .* 'causl'; did you mean causal="):
        call(*args, **options, causl=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures_show_no_unknown_keywords(function):
    parameters = inspect.signature(getattr(fastattn, function)).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert not _OURS.keys() & parameters.keys()


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, form", [((B, 7), "[:, None, None], or kv_lens"), ((B, S, 7), "[:, None]")]
)
def test_masks_of_each_entry(shape, form):
    """[B, S] and [B, Sq, Skv] are refused, and the message names a shape that broadcasts and
    works."""
    k, keep = torch.randn(B, H, 7, D), torch.rand(shape) > 0.3
    keep[..., 0] = True
    for name, x in (("mask", keep), ("bias", keep.float())):
        with pytest.raises(ValueError) as caught:
            fastattn.attention(Q, k, k, **{name: x})
        assert str(caught.value).endswith(f"(batch, heads, rows, keys), here {name}{form}")
    index = (slice(None), *[None] * (4 - len(shape)))
    wide = keep[index].expand(B, H, S, 7)
    out = fastattn.attention(Q, k, k, mask=keep[index])
    torch.testing.assert_close(out, fastattn.attention(Q, k, k, mask=wide.contiguous()))
    with pytest.raises(ValueError, match=r"\(batch, heads, rows, keys\)$"):
        fastattn.attention(Q, k, k, mask=torch.ones(S, S, dtype=torch.bool))


# ---- TorchScript ---------------------------------------------------------------------------------

SENTENCE = "torch.jit.script cannot compile fastattn; use torch.compile, torch.export or torch.jit"


def called(x: torch.Tensor):
    return fastattn.attention(x, x, x)


@pytest.mark.parametrize("function", [
    called, *(getattr(fastattn, name) for name in (*FUNCTIONS, "scaled_dot_product_attention")),
    *(getattr(fastattn.flash_attn, x) for x in fastattn.flash_attn.__all__ if x != "bert_padding"),
], ids=lambda x: x.__name__)  # fmt: skip
def test_scripting_a_function(function):
    with pytest.raises(RuntimeError, match=SENTENCE) as caught:
        torch.jit.script(function)
    assert "\n" not in str(caught.value)


def test_scripting_a_module():
    swapped = nn.TransformerEncoderLayer(16, 2)
    fastattn.swap(swapped)
    modules = [fnn.Attention(16, 2), fnn.RMSNorm(16), fnn.MultiheadAttention(16, 2), swapped]
    for module in modules:
        for whole in (module, nn.Sequential(nn.Linear(16, 16), module)):
            with pytest.raises(NotImplementedError, match=f"^{type(module).__name__}: {SENTENCE}"):
                torch.jit.script(whole)
    fastattn.unswap(swapped)
    torch.jit.script(swapped)
    for name in fnn.__all__:
        assert hasattr(getattr(fnn, name), "__prepare_scriptable__")


def heads(batch, length):
    return [torch.randn(batch, H, length, D, dtype=torch.float64) for _ in range(3)]


def padding(batch, length):
    return torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))


def rows(batch, length):
    return [torch.randn(batch, length, 16, dtype=torch.float64)] * 3


def encoder():
    layer = fnn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return fnn.TransformerEncoder(layer, 2).double()


class Masked(nn.Module):
    """Masks whose form in the kernels would depend on their values."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention = fnn.MultiheadAttention(16, 2, batch_first=True).double()
        self.need_weights = need_weights

    def forward(self, x, hidden, mask):
        options = {"key_padding_mask": hidden, "attn_mask": mask}
        return self.attention(x, x, x, need_weights=self.need_weights, **options)[0]


def with_masks(batch, length):
    """Causal and padded at the end for one length, neither for the other."""
    hidden, mask = padding(batch, length), torch.ones(length, length, dtype=torch.bool).triu(1)
    if length > 6:
        hidden, mask = hidden.flip(1), mask.flip(0, 1)
    return rows(batch, length)[0], hidden, mask


@pytest.mark.parametrize(
    "function, inputs",
    [
        (lambda q, k, v: fastattn.attention(q, k, v, causal=True), heads),
        (lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True), heads),
        (
            lambda q, k, v, n: fastattn.attention(q, k, v, window=(2, 1), kv_lens=n),
            lambda b, n: (*heads(b, n), torch.full((b,), n - 1)),
        ),
        (fnn.Attention(16, 2, causal=True).double(), lambda b, n: rows(b, n)[:1]),
        (fnn.MultiheadAttention(16, 2, batch_first=True).double(), rows),
        (Masked(False), with_masks),
        (Masked(True), with_masks),
        (encoder(), lambda b, n: rows(b, n)[:1]),
    ],
    ids=["attention", "sdpa", "lengths", "Attention", "multihead", "masks", "weights", "encoder"],
)
def test_tracing(function, inputs):  # fmt: skip
    """A traced function works for other batches, lengths and values, after saving, and with
    gradients."""
    traced = torch.jit.trace(function, tuple(inputs(2, 5)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    tensors = list(inputs(3, 9))
    tensors[0] = tensors[0].clone().requires_grad_()
    found = []
    for x in (function, traced, torch.jit.load(file)):
        out = x(*tensors)
        out = out[0] if isinstance(out, tuple) else out
        found.append([out, *torch.autograd.grad(out.sin().sum(), tensors[0])])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])

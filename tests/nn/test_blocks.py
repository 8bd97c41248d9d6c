"""The blocks for new models, against the same in plain torch."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from block_checks import close
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import nn as fnn
from fastattn.models.torch_attention import torch_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- Attention ----------------------------------------------------------------------------------


def plain_attention(m, x, context=None, visible=None, bias=None):
    """Attention(m) in plain torch, from its parameters; visible is bool, broadcastable."""
    source = x if context is None else context
    q, k, v = (
        p(y).unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
        for p, y in ((m.q_proj, x), (m.k_proj, source), (m.v_proj, source))
    )
    if m.q_norm is not None:
        q, k = (
            F.rms_norm(y, (m.head_dim,), n.weight, n.eps) for y, n in ((q, m.q_norm), (k, m.k_norm))
        )
    if m.rotary is not None:
        q, k = (plain_rotary(y, m.rotary) for y in (q, k))
    k, v = (y.repeat_interleave(m.heads // m.kv_heads, 1) for y in (k, v))
    scores = q @ k.transpose(2, 3) * (m.head_dim**-0.5 if m.scale is None else m.scale)
    if m.softcap:
        scores = m.softcap * torch.tanh(scores / m.softcap)
    scores = scores if bias is None else scores + bias
    i, j = torch.arange(q.shape[2]).unsqueeze(1), torch.arange(k.shape[2])
    if m.causal:
        scores = scores.masked_fill(j > i, -math.inf)
    if m.window is not None:
        scores = scores.masked_fill(j < i - m.window[0], -math.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if m.sinks is not None:
        sink = m.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return m.o_proj((weights @ v).transpose(1, 2).flatten(2))


def plain_rotary(x, rotary, start=0):
    """RoPE by complex multiplication, an implementation independent of ours."""
    d = rotary.dim
    angles = (torch.arange(x.shape[-2], dtype=torch.float64) + start).unsqueeze(1) * torch.tensor(
        [rotary.base ** (-2 * n / d) for n in range(d // 2)], dtype=torch.float64
    )
    y = x[..., :d].double()
    a, b = (y[..., 0::2], y[..., 1::2]) if rotary.interleaved else y.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    pair = (z.real, z.imag)
    y = torch.stack(pair, -1).flatten(-2) if rotary.interleaved else torch.cat(pair, -1)
    return torch.cat((y.to(x.dtype), x[..., d:]), -1)


ATTENTIONS = {
    "plain": {},
    "causal": {"causal": True, "bias": True},
    "gqa, rotary, qk_norm": {"kv_heads": 2, "rotary": True, "qk_norm": True, "causal": True},
    "sinks, window": {"sinks": True, "window": (3, None), "causal": True, "head_dim": 10},
    "softcap, scale": {"softcap": 2.0, "scale": 0.7, "out_bias": True},
    "partial rotary": {"rotary": fnn.RotaryEmbedding(4, 100.0, interleaved=True), "kv_heads": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_attention(name, dtype):
    m = fnn.Attention(32, 4, **ATTENTIONS[name], dtype=dtype)
    if m.sinks is not None:
        torch.nn.init.normal_(m.sinks)
    x = torch.randn(2, 9, 32, dtype=dtype, requires_grad=True)
    exact = copy.deepcopy(m).double()
    y = x.detach().double().requires_grad_()
    out, right = m(x), plain_attention(exact, y)
    close(out, right.to(dtype))
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, *m.parameters()), dout)
    rights = torch.autograd.grad(right, (y, *exact.parameters()), dout.double())
    for a, b in zip(grads, rights):
        close(a, b.to(dtype), 4 * max(1.0, b.abs().max().item()))


def test_attention_masks():
    m = fnn.Attention(16, 2)
    x, bias = torch.randn(2, 6, 16), torch.randn(2, 2, 6, 6)
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    right = plain_attention(m, x, visible=keys[:, None, None])
    close(m(x, mask=keys), right)
    close(m(x, kv_lens=torch.tensor([6, 4])), right)
    full = (torch.rand(2, 2, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    close(m(x, mask=full, bias=bias), plain_attention(m, x, visible=full, bias=bias))
    causal = fnn.Attention(16, 2, causal=True)
    right = plain_attention(causal, x, visible=keys[:, None, None])
    close(causal(x, kv_lens=torch.tensor([6, 4]))[1, :4], right[1, :4])
    close(causal(x, kv_lens=torch.tensor([6, 4]))[0], right[0])


def test_attention_cross():
    m = fnn.Attention(16, 2, context_dim=12, qk_norm=True)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    close(m(x, context), plain_attention(m, x, context))
    keys = torch.arange(7) < torch.tensor([[7], [3]])
    close(
        m(x, context, kv_lens=torch.tensor([7, 3])),
        plain_attention(m, x, context, visible=keys[:, None, None]),
    )


def test_attention_packed():
    """Packed sequences and documents equal the sequences one by one."""
    for options in ({"rotary": True, "causal": True}, {"window": (2, 2), "sinks": True}):
        m = fnn.Attention(16, 2, **options)
        x, cu = torch.randn(11, 16), torch.tensor([0, 4, 4, 11], dtype=torch.int32)
        right = torch.cat([m(x[None, a:b])[0] for a, b in ((0, 4), (4, 11))])
        close(m(x, cu_seqlens=cu), right)
        close(m(x, cu_seqlens=cu, max_seqlen=9), right)
        ids = torch.tensor([0] * 4 + [1] * 7)
        close(m(x[None], document_ids=ids)[0], right)
    m = fnn.Attention(16, 2, context_dim=8)
    context, ends = torch.randn(9, 8), torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    got = m(x, context, cu_seqlens=cu, context_cu_seqlens=ends)
    close(got[:4], m(x[None, :4], context[None, :5])[0])
    close(got[4:], m(x[None, 4:], context[None, 5:])[0])


def test_key_ranges():
    """The mask that says the same: in self- and cross-attention, packed, with a cache, in a block,
    and in torch's attention, which fastattn.models compares with."""
    x, context = torch.randn(2, 6, 16), torch.randn(2, 7, 12)
    ranges = fastattn.masks.chunked(3, 6)
    begin, end = ranges[0][..., None], ranges[1][..., None]

    def mask(keys):
        return (begin <= torch.arange(keys)) & (torch.arange(keys) < end)

    for m in (fnn.Attention(16, 2, causal=True, rotary=True),
              fnn.TransformerBlock(16, 2, causal=True)):  # fmt: skip
        want = m(x, mask=mask(6))
        assert not torch.allclose(m(x), want)
        close(m(x, key_ranges=ranges), want)
        with torch.no_grad():
            caches = m.make_cache(2, 9), m.make_cache(2, 9)
            close(m(x, cache=caches[0], key_ranges=ranges), want)
            m(x, cache=caches[1])  # the cache is the same; one more row at position 6
            one = fastattn.masks.chunked(3, 1, offset=6)
            seen = (torch.arange(9) >= 6).view(1, 1, 1, 9)
            close(m(x[:, :1], cache=caches[0], key_ranges=one),
                  m(x[:, :1], cache=caches[1], mask=seen))  # fmt: skip
    m = fnn.Attention(16, 2, causal=True)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    close(m(x.flatten(0, 1), cu_seqlens=cu, key_ranges=ranges).view(2, 6, 16), m(x, mask=mask(6)))
    ours = m(x, key_ranges=ranges)
    m.attend = torch_attention
    close(m(x, key_ranges=ranges), ours)
    m = fnn.Attention(16, 2, context_dim=12)
    close(m(x, context, key_ranges=ranges), m(x, context, mask=mask(7)))


def test_attention_dropout():
    m = fnn.Attention(16, 2, dropout=0.5)
    x = torch.randn(1, 8, 16)
    torch.manual_seed(1)
    first = m(x)
    torch.manual_seed(1)
    assert torch.equal(first, m(x)) and not torch.equal(first, m(x))
    m.eval()
    close(m(x), plain_attention(m, x))


# ---- rotary and positions -----------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    rotary = fnn.RotaryEmbedding(8, 100.0, interleaved=interleaved)
    q, k = torch.randn(2, 3, 70, 12), torch.randn(2, 1, 70, 12)
    right = plain_rotary(q, rotary), plain_rotary(k, rotary)
    close(torch.cat(rotary(q, k), 1), torch.cat(right, 1))
    close(rotary(q[:, :, 5:], offset=5), right[0][:, :, 5:])
    positions = torch.stack((torch.arange(70), torch.arange(70).flip(0)))
    rotated = rotary(q, positions=positions)
    close(rotated[0], right[0][0])
    close(rotated[1], plain_rotary(q[1].flip(1), rotary).flip(1))
    close(rotary(q, positions=positions[1]), plain_rotary(q.flip(2), rotary).flip(2))
    assert rotary(q.half()).dtype == torch.float16 and rotary(q.double()).dtype == torch.float64
    assert list(rotary.state_dict()) == []


def test_rotary_keeps_its_angles_when_the_model_is_cast():
    rotary = fnn.RotaryEmbedding(64).to(torch.bfloat16)
    x = torch.randn(1, 1, 3, 64)
    close(rotary(x, offset=40000), plain_rotary(x, rotary, 40000))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_rotary_scaling_as_transformers(scaling):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {**scaling, "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512,
                         rope_parameters=parameters)  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    q, k = torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32)
    cos, sin = theirs(q, torch.arange(300)[None])
    right = apply_rotary_pos_emb(q, k, cos, sin)
    ours = fnn.RotaryEmbedding(32, 500.0, scaling=parameters)
    for a, b in zip(ours(q, k), right):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # their angles are fp32 products


def test_rotary_ntk_changes_the_base():
    scaled = fnn.RotaryEmbedding(16, scaling={"type": "ntk", "factor": 3.0})
    base = fnn.RotaryEmbedding(16, 10000.0 * 3.0 ** (16 / 14))
    assert scaled.table.frequencies == base.table.frequencies
    assert scaled.table.frequencies[0] == 1.0  # the fastest pair stays, the slowest is divided
    assert math.isclose(scaled.table.frequencies[-1], 10000.0 ** (-14 / 16) / 3)


@pytest.mark.parametrize("dim", [6, 7])
def test_sinusoidal(dim):
    encoding = fnn.SinusoidalPositionalEncoding(dim, 50)
    right = torch.empty(50, dim, dtype=torch.float64)
    for p in range(50):
        for c in range(dim):
            angle = p / 10000 ** ((c - c % 2) / dim)
            right[p, c] = math.cos(angle) if c % 2 else math.sin(angle)
    x = torch.randn(2, 20, dim, dtype=torch.float64)
    close(encoding(x), x + right[:20])
    close(encoding(x[0], 30), x[0] + right[30:])
    close(encoding(x, torch.tensor([30, 4])), x + torch.stack((right[30:], right[4:24])))
    assert encoding(x.bfloat16()).dtype == torch.bfloat16 and not encoding.state_dict()


def test_learned_positions():
    encoding = fnn.LearnedPositionalEncoding(6, 9)
    x = torch.randn(2, 4, 6)
    close(encoding(x, 5), x + encoding.weight[5:])
    offset = torch.tensor([5, 0])
    out = encoding(x, offset)
    close(out, x + torch.stack((encoding.weight[5:], encoding.weight[:4])))
    out.sum().backward()
    assert encoding.weight.grad[:, 0].tolist() == [1.0] * 4 + [0.0] + [1.0] * 4


# ---- norms, gates, loss, block ------------------------------------------------------------------


def test_norms_are_torchs():
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    ours, theirs = fnn.LayerNorm(8), torch.nn.LayerNorm(8)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    normed, summed = ours(x, residual)
    close(ours(x), theirs(x))
    close(normed, theirs(x + residual))
    assert torch.equal(summed, x + residual)
    close(fnn.RMSNorm(8)(x), F.rms_norm(x, (8,), eps=1e-6))
    assert not list(fnn.RMSNorm(8, elementwise_affine=False).parameters())
    assert list(fnn.LayerNorm(8, bias=False).state_dict()) == ["weight"]


def test_feed_forwards():
    x = torch.randn(2, 3, 16)

    def tanh(y):
        return F.gelu(y, approximate="tanh")

    for m, f in ((fnn.SwiGLU(16), F.silu), (fnn.GeGLU(16, 24, bias=True), F.gelu),
                 (fnn.GeGLU(16, approximate="tanh"), tanh)):  # fmt: skip
        close(m(x), m.down_proj(f(m.gate_proj(x)) * m.up_proj(x)))
    assert fnn.SwiGLU(768).gate_proj.out_features == 2048
    for name, f in (("gelu", F.gelu), ("relu2", lambda y: y.relu() ** 2)):
        m = fnn.MLP(16, activation=name)
        close(m(x), m.down_proj(f(m.up_proj(x))))


def test_loss_module():
    hidden, weight = torch.randn(2, 5, 8), torch.randn(20, 8)
    labels = torch.randint(0, 20, (2, 5))
    labels[0, 1] = 7
    loss = fnn.LinearCrossEntropy(ignore_index=7, label_smoothing=0.1, reduction="none", chunk=3)
    right = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=7, label_smoothing=0.1,
        reduction="none",
    )  # fmt: skip
    close(loss(hidden, weight, labels), right.view(2, 5))
    assert "label_smoothing=0.1" in repr(loss)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "geglu_tanh", "gelu", "relu"])
def test_block(norm, mlp):
    m = fnn.TransformerBlock(16, 2, causal=True, context_dim=8, norm=norm, mlp=mlp, bias=True)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 8)
    y = x + plain_attention(m.attn, m.attn_norm(x))
    y = y + plain_attention(m.cross, m.cross_norm(y), context)
    y = y + m.mlp(m.mlp_norm(y))
    close(m(x, context), y)
    with torch.no_grad():
        cache, held = m.make_cache(2, 5), m.cross.make_cache(2, 3)
        parts = [m(x[:, n : n + 1], context, cache=cache, context_cache=held) for n in range(5)]
    close(torch.cat(parts, 1), y)


# ---- what every module must survive -------------------------------------------------------------


def block(**options):
    options = {"rotary": True, "qk_norm": True, "sinks": True, **options}
    return fnn.TransformerBlock(16, 4, 2, causal=True, context_dim=16, **options)


def run(m, x):
    return m(x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_trains(dtype):
    m, x = block(dtype=dtype), torch.randn(2, 6, 16, dtype=dtype, requires_grad=True)
    out = run(m, x)
    out.square().sum().backward()
    assert out.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_autocast():
    m, x = block(), torch.randn(2, 6, 16, requires_grad=True)
    weight, labels = torch.randn(30, 16, requires_grad=True), torch.randint(0, 30, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(m, x)
        loss = fnn.LinearCrossEntropy()(out, weight, labels)
    assert out.dtype == torch.float32 and loss.dtype == torch.float32  # the residual stream stays
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())
    torch.testing.assert_close(out, run(m, x), rtol=0.05, atol=0.05)


def test_deepcopy_and_save():
    m, x = block().eval(), torch.randn(2, 6, 16)
    out = run(m, x)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    for other in (copy.deepcopy(m), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, x), out)
    fresh = block().eval()
    fresh.load_state_dict(m.state_dict())
    assert torch.equal(run(fresh, x), out)


def test_checkpointing_with_dropout():
    m, x = block(dropout=0.3), torch.randn(2, 6, 16, requires_grad=True)
    grads = []
    for call in (lambda: run(m, x), lambda: checkpoint(run, m, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call().square().sum(), (x, *m.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_meta_and_reset_parameters():
    with torch.device("meta"):
        m = block(norm="layer", mlp="gelu", bias=True)
        assert run(m, torch.randn(2, 6, 16)).shape == (2, 6, 16)
    m = m.to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.constant_(p, math.nan)
    torch.manual_seed(0)
    m.reset_parameters()
    assert all(p.isfinite().all() for p in m.parameters())
    assert (m.attn_norm.weight == 1).all() and (m.attn.sinks == 0).all()
    assert run(m, torch.randn(2, 6, 16)).isfinite().all()


def test_compile():
    m, x = block(), torch.randn(2, 6, 16, requires_grad=True)
    right, got = run(m, x), torch.compile(run, fullgraph=True, backend="aot_eager")(m, x)
    close(got, right)
    wanted = (x, *m.parameters())
    for a, b in zip(*(torch.autograd.grad(y.sum(), wanted) for y in (got, right))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_positions_compile():
    for encoding in (fnn.SinusoidalPositionalEncoding(6, 9), fnn.LearnedPositionalEncoding(6, 9)):
        x = torch.randn(2, 4, 6)
        got = torch.compile(encoding, fullgraph=True, backend="aot_eager")(x, 3)
        close(got, encoding(x, 3))


# ---- bad input: one sentence --------------------------------------------------------------------

_X = torch.randn(2, 3, 8)
_SELF, _CAUSAL = fnn.Attention(8, 2), fnn.Attention(8, 2, causal=True)
_CROSS, _CU = fnn.Attention(8, 2, context_dim=4), torch.tensor([0, 3], dtype=torch.int32)
ERRORS = {
    "dim": (lambda: fnn.Attention(10, 4), "dim is 10 and heads 4; dim must be a multiple"),
    "kv_heads": (lambda: fnn.Attention(8, 4, 3), "heads is 4 and kv_heads 3"),
    "heads": (lambda: fnn.Attention(8, 0), "heads is 0; accepted is an int of at least 1"),
    "rotary": (lambda: fnn.Attention(8, 2, rotary=fnn.RotaryEmbedding(6)), "rotary rotates 6"),
    "cross causal": (lambda: fnn.Attention(8, 2, context_dim=8, causal=True), "causal came with"),
    "dropout": (lambda: fnn.Attention(8, 2, dropout=1.0), "dropout_p is 1.0; accepted is"),
    "x": (lambda: _SELF(_X[..., :7]), r"x has shape \[2, 3, 7\]; accepted is \[..., 8\]"),
    "x rank": (lambda: _SELF(_X[0]), r"x has shape \[3, 8\]; accepted is \[B, S, dim\]"),
    "context": (lambda: _SELF(_X, _X), "context came to self-attention"),
    "no context": (lambda: _CROSS(_X), "context is None; cross-attention needs it"),
    "context size": (lambda: _CROSS(_X, _X), r"context has shape \[2, 3, 8\]"),
    "positions": (lambda: _SELF(_X, positions=torch.arange(3)), "positions came to an Attention"),
    "not causal": (lambda: _SELF(_X, cache=_SELF.make_cache(2, 4)), "causal=False"),
    "batch": (lambda: _CAUSAL(_X, cache=_CAUSAL.make_cache(1, 4)), "has batch size 1 and x 2"),
    "mask": (lambda: _SELF(_X, mask=torch.ones(2, 4, dtype=torch.bool)), "mask has shape"),
    "rotary dim": (lambda: fnn.RotaryEmbedding(7), "dim is 7; accepted is an even number"),
    "rope_type": (lambda: fnn.RotaryEmbedding(8, scaling={"rope_type": "yarn"}), "'yarn'"),
    "scaling keys": (lambda: fnn.RotaryEmbedding(8, scaling={"type": "linear"}), "has the keys"),
    "rotary x": (lambda: fnn.RotaryEmbedding(16)(_X), "q has shape"),
    "position": (lambda: fnn.RotaryEmbedding(8)(_X, positions=torch.tensor([0, -1, 2])), "-1"),
    "offset": (lambda: fnn.LearnedPositionalEncoding(8, 4)(_X, 2), r"offset is 2; accepted is a "),
    "too long": (lambda: fnn.SinusoidalPositionalEncoding(8, 2)(_X), "x has 3 rows"),
    "eps": (lambda: fnn.RMSNorm(8, -1.0), "eps is -1.0"),
    "smoothing": (lambda: fnn.LinearCrossEntropy(label_smoothing=2.0), "label_smoothing is 2.0"),
    "reduction": (lambda: fnn.LinearCrossEntropy(reduction="avg"), "reduction is 'avg'"),
    "mlp": (lambda: fnn.TransformerBlock(8, 2, mlp="tanh"), "mlp is 'tanh'; accepted are 'swiglu'"),
    "norm": (lambda: fnn.TransformerBlock(8, 2, norm="batch"), "norm is 'batch'"),
    "block context": (lambda: fnn.TransformerBlock(8, 2)(_X, _X), "context came to a block"),
    "block lens": (lambda: fnn.TransformerBlock(8, 2)(_X, context_lens=_X), "context_lens came to"),
    "documents": (lambda: _SELF(_X[0], cu_seqlens=_CU, document_ids=_CU), "document_ids came with"),
    "max_seqlen": (lambda: _SELF(_X, max_seqlen=3), "max_seqlen came without cu_seqlens"),
    "context_cu": (lambda: _SELF(_X[0], cu_seqlens=_CU, context_cu_seqlens=_CU), "self-attention"),
    "context_max": (lambda: _CROSS(_X[0], _X[0, :, :4], cu_seqlens=_CU, context_max_seqlen=3),
                    "context_max_seqlen came without context_cu_seqlens"),
    "new_lens": (lambda: _CAUSAL.make_cache(2, 4).attend(
        *(torch.zeros(2, 2, 1, 4),) * 3, new_lens=torch.tensor([2, 0])), r"new_lens\[0\] is 2"),
    "reorder": (lambda: _CAUSAL.make_cache(2, 4).reorder(torch.tensor([2])), r"index\[0\] is 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors(name):
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        call()

"""A user's program for type checkers: every public name, with the types a user expects of it.
tests/attention/test_types.py runs pyright and mypy over it in their strict modes, and runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastattn
from fastattn import Explanation, Spec, SwapReport
from fastattn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fastattn.flash_attn.bert_padding import (
    index_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from fastattn.models import (
    BERT,
    GPT,
    BERTConfig,
    CheckpointError,
    EncoderDecoder,
    EncoderDecoderConfig,
    FusionConfig,
    FusionEncoder,
    GPTConfig,
    ModelOutput,
)


def calls(with_lse: bool) -> tuple[Tensor, Tensor]:
    """The calls, their results by return_lse, and what would run."""
    q = torch.randn(2, 4, 6, 8)
    bias = torch.zeros(6, 6)
    out: Tensor = fastattn.attention(q, q, q)
    out, lse = fastattn.attention(q, q, q, causal=True, bias=bias, softcap=30, return_lse=True)
    either: Tensor | tuple[Tensor, Tensor] = fastattn.attention(q, q, q, return_lse=with_lse)
    first = either if isinstance(either, Tensor) else either[0]
    out = out + first
    out = fastattn.attention(
        q, q, q, scale=0.5, window=(3, None), align="start", alibi_slopes=torch.ones(4),
        sinks=torch.zeros(4), kv_lens=torch.tensor([3, 6], dtype=torch.int32), dropout_p=0.1,
        dropout_seed=(1, 2), head_origin=(0, 4), deterministic=True, backend="reference",
        return_lse=False,
    )  # fmt: skip

    first, found = fastattn.attention(q, q, q, return_stats=("entropy", "topk:2"))
    entropy: Tensor = found["entropy"]
    out, lse, found = fastattn.attention(q, q, q, return_lse=True, return_stats=["col_mass"])
    weights: Tensor = fastattn.attention_weights(q, q, lse, rows=slice(0, 2), average=True)
    out = out + first + entropy[..., None] + weights.sum()
    with fastattn.capture(stats=("entropy",)) as rec:
        fastattn.attention(q, q, q)
    layer: int | None = rec[0].layer
    print(rec[0].name, layer, len(rec))

    ranges: tuple[Tensor, Tensor] = fastattn.masks.chunked(4, 6, offset=0)
    out = out + fastattn.attention(q, q, q, causal=True, key_ranges=ranges)
    prefix = fastattn.masks.prefix(torch.tensor([2, 0]), q_len=6)
    out = out + fastattn.attention(q, q, q, key_ranges=prefix)
    blocks_of = fastattn.masks.block_causal([2, 4], 6, device=q.device)
    out = out + fastattn.attention(q, q, q, key_ranges=blocks_of)

    packed, cu = torch.randn(12, 4, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    rows: Tensor = fastattn.varlen_attention(packed, packed, packed, cu, cu, 7, 7, causal=True)
    rows, _ = fastattn.varlen_attention(packed, packed, packed, cu, cu, 7, 7, return_lse=True)

    cache = torch.zeros(2, 4, 16, 8)
    new: Tensor = fastattn.decode_attention(q, cache, cache, cache_lens=10)
    new, new_lse = fastattn.decode_attention(
        q, cache, cache.clone(), cache_lens=torch.tensor([3, 4], dtype=torch.int32), k=q, v=q,
        causal=True, num_splits=2, return_lse=True,
    )  # fmt: skip
    merged, merged_lse = fastattn.merge_states(out, lse, new, new_lse)

    told: Explanation = fastattn.explain(q, q, q, causal=True, backend="reference")
    told = fastattn.explain(packed, packed, packed, cu, cu, 7, 7, window=(2, 0))
    told = fastattn.explain(q, cache, cache, cache_lens=10, causal=True, return_lse=True)
    spec: Spec = told.spec
    reasons: dict[str, str | None] = told.reasons
    print(told, told.backend, told.flops_forward, spec.offset(3, 5), len(reasons), rows.shape)
    return merged, merged_lse


def drop_ins() -> Tensor:
    """torch's call, the switch, and an existing model."""
    q = torch.randn(2, 4, 6, 8)
    out: Tensor = fastattn.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0)
    fastattn.enable()
    fastattn.disable()
    with fastattn.override_sdpa():
        out = out + nn.functional.scaled_dot_product_attention(q, q, q)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    report: SwapReport = fastattn.swap(model)
    names: list[str] = [name for name, _, _ in report.swapped]
    back: SwapReport = fastattn.unswap(model)
    print(report, names, back.left)
    return out


def flash() -> Tensor:
    """FlashAttention's functions; what they return depends on return_attn_probs."""
    q, kv, qkv = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 4, 8), torch.randn(2, 6, 3, 4, 8)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat, flat_kv, flat_qkv = (x.flatten(0, 1) for x in (q, kv, qkv))
    results = (
        flash_attn_func(q, q, q, causal=True, window_size=(3, 0)),
        flash_attn_kvpacked_func(q, kv),
        flash_attn_qkvpacked_func(qkv, dropout_p=0.0),
        flash_attn_varlen_func(flat, flat, flat, cu, cu, 6, 6),
        flash_attn_varlen_kvpacked_func(flat, flat_kv, cu, cu, 6, 6),
        flash_attn_varlen_qkvpacked_func(flat_qkv, cu, 6),
        flash_attn_with_kvcache(q, q.clone(), q.clone(), cache_seqlens=3),
    )
    tokens, indices, _, longest, _ = unpad_input(q, torch.ones(2, 6, dtype=torch.bool))
    lengths = torch.tensor([[2, 4, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    rows = unpad_input_for_concatenated_sequences(q, lengths)[0]
    padded: Tensor = pad_input(tokens, indices, 2, longest)
    total = padded.sum() + index_first_axis(rows, indices).sum()
    for result in results:
        total = total + (result if isinstance(result, Tensor) else result[0]).sum()
    return total


class Reader(nn.Module):
    """A module made of every block and drop-in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.positions = fastattn.nn.SinusoidalPositionalEncoding(dim, 64)
        self.learned = fastattn.nn.LearnedPositionalEncoding(dim, 64)
        self.rotary = fastattn.nn.RotaryEmbedding(dim // 2)
        self.attention = fastattn.nn.Attention(dim, 2, kv_heads=1, causal=True)
        self.norms = nn.ModuleList([fastattn.nn.RMSNorm(dim), fastattn.nn.LayerNorm(dim)])
        self.gates = nn.Sequential(
            fastattn.nn.SwiGLU(dim), fastattn.nn.GeGLU(dim), fastattn.nn.MLP(dim)
        )
        self.block = fastattn.nn.TransformerBlock(dim, 2, causal=True)
        self.loss = fastattn.nn.LinearCrossEntropy()
        self.multihead = fastattn.nn.MultiheadAttention(dim, 2, batch_first=True)
        encoder_layer = fastattn.nn.TransformerEncoderLayer(dim, 2, batch_first=True)
        self.encoder = fastattn.nn.TransformerEncoder(encoder_layer, num_layers=1)
        decoder_layer = fastattn.nn.TransformerDecoderLayer(dim, 2, batch_first=True)
        self.decoder = fastattn.nn.TransformerDecoder(decoder_layer, num_layers=1)
        self.whole = fastattn.nn.Transformer(dim, 2, 1, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, dim] -> [B, S, dim]."""
        x = self.learned(self.positions(x))
        for norm in self.norms:
            x = norm(x)
        x = self.gates(self.attention(x))
        chunks = fastattn.masks.chunked(4, x.shape[1])
        attended, weights = self.multihead.forward(x, x, x, need_weights=True)
        print(
            None if weights is None else weights.shape,
            self.block.forward(x, key_ranges=chunks).shape,
        )
        decoded: Tensor = self.decoder.forward(self.encoder.forward(attended), x)
        return decoded + self.whole.forward(x, x)


def blocks() -> Tensor:
    """fastattn.nn, and its cache."""
    reader, x = Reader(16), torch.randn(2, 5, 16)
    cache: fastattn.nn.KVCache = reader.attention.make_cache(2, 8)
    with torch.no_grad():
        step: Tensor = reader.attention.forward(x, cache=cache)
    cache.truncate(3)
    cache.reorder(torch.tensor([1, 0]))
    loss: Tensor = reader.loss.forward(x[0], torch.randn(7, 16), torch.zeros(5, dtype=torch.int64))
    normed = fastattn.nn.RMSNorm(16).forward(x)
    whole = normed if isinstance(normed, Tensor) else normed[0]
    return step + whole + reader.forward(x) + loss


def whole_models(folder: str) -> Tensor:
    """fastattn.models: configurations, outputs, generation, folders."""
    config = GPTConfig(vocab_size=50, max_len=32, dim=16, heads=2, layers=1)
    gpt, ids = GPT(config), torch.randint(1, 50, (2, 6))
    output: ModelOutput = gpt.forward(ids, labels=ids)
    loss: Tensor | None = output.loss
    written: Tensor = gpt.generate(ids, max_new_tokens=2, temperature=0.7)
    for column in gpt.stream(ids, 2):
        written = torch.cat((written, column[:, None]), 1)
    gpt.save_pretrained(folder)
    try:
        again: GPT = GPT.from_pretrained(folder, attention="torch")
    except CheckpointError:
        again = gpt
    kv_heads: int | None = again.config.kv_heads
    bert = BERT(BERTConfig(vocab_size=50, max_len=32, dim=16, heads=2, layers=1))
    pairs = EncoderDecoder(EncoderDecoderConfig(vocab_size=50, max_len=32, dim=16, heads=2))
    fusion = FusionEncoder(FusionConfig(vocab_size=50, feature_dim=8, dim=16, heads=2))
    made = fastattn.models.GPT(vocab_size=50, dim=16, heads=2, layers=1)
    hidden = bert.forward(ids).last_hidden_state
    print(kv_heads, hidden is None, pairs.num_parameters(), fusion.config.dim, made.config.dim)
    return written if loss is None else written + loss


def hugging_face(model: object) -> None:
    """fastattn.hf, where transformers is installed."""
    from transformers import BertConfig, BertModel, PreTrainedModel

    import fastattn.hf

    if isinstance(model, PreTrainedModel):
        same: PreTrainedModel = fastattn.hf.enable(model)
        same = fastattn.hf.enable(model, fastattn.hf.FLASH_NAME)
        print(same is model)
    fastattn.hf.register()
    small = BertModel(BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    bert: BertModel = fastattn.hf.enable(small)
    print(type(bert).__name__, fastattn.hf.NAME, sorted(fastattn.hf.HARMLESS)[:2])


if __name__ == "__main__":
    import tempfile

    calls(with_lse=True)
    drop_ins()
    flash()
    blocks()
    with tempfile.TemporaryDirectory() as made:
        whole_models(made)

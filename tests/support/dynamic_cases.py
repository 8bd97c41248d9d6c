"""Calls whose lengths change, one Case each: the public functions, drop-ins and modules, with every
operand. tests/attention/test_dynamic_shapes.py compiles them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import fastattn
from fastattn import flash_attn as flash
from fastattn import nn as fnn

LENGTHS = (5, 9, 14)
B, HQ, HKV, D = 2, 4, 2, 6  # sizes of no length, nor of one and a few: equal sizes are taken as one
DIM = 24
SLOTS = 20  # of caches: only new tokens and the filled part vary


@dataclass
class Case:
    """function(*make(length)); tensors of make that require grad get one."""

    function: callable
    make: callable
    grad: bool = True
    random: bool = False  # dropout: the compiler draws the key, so only shapes are compared
    compilations: int = 2  # one compilation for the first length, one for all others


CASES: dict[str, Case] = {}


def case(name, function, make, **more):
    assert name not in CASES
    CASES[name] = Case(function, make, **more)


def randn(*shape):
    return torch.randn(*shape)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def grown(*shape):
    return torch.randn(*shape, requires_grad=True)


# ---- attention() ---------------------------------------------------------------------------------


def qkv(s, t=None):
    t = s if t is None else t
    return grown(B, HQ, s, D), grown(B, HKV, t, D), grown(B, HKV, t, D)


def band(s, t):
    return torch.ones(s, t, dtype=torch.bool).tril(t - s)


def ranges(s):
    """Ends that rise from row to row, of every head."""
    return torch.zeros(1, dtype=torch.int32), ints(*range(2, s + 2)).expand(HQ, s)


ATTENTION_OPERANDS = {  # name: (rows, keys) -> a tensor that varies, or not, with the lengths
    "mask": lambda s, t: band(s, t),
    "mask_4d": lambda s, t: band(s, t).expand(B, HQ, s, t),
    "mask_keys": lambda s, t: (torch.arange(t) < t - 1).expand(B, 1, 1, t),
    "bias": lambda s, t: grown(HQ, s, t),
    "bias_keys": lambda s, t: grown(B, 1, 1, t),
    "alibi_slopes": lambda s, t: torch.rand(HQ),
    "alibi_slopes_2d": lambda s, t: torch.rand(B, HQ),
    "sinks": lambda s, t: grown(HQ),
    "kv_lens": lambda s, t: ints(t, t // 2),
}
ATTENTION_OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (3, 1), "align": "start"},
    "softcap": {"softcap": 5.0, "scale": 0.3},
    "return_lse": {"return_lse": True, "causal": True},
    "dropout": {"dropout_p": 0.3},
    "dropout_seed": {"dropout_p": 0.3, "dropout_seed": (7, 1)},
    "reference": {"backend": "reference", "causal": True},
}


def with_operand(name, q, k, v, x, **options):
    return fastattn.attention(q, k, v, **{name: x}, **options)


for _name, _make in ATTENTION_OPERANDS.items():
    _argument = _name.removesuffix("_4d").removesuffix("_keys").removesuffix("_2d")
    case(
        f"attention {_name}",
        partial(with_operand, _argument, causal=True, return_lse=True),
        lambda s, make=_make: (*qkv(s, s + 3), make(s, s + 3)),
    )
for _name, _options in ATTENTION_OPTIONS.items():
    case(f"attention {_name}", partial(fastattn.attention, **_options),
         lambda s: qkv(s, s + 3), random=_name == "dropout",
         # Dynamo keeps Python's ranges constant, of which the reference makes its pieces.
         compilations=3 if _name == "reference" else 2)  # fmt: skip
case(
    "attention key_ranges",
    lambda q, k, v, begin, end: fastattn.attention(q, k, v, key_ranges=(begin, end)),
    lambda s: (*qkv(s, s + 3), torch.zeros(1, dtype=torch.int32), ints(*range(3, s + 3))),
)


def masks_of(kind, q, k, v):
    """Every function of fastattn.masks, called where it is compiled."""
    rows, offset = q.shape[2], k.shape[2] - q.shape[2]
    ranges = {
        "prefix": lambda: fastattn.masks.prefix(4, rows, offset=offset),
        "chunked": lambda: fastattn.masks.chunked(4, rows, offset=offset),
        "block_causal": lambda: fastattn.masks.block_causal(4, rows, offset=offset),
    }[kind]()
    return fastattn.attention(q, k, v, key_ranges=ranges)


for _name in fastattn.masks.__all__:
    case(f"attention masks.{_name}", partial(masks_of, _name), lambda s: qkv(s, s + 3))
case("attention document_ids", partial(with_operand, "document_ids"),
     lambda s: (*qkv(s), (torch.arange(s) // 3).int()))  # fmt: skip
case("attention rank 3", lambda q, m: fastattn.attention(q, q, q, mask=m),
     lambda s: (grown(B, s, D), band(s, s).expand(B, s, s)))  # fmt: skip
case("attention rank 2", lambda q, b: fastattn.attention(q, q, q, bias=b),
     lambda s: (grown(s, D), grown(s, s)))  # fmt: skip
case(
    "attention of everything",
    lambda q, k, v, mask, bias, slopes, sinks, lens: fastattn.attention(
        q, k, v, mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks, kv_lens=lens, causal=True,
        window=(4, None), softcap=3.0, dropout_p=0.2, dropout_seed=(1, 2), return_lse=True,
    ),
    lambda s: (*qkv(s, s + 3), band(s, s + 3), grown(1, HQ, s, s + 3), torch.rand(HQ),
               grown(HQ), ints(s, s + 3)),
)  # fmt: skip
case(
    "attention_weights",
    lambda q, k, lse, mask: fastattn.weights.attention_weights(q, k, lse, mask=mask[None, None]),
    lambda s: (*qkv(s, s + 3)[:2], grown(B, HQ, s), band(s, s + 3)),
)


# ---- varlen_attention() --------------------------------------------------------------------------


def packed(s):
    """Sequences of s, 0 and 3 rows, with two more keys each."""
    rows, keys = ints(0, s, s, s + 3), ints(0, s + 2, s + 4, s + 9)
    q, k, v = (grown(n, h, D) for n, h in ((s + 3, HQ), (s + 9, HKV), (s + 9, HKV)))
    return q, k, v, rows, keys


VARLEN_OPERANDS = {
    "mask": lambda s, t: band(s, t),
    "bias": lambda s, t: grown(3, HQ, s, t),
    "alibi_slopes": lambda s, t: torch.rand(3, HQ),
    "sinks": lambda s, t: grown(HQ),
    "kv_lens": lambda s, t: ints(s, 0, 4),
    "key_ranges": lambda s, t: ranges(s),
}


def varlen(name, q, k, v, rows, keys, x, **options):
    longest = q.shape[0] - 3, k.shape[0] - 4  # as many as the mask has
    return fastattn.varlen_attention(q, k, v, rows, keys, *longest, **{name: x}, **options)


for _name, _make in VARLEN_OPERANDS.items():
    case(f"varlen {_name}", partial(varlen, _name, causal=True, return_lse=True),
         lambda s, make=_make: (*packed(s), make(s, s + 5)))  # fmt: skip
for _name, _options in ATTENTION_OPTIONS.items():
    if _name != "reference":  # which reads cu_seqlens
        case(f"varlen {_name}", partial(varlen, "mask", **_options),
             lambda s: (*packed(s), None), random=_name == "dropout")  # fmt: skip


def varlen_paged(q, k, v, rows, keys, table):
    longest = q.shape[0] - 3, k.shape[0] * 4
    return fastattn.varlen_attention(
        q.detach(), k.detach(), v.detach(), rows, keys, *longest, page_table=table
    )


case("varlen page_table", varlen_paged,
     lambda s: (grown(s + 3, HQ, D), randn(s, 4, HKV, D), randn(s, 4, HKV, D),
                ints(0, s, s, s + 3), ints(0, s, s, s + 4), torch.arange(s).int().expand(3, s)),
     grad=False)  # fmt: skip


# ---- decode_attention() --------------------------------------------------------------------------


def cached(new, slots=SLOTS):
    caches = (torch.zeros(B, HKV, slots, D), torch.zeros(B, HKV, slots, D))
    for x in caches:
        x.normal_()
    fresh = (randn(B, HKV, new, D), randn(B, HKV, new, D))
    return (randn(B, HQ, new, D), *caches, ints(3, 5), *fresh)


def decode(name, q, k_cache, v_cache, lens, k, v, x=None, **options):
    operand = {} if name is None else {name: x}
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    out, lse = fastattn.decode_attention(
        q, k_cache, v_cache, cache_lens=lens, k=k, v=v, return_lse=True, **operand, **options
    )
    return out, lse, k_cache, v_cache


DECODE_OPERANDS = {  # (new tokens, slots)
    "mask": lambda s, t: torch.ones(s, t, dtype=torch.bool),
    "bias": lambda s, t: randn(HQ, s, t),
    "alibi_slopes": lambda s, t: torch.rand(HQ),
    "sinks": lambda s, t: randn(HQ),
    "cache_leftpad": lambda s, t: ints(1, 2),
    "key_ranges": lambda s, t: ranges(s),
    "cache_batch_idx": lambda s, t: ints(1, 0),
    "rotary": lambda s, t: (randn(t, D // 2), randn(t, D // 2)),
}
for _name, _make in DECODE_OPERANDS.items():
    case(f"decode {_name}", partial(decode, _name, causal=True),
         lambda s, make=_make: (*cached(s), make(s, SLOTS)), grad=False)  # fmt: skip
for _name, _options in (ATTENTION_OPTIONS | {"num_splits": {"num_splits": 2}}).items():
    if _name not in ("reference", "return_lse"):
        case(f"decode {_name}", partial(decode, None, **_options), cached, grad=False,
             random=_name == "dropout")  # fmt: skip
case("decode of a growing cache", partial(decode, "mask"),
     lambda s: (*cached(1, SLOTS + s), torch.ones(1, SLOTS + s, dtype=torch.bool)),
     grad=False)  # fmt: skip
case("decode page_table", partial(decode, "page_table", causal=True),
     lambda s: (randn(B, HQ, s, D), randn(2 * s, HKV, 4, D), randn(2 * s, HKV, 4, D), ints(3, 5),
                randn(B, HKV, s, D), randn(B, HKV, s, D),
                torch.arange(2 * s).int().view(B, s)), grad=False)  # fmt: skip


def decode_8bit(q, k_cache, v_cache, lens, k, v, scale):
    caches = k_cache.to(torch.int8), v_cache.to(torch.int8)
    scales = {"k_descale": scale, "v_descale": scale}
    return fastattn.decode_attention(q, *caches, cache_lens=lens, k=k, v=v, **scales), *caches


case("decode int8", decode_8bit, lambda s: (*cached(s), torch.rand(HKV) + 0.5), grad=False)
case(
    "merge_states",
    fastattn.merge_states,
    lambda s: (grown(B, HQ, s, D), grown(B, HQ, s), grown(B, HQ, s, D), grown(B, HQ, s)),
)


# ---- drop-ins ------------------------------------------------------------------------------------

sdpa = fastattn.scaled_dot_product_attention
case("sdpa", partial(sdpa, is_causal=True), lambda s: (grown(B, HQ, s, D),) * 3)
case("sdpa bool mask", sdpa, lambda s: (*(grown(B, HQ, s, D),) * 3, band(s, s)))
case("sdpa float mask", sdpa, lambda s: (*(grown(B, HQ, s, D),) * 3, grown(B, 1, s, s)))
case("sdpa gqa", partial(sdpa, enable_gqa=True), lambda s: (*qkv(s, s + 2), band(s, s + 2)))
case("sdpa dropout", partial(sdpa, dropout_p=0.2), lambda s: qkv(s)[:1] * 3, random=True)
case("sdpa ranks", sdpa, lambda s: (grown(2, B, HQ, s, D), grown(HQ, s, D), grown(1, HQ, s, D),
                                    grown(2, B, 1, s, s)))  # fmt: skip


def seq(s, h=HQ):
    return grown(B, s, h, D)


case("flash_attn_func",
     lambda q, k, v, a: flash.flash_attn_func(
         q, k, v, causal=True, alibi_slopes=a, return_attn_probs=True)[:2],
     lambda s: (seq(s), seq(s + 2, HKV), seq(s + 2, HKV), torch.rand(HQ)))  # fmt: skip
case("flash_attn_func S_dmask",
     lambda q: flash.flash_attn_func(q, q, q, 0.3, return_attn_probs=True),
     lambda s: (seq(s),), random=True)  # fmt: skip
case("flash_attn_kvpacked_func", partial(flash.flash_attn_kvpacked_func, window_size=(2, 0)),
     lambda s: (seq(s), grown(B, s + 2, 2, HKV, D)))  # fmt: skip
case("flash_attn_qkvpacked_func", partial(flash.flash_attn_qkvpacked_func, causal=True),
     lambda s: (grown(B, s, 3, HQ, D),))  # fmt: skip
case("flash_attn_varlen_func",
     lambda q, k, v, a, b, x: flash.flash_attn_varlen_func(
         q, k, v, a, b, q.shape[0], k.shape[0], causal=True, alibi_slopes=x),
     lambda s: (*packed(s), torch.rand(HQ)))  # fmt: skip
case("flash_attn_varlen_func S_dmask",
     lambda q, k, v, a, b: flash.flash_attn_varlen_func(
         q, k, v, a, b, q.shape[0], k.shape[0], 0.3, return_attn_probs=True),
     packed, random=True)  # fmt: skip
case("flash_attn_varlen_kvpacked_func",
     lambda q, kv, a, b: flash.flash_attn_varlen_kvpacked_func(
         q, kv, a, b, q.shape[0], kv.shape[0]),
     lambda s: (grown(s + 3, HQ, D), grown(s + 9, 2, HKV, D), *packed(s)[3:]))  # fmt: skip
case("flash_attn_varlen_qkvpacked_func",
     lambda x, a: flash.flash_attn_varlen_qkvpacked_func(x, a, x.shape[0], causal=True),
     lambda s: (grown(s + 3, 3, HQ, D), ints(0, s, s + 3)))  # fmt: skip


def with_kvcache(q, k_cache, v_cache, lens, k, v, table=None):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return *flash.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lens, block_table=table, causal=True,
        return_softmax_lse=True,
    ), k_cache, v_cache  # fmt: skip


case("flash_attn_with_kvcache", with_kvcache,
     lambda s: tuple(x.transpose(1, 2) if x.dim() == 4 else x for x in cached(s)),
     grad=False)  # fmt: skip
case("flash_attn_with_kvcache block_table", with_kvcache,
     lambda s: (randn(B, s, HQ, D), randn(2 * s, 4, HKV, D), randn(2 * s, 4, HKV, D), ints(3, 5),
                randn(B, s, HKV, D), randn(B, s, HKV, D),
                torch.arange(2 * s).int().view(B, s)), grad=False)  # fmt: skip


# ---- modules -------------------------------------------------------------------------------------


def tokens(s):
    return grown(B, s, DIM)


def module_case(name, make_module, make, call=None, **more):
    torch.manual_seed(1)
    module = make_module()
    function = module if call is None else partial(call, module)
    case(name, function, make, **more)


def attend(name, module, x, operand):
    return module(x, **{name: operand})


full = partial(fnn.Attention, DIM, HQ, HKV, causal=True, rotary=True, qk_norm=True, sinks=True)
MODULE_OPERANDS = {
    "mask": lambda s: torch.ones(B, s, dtype=torch.bool),
    "bias": lambda s: grown(HQ, s, s),
    "kv_lens": lambda s: ints(s, s - 1),
    "document_ids": lambda s: (torch.arange(s) // 3).int(),
    "key_ranges": lambda s: ranges(s),
    "positions": lambda s: torch.arange(s),
}
for _name, _make in MODULE_OPERANDS.items():
    for _kind, _module in (("Attention", full),
                           ("TransformerBlock", partial(fnn.TransformerBlock, DIM, HQ, HKV,
                                                        causal=True, rotary=True))):  # fmt: skip
        module_case(
            f"{_kind} {_name}",
            _module,
            lambda s, make=_make: (tokens(s), make(s)),
            partial(attend, _name),
        )
module_case("Attention packed", full, lambda s: (grown(s + 3, DIM), ints(0, s, s + 3)),
            lambda m, x, cu: m(x, cu_seqlens=cu, max_seqlen=x.shape[0]))  # fmt: skip
module_case("Attention of a context", partial(fnn.Attention, DIM, HQ, context_dim=DIM),
            lambda s: (tokens(s), tokens(s + 2), torch.ones(B, s + 2, dtype=torch.bool)),
            lambda m, x, c, mask: m(x, c, mask=mask))  # fmt: skip


def with_cache(module, x, mask=None):
    cache = module.make_cache(B, SLOTS)
    module(x.detach(), cache=cache)
    return module(x[:, :1].detach(), mask=mask, cache=cache)


for _kind, _module in (("Attention", full), ("TransformerBlock", partial(
        fnn.TransformerBlock, DIM, HQ, HKV, causal=True, rotary=True))):  # fmt: skip
    module_case(f"{_kind} with a cache", _module, lambda s: (tokens(s),), with_cache, grad=False)
module_case(
    "Attention with a cache and a mask",
    full,
    lambda s: (tokens(s), torch.ones(B, s + 1, dtype=torch.bool)),
    with_cache,
    grad=False,
)

MHA = partial(fnn.MultiheadAttention, DIM, HQ, batch_first=True)
PADDING = {
    "bool": lambda s: torch.arange(s).expand(B, s) >= s - 1,
    "float": lambda s: torch.zeros(B, s),
}
ATTN_MASKS = {
    "none": lambda s: None,
    "bool": lambda s: ~band(s, s),
    "float": lambda s: torch.zeros(s, s).masked_fill(~band(s, s), -torch.inf),
    "3d": lambda s: grown(B * HQ, s, s),
}


def mha(module, x, padding, mask, need_weights):
    return module(x, x, x, padding, attn_mask=mask, need_weights=need_weights)


for _p, _padding in PADDING.items():
    for _m, _mask in ATTN_MASKS.items():
        _weights = (_p == "bool") == (_m in ("none", "float"))
        module_case(f"MultiheadAttention {_p} {_m}", MHA,
                    lambda s, a=_padding, b=_mask: (tokens(s), a(s), b(s)),
                    partial(mha, need_weights=_weights))  # fmt: skip
module_case("MultiheadAttention bias_kv", partial(MHA, add_bias_kv=True, add_zero_attn=True),
            lambda s: (tokens(s), PADDING["bool"](s), ATTN_MASKS["bool"](s)),
            partial(mha, need_weights=True))  # fmt: skip

LAYER = {"d_model": DIM, "nhead": HQ, "dim_feedforward": 24, "batch_first": True, "dropout": 0.0}
module_case(
    "TransformerEncoderLayer",
    partial(fnn.TransformerEncoderLayer, **LAYER),
    lambda s: (tokens(s), ~band(s, s), PADDING["bool"](s)),
)
module_case(
    "TransformerDecoderLayer",
    partial(fnn.TransformerDecoderLayer, **LAYER),
    lambda s: (tokens(s), tokens(s + 2), ATTN_MASKS["float"](s)),
)
module_case(
    "TransformerEncoder",
    lambda: fnn.TransformerEncoder(fnn.TransformerEncoderLayer(**LAYER), 2),
    lambda s: (tokens(s), None, PADDING["bool"](s)),
)
module_case(
    "Transformer",
    partial(fnn.Transformer, DIM, HQ, 1, 1, 24, dropout=0.0, batch_first=True),
    lambda s: (tokens(s), tokens(s + 2), PADDING["bool"](s)),
    lambda m, x, y, hidden: m(x, y, src_key_padding_mask=hidden, memory_key_padding_mask=hidden,
                              tgt_is_causal=True),
)  # fmt: skip
for _name, _module in {
    "RMSNorm": fnn.RMSNorm, "LayerNorm": fnn.LayerNorm, "SwiGLU": fnn.SwiGLU, "GeGLU": fnn.GeGLU,
    "SinusoidalPositionalEncoding": partial(fnn.SinusoidalPositionalEncoding, max_len=32),
    "LearnedPositionalEncoding": partial(fnn.LearnedPositionalEncoding, max_len=32),
}.items():  # fmt: skip
    module_case(_name, partial(_module, DIM), lambda s: (tokens(s),))
module_case("RotaryEmbedding", partial(fnn.RotaryEmbedding, D), lambda s: qkv(s)[:2])
module_case(
    "LinearCrossEntropy",
    fnn.LinearCrossEntropy,
    lambda s: (tokens(s), grown(11, DIM), torch.randint(0, 11, (B, s))),
)


# ---- Hugging Face's function ---------------------------------------------------------------------


def hf(name, q, k, v, x, **options):
    from fastattn.hf.interface import attention_forward

    mask = x if name == "attention_mask" else None
    operand = {} if name == "attention_mask" else {name: x}
    return attention_forward(F, q, k, v, mask, **operand, **options)[0]


for _kind, _make in {
    "bool": lambda s, t: band(s, t)[None, None],
    "float": lambda s, t: grown(B, 1, s, t),
    "padding": lambda s, t: torch.ones(B, t, dtype=torch.bool),
}.items():
    case(f"hf {_kind} mask", partial(hf, "attention_mask"),
         lambda s, make=_make: (*qkv(s, s + 3), make(s, s + 3)))  # fmt: skip
case("hf position_bias", partial(hf, "position_bias", is_causal=False),
     lambda s: (*qkv(s, s + 3), grown(1, HQ, s, s + 3)))  # fmt: skip
case("hf weights", partial(hf, "sinks", output_attentions=True),
     lambda s: (*qkv(s, s), grown(HQ)))  # fmt: skip

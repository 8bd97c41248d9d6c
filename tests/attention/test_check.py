"""`make check`: one small case of every option on every backend of this machine, by the public
functions, forward and backward; and every public name. A minute, where all tests take ten."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import OPTIONS, Case, combine
from operator_calls import cotangents_of, run_reference

import fastattn
from fastattn.core.spec import Operands
from fastattn.core.tolerance import Tolerance

SMALL = {  # what is too long in the list of options
    "window": {"window": (9, 4)},
    "kv_lens": {"kv_lens": (31, 7)},
    "kv_starts": {"kv_starts": (5, 11)},
    "documents": {"documents": (1, 12, 8, 12), "q_len": 33},
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
    """out, lse and the gradients, by the public function."""
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
    if case.packed:  # [T, H, Dv] and [H, T], where the operators have [1, H, T, Dv] and [1, H, T]
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


PUBLIC = {
    "fastattn": """attention varlen_attention decode_attention merge_states explain Explanation
        scaled_dot_product_attention override_sdpa enable disable swap unswap SwapReport nn""",
    "fastattn.nn": """MultiheadAttention TransformerEncoderLayer TransformerDecoderLayer
        TransformerEncoder TransformerDecoder Transformer Attention RMSNorm LayerNorm
        RotaryEmbedding SwiGLU GeGLU LinearCrossEntropy SinusoidalPositionalEncoding
        LearnedPositionalEncoding TransformerBlock""",
    "fastattn.models": """GPT BERT EncoderDecoder FusionEncoder GPTConfig BERTConfig
        EncoderDecoderConfig FusionConfig""",
    "fastattn.hf": "enable",
    "fastattn.flash_attn": """flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func
        flash_attn_varlen_func flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func
        flash_attn_with_kvcache""",
    "fastattn.flash_attn.bert_padding": "pad_input unpad_input index_first_axis",
    "fastattn.audit": "audit",
    "fastattn.benchmarks.timing": "Contender compare",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    if module == "fastattn.hf":
        pytest.importorskip("transformers")
    found = importlib.import_module(module)
    missing = [name for name in PUBLIC[module].split() if not hasattr(found, name)]
    assert not missing, f"{module} lacks {missing}"

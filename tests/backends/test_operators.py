"""The operators as torch sees them: schemas, fake kernels, autograd, vmap, autocast, FLOPs; and
what happens without the native library."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch
from cases import Case, select
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.backends import library
from fastattn.core.reference import reference
from fastattn.core.spec import OPERANDS, Operands, Spec
from fastattn.core.work import pairs_of_band

FORWARD = torch.ops.fastattn.flash_attn_fwd
BACKWARD = torch.ops.fastattn.flash_attn_bwd


def name_of(x) -> str:
    return x.name if isinstance(x, Case) else str(x).removeprefix("torch.")


def numbers(spec: Spec) -> tuple:
    return tuple(getattr(spec, name) for name in Spec.__slots__)


def small(case: Case, dtype=torch.float64, grad=True):
    """The case's tensors with finite values, as leaves."""
    problem = case.make(dtype)
    tensors = [*problem[:3], *problem.operands.tensors()]
    for n, x in enumerate(tensors):
        if x is not None and x.is_floating_point():
            x = torch.where(x.isnan(), 0.0, x)
            tensors[n] = x.requires_grad_(grad and n in (0, 1, 2, 4, 6))
    return tensors, numbers(problem.spec)


CASES = [
    Case("plain", q_len=3, kv_len=5, head_dim=4),
    Case("gqa, v_dim, bshd", heads=4, kv_heads=2, q_len=3, kv_len=5, head_dim=4, v_dim=3,
         layout="bshd", causal=True),
    Case("mask, bias, sinks", q_len=3, kv_len=5, head_dim=4, mask="entries", bias="heads",
         sinks=True, alibi="batch", softcap=2.0),
    Case("dropout, lengths", q_len=3, kv_len=5, head_dim=4, dropout=0.4, kv_lens=(5, 2),
         kv_starts=(1, 0), layout="ragged"),
    Case("packed", head_dim=4, packed=((2, 3), (1, 0), (3, 4)), bias="plane"),
    Case("documents", q_len=5, kv_len=5, head_dim=4, documents=(2, 3)),
    Case("key ranges", q_len=3, kv_len=5, head_dim=4, ranges="random_by_head", bias="heads"),
    Case("packed, key ranges", head_dim=4, packed=((2, 3), (1, 0), (3, 4)), ranges="chunks_of_1"),
]  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck_forward(case):
    tensors, spec = small(case)
    opcheck(FORWARD.default, (*tensors, *spec, 0))
    with torch.no_grad():
        opcheck(FORWARD.default, (*(x if x is None else x.detach() for x in tensors), *spec, 2))


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck_backward(case):
    tensors, spec = small(case)
    with torch.no_grad():
        out, lse = FORWARD(*tensors, *spec, 0)
    needs = (tensors[4] is not None, tensors[6] is not None)
    dout = torch.randn_like(out).requires_grad_()
    dlse = None if case.name == "plain" else torch.randn_like(lse).requires_grad_()
    call = (dout, dlse, out, lse, *tensors)
    if case.name == "mask, bias, sinks":  # slow; lengths and seeds are read again in second order
        opcheck(BACKWARD.default, (*call, *spec, *needs))
    call = (x if x is None else x.detach() for x in call)
    opcheck(BACKWARD.default, (*call, *spec, *needs))


@pytest.mark.native
@pytest.mark.parametrize("case", select("alone", "layout"), ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_fake_kernels_say_what_comes(case, dtype):
    """Shapes, dtypes and strides of all results, also for inputs whose last stride is not 1."""
    tensors, spec = small(case, dtype, grad=False)
    for turned in (False, True):
        if turned:
            tensors = [x if n > 2 else x.mT.contiguous().mT for n, x in enumerate(tensors)]
        meta = [x if x is None else torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]  # fmt: skip
        real, fake = FORWARD(*tensors, *spec, 0), FORWARD(*meta, *spec, 0)
        calls = [(real, fake)]
        if case.has_backward:
            needs = (tensors[4] is not None, tensors[6] is not None)
            outs = [torch.randn_like(real[0]), None, *real]
            metas = [None if x is None else x.to("meta") for x in outs]
            calls.append((BACKWARD(*outs, *tensors, *spec, *needs),
                          BACKWARD(*metas, *meta, *spec, *needs)))  # fmt: skip
        for got, said in calls:
            for a, b in zip(got, said, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_schemas_and_tags():
    for op in (FORWARD.default, BACKWARD.default):
        assert torch.Tag.needs_fixed_stride_order in op.tags
        assert torch.Tag.pt2_compliant_tag in op.tags
        assert not op._schema.is_mutable
    arguments = [a.name for a in FORWARD.default._schema.arguments]
    operands = list(OPERANDS)
    assert arguments == ["q", "k", "v", *operands, *Spec.__slots__, "num_splits"]


@pytest.mark.native
def test_the_native_list_of_arguments_is_that_of_the_schemas():
    """csrc/operands.h reads arguments by position: names, types and order must be Python's."""
    schema = library.NATIVE.fastattn_inputs_schema
    schema.restype = ctypes.c_char_p
    shared = schema().decode()
    assert [x.split()[-1] for x in shared.split(", ")] == [*OPERANDS, *Spec.__slots__]
    for op in (FORWARD.default, BACKWARD.default):
        assert f"Tensor q, Tensor k, Tensor v, {shared}, " in str(op._schema)


@pytest.mark.native
def test_direct_calls_have_two_derivatives():
    tensors, spec = small(CASES[2])
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    results = []
    operands = Operands(*tensors[3:])
    for run in (
        lambda: FORWARD(*tensors, *spec, 0),
        lambda: reference(*tensors[:3], Spec(*spec), operands),
    ):
        out, lse = run()
        first = torch.autograd.grad(out.sin().sum() + lse.exp().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)
        results.append([out, lse, *first, *second])
    torch.testing.assert_close(*results)


@pytest.mark.native
def test_direct_calls_with_only_one_result_used():
    tensors, spec = small(CASES[0])
    out, lse = FORWARD(*tensors, *spec, 0)
    (dv,) = torch.autograd.grad(lse.sum(), tensors[2], retain_graph=True)
    assert (dv == 0).all()
    (dq,) = torch.autograd.grad(out.sum(), tensors[0])
    assert dq.abs().sum() > 0


@pytest.mark.native
def test_direct_calls_under_vmap_and_autocast():
    tensors, spec = small(CASES[0], torch.float32, grad=False)
    q, k, v, *operands = tensors
    many = torch.randn(3, *q.shape)
    got, lse = torch.vmap(lambda q: FORWARD(q, k, v, *operands, *spec, 0))(many)
    for n in range(3):
        torch.testing.assert_close(got[n], FORWARD(many[n], k, v, *operands, *spec, 0)[0])
    call = (many[0], k, v, *operands, *spec)
    douts = torch.randn(3, *q.shape)
    one = FORWARD(*call, 0)
    grads = torch.vmap(lambda dout: BACKWARD(dout, None, *one, *call, False, False)[0])(douts)
    torch.testing.assert_close(grads[1], BACKWARD(douts[1], None, *one, *call, False, False)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = FORWARD(*call, 0)
        double, _ = FORWARD(*(x.double() for x in call[:3]), *call[3:], 0)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert double.dtype == torch.float64


# ---- FLOPs -------------------------------------------------------------------------------------


def test_pairs_of_every_band():
    for q_len in range(5):
        for kv_len in range(6):
            for left in range(-1, 7):
                for right in range(-1, 7):
                    for align_end in (False, True):
                        spec = Spec(1.0, left=left, right=right, align_end=align_end)
                        size = (q_len, kv_len)
                        want = sum(spec.hi(i, *size) - spec.lo(i, *size) for i in range(q_len))
                        assert pairs_of_band(*size, left, right, spec.offset(*size)) == want


def count(function) -> dict[str, int]:
    with FlopCounterMode(display=False) as mode:
        function()
    return {str(op): n for op, n in mode.get_flop_counts()["Global"].items()}


@pytest.mark.native
def test_flop_counter():
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    pairs = 2 * 4 * (4 + 5 + 6 + 7 + 8 + 9)
    got = count(lambda: fastattn.attention(q, k, v, causal=True).sum().backward())
    assert got == {
        "fastattn.flash_attn_fwd": 2 * pairs * (8 + 5),
        "fastattn.flash_attn_bwd": 2 * pairs * (3 * 8 + 2 * 5),
    }
    lens = torch.tensor([2, 9], dtype=torch.int32)
    got = count(lambda: fastattn.attention(q.detach(), k, v, kv_lens=lens))
    assert got == {"fastattn.flash_attn_fwd": 2 * 4 * 6 * (2 + 9) * (8 + 5)}
    cu = torch.tensor([0, 2, 6]), torch.tensor([0, 9, 9])
    rows = (q[0].detach().transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1))
    got = count(lambda: fastattn.varlen_attention(*rows, *cu, 4, 9))
    assert got == {"fastattn.flash_attn_fwd": 2 * 4 * (2 * 9 + 4 * 0) * (8 + 5)}


def _ints(*values):
    return torch.tensor(values, dtype=torch.int32)


COUNTED = {  # name: (function, q, k and v, arguments); the test sets v's columns
    "band": ("attention", (2, 4, 6, 8), (2, 2, 9, 8), {"causal": True}),
    "window": ("attention", (2, 4, 6, 8), (2, 2, 9, 8), {"window": (2, 1), "align": "start"}),
    "kv_lens": ("attention", (2, 4, 6, 8), (2, 2, 9, 8), {"kv_lens": _ints(2, 9), "causal": True}),
    "documents": ("attention", (2, 4, 7, 8), (2, 2, 7, 8),
                  {"document_ids": torch.tensor([[0, 0, 0, 3, 3, 9, 9], [1, 1, 1, 1, 1, 1, 1]])}),
    "documents in a window": ("attention", (1, 4, 7, 8), (1, 2, 7, 8),
                              {"document_ids": _ints(0, 0, 0, 0, 1, 1, 1), "window": (1, 0)}),
    "documents and kv_lens": ("attention", (1, 4, 7, 8), (1, 2, 7, 8),
                              {"document_ids": _ints(0, 0, 0, 0, 1, 1, 1), "kv_lens": _ints(5)}),
    "cu_seqlens": ("varlen_attention", (6, 4, 8), (9, 4, 8),
                   {"cu_seqlens_q": _ints(0, 2, 2, 6), "cu_seqlens_k": _ints(0, 5, 7, 9),
                    "max_seqlen_q": 4, "max_seqlen_k": 5, "window": (2, 0)}),
    "decode": ("decode_attention", (2, 4, 2, 8), (2, 2, 9, 8),
               {"cache_lens": _ints(3, 9), "cache_leftpad": _ints(2, 5), "causal": True}),
    "pages": ("decode_attention", (2, 4, 2, 8), (4, 2, 5, 8),
              {"cache_lens": _ints(3, 9), "page_table": _ints(3, 0, 2, 1).view(2, 2)}),
}  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_the_weights_there_are(name):
    """The FLOP counter, explain() and the non-zero probs agree: key j's value is 1 in column j."""
    function, q_shape, k_shape, options = COUNTED[name]
    q, k = torch.randn(q_shape), torch.randn(k_shape)
    keys = k.shape[0] if k.dim() == 3 else k.shape[0] * k.shape[2]
    v = torch.eye(keys)
    if k.dim() == 3:
        v = v[:, None].expand(*k.shape[:2], keys)
    else:
        v = v.view(k.shape[0], 1, k.shape[2], keys).expand(*k.shape[:3], keys)
    with FlopCounterMode(display=False) as mode:
        out = getattr(fastattn, function)(q, k, v, **options)
    pairs = int((out != 0).sum())
    assert pairs
    assert mode.get_total_flops() == 2 * pairs * (q.shape[-1] + keys)
    found = fastattn.explain(q, k, v, **options)
    assert found.pairs == pairs and found.flops_forward == mode.get_total_flops()


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_importing_is_light_and_flops_register_later():
    code = """
import sys, torch
before = set(sys.modules)
import fastattn
from fastattn.backends import library
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new and "torch._dynamo" not in sys.modules, new
from torch.utils.flop_counter import flop_registry
assert torch.ops.fastattn.flash_attn_fwd in flop_registry
assert torch.ops.fastattn.flash_attn_bwd in flop_registry
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr


# ---- without the native library ------------------------------------------------------------------

WITHOUT = """
import json, warnings, torch, fastattn
from fastattn.backends import library
q = torch.randn(1, 2, 4, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = fastattn.attention(q, q, q)
    fastattn.attention(q, q, q, causal=True)
    silent = len(caught)
    fastattn.attention(q, q, q, backend="reference")
try:
    fastattn.attention(q, q, q, backend="cpu")
except NotImplementedError as error:
    refusal = str(error)
print(json.dumps({
    "missing": library.NATIVE_MISSING,
    "warnings": [str(w.message) for w in caught],
    "where": caught[0].filename,
    "refusal": refusal,
    "explained": fastattn.explain(q, q, q).reasons["cpu"],
    "close": torch.allclose(out, torch.softmax(q @ q.mT / 8**0.5, -1) @ q, atol=1e-6),
}))
"""


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_without_the_library_the_reference_runs_and_says_so(library, tmp_path):
    path = tmp_path / "_cpu.so"
    if library == "broken":
        path.write_text("not a library")
    run = run_python(WITHOUT, FASTATTN_CPU_LIBRARY=str(path))
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert str(path) in told["missing"] and "does not load" in told["missing"]
    assert len(told["warnings"]) == 1 and told["missing"] in told["warnings"][0]
    assert told["where"] == "<string>"  # the caller's line, not one of ours
    assert told["refusal"] == f"backend='cpu' cannot run this call: {told['missing']}"
    assert told["explained"] == told["missing"] and told["close"]

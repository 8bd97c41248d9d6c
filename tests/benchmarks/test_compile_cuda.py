"""What nvcc makes of the CUDA kernels, if nvcc is here; and which calls the "cuda" backend
supports."""

from __future__ import annotations

import json

import pytest
import torch
from fastattn.benchmarks.compile import cuda as compiled

from fastattn.backends import backend, cpu, cuda, library, registry, schema, triton
from fastattn.core.call import Call, Result
from fastattn.core.spec import NO_OPERANDS, Descales, Operands, Spec

needs_nvcc = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))

GOOD = {
    "name": "forward_sm90 bf16 D 64", "source": "forward_sm90.cu", "registers": 128, "spills": 0,
    "stack": 0, "shared": 1024,
    **dict.fromkeys(compiled.COUNTED, 1), "overlapped": 64,
}  # fmt: skip


def stored():
    return json.loads(compiled.STORED.read_text())


def test_the_stored_table_is_of_these_sources():
    """Nothing is compiled here: making the table does that, and --long compares it."""
    stale = compiled.stale(stored())
    again = "where nvcc is, `make gpu-audit ARGS=--write` makes the table again"
    assert stale == [], f"{compiled.STORED.name} was made from other sources: {again}"


def test_the_stored_table_is_clean():
    rows = stored()["rows"]
    assert [row["name"] for row in rows if compiled.problems(row, []) or row["problems"]] == []
    names = {row["name"] for row in rows}
    kernels = ("forward_sm90 {}", "backward_sm90 {}", "forward_sm80 {}", "forward_sm80 {} few",
               "backward_sm80 {}", "backward_sm80 {} small")  # fmt: skip
    for kernel in kernels:
        for dim in (64, 128) if "small" in kernel else (64, 128, 256):
            assert {kernel.format(f"{e} D {dim}") for e in ("bf16", "fp16")} <= names
    assert {f"forward_sm90 e4m3 D {dim}" for dim in (64, 128, 256)} <= names
    large = [row for row in rows if "_sm90" in row["name"]]
    assert all(100_000 < row["shared"] <= compiled.MAX_SHARED["_sm90"] for row in large)
    small = [r for r in rows if r["name"].startswith("forward_sm80") or "small" in r["name"]]
    assert all(row["sm_86"] for row in small)


@needs_nvcc
@pytest.mark.long
def test_kernels_compile_as_stored():
    rows = compiled.audit()
    assert [row["name"] for row in rows if row["problems"]] == []
    if compiled.nvcc_version() == stored()["nvcc"]:
        assert compiled.differences(rows, stored()["rows"]) == []
    else:
        assert {row["name"] for row in rows} == {row["name"] for row in stored()["rows"]}


@needs_nvcc
def test_another_nvcc_compiles_a_sample():
    """Compiles the quickest file. The nvcc here may differ from the one that made the table."""
    if compiled.nvcc_version() == stored()["nvcc"]:
        pytest.skip("the stored table is of this nvcc")
    rows = compiled.rows_of(next(s for s in compiled.sources() if s.stem == "forward_sm80"))
    assert [row["name"] for row in rows if row["problems"]] == []


@needs_nvcc
def test_only_what_changed_is_compiled(monkeypatch):
    """Only files whose key differs are compiled; with another nvcc than the table's, all are."""
    asked = []
    monkeypatch.setattr(compiled, "rows_of", lambda source: asked.append(source.name) or [])
    names = [source.name for source in compiled.sources()]
    fresh = [
        {"name": source.stem, "source": source.name, "key": compiled.key(source)}
        for source in compiled.sources()
    ]
    report = {"nvcc": compiled.nvcc_version(), "rows": fresh}
    assert compiled.stale(report) == [] and compiled.audit(report) == fresh and asked == []
    gone = {"name": "x", "source": "gone_sm80.cu", "key": ""}
    report["rows"] = [fresh[0] | {"key": "0"}, *fresh[1:], gone]
    assert compiled.stale(report) == sorted([names[0], "gone_sm80.cu"])
    assert compiled.audit(report) == fresh[1:] and asked == names[:1]
    asked.clear()
    assert compiled.audit({**report, "nvcc": "release 1"}) == [] and asked == names


@pytest.mark.parametrize(
    "change, word",
    [
        ({"spills": 8}, "spilled"),
        ({"stack": 16}, "local memory"),
        ({"shared": 231425}, "shared memory"),
        ({"shared": 165889, "source": "forward_sm80.cu"}, "shared memory"),
        ({"HGMMA": 0}, "no HGMMA"),
        ({"UTMASTG": 0}, "no UTMASTG"),
        ({"name": "forward_sm80 bf16 D 64", "LDGSTS": 0}, "no LDGSTS"),
        ({"overlapped": 0}, "0 exponentials overlap"),
    ],
)
def test_problems_are_named(change, word):
    assert compiled.problems(GOOD, []) == []
    assert word in compiled.problems({**GOOD, **change}, [])[0]


def test_eight_bits_have_products_of_their_own():
    eight = {**GOOD, "name": "forward_sm90 e4m3 D 128", "HGMMA": 0}
    assert compiled.problems(eight, []) == []
    assert "no QGMMA" in compiled.problems({**eight, "QGMMA": 0}, [])[0]
    assert "0 exponentials" in compiled.problems({**eight, "overlapped": 0}, [])[0]
    wide = {**eight, "name": "forward_sm90 e4m3 D 256", "overlapped": 0}
    assert compiled.problems(wide, []) == []


def test_serialised_wgmma_is_a_problem():
    note = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert "C7510" in compiled.problems(GOOD, [note])[0]


def test_differences_are_shown():
    other = {**GOOD, "registers": 100}
    assert compiled.differences([GOOD], [GOOD]) == []
    assert compiled.differences([GOOD], [other]) == [
        "forward_sm90 bf16 D 64: registers was 100, is 128"
    ]
    assert compiled.differences([GOOD], []) == ["forward_sm90 bf16 D 64 is new"]


# ---- the backend's closed table ----------------------------------------------------------------


def refusal(dtype=torch.bfloat16, dim=64, v_dim=64, rows=64, spec=None, **operands):
    q, k, v = (torch.empty(1, 2, rows, d, dtype=dtype, device="meta") for d in (dim, dim, v_dim))
    return cuda.unsupported_reason(Call(q, k, v, spec or Spec(0.125), Operands(**operands)))


def test_what_the_kernels_serve():
    for dtype in cuda.DTYPES:
        for dim in cuda.HEAD_DIMS:
            assert refusal(dtype, dim, dim) is None
    some = torch.empty(2, device="meta")
    assert refusal(spec=Spec(0.1, 5.0, 3, 0, False), sinks=some, kv_lens=some) is None
    assert refusal(rows=64, cu_seqlens_q=some, cu_seqlens_k=some) is None
    assert refusal(rows=1, kv_lens=some, page_table=some) is None


@pytest.mark.parametrize(
    "change, word",
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dim": 96, "v_dim": 96}, "96"),
        ({"v_dim": 128}, "64 (q, k) and 128 (v)"),
        ({"bias": torch.empty(1, 1, 1, 1)}, "bias is given"),
        ({"mask": torch.empty(1, 1, 1, 1)}, "mask is given"),
        ({"dropout_seed": torch.empty(2)}, "dropout_seed is given"),
        ({"alibi_slopes": torch.empty(2)}, "alibi_slopes is given"),
    ],
)
def test_what_they_do_not_serve_is_named(change, word):
    assert word in refusal(**change)


FLOAT8 = {"dtype": torch.float8_e4m3fn, "descales": Descales()}


def test_float8_has_kernels_of_its_own(monkeypatch):
    some = torch.empty(2, device="meta")
    for dim in cuda.HEAD_DIMS:
        assert refusal(dim=dim, v_dim=dim, sinks=some, kv_lens=some, **FLOAT8) is None
    assert "page_table is given" in refusal(page_table=some, **FLOAT8)
    assert "96" in refusal(dim=96, v_dim=96, **FLOAT8)
    assert "descales is given" in refusal(descales=Descales())
    monkeypatch.setattr(library, "CUDA_MISSING", None)
    q = type("Q", (), {"device": torch.device("cuda"), "dtype": torch.float8_e4m3fn})()
    q.shape = (1, 1, 64, 64)
    for found, reason in (((9, 0), None), ((8, 9), "sm_89"), ((10, 0), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, x=found: x)
        operands = Operands(descales=FLOAT8["descales"])
        answer = registry.BY_NAME["cuda"].why_not(Call(q, q, q, Spec(0.125), operands))
        assert answer is None if reason is None else reason in answer


def test_float8_goes_to_its_operator(monkeypatch):
    """With the operands' arguments, documents as sequences, and the descales at the end."""
    calls = []
    monkeypatch.setattr(schema, "forward_float8", lambda *a: calls.append(a) or (a[0], a[0]))
    q, scale = torch.empty(1, 1, 2, 64), torch.ones(1)
    ids = torch.zeros(1, 2, dtype=torch.int32)
    operands = Operands(document_ids=ids, descales=Descales(None, scale, None))
    registry.BY_NAME["cuda"].forward(Call(q, q, q, Spec(0.5), operands))
    (*_, given_ids, _, _, cu_q, _, _, _), numbers = calls[0][3:16], calls[0][16:23]
    assert given_ids is None and cu_q.tolist() == [[0, 2]]
    assert numbers == (0.5, 0.0, -1, -1, True, 0.0, 0) and calls[0][23:] == (None, scale, None)


def test_documents_wait_for_no_compiler(monkeypatch):
    ids = torch.empty(1, 64, dtype=torch.int32)
    assert refusal(document_ids=ids) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "how many documents" in refusal(document_ids=ids)


def test_documents_become_sequences():
    ids = torch.tensor([[0, 0, 1, 1, 5], [2, 2, 2, 2, 2]], dtype=torch.int32)
    found = cuda.documents_as_sequences(Operands(document_ids=ids))
    assert found.document_ids is None and found.cu_seqlens_q is found.cu_seqlens_k
    assert found.cu_seqlens_q.tolist() == [[0, 2, 4, 5], [0, 5, 5, 5]]
    empty = Operands(document_ids=ids[:, :0])
    assert cuda.documents_as_sequences(empty).cu_seqlens_q.shape == (2, 1)


def test_cpu_tensors_are_refused():
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
    reason = registry.BY_NAME["cuda"].why_not(Call(q, q, q, Spec(0.125), NO_OPERANDS))
    assert "q is on cpu" in reason


def test_the_shared_memory_of_a_cta_is_the_same_number_everywhere():
    config = (compiled.ROOT / "csrc/cuda/config.h").read_text()
    small = compiled.SMALL_SHARED + 1024
    assert f"Memory::LARGE ? {cuda.WIDE_BACKWARD} : {small};" in config
    assert compiled.MAX_SHARED["_sm80"] + 1024 == cuda.WIDE_BACKWARD


def test_a_backward_that_does_not_fit_goes_to_the_next_backend(monkeypatch):
    calls = []
    able = backend.Backend("able", "", lambda *a: None, None, lambda *a: calls.append("able"), None)
    unable = backend.Backend("unable", "", lambda *a: "cannot", None, None, None)
    monkeypatch.setattr(triton, "BACKEND", unable)
    monkeypatch.setattr(cpu, "BACKEND", able)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(cpu, "backward", lambda *a: calls.append("cuda"))
    gpu = type("Properties", (), {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    def backward(shared, dim):
        gpu.shared_memory_per_block_optin = shared
        q = type("Q", (), {"device": None, "is_cuda": True, "shape": (1, 1, 64, dim)})
        call = Call(q, q, q, Spec(1.0), NO_OPERANDS)
        cuda.BACKEND.backward(call, Result(q, q), q, None, (False, False))

    backward(232448, 256)
    backward(101376, 128)
    with pytest.warns(UserWarning, match="able runs a backward .* this GPU has 101376"):
        backward(101376, 256)
    assert calls == ["cuda", "cuda", "able"]


@pytest.mark.parametrize("found, reason", [((7, 5), "sm_75"), ((8, 0), None), ((12, 0), None)])
def test_gpus_older_than_sm_80_are_refused(monkeypatch, found, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(library, "CUDA_MISSING", None)
    q = type("Q", (), {"device": torch.device("cuda"), "dtype": torch.float16})()
    q.shape = (1, 1, 1, 64)
    answer = registry.BY_NAME["cuda"].why_not(Call(q, q, q, Spec(0.125), NO_OPERANDS))
    assert answer is None if reason is None else reason in answer

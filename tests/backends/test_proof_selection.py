"""Which calls select the CUDA kernels automatically: those that are proven on this GPU, and no
others."""

from __future__ import annotations

from dataclasses import replace

import pretended
import pytest
import torch
from pretended import GPU, closed, prove

from fastattn import explain
from fastattn.backends import backend, cpu, library, plain, proof, registry, triton
from fastattn.cli import info
from fastattn.core.call import Call, Result
from fastattn.core.spec import NO_OPERANDS, Descales, Operands, Spec

file = pytest.fixture(autouse=True)(pretended.file)


class Tensor:
    """The attributes of a tensor on a GPU that backends use."""

    device, is_cuda, is_cpu = torch.device("cuda", 0), True, False

    def __init__(self, dtype=torch.bfloat16, dim=64):
        self.dtype, self.shape = dtype, (1, 2, 64, dim)

    def get_device(self):
        return 0


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU on which Triton runs and the CUDA library seems to be loaded."""
    monkeypatch.setattr(library, "CUDA_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "gpu_missing", lambda index: None)
    monkeypatch.setattr(backend, "_warned", set())


def plain_call(q) -> Call:
    return Call(q, q, q, Spec(0.125), NO_OPERANDS)


def picked(q=None, name=None, **operands):
    q = q or Tensor()
    return registry.pick(name, Call(q, q, q, Spec(0.125), Operands(**operands)))


def test_without_proof_triton_runs_and_says_once_how_to_get_it(gpu):
    with pytest.warns(UserWarning) as caught:
        assert picked().name == "triton"
        assert picked().name == "triton"
        assert picked(kv_lens=torch.ones(1)).name == "triton"
    (warning,) = caught
    text = str(warning.message)
    assert GPU.name in text and "580.65.06" in text and "`python -m fastattn verify`" in text
    assert text.count(". ") == 0, "one sentence"


@pytest.mark.filterwarnings("error")
def test_calls_that_the_kernels_do_not_take_say_nothing(gpu):
    assert picked(Tensor(torch.float32)).name == "triton"
    assert picked(name="triton").name == "triton"
    assert picked(name="cuda") is registry.BY_NAME["cuda"]


CALLS = {  # the additional tensor and operands of a call
    "call": (Tensor(), {}),
    "lengths": (Tensor(), {"kv_lens": torch.ones(1)}),
    "pages": (Tensor(), {"kv_lens": torch.ones(1), "page_table": torch.ones(1)}),
    "float8": (Tensor(torch.float8_e4m3fn), {"descales": Descales()}),
}
BREAKS = {  # of a step that fails: the kinds of calls that then run on Triton
    "all shapes": tuple(CALLS),
    "graphs": tuple(CALLS),
    "lengths": ("lengths", "pages", "float8"),
    "pages": ("pages",),
    "float8": ("float8",),
    "backward": (),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("step", [None, *BREAKS])
def test_what_has_passed_is_selected_and_no_more(gpu, step):
    prove(**({step.replace(" ", "_"): "fail"} if step else {}))
    for kind, (q, operands) in CALLS.items():
        wanted = "triton" if kind in BREAKS.get(step, ()) else "cuda"
        assert picked(q, **operands).name == wanted, kind
    assert picked(name="cuda").name == "cuda"


def test_documents_wait_for_the_gpu_so_they_are_asked_for(gpu):
    prove()
    ids = {"document_ids": torch.zeros(1, 64)}
    assert picked(**ids).name == "triton" and picked(name="cuda", **ids).name == "cuda"


def test_where_the_backward_cannot_follow_it_is_asked_for(gpu, monkeypatch):
    prove()
    properties = type("Properties", (), {"shared_memory_per_block_optin": 101376})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert picked(Tensor(dim=256)).name == "triton" and picked(Tensor(dim=128)).name == "cuda"


@pytest.mark.parametrize("step", ["backward", "orders", "graphs_of_gradients"])
def test_gradients_that_are_not_proven_run_on_the_next_backend(gpu, monkeypatch, step):
    """If torch.compile may need gradients, the forward goes to Triton too."""
    prove(**{step: "fail"})
    backend = picked()
    assert backend.name == "cuda"
    calls = []
    for name, module in {"triton": triton, "cpu": cpu, "reference": plain}.items():
        own = replace(module.BACKEND, backward=lambda *a, n=name: calls.append(n))
        monkeypatch.setattr(module, "BACKEND", own)
    q = Tensor()
    with pytest.warns(
        UserWarning, match="triton runs a backward of the cuda backend: .* failed: out"
    ):
        backend.backward(plain_call(q), Result(q, q), q, None, (False, False))
    assert calls == ["triton"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert picked().name == "triton"


def test_proven_gradients_run(gpu, monkeypatch):
    prove()
    calls = []
    monkeypatch.setattr(cpu, "backward", lambda *a: calls.append("cuda"))
    q = Tensor()
    call = plain_call(q).but(operands=Operands(kv_lens=torch.ones(1)))
    picked(kv_lens=torch.ones(1)).backward(call, Result(q, q), q, None, (False, False))
    assert calls == ["cuda"]


def test_explain_says_why_a_backend_is_not_auto_selected(monkeypatch):
    """CPU tensors are kept from Triton's interpreter; the sentence for a GPU's is the same."""
    q = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)
    held = "their self-test 'graphs' on this GPU, driver and build: failed: x"
    cuda = replace(registry.BACKENDS[0], why_not=lambda *c: None, why_not_auto=lambda *c: held)
    monkeypatch.setattr(registry, "BACKENDS", [cuda, *registry.BACKENDS[1:]])
    monkeypatch.setitem(registry.BY_NAME, "cuda", cuda)
    found = explain(q, q, q)
    assert found.reasons["cuda"] is None and found.why_not_auto["cuda"] == held
    assert found.backend in ("cpu", "reference")
    assert f"only when named: {held}" in str(found)
    assert explain(q, q, q, backend="cuda").backend == "cuda"


def test_info_says_what_is_proven(monkeypatch, capsys):
    prove(backward="fail")
    fresh = replace(GPU, name="NVIDIA Untried")
    monkeypatch.setattr(proof, "here", lambda: [(g, proof.load(g)) for g in (GPU, fresh)])
    facts = info.facts()["proof"]
    assert facts[fresh.key] is None and facts[GPU.key]["backward"] == "failed: out is wrong"
    info.main([])
    printed = " ".join(capsys.readouterr().out.split())
    assert "nothing yet" in printed and "failed: out is wrong" in printed and "Untried" in printed


def test_reading_it_costs_a_process_one_look(monkeypatch):
    prove()
    assert closed("call") is None
    monkeypatch.setattr(proof, "_read", lambda: pytest.fail("read again"))
    assert closed("call", "lengths") is None and proof.missing(0) is None


@pytest.mark.filterwarnings("error")
def test_cpu_calls_ask_for_no_proof(monkeypatch):
    monkeypatch.setattr(proof, "gpu_of", lambda index: pytest.fail("asked"))
    monkeypatch.setattr(library, "CUDA_MISSING", None)
    q = torch.zeros(1, 2, 8, 64)
    assert registry.pick(None, plain_call(q)).name in ("cpu", "reference")

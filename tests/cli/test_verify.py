"""The tolerance rule (fastattn/core/tolerance.py) and `python -m fastattn verify`."""

from __future__ import annotations

import io
import json

import pytest
import torch

from fastattn import attention
from fastattn.backends import registry
from fastattn.cli import features, verify
from fastattn.core.reference import reference
from fastattn.core.spec import Spec
from fastattn.core.tolerance import Tolerance

# torch's forward-mode derivatives of logsumexp and softmax still go through torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")

# ---- the rule for errors, and `python -m fastattn verify` ---------------------------------------


def compared(**changed):
    """The worst comparison of a result of random tensors, after one function has changed it."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=draw) for _ in range(3))
    spec = Spec(0.25)
    want = dict(zip(("out", "lse"), reference(*(x.double() for x in (q, k, v)), spec), strict=True))
    plain = dict(zip(("out", "lse"), reference(q, k, v, spec), strict=True))
    tolerance = Tolerance(q, k, v, spec.scale, want["lse"])
    ((name, change),) = changed.items()
    return tolerance.compare(name, change(want[name].clone()), want[name], plain[name])


def put(x: torch.Tensor, index: tuple, value: float) -> torch.Tensor:
    x[index] = value
    return x


def test_tolerance_lets_roundings_pass():
    for name in ("out", "lse"):
        assert compared(**{name: lambda x: x}).passed
        assert compared(**{name: lambda x: x.float()}).passed
        assert compared(**{name: lambda x: x * (1 + 1e-7)}).passed


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * (1 + 1e-5),
        lambda x: x.half(),
        lambda x: put(x, (1, 2, 39, 15), 1e-3),
        lambda x: put(x, (0, 0, 0, 0), torch.nan),
        lambda x: put(x, (0, 0, 0, 0), torch.inf),
        lambda x: x[:, :, :39],
        lambda x: torch.zeros_like(x),
    ],
    ids=["scaled", "half", "one", "nan", "inf", "shape", "zeros"],
)
def test_tolerance_sees_errors(change):
    comparison = compared(out=change)
    assert not comparison.passed, comparison
    assert comparison.ratio > 1 and "error" in str(comparison)


def test_tolerance_sees_a_small_error_in_a_small_row():
    """A relative error of 1e-3 in a row that is a thousand times smaller than the others."""
    want = torch.ones(1, 1, 50, 8, dtype=torch.float64)
    want[0, 0, 7] = 1e-3
    got = want.clone()
    got[0, 0, 7] *= 1.01
    q = torch.randn(1, 1, 50, 8)
    comparison = Tolerance(q, q, q, 1.0, torch.zeros(1, 1, 50)).compare(
        "out", got, want, want.float()
    )
    assert not comparison.passed


def test_verify_passes_and_prints_tables():
    stream = io.StringIO()
    assert verify.verify(stream, quick=True)
    text = stream.getvalue()
    assert "reference on cpu" in text and "all passed" in text
    for feature in verify.QUICK:
        assert feature in text


def test_verify_fails_where_a_call_is_wrong_or_raises(monkeypatch):
    def broken(q, *tensors, causal=False, dropout_p=0.0, **options):
        if dropout_p:
            raise RuntimeError("something [broke]")
        out, lse = attention(q, *tensors, causal=causal, **options)
        return (out * 1.001 if causal and q.dtype == torch.float32 else out), lse

    monkeypatch.setattr(features, "attention", broken)
    monkeypatch.setattr(verify, "QUICK", ("plain", "causal", "dropout"))
    stream = io.StringIO()
    assert not verify.verify(stream, quick=True)
    text = stream.getvalue()
    assert "FAILED reference, causal, float32: out" in text
    assert "FAILED reference, dropout, bfloat16: RuntimeError: something [broke]" in text
    assert "plain, " not in text


def test_features_to_verify_are_named_once():
    names = [feature.name for feature in features.FEATURES]
    assert len(set(names)) == len(names) and set(verify.QUICK) <= set(names)


def test_verify_says_the_worst_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "QUICK", ("plain", "causal"))
    assert verify.main(["--quick", "--json", str(tmp_path / "new/verify.json")]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "new/verify.json").read_text())
    assert stored["passed"] and {c["feature"] for c in stored["cells"]} == {"plain", "causal"}
    ran = {c["backend"] for c in stored["cells"]}
    assert ran == set(stored["worst"]) and "reference" in ran
    assert ran | set(stored["not_run"]) == {row.name for row in registry.BACKENDS}
    for backend, dtypes in stored["worst"].items():
        assert set(dtypes) == {"float32", "bfloat16"}
        for dtype, (error, feature) in dtypes.items():
            cells = [c for c in stored["cells"] if (c["backend"], c["dtype"]) == (backend, dtype)]
            assert error == max(c["error"] for c in cells)
            assert any(c["error"] == error and c["feature"] == feature for c in cells)
        assert f"largest error of {backend}: float32" in printed


def test_what_a_backend_declines_is_no_failure(monkeypatch):
    def declines(*args, backend, **options):
        if backend == "cpu":
            raise NotImplementedError("not with <this>")
        return attention(*args, backend=backend, **options)

    monkeypatch.setattr(features, "attention", declines)
    monkeypatch.setattr(verify, "QUICK", ("plain",))
    found = verify.run(quick=True)
    refused = [cell for cell in found.cells if cell.refused]
    assert not found.failures
    assert all(cell.backend == "cpu" and cell.refused == "not with <this>" for cell in refused)

"""Autotuning on request, with a simulated clock: it picks the fastest, stores it, and survives
failures."""

from __future__ import annotations

import json

import pytest
import torch

import fastattn

tune = pytest.importorskip("fastattn.kernels.tune", reason="Triton is not installed")
from fastattn.kernels import config  # noqa: E402

ROW = config.Config(32, 64, 4, 2)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The configurations that were timed. Tiles of 64 rows are fastest, and 8 warps do not
    compile."""
    seen = []

    def seconds(row, run):
        run(row)
        seen.append(row)
        return None if row.warps == 8 else abs(row.block_q - 64) + row.stages

    monkeypatch.setenv("FASTATTN_TUNE", "1")
    monkeypatch.setenv("FASTATTN_TUNE_CACHE", str(tmp_path / "made" / "tuned.json"))
    monkeypatch.setattr(tune, "_time", seconds)
    return seen


def choose(run=lambda row: None):
    return tune.choose("forward", torch.float16, (64, 64), ROW, run)


def test_not_asked_for(monkeypatch, timed):
    monkeypatch.delenv("FASTATTN_TUNE")
    assert choose() is ROW and not timed


def test_the_fastest_is_remembered(timed):
    assert choose() == ROW._replace(block_q=64)
    assert len(timed) == len(set(timed)) == 1 + len(list(tune.neighbours(ROW)))
    timed.clear()
    assert choose() == ROW._replace(block_q=64) and not timed


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": [1]}', '{"a": 3}'])
def test_a_broken_file(timed, text, tmp_path):
    file = tmp_path / "made" / "tuned.json"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match="is not a file of tuned configs; it will be replaced"):
        assert choose().block_q == 64
    assert list(json.loads(file.read_text()).values()) == [[64, 64, 4, 2, False]]


def test_nothing_runs(timed, monkeypatch):
    monkeypatch.setattr(tune, "_time", lambda row, run: None)
    assert choose() is ROW


def test_neighbours_are_possible():
    for row in (ROW, config.Config(16, 256, 1, 1, tma=True)):
        for near in tune.neighbours(row):
            assert near != row and min(near[:2]) >= 16 and near.warps >= 1 and near.stages >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="times for real there")
def test_calls_are_tuned(timed, monkeypatch, tmp_path):
    """Forward and both passes of the backward; the results stay right."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.randn(1, 1, 40, 16, requires_grad=True)
    out = fastattn.attention(q, q, q, causal=True, backend="triton")
    (got,) = torch.autograd.grad(out.square().sum(), q)
    names = json.loads((tmp_path / "made" / "tuned.json").read_text())
    assert [name.split(", ")[2] for name in names] == ["forward", "rows", "keys"]
    want = fastattn.attention(q, q, q, causal=True, backend="reference")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), q)[0])

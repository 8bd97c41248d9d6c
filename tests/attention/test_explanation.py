"""explain(): its counts against counting pair by pair, its choices against what runs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, Case

import fastattn
from fastattn.backends import cpu, isa, registry
from fastattn.core.philox import keep_probability

COUNTED = [
    c for c in CASES if c.function and c.name.split("/")[0] in ("alone", "pair", "edge", "size")
]


def visible(case: Case, problem) -> list[torch.Tensor]:
    """[heads or 1, rows, keys] of each entry, by the definition: band, lengths, documents, key
    ranges; no mask."""
    spec, operands = problem.spec, problem.operands
    planes = []
    for n in range(case.entries):
        if case.packed:
            q_len, places = case.packed[n]
        else:
            q_len, places = problem.q.shape[2], problem.k.shape[2]
            if case.page_size:
                places = operands.page_table.shape[1] * case.page_size
        kv_len = int(operands.kv_lens[n]) if operands.kv_lens is not None else places
        if case.function == "decode_attention" and operands.kv_lens is None:
            kv_len = case.kv_len
        i, j = torch.arange(q_len)[:, None], torch.arange(places)
        offset = kv_len - q_len if spec.align_end else 0
        seen = (j < kv_len).expand(q_len, places)
        if operands.kv_starts is not None:
            seen = seen & (j >= operands.kv_starts[n])
        if spec.left >= 0:
            seen = seen & (j >= i + offset - spec.left)
        if spec.right >= 0:
            seen = seen & (j <= i + offset + spec.right)
        if operands.document_ids is not None:
            ids = operands.document_ids[n]
            seen = seen & (ids[:, None] == ids)
        seen = seen.expand(case.heads, q_len, places)
        if operands.key_begin is not None:
            begin, end = (x[n if len(x) > 1 else 0] for x in (operands.key_begin, operands.key_end))
            begin, end = (x[:, :q_len] for x in (begin, end))
            seen = seen & (begin <= j) & (j < end)
        planes.append(seen)
    return planes


@pytest.mark.native
@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_counts(case, monkeypatch):
    row = replace(registry.BY_NAME["cpu"], tile=(16, 16))
    monkeypatch.setitem(registry.BY_NAME, "cpu", row)
    problem = case.make(torch.float32)
    tensors, options = case.call(problem)
    told = fastattn.explain(*tensors, **options)
    entries = visible(case, problem)
    d, v_dim = told.q[3], told.v[3]
    assert told.function == case.function and told.backend == "cpu"
    assert told.pairs == sum(int(planes.sum()) for planes in entries)
    assert told.all_pairs == sum(planes.numel() for planes in entries)
    assert told.flops_forward == 2 * told.pairs * (d + v_dim)
    if case.function == "decode_attention" or case.page_size:
        assert told.flops_backward is None
    else:
        assert told.flops_backward == 2 * told.pairs * (3 * d + 2 * v_dim)
    assert told.keep_probability == (keep_probability(case.dropout) if case.dropout else None)
    found = Counter()
    for n, plane in ((n, plane) for n, planes in enumerate(entries) for plane in planes):
        documents = [plane]
        if case.documents:  # each document starts new tiles of rows
            lengths = problem.operands.document_ids[n].unique_consecutive(return_counts=True)[1]
            documents = plane.split(lengths.tolist())
        tiles = [t for rows in documents for r in rows.split(16) for t in r.split(16, dim=1)]
        found.update(sort_of(tile) for tile in tiles if tile.numel())
    counted = {"skipped": told.tiles.skipped, "full": told.tiles.full, "masked": told.tiles.masked}
    if case.ranges:  # rows that see nothing widen what a tile's first and last row bound
        assert counted["skipped"] <= found["skipped"] and counted["full"] == found["full"]
        assert sum(counted.values()) == found.total()
    else:
        assert counted == {name: found[name] for name in counted}


def sort_of(tile) -> str:
    return "full" if tile.all() else "masked" if tile.any() else "skipped"


def test_tiles_are_those_of_the_kernels():
    source = Path(__file__).parents[2] / "csrc/cpu/gemm.inl"
    if not source.exists():
        pytest.skip("an installed package, without its C++ sources")
    sizes = dict(re.findall(r"constexpr int (BLOCK_\w+) = (\d+);", source.read_text()))
    assert (int(sizes["BLOCK_Q"]), int(sizes["BLOCK_KV"])) == cpu.TILE
    assert registry.BY_NAME["cpu"].tile == cpu.TILE


def test_bytes():
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    rows, keys = 2 * 4 * 6, 2 * 2 * 9
    plain = (rows + keys) * (8 + 5) * 4 + rows * 4
    assert fastattn.explain(q, k, v).bytes_forward == plain
    causal = fastattn.explain(q, k, v, causal=True, align="start").bytes_forward
    assert causal == plain - 2 * 2 * 3 * (8 + 5) * 4  # the last three keys are never read
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool).expand(2, 4, 6, 9)
    assert fastattn.explain(q, k, v, mask=mask).bytes_forward == plain + 2 * 9
    half = [x.bfloat16() for x in (q, k, v)]
    assert fastattn.explain(*half).bytes_forward == (rows + keys) * (8 + 5) * 2 + rows * 4


def test_table():
    q, k = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 150, 64)
    text = str(fastattn.explain(q, k, k, causal=True, window=(31, None), dropout_p=0.1,
                                bias=torch.zeros(100, 150), backend="reference"))  # fmt: skip
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines())
    assert lines["call"] == "attention of float32 on cpu"
    assert lines["q"] == "[2, 8, 100, 64]" and lines["k, v"].startswith("[2, 2, 150, 64]")
    assert lines["computes"] == "scale 0.125, left 31, right 0, aligned to the end"
    assert lines["operands"] == "bias, dropout_seed"
    assert lines["dropout"] == "keeps 0.899994 of the probabilities"
    assert lines["visible pairs"] == "51,200 (21.3% of 240,000), before the bias"
    assert lines["forward"].startswith("13.1 MFLOP, ") and lines["backward"] == "32.8 MFLOP"
    assert lines["backend cuda"].startswith("no: ")
    assert lines["backend reference"] == "runs"
    assert len({line.index(line.split("  ")[-1].strip()) for line in text.splitlines()}) == 1


@pytest.mark.native
def test_table_of_the_cpu_backend():
    q = torch.randn(1, 1, 200, 8)
    told = fastattn.explain(q, q, q, causal=True)
    assert told.isa == isa.selected() and told.backend == "cpu"
    assert f"runs ({told.isa})" in str(told)
    assert "tiles 96 x 96" in str(told) and "3 full, 3 masked, 3 skipped" in str(told)


def test_a_console_shows_the_table():
    q = torch.randn(1, 1, 4, 8)
    told = fastattn.explain(q, q, q)
    assert repr(told) == str(told) and str(told).startswith("call ")


def test_a_call_that_cannot_be_bound_names_the_function():
    q, lens = torch.randn(1, 1, 4, 8), torch.tensor([0, 4])
    with pytest.raises(TypeError, match=r"^attention\(\) .*'casual'; did you mean causal="):
        fastattn.explain(q, q, q, casual=True)
    with pytest.raises(TypeError, match=r"^varlen_attention\(\) .*'max_seqlen_q'"):
        fastattn.explain(q[0], q[0], q[0], lens, lens)


def test_what_is_explained_is_what_runs(monkeypatch):
    q = torch.randn(1, 2, 4, 8)
    refused = fastattn.explain(q, q, q, backend="cuda")
    assert refused.backend is None and refused.asked == "cuda"
    assert f"asked for, but no: {refused.reasons['cuda']}" in str(refused)
    with pytest.raises(NotImplementedError, match=re.escape(refused.reasons["cuda"])):
        fastattn.attention(q, q, q, backend="cuda")
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    told = fastattn.explain(q, q, q)
    assert told.backend == told.asked == "reference" and told.tiles is None and told.isa is None


def test_explaining_changes_nothing():
    q, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 6, 8)
    before, state = cache.clone(), torch.get_rng_state()
    fastattn.explain(q, cache, cache.clone(), cache_lens=3, k=q, v=q, dropout_p=0.5)
    fastattn.explain(q, q, q, dropout_p=0.5)
    assert torch.equal(cache, before) and torch.equal(torch.get_rng_state(), state)


def test_arguments_are_checked_as_in_the_call():
    q = torch.randn(1, 2, 4, 8)
    for wrong in ({"align": "middle"}, {"kv_lens": torch.tensor([9])}, {"backend": "fast"}):
        with pytest.raises(ValueError) as call:
            fastattn.attention(q, q, q, **wrong)
        with pytest.raises(ValueError) as explanation:
            fastattn.explain(q, q, q, **wrong)
        assert str(call.value) == str(explanation.value)
    with pytest.raises(TypeError, match="is_causal"):
        fastattn.explain(q, q, q, is_causal=True)

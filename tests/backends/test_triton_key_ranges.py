"""Key ranges on the Triton kernels: results and gradients against float64, and what is skipped."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
import triton_calls
from case_tensors import RANGES
from cases import Problem
from operator_calls import cotangents_of, name_of
from pairwise import crossed, thinned
from ranged_cases import Ranged
from triton_calls import DEVICE, row, run_triton

import fastattn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
ON_GPU = DEVICE == "cuda"


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def check(case: Ranged, dtype=torch.float32, num_splits: int = 0, config=None) -> None:
    triton_calls.check(case, dtype, num_splits, config, truth=replace(case, as_mask=True))


SHORT = {"q_len": 70, "kv_len": 150, "batch": 2, "heads": 2}
GQA = {"heads": 4, "kv_heads": 2}
PACKED = ((45, 139), (1, 5), (20, 20), (0, 7), (9, 0), (70, 33))
OPTIONS = {
    "causal": {"causal": True, "align": "start", "kv_lens": (140, 90)},
    "window+mask": {"window": (60, 9), "mask": "full", **GQA},
    "documents": {"documents": (1, 50, 17, 64, 7), "q_len": 139, "kv_len": 139, "causal": True},
    "bias": {"bias": "full", "dropout": 0.3, **GQA},
    "bias_of_all": {"bias": "plane", "softcap": 5.0, "sinks": True, "alibi": "batch"},
    "bias_of_keys": {"bias": "keys", "mask": "blocks"},
    "strides": {"layout": "bshd", "expanded": True, "v_dim": 40},
    "packed": {"packed": PACKED, **GQA},
}
KINDS = [Ranged(kind, **SHORT, ranges=kind) for kind in RANGES]
COMBINED = [
    Ranged(f"{kind}+{name}", **(SHORT | settings), ranges=kind)
    for kind in (("chunks", "random_by_head", "prefix") if ON_GPU else ("random_by_head",))
    for name, settings in OPTIONS.items()
]
SHARED = [  # ranges shared by sequences, and ranges shared by heads
    Ranged(f"packed+{kind}", packed=PACKED, causal=causal, ranges=kind)
    for kind, causal in (("chunks", True), ("random_by_entry", False), ("one_for_all", False))
]


@pytest.mark.parametrize(
    "case", [*thinned(KINDS, all_of_them=ON_GPU), *COMBINED, *SHARED], ids=name_of
)
def test_single_precision(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", [KINDS[1], KINDS[-6]], ids=name_of)
def test_halves(case, dtype):
    check(case, dtype)


DECODING = [
    Ranged("few_rows", q_len=5, kv_len=700, heads=8, kv_heads=2, ranges="random_by_head"),
    Ranged("paged", q_len=3, kv_len=140, page_size=16, kv_lens=(131, 30), ranges="banded", **GQA),
    Ranged("starts", q_len=1, kv_len=300, kv_lens=(290, 30), kv_starts=(70, 0), ranges="prefix"),
]


@pytest.mark.parametrize("case, num_splits", crossed(DECODING, [1, 2, 7], ON_GPU), ids=name_of)
def test_parts_of_the_keys(case, num_splits):
    check(case, torch.float32, num_splits)


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (16, 128)], ids=str)
def test_tiles_of_other_sizes(tile):
    check(Ranged("", **SHORT, ranges="random_by_entry"), config=row(*tile))


@pytest.mark.parametrize("kind", ["far_gaps", "chunks_of_a_tile"])
def test_tiles_outside_are_never_touched(kind):
    """NaN in tiles of keys that no tile of rows needs changes no bit of any result."""
    case = Ranged("", q_len=64, kv_len=256, ranges=kind)
    clean = case.make(torch.float32, device=DEVICE)
    seen = replace(case, as_mask=True).make(torch.float32).operands.mask[0, 0]  # [rows, keys]
    tiles = seen.unflatten(0, (-1, 16)).any(1).unflatten(1, (-1, 16)).any(2)  # [row tiles, tiles]
    places = torch.arange(tiles.shape[1])
    first, last = (torch.where(tiles, places, end) for end in (len(places), -1))
    between = (places >= first.amin(1, True)) & (places <= last.amax(1, True))
    untouched = (~between.any(0)).repeat_interleave(16).to(DEVICE)
    assert untouched.any()
    spoiled = [x.masked_fill(untouched[:, None], torch.nan) for x in (clean.k, clean.v)]
    cotangents = cotangents_of(case, case.make(torch.float32), True)
    got, want = (
        run_triton(problem, cotangents, config=row(16, 16))
        for problem in (Problem(clean.q, *spoiled, *clean[3:]), clean)
    )
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


def test_hostile_ends_read_nothing_outside():
    """Values on a GPU are not checked. Ends outside of the keys are clamped; ends that decrease
    give each row no more than its own range in the forward pass."""
    case = Ranged("", **SHORT, ranges="random_by_head")
    problem = case.make(torch.float32, device=DEVICE)
    ends = torch.randint(-(2**31), 2**31 - 1, (2, 2, 2, 70, 1), dtype=torch.int32, device=DEVICE)
    ends[:, ::2, ::2, ::3] = torch.randint(-5, 160, (2, 1, 1, 24, 1), device=DEVICE).int()
    operands = replace(problem.operands, key_begin=ends[0], key_end=ends[1])
    got = run_triton(problem._replace(operands=operands), cotangents_of(case, problem, False))
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")
    j = torch.arange(150, device=DEVICE)
    mask = (j >= ends[0]) & (j < ends[1])
    want = run_triton(
        problem._replace(operands=replace(operands, mask=mask, key_begin=None, key_end=None)), None
    )
    torch.testing.assert_close(got["out"], want["out"])


def test_derivatives_of_every_kind():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    ranges = fastattn.masks.chunked(4, 6, device=DEVICE)

    def function(q, k, v, ranges=ranges, backend="triton"):
        return fastattn.attention(q, k, v, causal=True, key_ranges=ranges, backend=backend)

    def expected(q, k, v, ranges=ranges):
        return function(q, k, v, ranges, "reference")

    own = tuple(
        torch.stack(x)
        for x in zip(*(fastattn.masks.chunked(n, 6, device=DEVICE) for n in (2, 3, 5)))
    )
    batch = [x.unsqueeze(0).repeat(3, 1, 1, 1, 1) for x in (q, k, v)]
    for transform in (
        lambda f: torch.func.vmap(f)(*batch),
        lambda f: torch.func.vmap(f)(*batch, own),
        lambda f: torch.func.jvp(f, (q, k, v), (k, v, q))[1],
        lambda f: torch.autograd.grad(
            torch.autograd.grad(f(q, k, v).square().sum(), q, create_graph=True)[0].sum(), k
        )[0],
    ):
        torch.testing.assert_close(transform(function), transform(expected), rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break():
    def loss(q, k):
        ranges = fastattn.masks.prefix(7, 20, device=q.device)
        out = fastattn.attention(q, k, k, key_ranges=ranges, backend="triton")
        return out.square().sum()

    q, k = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k), (q, k))
    want = torch.autograd.grad(loss(q, k), (q, k))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)

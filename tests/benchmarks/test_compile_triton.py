"""`make gpu-audit`: the Triton kernels compiled for GPUs that are not here, and the tests of the
audit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.5")
from fastattn.benchmarks.compile import triton
from fastattn.benchmarks.compile.triton import ARCHES, Subject, changes, problems

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = "forward_kernel bf16 128 causal"


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    """A process without the interpreter, which this one may use."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "150"}
    environment.setdefault("TRITON_CACHE_DIR", str(triton.CACHE))
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )


def audit(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    run = compiled("-m", "fastattn.benchmarks.compile.triton", *arguments)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


def test_no_stored_row_is_stale():
    """Each entry was made from the current source, configuration and compilers, and has no problem.
    With another Triton nothing can be said of the stored entries, and only the sample below is
    tested."""
    said = audit("--stale")
    assert "0 stale rows" in said or "not compared" in said


def test_every_module_with_subjects_is_compiled():
    kernels = (ROOT / "kernels").glob("*.py")
    assert {p.stem for p in kernels if "\ndef audit_subjects(" in p.read_text()} == set(
        triton.MODULES
    )


def test_a_sample_compiles_within_its_limits():
    """One kernel per architecture, which equals the stored entry if the compilers are the same."""
    said = audit("--only", SAMPLE, "--all")
    assert f"{len(ARCHES)} kernels, {len(ARCHES)} of them compiled, 0 with problems, 0 chan" in said


@pytest.mark.long
@pytest.mark.parametrize("arch", [arch.name for arch in ARCHES])
def test_every_kernel_compiles_within_its_limits(arch):
    said = audit("--all", "--arch", arch)
    assert "0 with problems, 0 changed" in said and arch in said


def test_the_stored_report_has_every_architecture():
    rows = json.loads(triton.STORED.read_text())["rows"]
    assert {row["arch"] for row in rows} == {arch.name for arch in ARCHES}
    assert all(row.get("key") for row in rows), triton.AGAIN
    assert not any(row["hot"] and row["in_loops"] for row in rows)
    assert {row["arch"] for row in rows if SAMPLE in row["name"]} == {arch.name for arch in ARCHES}


KERNELS = """
import json
import torch, triton, triton.language as tl
from fastattn.benchmarks.compile.triton import ARCHES, audit

@triton.jit
def product(x, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + at)
    tl.store(out + at, tl.dot(a, a))

@triton.jit
def spilling(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    for n in range(100):
        a += tl.sum(a * n, 0)
        tl.store(out + at, a)

def launches(arch):
    half = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    out = torch.empty(64, 64, device="meta")
    yield from arch.launches("", lambda: product[(1,)](half, out, 64), True, "matrix")
    wide = torch.empty(1 << 17, device="meta")
    warps = 2 if arch.name.startswith("gfx") else 8  # 512 values a thread, or 256
    yield from arch.launches(
        "", lambda: spilling[(1,)](wide, wide, 1 << 16, num_warps=warps), True
    )
    yield from arch.launches("f", lambda: product[(1,)](wide, wide, 7), True)

print(json.dumps(audit([(arch, s) for arch in ARCHES for s in launches(arch)])))
"""


LISTING = """
        /*0010*/ STL [R1], R2 ;
.L_x_2:
        /*0020*/ LDL R2, [R1] ;
.L_x_1:
        /*0030*/ HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
{inside}
        /*0050*/ @!P0 BRA `(.L_x_1) ;
        /*0060*/ LDL R3, [R1] ;
        /*0070*/ @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/ BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize("inside, in_loops", [("", 0), ("/*0040*/ STL [R1], R5 ;", 1)])
def test_spills_in_loops(inside, in_loops):
    """Those in the innermost loop with matrix instructions, not those in the loops around it."""
    assert triton.spills_in_loops(LISTING.format(inside=inside)) == in_loops


def test_spills_where_no_loop_multiplies():
    assert triton.spills_in_loops(LISTING.replace("HGMMA", "FFMA").format(inside="")) == 3


def test_what_it_sees(tmp_path):
    """Matrix instructions, spills and compiler errors, of kernels that have them."""
    file = tmp_path / "kernels.py"
    file.write_text(KERNELS)
    run = compiled(str(file))
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    assert len(rows) == 3 * len(ARCHES)
    for row in rows:
        if row["name"].startswith("product f"):
            assert row["problems"][0].startswith("does not compile: "), row
            assert "power of 2" in row["problems"][0], row
        elif row["name"].startswith("product"):
            assert row["problems"] == [] and row["matrix"], row
            assert row["shared"] > 0 and 16 < row["registers"] < 256, row
        else:
            assert "spills in the loops of a hot kernel" in row["problems"][0], row


EDGES = """
import json
import torch
from fastattn.benchmarks.compile.triton import ARCHES, audit
from fastattn.kernels import activate, gate, norm, rope
from fastattn.kernels.linear_cross_entropy import cross_entropy_

def meta(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="meta")

def calls(dtype, rows, n):
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x, vector, stats = meta(rows, n, dtype=dtype), meta(n, dtype=dtype), meta(rows, dtype=kind)
    seed, statistics = meta(2), (stats, stats, 1e-5, True, True, True)
    yield lambda: norm.norm_fwd(x, x, vector, vector, 1e-5, True, seed, 0.5)
    yield lambda: norm.norm_bwd(x, x, x, vector, *statistics, seed, 0.5)
    for name in gate.ACTIVATIONS:
        yield lambda: gate.gate_fwd(x, x, name)
        yield lambda: gate.gate_bwd(x, x, x, name)
    for name in activate.ACTIVATIONS:
        yield lambda: activate.activate_fwd(x, vector, seed, 0.5, name)
        yield lambda: activate.activate_bwd(x, x, vector, seed, 0.5, name, True)
    table, heads = meta(rows, max(1, n // 2), dtype=kind), meta(1, rows, rows, 2 * n, dtype=dtype)
    for interleaved in (False, True):
        yield lambda: rope.rotate(heads, table, table, meta(1, rows), interleaved, False)
    yield lambda: cross_entropy_(x, meta(rows), stats, -100, 0.1, 0.1, 3.0)

pairs = []
for dtype, rows, n in ((torch.float64, 3, 65), (torch.float32, 1, 1), (torch.bfloat16, 1, 1)):
    for number, call in enumerate(calls(dtype, rows, n)):
        name = f"{number} {dtype} {rows} x {n}"
        pairs += [(ARCHES[1], subject) for subject in ARCHES[1].launches(name, call)]
print(json.dumps(audit(pairs)))
"""


def test_float64_and_the_smallest_shapes_compile(tmp_path):
    """Lengths and strides of 1 are constants to Triton, and float64 calls different functions."""
    file = tmp_path / "edges.py"
    file.write_text(EDGES)
    run = compiled(str(file))
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    assert len(rows) > 60
    assert [row for row in rows if row["problems"]] == []


def test_problems():
    by_name = {arch.name: arch for arch in ARCHES}
    arch, older = by_name["sm_90"], by_name["sm_80"]
    row = {"spills": 3, "in_loops": 0, "shared": arch.shared, "matrix": {"HMMA": 4}}
    subject = Subject("a", None, {}, {}, {}, True, "matrix")
    assert problems(arch, subject, {**row, "matrix": {"HGMMA": 1}}) == []
    assert problems(arch, subject, row) == ["no instruction [HIQ]GMMA"]
    assert problems(older, subject, {**row, "shared": 0}) == []
    plain = Subject("a", None, {}, {}, {}, True, "HMMA")
    assert problems(arch, plain, row) == []
    over = {**row, "shared": arch.shared + 1, "in_loops": 3}
    assert problems(arch, plain, over) == [
        "3 spills in the loops of a hot kernel",
        "232449 bytes of shared memory, sm_90 has 232448",
    ]
    cold = Subject("a", None, {}, {}, {}, False)
    assert problems(arch, cold, {**row, "in_loops": 3}) == []


def test_changes():
    row = {"arch": "sm_90", "name": "a", "registers": 40, "shared": 64}
    stored = {"compilers": {"triton": "3.7.1"}, "rows": [row]}
    fresh = {**stored, "rows": [{**row, "registers": 48}, {**row, "name": "b"}]}
    assert changes(stored, fresh) == {
        ("sm_90", "a"): "registers was 40", ("sm_90", "b"): "new"
    }  # fmt: skip
    assert changes(stored, stored) == {}
    assert changes({**stored, "compilers": {"triton": "3.6.0"}}, fresh) == {}


def test_stale_rows(monkeypatch, capsys):
    """Changed, new and removed entries; with another compiler, all entries are stale."""
    here = {"triton": "3.7.1", "ptxas": "12.8"}
    monkeypatch.setattr(triton, "compilers", lambda: here)
    arch = ARCHES[0]
    pairs = [(arch, Subject(name, kernel, {"x": "*fp32"}, {}, {}, True)) for name in "abc"]
    good = {"arch": arch.name, "in_loops": 0, "shared": 0, "matrix": {}}
    rows = [{**good, "name": x.name, "key": x.key(arch)} for _, x in pairs]
    assert triton.stale({"compilers": here, "rows": rows}, pairs) == []
    rows[0]["key"] = "another"
    rows[1]["name"] = "z"
    rows[2]["in_loops"] = 2
    stored = {"compilers": here, "rows": rows}
    names = [f"{arch.name} {name}" for name in ("a", "b", "z (gone)")]
    assert triton.stale(stored, pairs) == names
    found = triton.reused(stored, pairs)
    assert found[:2] == [None, None]
    assert found[2]["hot"] and found[2]["problems"] == ["2 spills in the loops of a hot kernel"]
    assert triton.reused({**stored, "compilers": {"triton": "3.6.0"}}, pairs) == [None] * 3
    assert triton.show_stale(names) == 1 and triton.show_stale([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"stale: {names[0]}" and said[-1] == "0 stale rows in gpu-audit.json"
    again = "`make gpu-audit ARGS=--write` updates them"
    assert said[-2] == f"3 stale rows in gpu-audit.json: {again}"


def kernel(x):
    return x


@pytest.mark.parametrize(
    "change",
    [
        {"signature": {"x": "*bf16"}},
        {"constexprs": {(0,): 64}},
        {"constexprs": {(0,): kernel}},
        {"options": {"num_warps": 8}},
        {"attrs": {(0,): [["tt.divisibility", 16]]}},
        {"fn": test_changes},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_sees_the_configuration(change):
    plain = {"name": "a", "fn": kernel, "signature": {"x": "*fp32"}, "constexprs": {}}
    plain |= {"options": {}, "hot": False}
    keys = {Subject(**{**plain, **change}).key(arch) for change in ({}, change) for arch in ARCHES}
    assert len(keys) == 2 * len(ARCHES)
    assert Subject(**{**plain, "hot": True, "name": "b"}).key(ARCHES[0]) in keys


def test_it_does_not_interpret():
    command = [sys.executable, "-m", "fastattn.benchmarks.compile.triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr

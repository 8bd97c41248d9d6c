"""What the CPU library reports of its instruction sets, with and without the module fastattn._C."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastattn.backends import isa, library

pytestmark = pytest.mark.native

NAMES = ["avx512_bf16", "avx512", "avx2", "portable", "portable_bf16"]
CPUINFO = Path("/proc/cpuinfo")
ROOT = Path(__file__).resolve().parents[2]


def test_the_table():
    assert [row.name for row in isa.isas()] == NAMES
    assert isa.supported()[-2:] == ["portable", "portable_bf16"]
    assert [row.name for row in isa.isas() if not row.automatic] == ["portable_bf16"]
    for row in isa.isas():
        assert not any(isa.features()[feature] for feature in row.lacking)


def test_the_kernels_follow_the_table():
    """run.h finds the kernels by their place in isa.h's table: the orders must be the same."""
    code = ROOT / "csrc/cpu"
    table = re.findall(r'^        \{"(\w+)", ', (code / "isa.h").read_text(), re.MULTILINE)
    kernels = re.findall(r"(\w+)_kernels\b", (code / "run.h").read_text())
    assert kernels == [name for name in table if name in NAMES] == NAMES
    assert sorted(path.stem for path in code.glob("isa_*.cpp")) == sorted(f"isa_{n}" for n in NAMES)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="needs Linux on x86-64"
)
def test_features_are_what_the_kernel_says():
    """Under the kernel's names. The kernel hides features whose registers it does not save."""
    line = next(x for x in CPUINFO.read_text().splitlines() if x.startswith("flags"))
    flags = set(line.partition(":")[2].split())
    assert isa.features() == {name: name in flags for name in isa.features()}
    assert {"avx2", "avx512_bf16", "avx_vnni", "amx_tile"} <= isa.features().keys()


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    assert isa.selected() == isa.supported()[0] and isa.problem() is None
    monkeypatch.setenv("FASTATTN_ISA", "portable_bf16")
    assert isa.selected() == "portable_bf16"
    monkeypatch.setenv("FASTATTN_ISA", "mmx")
    with pytest.raises(ValueError, match="FASTATTN_ISA=mmx is not one of: avx512_bf16, avx512"):
        isa.selected()


WITHOUT_C = """
import json, sys
sys.modules["fastattn._C"] = None  # what its absence looks like: importing it fails
import torch, fastattn
from fastattn.backends import isa
from fastattn.cli import info
from fastattn.benchmarks.measure.machine import machine_facts
q = torch.randn(1, 1, 4, 8)
gathered = info.facts()
states = {row["name"]: row["state"] for row in gathered["isas"]}
print(json.dumps([fastattn.explain(q, q, q, backend="cpu").isa, states, machine_facts()["isa"],
                  gathered["machine"]["features"] == isa.features()]))
"""


def python(*command: str, **settings: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, **settings}
    return subprocess.run(
        [sys.executable, *command], env=settings, capture_output=True, text=True, cwd=ROOT
    )


def test_it_is_known_without_the_module():
    """As in a wheel for every CPython, which contains the library but not the module."""
    run = python("-c", WITHOUT_C, FASTATTN_ISA="portable")
    assert run.returncode == 0, run.stderr
    explained, states, recorded, same = json.loads(run.stdout)
    assert explained == recorded == "portable" and same
    assert states["portable"] == "chosen" and list(states) == NAMES


def test_info_ends_where_nothing_can_run():
    for form in ((), ("--json",)):
        run = python("-m", "fastattn", "info", *form, FASTATTN_ISA="avx1024")
        assert run.returncode == 1
        (sentence,) = run.stderr.splitlines()
        assert sentence.startswith("FASTATTN_ISA=avx1024 is not one of: avx512_bf16, ")
        assert bool(run.stdout) == bool(form)  # the rest is for programs that read --json
    assert all("avx1024" in row["state"] for row in json.loads(run.stdout)["isas"])


def test_an_older_library_is_named(monkeypatch):
    monkeypatch.setattr(library, "NATIVE", SimpleNamespace(_name="/some/_cpu.abi3.so"))
    with pytest.raises(RuntimeError, match=r"/some/_cpu.abi3.so is older than .* build it again"):
        isa.selected()


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(library, "NATIVE", None)
    isa._facts.cache_clear()
    try:
        assert isa.features() is None and isa.isas() == [] and isa.supported() == []
        assert isa.selected() is None and isa.problem() is None
    finally:
        isa._facts.cache_clear()

"""A simulated machine for the tests of proof.py: its GPU, and steps that pass, fail, crash and
hang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastattn.backends import proof
from fastattn.backends.proof import STEPS, Gpu, Machine

GPU = Gpu("NVIDIA Pretended 9000", (9, 0), "580.65.06", "0123456789abcdef")

SCRIPTS = {
    "pass": "echo some noise; echo 'passed: 3 calls'",
    "fail": "echo 'failed: out is wrong'; exit 1",
    "raise": "echo 'RuntimeError: no kernel image' >&2; exit 1",
    "crash": "echo 'about to fall'; kill -SEGV $$",
    "hang": "trap '' TERM; sleep 61 & echo 'waiting'; sleep 61",
    "silent": "exit 0",
    "quiet failure": "exit 3",
}
ENDS = {  # how: (state, what is said)
    "fail": ("failed", "out is wrong"),
    "raise": ("failed", "RuntimeError: no kernel image"),
    "crash": ("crashed", "SIGSEGV; the last that it said: about to fall"),
    "hang": ("hung", "it did not end within 2 s and was killed"),
    "silent": ("failed", "exit status 0, and it said nothing"),
    "quiet failure": ("failed", "exit status 3, and it said nothing"),
}


class Pretended(Machine):
    """Steps behave as `how` says; the others pass."""

    def __init__(self, problem: str | None = None, gpus=(GPU,), **how: str):
        self.problem, self.found = problem, list(gpus)
        self.how, self.ran = {k.replace("_", " "): x for k, x in how.items()}, []

    def gpus(self):
        return self.found, self.problem

    def command(self, step, gpu):
        self.ran.append(step.name)
        return ["/bin/sh", "-c", SCRIPTS[self.how.get(step.name, "pass")]]


def file(tmp_path, monkeypatch) -> Iterator[Path]:
    """Of the fixture: where proofs are kept; steps have two seconds; device 0 is GPU."""
    path = tmp_path / "caches/proof.json"
    monkeypatch.setenv("FASTATTN_PROOF", str(path))
    monkeypatch.setattr(proof, "STEPS", tuple(replace(step, limit=2) for step in STEPS))
    monkeypatch.setattr(proof, "gpu_of", lambda index: GPU)
    proof.forget()
    yield path
    proof.forget()


def prove(**how):
    machine = Pretended(**how)
    told = []
    found = proof.prove(told.append, machine)
    return found, machine, told


def closed(*features: str) -> str | None:
    return proof.why_not(0, features)

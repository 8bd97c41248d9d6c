"""Proof that the CUDA kernels are right on a GPU; without it, only calls that name them use them.

`python -m fastattn verify` takes the STEPS in their order (proof_steps.py has what they do), each
in a process of its own with a time limit: the likeliest fault of such kernels is that they never
end. What passes is kept in a file for this GPU model, driver and build of the library, and opens
the calls that FEATURES says. What fails stays closed, and so does all that depends on it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..core import limited
from ..core.files import replace_file
from . import library
from .gpu import constant

# ---- the steps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a process shows in at most `limit` seconds, once the steps that it needs have passed."""

    name: str
    shows: str
    needs: tuple[str, ...] = ()
    limit: int = 90  # starting Python, torch and a GPU may alone take 20 on a cold machine
    hopper: bool = False  # of kernels that are for compute capability 9.0 alone


STEPS = (
    Step("driver", "the library loads and the driver serves it"),
    Step("tensor maps", "the driver describes every layout to TMA", ("driver",), hopper=True),
    Step("one tile", "one tile of rows and of keys, by each kernel", ("tensor maps",)),
    Step("loops", "many tiles of keys, and keys in parts", ("one tile",)),
    Step("all shapes", "head dimensions, dtypes, masks, layouts, options", ("loops",), 300),
    Step("graphs", "CUDA graphs, other streams, no waiting for the GPU", ("all shapes",)),
    Step("backward", "gradients", ("all shapes",), 300),
    Step("orders", "the same bits every time, with all of the GPU at work", ("backward",), 180),
    Step("graphs of gradients", "CUDA graphs of the backward", ("graphs", "orders")),
    Step("lengths", "lengths, packed sequences, documents; NaN beyond them", ("all shapes",), 180),
    Step("gradients of lengths", "their gradients", ("lengths", "orders"), 180),
    Step("pages", "keys in pages, decoding", ("lengths",), 180),
    Step("float8", "float8 q, k and v", ("lengths",), 180, hopper=True),
)
BY_NAME = {step.name: step for step in STEPS}

# What a call has: the steps that must have passed.
FEATURES = {
    "call": ("all shapes", "graphs"),
    "lengths": ("lengths",),
    "pages": ("pages",),
    "float8": ("float8",),
    "gradient": ("backward", "orders", "graphs of gradients"),
    "gradient of lengths": ("gradients of lengths",),
}
HOW = "`python -m fastattn verify` tries them, in some minutes"


@dataclass(frozen=True)
class Result:
    """How a step ended: passed, failed, crashed, hung, stuck (it hangs and cannot be killed), not
    run, not for this GPU; or started, of a run that was itself cut off."""

    state: str
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


FINE = ("passed", "not for this GPU")


# ---- where: GPU, driver, build -------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What a proof is about. `index` is one of the devices of this name, as torch counts them."""

    name: str
    capability: tuple[int, int]
    driver: str
    build: str
    index: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        return f"{self.name}, driver {self.driver}, build {self.build}"


@functools.cache
def build() -> str:
    """The library's own name: a hash of the file."""
    path = library._native_path("CUDA")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else "none"


@functools.cache
def driver() -> str:
    """The NVIDIA driver's version; where only that is known, of the newest CUDA that it serves."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    if found := re.search(r"Kernel Module[^\n]*?\s(\d+\.\d[\d.]*)\s", text):
        return found.group(1)
    version = torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]
    return f"for CUDA {version}"


def gpu_of(index: int) -> Gpu:
    capability = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), capability, driver(), build(), index)


def one_of_each(gpus: Iterable[Gpu]) -> list[Gpu]:
    """The first of each kind."""
    kinds: dict[str, Gpu] = {}
    for gpu in gpus:
        kinds.setdefault(gpu.key, gpu)
    return list(kinds.values())


# ---- what is remembered --------------------------------------------------------------------------


def store() -> Path:
    """The file: $FASTATTN_PROOF, or fastattn/proof.json where the user's caches are."""
    if named := os.environ.get("FASTATTN_PROOF"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastattn" / "proof.json"


def _read() -> dict:
    """The file's entries by Gpu.key; none where it is missing or damaged."""
    try:
        entries = json.loads(store().read_text())["gpus"]
        return {key: x for key, x in entries.items() if isinstance(x["steps"], dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        return {}  # RuntimeError: there is no home folder


def load(gpu: Gpu) -> dict[str, Result] | None:
    """What is known of this GPU, driver and build; None where verify never ran on them."""
    entry = _read().get(gpu.key)
    if entry is None:
        return None
    found = {}
    for name, x in entry["steps"].items():
        try:
            found[name] = Result(str(x["state"]), float(x["seconds"]), str(x["reason"]))
        except (KeyError, TypeError, ValueError):
            continue  # a step whose entry is damaged has not passed
    return found


def save(gpu: Gpu, results: dict[str, Result]) -> None:
    """Whole or not at all: another process may read it."""
    steps = {name: asdict(result) for name, result in results.items()}
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    entries = _read() | {gpu.key: {"when": when, "torch": torch.__version__, "steps": steps}}
    path = store()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"gpus": entries}, indent=1)
    replace_file(path, lambda whole: whole.write_text(text))
    forget()


# ---- what it opens -------------------------------------------------------------------------------


@functools.cache
def _known(index: int) -> dict[str, Result] | None:
    return load(gpu_of(index))


def forget() -> None:
    """A process reads the file once for each GPU; this makes it read it again."""
    _known.cache_clear()
    why_not.cache_clear()
    missing.cache_clear()


@constant
@functools.cache
def why_not(index: int, features: tuple[str, ...]) -> str | None:
    """Why a call with these FEATURES does not select the CUDA kernels by itself on GPU `index`."""
    results = _known(index)
    if results is None:
        return f"nothing has proven them on this GPU, driver and build yet; {HOW}"
    for name in dict.fromkeys(name for feature in features for name in FEATURES[feature]):
        result = results.get(name, Result("not run"))
        if result.state != "passed":
            return f"their self-test {name!r} on this GPU, driver and build: {result}"
    return None


@constant
@functools.cache
def missing(index: int) -> str | None:
    """One sentence for the user of a GPU on which nothing has been proven nor disproven."""
    if _known(index) is not None:
        return None
    gpu = gpu_of(index)
    return (
        f"fastattn's CUDA kernels, which have not been proven on {gpu.name} with driver "
        f"{gpu.driver} and this build, leave their calls to another backend; {HOW}"
    )


# ---- running the steps ---------------------------------------------------------------------------


class Machine:
    """The GPUs here, and the command that runs a step on one. Tests put another in its place."""

    limit = 120  # seconds that may pass until the driver has said what there is
    slower = 1  # how many times

    def gpus(self) -> tuple[list[Gpu], str | None]:
        """One GPU of each kind; and why there is none, where that is a fault. Asked in a process of
        its own, since a driver may hang as well."""
        if library.CUDA is None:
            return [], library.cuda_fault()
        outcome = limited.run(self.python("gpus"), self.limit)
        result = result_of(outcome, self.limit, says="[")
        if result.state != "passed":
            return [], f"asking the driver for its GPUs {result}"
        found = [Gpu(**{**x, "capability": tuple(x["capability"])})
                 for x in json.loads(outcome.last_line())]  # fmt: skip
        return one_of_each(found), None

    def command(self, step: Step, gpu: Gpu) -> list[str]:
        return self.python(step.name, "--device", str(gpu.index))

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"{__package__}.proof_steps", *arguments]


class Sanitized(Machine):
    """Under compute-sanitizer, which sees reads and writes out of bounds."""

    slower = 20

    def __init__(self, tool: str):
        self.tool = tool

    def command(self, step: Step, gpu: Gpu) -> list[str]:
        return [self.tool, "--error-exitcode", "86", *super().command(step, gpu)]


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def result_of(outcome: limited.Outcome, limit: float, says: str = "passed: ") -> Result:
    """A step passes by saying so and ending with 0; anything else is a failure."""
    said, seconds = outcome.last_line(), round(outcome.seconds, 1)
    if outcome.state in ("hung", "stuck"):
        killed = "was killed" if outcome.state == "hung" else "could not be killed"
        return Result(outcome.state, seconds, f"it did not end within {limit:g} s and {killed}")
    if outcome.state == "crashed":
        name = signal.Signals(outcome.code).name
        return Result("crashed", seconds, f"{name}; the last that it said: {said or 'nothing'}")
    if outcome.code == 0 and said.startswith(says):
        return Result("passed", seconds, said.removeprefix(says))
    reason = said.removeprefix("failed: ") or f"exit status {outcome.code}, and it said nothing"
    return Result("failed", seconds, reason)


def run_steps(
    gpu: Gpu, machine: Machine, tell: Callable[[str], None], keep: Callable[[Gpu, dict], None]
) -> dict[str, Result]:
    """All steps on one GPU. Kept after each, so that a run that is cut off has shown what it has;
    what was known before is forgotten at the start, since the run may end the machine."""
    results: dict[str, Result] = {}
    for step in STEPS:
        lacking = [name for name in step.needs if results[name].state not in FINE]
        stuck = [name for name, x in results.items() if x.state == "stuck"]
        if stuck:
            result = Result("not run", reason=f"the process of {stuck[0]!r} still has the GPU")
        elif lacking:
            result = Result("not run", reason=f"it needs {lacking[0]!r}")
        elif step.hopper and gpu.capability != (9, 0):
            result = Result("not for this GPU", reason="its kernels are for compute capability 9.0")
        else:
            keep(gpu, results | {step.name: Result("started")})
            limit = step.limit * machine.slower
            outcome = limited.run(machine.command(step, gpu), limit, PYTHONFAULTHANDLER="1")
            result = result_of(outcome, limit)
        results[step.name] = result
        keep(gpu, results)
        tell(f"{step.name}: {result}" + (f" ({result.seconds} s)" if result.seconds else ""))
    return results


@dataclass
class Found:
    """What prove() found: the results on each kind of GPU, and what else is wrong."""

    proofs: dict[str, dict[str, Result]] = field(default_factory=dict)  # Gpu.key -> step -> result
    problem: str | None = None
    hangs: bool = False  # a GPU or its driver: nothing else may touch it, and may never come back

    @property
    def failures(self) -> list[str]:
        wrong = [f"CUDA kernels: {self.problem}"] if self.problem else []
        for key, results in self.proofs.items():
            for name, result in results.items():
                if result.state not in (*FINE, "not run"):
                    wrong.append(f"CUDA kernels on {key}: {name} {result}")
        return wrong

    def as_dict(self) -> dict:
        proofs = {k: {n: asdict(x) for n, x in r.items()} for k, r in self.proofs.items()}
        return {"passed": not self.failures, "problem": self.problem, "gpus": proofs}


def prove(tell: Callable[[str], None], machine: Machine | None = None) -> Found:
    """Runs the steps on one GPU of each kind, and remembers what passed."""
    machine = machine or Machine()
    gpus, problem = machine.gpus()
    found = Found(problem=problem, hangs=problem is not None and problem != library.cuda_fault())

    def keep(gpu: Gpu, results: dict[str, Result]) -> None:
        try:
            save(gpu, results)
        except (OSError, RuntimeError) as error:
            found.problem = f"what is found cannot be kept in a file, so it opens nothing: {error}"

    for gpu in gpus:
        if found.hangs:
            break
        tell(f"the CUDA kernels on {gpu.key}")
        results = run_steps(gpu, machine, lambda text: tell(f"  {text}"), keep)
        found.proofs[gpu.key] = results
        found.hangs = "stuck" in [x.state for x in results.values()]
    return found


def here() -> Iterable[tuple[Gpu, dict[str, Result] | None]]:
    """(GPU, what is known of it) for each kind in this machine; nothing is run."""
    if library.CUDA is None:
        return
    for gpu in one_of_each(map(gpu_of, range(torch.cuda.device_count()))):
        yield gpu, load(gpu)

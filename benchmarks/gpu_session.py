"""`make gpu`: everything that needs a GPU, in stages, with a report that survives a crash.

    python -m fastattn.benchmarks.gpu_session [--out out/gpu] [--skip STAGE ...]

The session begins with the self-tests of the CUDA kernels (`verify`), because a call may select
those kernels only after they have passed. Then come the tests of the GPU backends, and the
benchmark against torch's kernels. Each stage runs in a process of its own with a time limit: a
stage that hangs is killed, and the next one starts. report.json and report.md in --out are
rewritten before and after every stage, so they are up to date whatever happens; the output of each
stage is in a file beside them. Exits with 1 if a stage did not pass."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastattn.core import limited
from fastattn.core.files import replace_file

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """Arguments for the Python interpreter and a limit in seconds. If a `vital` stage fails, the
    stages after it are not run."""

    name: str
    arguments: tuple[str, ...]
    limit: int
    vital: bool = False


# Fails where torch sees no GPU, and then no other stage runs. Its output goes into the report.
GPU_HERE = """
import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device here"
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
print(f"torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
"""
TESTS = (
    "tests/backends/test_gpu.py",
    "tests/backends/test_triton.py",
    "tests/backends/test_triton_key_ranges.py",
    "tests/backends/test_triton_decode.py",
    "tests/fused/test_triton_fused.py",
)


def stages(out: Path) -> tuple[Stage, ...]:
    return (
        Stage("gpu", ("-c", GPU_HERE), 120, vital=True),
        Stage("verify", (
            "-m", "fastattn", "verify", "--quick", "--json", f"{out}/verify.json",
        ), 2400),
        Stage("info", ("-m", "fastattn", "info"), 120),
        # The name of a test is printed before it runs, so a log ends with the one that hung.
        *(Stage(Path(file).stem, ("-u", "-m", "pytest", "-v", "--color=no", file), 900)
          for file in TESTS),
        Stage("bench", (
            "-m", "fastattn", "bench", "gpu", "--device", "cuda", "--minutes", "4",
            "--vs", "sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,flex",
            "--json", "benchmarks/results/gpu.json", "--md", "benchmarks/results/gpu.md",
        ), 900),
    )  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """The outcome of a stage: passed, failed, crashed, hung, stuck (it could not be killed),
    running (the session was cut off during it) or not run."""

    stage: str
    state: str
    seconds: float = 0.0
    said: str = ""  # the last lines of a stage that did not pass, the last line of one that did


def outcome_of(stage: Stage, outcome: limited.Outcome) -> Reached:
    state = outcome.state
    if state == "ended":
        state = "failed" if outcome.code else "passed"
    lines = [line for line in outcome.tail.splitlines() if line.strip()]
    said = "\n".join(lines[-1:] if state == "passed" else lines[-12:])
    return Reached(stage.name, state, round(outcome.seconds, 1), said)


def run(stages, out: Path, tell: Callable[[str], None] = print) -> list[Reached]:
    """Runs the stages in order. After a stage that cannot be killed, or a vital one that does not
    pass, the remaining stages are reported as not run."""
    out.mkdir(parents=True, exist_ok=True)
    reached: list[Reached] = []
    over = None
    for stage in stages:
        if over:
            reached.append(Reached(stage.name, "not run", said=over))
            write(out, reached)
            continue
        write(out, [*reached, Reached(stage.name, "running")])
        log = out / f"{stage.name}.txt"
        tell(f"{stage.name}: {stage.limit} s at most, output in {log}")
        found = outcome_of(stage, limited.run([sys.executable, *stage.arguments], stage.limit, log))
        reached.append(found)
        write(out, reached)
        tell(f"{stage.name}: {found.state} in {found.seconds} s\n{found.said}")
        if found.state == "stuck":
            over = f"the process of {stage.name!r} cannot be killed and still has the GPU"
        elif stage.vital and found.state != "passed":
            over = f"{stage.name!r} did not pass"
    return reached


def write(out: Path, reached: list[Reached]) -> None:
    """Writes both reports. Each file is replaced atomically, so it is never half written."""
    stored = {"when": time.strftime("%Y-%m-%d %H:%M:%S"), "stages": [asdict(x) for x in reached]}
    lines = [
        "# Results of the GPU session",
        "",
        "| stage | state | seconds |",
        "|---|---|--:|",
    ]
    lines += [f"| {x.stage} | {x.state} | {x.seconds} |" for x in reached]
    for x in reached:
        if x.said:
            lines += ["", f"## {x.stage}", "", "```", x.said, "```"]
    texts = {"report.json": json.dumps(stored, indent=1), "report.md": "\n".join(lines)}
    for name, text in texts.items():
        replace_file(out / name, lambda whole, text=text: whole.write_text(text + "\n"))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m fastattn.benchmarks.gpu_session", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--out", type=Path, default=Path("out/gpu"))
    p.add_argument("--skip", nargs="+", default=(), metavar="STAGE")
    args = p.parse_args(argv)
    every = stages(args.out)
    if unknown := set(args.skip) - {stage.name for stage in every}:
        p.error(f"--skip {unknown.pop()}: there are {', '.join(s.name for s in every)}")
    os.chdir(ROOT)
    reached = run([stage for stage in every if stage.name not in args.skip], args.out)
    print(f"wrote {args.out / 'report.md'}")
    return 0 if all(x.state == "passed" for x in reached) else 1


if __name__ == "__main__":
    sys.exit(main())

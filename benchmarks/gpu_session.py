"""`make gpu`: all that a machine with a GPU can show, in stages, and a report of what was reached.

    python -m fastattn.benchmarks.gpu_session [--out out/gpu] [--skip STAGE ...]

Begins with the self-tests of the CUDA kernels (`verify`), which open them; then the tests of the
GPU backends, and speed beside torch's kernels. Each stage is a process of its own with a limit:
one that hangs is killed, and the next begins. report.json and report.md in --out are written anew
before and after every stage, so whatever happens they say what was reached; each stage's output is
in a file beside them. Exits with 1 where a stage did not pass.
"""

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
    """A command of this Python and its seconds; after a `vital` one that fails, none is run."""

    name: str
    arguments: tuple[str, ...]
    limit: int
    vital: bool = False


# Fails where torch sees no GPU: then no other stage is run. What it prints is for the report.
GPU_HERE = """
import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device here"
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
print(f"torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
"""
TESTS = {  # stage: file
    name: f"tests/{folder}/{name}.py"
    for folder, name in (
        ("backends", "test_gpu"),
        ("backends", "test_triton"),
        ("fused", "test_triton_fused"),
        ("backends", "test_triton_decode"),
        ("backends", "test_triton_key_ranges"),
    )
}


def stages(out: Path) -> tuple[Stage, ...]:
    return (
        Stage("gpu", ("-c", GPU_HERE), 120, vital=True),
        Stage("verify", (
            "-m", "fastattn", "verify", "--quick", "--json", f"{out}/verify.json",
        ), 2400),
        Stage("info", ("-m", "fastattn", "info"), 120),
        # The name of a test is printed before it runs, so a log ends with the one that hung.
        *(Stage(name, ("-u", "-m", "pytest", "-v", "--color=no", path), 900)
          for name, path in TESTS.items()),
        Stage("bench", (
            "-m", "fastattn", "bench", "gpu", "--device", "cuda", "--minutes", "4",
            "--vs", "sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,flex",
            "--json", "benchmarks/results/gpu.json", "--md", "benchmarks/results/gpu.md",
        ), 900),
    )  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """What came of a stage: passed, failed, crashed, hung, stuck, running (the session was cut off)
    or not run."""

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
    """The stages in their order. After one that cannot be killed, or a vital one that does not
    pass, none of the others is run."""
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
    """Both reports, each whole or not at all."""
    stored = {"when": time.strftime("%Y-%m-%d %H:%M:%S"), "stages": [asdict(x) for x in reached]}
    lines = [
        "# What this machine's GPU has shown",
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

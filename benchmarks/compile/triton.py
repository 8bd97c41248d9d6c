"""`make gpu-audit`: audit of the Triton kernels' machine code, on a machine without a GPU.

    python -m fastattn.benchmarks.compile.triton [--all] [--write] [--stale] [--arch sm_90]
        [--only norm]

Each kernel module has a function `audit_subjects(arch)` that yields Subjects, each a kernel in one
configuration. `arch.launches(name, call)` makes them from a real launch with meta tensors, so that
the audit sees the arguments, alignments and options that a GPU would. Every Subject is compiled for
every architecture in ARCHES, and the machine code is read: registers, stack, spills, shared memory,
matrix instructions. Exits with 1 if a hot subject spills in a loop with matrix instructions (or
anywhere, if it has no such loop), if shared memory exceeds the architecture's, if a required matrix
instruction is missing, or if a compiler fails.

benchmarks/results/gpu-audit.json has the last audit, where each row has a key of what it was made
from (source, configuration, architecture). Only subjects that are missing there, or whose key or
compiler differs, are compiled; --all compiles all. Differences are printed, and --write stores the
new rows. --stale compiles nothing, and fails if a row is out of date.

TRITON_INTERPRET must be unset, because it decides at import whether kernels are interpreted.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from . import source_keys

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks" / "results" / "gpu-audit.json"
CACHE = ROOT / "build" / "triton"  # Triton's own cache, so that a second audit is quick
MODULES = ("audit", "norm", "rope", "gate", "activate", "linear_cross_entropy")
AGAIN = "`make gpu-audit ARGS=--write` updates them"


@dataclass(frozen=True)
class Arch:
    """An architecture: Triton's target, the limit of shared memory per block, and a regular
    expression for its fastest matrix instructions in a disassembly."""

    name: str
    target: tuple[str, int | str, int]
    shared: int
    matrix: str

    def gpu_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self.target)

    def subject(self, name, fn, *arguments, hot=False, needs=None, **keywords) -> Subject:
        """What fn[grid](*arguments, **keywords) would compile. Tensors may be meta tensors."""
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(self.gpu_target())
        bind = create_function_from_signature(fn.signature, fn.params, backend)
        bound, special, options = bind(*arguments, **keywords)
        keywords = {"debug": False, **keywords}
        _, signature, constexprs, attrs = fn._pack_args(backend, keywords, bound, special, options)
        return Subject(name, fn, signature, constexprs, options, hot, needs, attrs)

    def launches(self, name: str, call: Callable, hot=False, needs=None) -> list[Subject]:
        """A Subject for every kernel that call() would launch, named `<kernel> <name>`. Nothing is
        launched. Use meta tensors, whose addresses count as aligned."""
        from triton.runtime.jit import JITFunction

        found = []

        def run(fn, *arguments, grid, warmup, **keywords):
            kernel = f"{fn.__name__.strip('_')} {name}"
            again = sum(x.name.startswith(kernel) for x in found)
            kernel += f" ({again + 1})" if again else ""
            found.append(self.subject(kernel, fn, *arguments, hot=hot, needs=needs, **keywords))

        with mock.patch.object(JITFunction, "run", run):
            call()
        if not found:
            raise RuntimeError(f"{name} launched no kernel")
        return found


@dataclass(frozen=True)
class Subject:
    """One kernel in one configuration: triton.compile's input, and requirements on the code."""

    name: str  # unique on its architecture
    fn: object  # the @triton.jit function
    signature: dict
    constexprs: dict
    options: dict  # num_warps, num_stages
    hot: bool  # may not spill
    needs: str | None = None  # "matrix": the architecture's own instruction; or a pattern
    attrs: dict = field(default_factory=dict)  # divisibility of arguments

    @property
    def code(self) -> str:
        """Equal for subjects that compile to the same code."""
        parts = self.fn, self.signature, self.constexprs, self.options, self.attrs
        return repr(tuple(str(part) for part in parts))

    def key(self, arch: Arch) -> str:
        """The key of its row, without the versions of the compilers."""
        values = {name: source_keys.of_value(x) for name, x in self.constexprs.items()}
        parts = self.signature, values, self.options, self.attrs, arch.target
        read = [source_keys.of_function(x) for x in (spills_in_loops, _counted)]
        return source_keys.digest(source_keys.of_function(self.fn), *map(str, parts), read)


KB = 1024
ARCHES = (
    Arch("sm_80", ("cuda", 80, 32), 163 * KB, r"[HIQ]MMA"),
    Arch("sm_86", ("cuda", 86, 32), 99 * KB, r"[HIQ]MMA"),
    Arch("sm_90", ("cuda", 90, 32), 227 * KB, r"[HIQ]GMMA"),
    Arch("sm_100", ("cuda", 100, 32), 227 * KB, r"UTC\w*MMA"),
    Arch("gfx942", ("hip", "gfx942", 64), 64 * KB, r"v_mfma\w*"),
)
SPILL = re.compile(r"\b(?:STL|LDL)\b")
MATRIX = re.compile(rf"\b(?:DMMA|{'|'.join(arch.matrix for arch in ARCHES)})\b")


# ---- reading machine code -----------------------------------------------------------------------


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the disassemblers in Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read_nvidia(asm) -> dict:
    """Numbers from NVIDIA machine code, cached by that code, because the disassemblers take longer
    than a cached compilation."""
    key = hashlib.sha256(asm["cubin"] + MATRIX.pattern.encode() + b"loops 2").hexdigest()
    known = Path(os.environ.get("TRITON_CACHE_DIR", CACHE)) / "audit" / f"{key}.json"
    if known.exists():
        return json.loads(known.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    found = {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "spills": len(SPILL.findall(code)),
        "in_loops": spills_in_loops(code),
        "matrix": _counted(code),
    }
    known.parent.mkdir(parents=True, exist_ok=True)
    whole = known.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(found))
    whole.replace(known)
    return found


def spills_in_loops(code: str) -> int:
    """Spills and reloads within the innermost loops that contain matrix instructions, or all of
    them if no loop does. What is spilled before such a loop and reloaded after it costs very
    little."""
    places, branches, events = {}, [], []  # events: (position, is it a spill)
    for position, line in enumerate(code.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            places[label.group(1)] = position
        elif branch := re.search(r"\bBRA\b.*?(\.L_\w+)", line):
            branches.append((position, branch.group(1)))
        elif SPILL.search(line):
            events.append((position, True))
        elif MATRIX.search(line):
            events.append((position, False))
    loops = [(places[to], at) for at, to in branches if places.get(to, at) < at]
    loops = [(a, b) for a, b in loops if any(a < n < b and not spill for n, spill in events)]
    # A branch into the middle of a loop from below it returns from a wait that was moved there.
    loops = [(a, b) for a, b in loops if not any(c < a < d < b for c, d in loops)]
    inner = [(a, b) for a, b in loops
             if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]  # fmt: skip
    if not inner:
        return sum(spill for _, spill in events)
    return sum(spill for n, spill in events if any(a < n < b for a, b in inner))


def read_amd(asm) -> dict:
    code = asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "in_loops": number("vgpr_spill_count"),
        "matrix": _counted(code),
    }


def _counted(code: str) -> dict[str, int]:
    """How often each matrix instruction occurs."""
    counts: dict[str, int] = {}
    for name in MATRIX.findall(code):
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


# ---- the audit ----------------------------------------------------------------------------------


def subjects(arches=ARCHES, only: str = "") -> Iterator[tuple[Arch, Subject]]:
    """Every subject whose name contains `only`, for each architecture, without duplicates."""
    for arch in arches:
        names, seen = set(), set()
        for module in MODULES if arch.name != "sm_86" else MODULES[:1]:  # the others need little
            kernels = importlib.import_module(f"fastattn.kernels.{module}")
            for subject in kernels.audit_subjects(arch):
                if subject.code in seen:
                    continue
                if subject.name in names:
                    raise ValueError(f"two different subjects are called {subject.name}")
                names.add(subject.name)
                seen.add(subject.code)
                if only in subject.name:
                    yield arch, subject


def audited(arch: Arch, subject: Subject) -> dict:
    """The row of one subject: what its code uses, and `problems` in sentences."""
    import triton
    from triton.compiler import ASTSource

    row = {"arch": arch.name, "name": subject.name, "key": subject.key(arch), "hot": subject.hot}
    begin = time.perf_counter()
    try:
        source = ASTSource(subject.fn, subject.signature, subject.constexprs, subject.attrs)
        kernel = triton.compile(source, target=arch.gpu_target(), options=subject.options)
        read = read_amd if arch.target[0] == "hip" else read_nvidia
        row |= {"shared": kernel.metadata.shared, **read(kernel.asm)}
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [""]  # source, then reason
        return row | {"problems": [f"does not compile: {type(error).__name__}: {lines[-1]}"]}
    return row | {"problems": problems(arch, subject, row), "s": time.perf_counter() - begin}


def problems(arch: Arch, subject: Subject, row: dict) -> list[str]:
    """The problems of a row, one sentence each."""
    found = []
    if subject.hot and row["in_loops"]:
        found.append(f"{row['in_loops']} spills in the loops of a hot kernel")
    if row["shared"] > arch.shared:
        found.append(f"{row['shared']} bytes of shared memory, {arch.name} has {arch.shared}")
    needs = arch.matrix if subject.needs == "matrix" else subject.needs
    if needs and not any(re.fullmatch(needs, name) for name in row["matrix"]):
        found.append(f"no instruction {needs}")
    return found


def audit(pairs: list[tuple[Arch, Subject]]) -> list[dict]:
    """The rows of all pairs, in order. Workers are forked, because kernels cannot be pickled."""
    global _PAIRS
    _PAIRS = pairs
    if not pairs:
        return []
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_one, range(len(pairs)), chunksize=1)


_PAIRS: list[tuple[Arch, Subject]] = []


def _one(n: int) -> dict:
    return audited(*_PAIRS[n])


# ---- the stored report ---------------------------------------------------------------------------


def compilers() -> dict[str, str]:
    """The versions of the compilers here."""
    import triton

    nvidia = triton.knobs.nvidia
    found = {"triton": triton.__version__, "ptxas": nvidia.ptxas.version}
    newer = getattr(nvidia, "ptxas_blackwell", None)  # of Triton 3.6 and newer
    return found | ({"ptxas_blackwell": newer.version} if newer else {})


def stored_report() -> dict:
    return json.loads(STORED.read_text()) if STORED.exists() else {"compilers": None, "rows": []}


def reused(stored: dict, pairs: list[tuple[Arch, Subject]]) -> list[dict | None]:
    """The stored row of each pair with its problems determined again, or None if it is stale."""
    if stored.get("compilers") != compilers():
        return [None] * len(pairs)
    before = {(row["arch"], row["name"]): row for row in stored["rows"]}
    found = []
    for arch, subject in pairs:
        row = before.get((arch.name, subject.name), {})
        fresh = row.get("key") == subject.key(arch)
        row = {**row, "hot": subject.hot}
        found.append({**row, "problems": problems(arch, subject, row)} if fresh else None)
    return found


def stale(stored: dict, pairs: list[tuple[Arch, Subject]]) -> list[str]:
    """Names of the rows that are out of date: changed, new or gone."""
    missing = [p for p, row in zip(pairs, reused(stored, pairs)) if row is None]
    found = [f"{arch.name} {subject.name}" for arch, subject in missing]
    known = {(arch.name, subject.name) for arch, subject in pairs}
    gone = [row for row in stored["rows"] if (row["arch"], row["name"]) not in known]
    return found + [f"{row['arch']} {row['name']} (gone)" for row in gone]


# ---- compared, and printed ----------------------------------------------------------------------

FIELDS = ("registers", "stack", "spills", "in_loops", "shared", "matrix")


def report(rows: list[dict]) -> dict:
    """The report to store. It has no times, so that the file changes only with the code."""
    kept = [{key: row[key] for key in row if key not in ("s", "problems")} for row in rows]
    return {"compilers": compilers(), "rows": kept}


def changes(stored: dict, fresh: dict) -> dict[tuple[str, str], str]:
    """Differences from the stored report by (arch, name); {} if other compilers made it."""
    if stored.get("compilers") != fresh["compilers"]:
        return {}
    before = {(row["arch"], row["name"]): row for row in stored["rows"]}
    found = {}
    for row in fresh["rows"]:
        key = row["arch"], row["name"]
        if key not in before:
            found[key] = "new"
            continue
        differ = [f for f in FIELDS if before[key].get(f) != row.get(f)]
        if differ:
            found[key] = ", ".join(f"{f} was {before[key].get(f)}" for f in differ)
    return found


def show(rows: list[dict], changed: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels compiled ahead of time (* hot: may not spill)")
    table.add_column("arch")
    table.add_column("kernel", overflow="fold")
    for name in FIELDS:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        matrix = " ".join(f"{n} {k}" for k, n in row.get("matrix", {}).items())
        notes = [f"[red]{p}[/red]" for p in row["problems"]]
        notes += [changed[key] for key in [(row["arch"], row["name"])] if key in changed]
        numbers = (str(row.get(f, "")) for f in FIELDS[:-1])
        name = row["name"] + ("*" if row["hot"] else "")
        table.add_row(row["arch"], name, *numbers, matrix, "; ".join(notes))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)


def main(arguments=None) -> int:
    """The command. Exits with 1 if a row has a problem or, with --stale, is out of date."""
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.benchmarks.compile.triton", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--arch", choices=[arch.name for arch in ARCHES], help="only this architecture"
    )
    parser.add_argument("--only", default="", help="only subjects whose name contains this")
    parser.add_argument("--all", action="store_true", help="compile unchanged subjects too")
    parser.add_argument("--write", action="store_true", help=f"replace {STORED.name}")
    parser.add_argument("--stale", action="store_true", help="compile nothing, list stale rows")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled")
    if (chosen.write or chosen.stale) and (chosen.arch or chosen.only):
        parser.error("--write and --stale need the whole audit; leave --arch and --only out")
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    begin = time.perf_counter()
    arches = [arch for arch in ARCHES if chosen.arch in (None, arch.name)]
    pairs = list(subjects(arches, chosen.only))
    stored = stored_report()
    if stored.get("compilers") != compilers():
        print(f"not compared: the stored report is of {stored.get('compilers')}, here are "
              f"{compilers()}")  # fmt: skip
        if chosen.stale:
            return 0
    if chosen.stale:
        return show_stale(stale(stored, pairs))
    rows = [None] * len(pairs) if chosen.all else reused(stored, pairs)
    made = iter(audit([pair for pair, row in zip(pairs, rows) if row is None]))
    again = rows.count(None)
    rows = [next(made) if row is None else row for row in rows]
    fresh = report(rows)
    changed = changes(stored, fresh)
    show(rows, changed)
    bad = [row for row in rows if row["problems"]]
    print(f"{len(rows)} kernels, {again} of them compiled, {len(bad)} with problems, "
          f"{len(changed)} changed, {time.perf_counter() - begin:.0f} s")  # fmt: skip
    for row in bad:
        print(f"{row['arch']} {row['name']}: {'; '.join(row['problems'])}", file=sys.stderr)
    if chosen.write:
        STORED.write_text(json.dumps(fresh, indent=1) + "\n")
    return 1 if bad else 0


def show_stale(names: list[str]) -> int:
    """Prints the names; returns the exit status."""
    for name in names:
        print(f"stale: {name}")
    print(f"{len(names)} stale rows in {STORED.name}" + (f": {AGAIN}" if names else ""))
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())

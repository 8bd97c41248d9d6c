"""Audit of the CUDA kernels' machine code, on a machine without a GPU.

    python -m fastattn.benchmarks.compile.cuda [--all] [--write]

Compiles each .cu file in csrc/cuda that instantiates kernels, and reads ptxas' report and the
machine code: registers, spills, stack, shared memory, and the number of instructions that matter
for speed. Exits with 1 if a kernel spills or uses local memory, if ptxas serialises wgmma (its
notes C7510 to C7520), if a required instruction is missing, if too few exponentials run between the
issue of a matrix product and its wait (ptxas tends to move the wait ahead of them), or if shared
memory exceeds the limit of a CTA. The column `sm_86` says whether it also fits the 99 KB of sm_86
and sm_89.

benchmarks/results/cuda-audit.json has the last audit, where each row has a key of the sources and
flags that it was made from. Files whose key or nvcc version differs are compiled again; --all
compiles all. Differences are printed, and --write stores the new rows."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import source_keys

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks" / "results" / "cuda-audit.json"
CACHE = ROOT / "build" / "cuda-audit"
FLAGS = ("-O3", "-std=c++17", "-cubin", "-Xptxas", "-v,-warn-spills")
ARCHS = {"_sm90": "90a", "_sm80": "80"}  # by a part of the file's name
# The limit of a CTA in bytes, less the cost of alignment.
MAX_SHARED = {"_sm90": 232448 - 1024, "_sm80": 166912 - 1024}
SMALL_SHARED = 101376 - 1024  # the same for sm_86 and sm_89
# For sm_90: 16-bit and FP8 matrix products, TMA loads and stores, bulk reductions into memory, and
# reallocation of registers. For sm_80: matrix products, asynchronous copies, ldmatrix, and atomic
# additions to memory.
COUNTED = (
    *("HGMMA", "QGMMA", "UTMALDG", "UTMASTG", "UBLKRED", "USETMAXREG"),
    *("HMMA", "LDGSTS", "LDSM", "RED"),
)
VARIANTS = {"ELb1EE": "few", "MemoryE1E": "small"}  # by a part of the mangled name
OVERLAP = "overlapped"
# The last key that the kernel's name starts with applies. 40 exponentials are those of a thread in
# the smallest tile, of 80 keys; in FP8, D 256 leaves no registers to overlap any.
MIN_OVERLAP = {"forward_sm90": 40, "forward_sm90 e4m3 D 256": 0}
REQUIRED = {
    "forward_sm90": ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"),
    "forward_sm90 e4m3": ("QGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"),
    "backward_sm90": ("HGMMA", "UTMALDG", "UTMASTG", "UBLKRED", "USETMAXREG"),
    "forward_sm80": ("HMMA", "LDGSTS", "LDSM"),
    "backward_sm80": ("HMMA", "LDGSTS", "LDSM", "RED"),
}


# ---- tools -------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """The path of nvcc or cuobjdump: on PATH, in the CUDA toolkit, or in Triton's wheel."""
    folders = ["", "/usr/local/cuda/bin/"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(f"{Path(triton.origin).parent}/backends/nvidia/bin/")
    return next((found for f in folders if (found := shutil.which(f + name))), None)


def why_not() -> str | None:
    """Why the audit cannot run here, or None."""
    for name in ("nvcc", "cuobjdump"):
        if find_tool(name) is None:
            return f"{name} was not found"
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr


def nvcc_version() -> str:
    return re.search(r"release [^\n]+", _run(find_tool("nvcc"), "--version")).group()


# ---- compiling ---------------------------------------------------------------------------------


def sources() -> list[Path]:
    """The files that instantiate kernels. ops.cu has none, and needs torch to compile."""
    return sorted((ROOT / "csrc/cuda").glob("*_sm*.cu"))


def arch_of(source: str) -> str:
    """The key of ARCHS in a file's name."""
    found = next((key for key in ARCHS if key in source), None)
    if found is None:
        raise ValueError(f"{source} names no architecture; known are {', '.join(ARCHS)}")
    return found


def key(source: Path) -> str:
    """The key of a source's rows, without the version of nvcc."""
    read = [source_keys.of_function(x) for x in (_numbers, _counts)]
    return source_keys.digest(source_keys.of_file(source), FLAGS, arch_of(source.name), read)


def compiled(source: Path) -> tuple[Path, str]:
    """(cubin, ptxas' report) of a source, from build/cuda-audit if nothing changed."""
    made_from = source_keys.digest(key(source), nvcc_version())
    cubin = CACHE / f"{source.stem}-{made_from}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        flags = (*FLAGS, f"-arch=sm_{ARCHS[arch_of(source.name)]}")
        part = cubin.with_suffix(f".{os.getpid()}")  # another process may compile it too
        text = _run(find_tool("nvcc"), *flags, str(source), "-o", str(part))
        part.replace(cubin)
        part.write_text(text)
        part.replace(report)
    return cubin, report.read_text()


def readable(symbol: str) -> str:
    """A kernel's readable name, such as `forward_sm80 bf16 D 64 few`, from its mangled name. The
    kernels before and after the backward exist for both architectures; sm_80's get a `_sm80`."""
    kernel = re.match(r"_ZN8fastattn4cuda\d+([a-z_0-9]+?)I?NS", symbol)
    element = re.search(r"(Bf16|Fp16|E4m3)", symbol)
    dim = re.search(r"(?:Bf16|Fp16|E4m3)ELi(\d+)E", symbol)
    name = kernel.group(1).removesuffix("I") if kernel else symbol
    if "Backward80" in symbol and not name.endswith("_sm80"):
        name += "_sm80"
    variant = [word for mark, word in VARIANTS.items() if mark in symbol]
    return " ".join(
        [name, *([element.group(1).lower()] if element else []),
         *([f"D {dim.group(1)}"] if dim else []), *variant]
    )  # fmt: skip


def _numbers(report: str) -> dict[str, dict]:
    """Each kernel's numbers from ptxas' report, by mangled name."""
    rows = {}
    for block in report.split("Compiling entry function ")[1:]:
        symbol = block.split("'")[1]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        shared = re.findall(r"Li(\d{4,})EE", symbol)
        rows[symbol] = {
            "name": readable(symbol),
            "registers": int(re.search(r"Used (\d+) registers", block).group(1)),
            "spills": int(stores) + int(loads),
            "stack": int(stack),
            "shared": int(shared[-1]) if shared else 0,
        }
    return rows


def _counts(cubin: Path) -> dict[str, dict[str, int]]:
    """How often each of COUNTED occurs, by kernel. Also `overlapped`: the exponentials between a
    wait that leaves one group of products in flight and the next wait, in the step with the fewest.
    Those of softcap, which a branch skips, do not count.
    """
    counts: dict[str, dict[str, int]] = {}
    steps: list[int] = []
    inside = False
    for line in _run(find_tool("cuobjdump"), "-sass", str(cubin)).split("\n"):
        if found := re.match(r"\s*Function : (\S+)", line):
            current = counts.setdefault(found.group(1), dict.fromkeys((*COUNTED, OVERLAP), 0))
            steps, inside = [], False
            continue
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(\S*)\s*(.*)", line)
        if not found:
            continue
        name, variant, operands = found.groups()
        if name in COUNTED:
            current[name] += 1
        elif name == "WARPGROUP" and variant.startswith(".DEPBAR"):
            inside = not operands.startswith("gsb0, 0x0")
            steps += [0] if inside else []
            current[OVERLAP] = min(steps, default=0)
        elif inside and name in ("MUFU", "BRA"):
            steps[-1] = steps[-1] + 1 if name == "MUFU" else 0
    return counts


def rows_of(source: Path) -> list[dict]:
    """One row per kernel: name, key, numbers, counts, and `problems` in sentences."""
    cubin, report = compiled(source)
    notes = re.findall(r"\(C75[12]\d\)[^\n]*", report)
    counts = _counts(cubin)
    rows = []
    for symbol, numbers in _numbers(report).items():
        small = {"sm_86": numbers["shared"] <= SMALL_SHARED}
        of = {"source": source.name, "key": key(source)}
        row = {**numbers, **small, **of, **counts[symbol]}
        row["problems"] = problems(row, [n for n in notes if symbol in n])
        rows.append(row)
    return rows


def stored_report() -> dict:
    return json.loads(STORED.read_text()) if STORED.exists() else {"nvcc": None, "rows": []}


def stale(stored: dict) -> list[str]:
    """The names of sources whose stored rows are out of date, including removed sources."""
    keys = {(source.name, key(source)) for source in sources()}
    known = {(row["source"], row.get("key")) for row in stored["rows"]}
    return sorted({name for name, _ in keys ^ known})


def audit(stored: dict | None = None) -> list[dict]:
    """The rows of every source. Stored rows that are up to date are reused."""
    stored = stored or {"nvcc": None, "rows": []}
    again = {source.name for source in sources()}
    if stored["nvcc"] == nvcc_version():
        again &= set(stale(stored))
    files = [source for source in sources() if source.name in again]
    present = {source.name for source in sources()} - again
    rows = [row for row in stored["rows"] if row["source"] in present]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(rows_of, files):
            rows += found
    return sorted(rows, key=lambda row: row["name"])


def _of(table: dict, name: str, nothing):
    """The value of the last key in `table` that the kernel's name starts with."""
    keys = [key for key in table if f"{name} ".startswith(f"{key} ")]
    return table[keys[-1]] if keys else nothing


def problems(row: dict, notes: list[str]) -> list[str]:
    """The problems of a kernel, in sentences."""
    found = [f"ptxas says: {note}" for note in notes]
    if row["spills"]:
        found.append(f"{row['spills']} bytes are spilled")
    if row["stack"]:
        found.append(f"{row['stack']} bytes of local memory")
    if row["shared"] > (most := MAX_SHARED[arch_of(row["source"])]):
        found.append(f"{row['shared']} bytes of shared memory, the limit is {most}")
    if row[OVERLAP] < (least := _of(MIN_OVERLAP, row["name"], 0)):
        found.append(
            f"{row[OVERLAP]} exponentials overlap with matrix products, at least {least} must"
        )
    missing = [name for name in _of(REQUIRED, row["name"], ()) if not row[name]]
    return found + [f"no {name} in the machine code" for name in missing]


# ---- the command -------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = ("name", "registers", "spills", "stack", "shared", "sm_86", *COUNTED, OVERLAP)
    lines = [[str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *lines]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(line, widths)))
        for line in [list(columns), *lines]
    )  # fmt: skip


def differences(rows: list[dict], stored: list[dict]) -> list[str]:
    """New, removed and changed kernels, in sentences."""
    old, new = ({row["name"]: row for row in side} for side in (stored, rows))
    changes = [
        f"{name} is {'new' if name in new else 'gone'}" for name in sorted(old.keys() ^ new.keys())
    ]
    for name in sorted(old.keys() & new.keys()):
        for column, before in old[name].items():
            now = new[name].get(column)
            if now != before:
                changes.append(f"{name}: {column} was {before}, is {now}")
    return changes


def main(arguments: list[str] | None = None) -> int:
    """The command above."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.benchmarks.compile.cuda")
    parser.add_argument("--all", action="store_true", help="compile unchanged files too")
    parser.add_argument("--write", action="store_true", help="replace the stored table")
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"cuda audit: {reason}", file=sys.stderr)
        return 1
    stored = stored_report()
    rows = audit(None if options.all else stored)
    print(table(rows))
    if options.write:
        STORED.write_text(json.dumps({"nvcc": nvcc_version(), "rows": rows}, indent=1) + "\n")
    else:
        for change in differences(rows, stored["rows"]):
            print(f"differs from {STORED.name}: {change}")
    found = [f"{row['name']}: {problem}" for row in rows for problem in row["problems"]]
    for problem in found:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

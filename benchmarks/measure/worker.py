"""One side of `bench --base`: a process that imports fastattn from a given source tree.

    python worker.py TREE        reads requests from stdin, writes answers to stdout: JSON lines

Both processes take the benchmark's code from this file's own tree, so that two commits are measured
by the same protocol. Only fastattn itself comes from TREE.

    {"op": "open", "attention": {...} or "workload": name, "device": ..., "threads": n}
        -> {"backend": ..., "errors": {...}, "why_not": null or a sentence}
    {"op": "sample", "repeats": n}  -> {"ns": ...}      after one warm-up call
    {"op": "close"}                 -> {}
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path


class _Tree(importlib.abc.MetaPathFinder):
    """Finds fastattn in a source tree, but fastattn.benchmarks here."""

    def __init__(self, tree: Path) -> None:
        here = Path(__file__).resolve().parents[1]  # benchmarks/
        self.folders = {"fastattn": tree / "fastattn", "fastattn.kernels": tree / "kernels"}
        self.folders["fastattn.benchmarks"] = here

    def find_spec(self, name, path=None, target=None):
        folder = self.folders.get(name)
        if folder is None or not (folder / "__init__.py").exists():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def use_tree(tree: Path) -> None:
    """From now on `import fastattn` imports the tree's, whatever is installed."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    sys.meta_path.insert(0, _Tree(tree))


class Served:
    """The open case, and the answers to requests about it."""

    def __init__(self) -> None:
        self.step = self.scope = None

    def open(self, request: dict) -> dict:
        from dataclasses import asdict

        import torch
        from fastattn.benchmarks.cases import AttentionCase
        from fastattn.benchmarks.end_to_end import WORKLOADS
        from fastattn.benchmarks.measure import protocol
        from fastattn.benchmarks.measure.devices import DEVICES

        torch.set_num_threads(request["threads"] or torch.get_num_threads())
        if request.get("attention"):
            case = AttentionCase(**request["attention"])
        else:
            case = next(w for w in WORKLOADS if w.name == request["workload"])
        plan = protocol.Plan(DEVICES[request["device"]](), ())
        result = protocol.Result(case)
        protocol.open_case(result, plan)
        ours = result.sides["fastattn"]
        self.step, self.scope = ours.step, ours.scope
        errors = asdict(ours.errors) if ours.errors else None
        return {"backend": ours.backend, "errors": errors, "why_not": result.red}

    def sample(self, request: dict) -> dict:
        repeats, step = request["repeats"], self.step
        with self.scope():
            step()  # the other process has used the caches meanwhile
            start = time.perf_counter_ns()
            for _ in range(repeats):
                step()
            return {"ns": time.perf_counter_ns() - start}

    def close(self, request: dict) -> dict:
        self.step = self.scope = None
        return {}


def serve(requests, answers) -> None:
    """Answers one request per line until the input ends."""
    served = Served()
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(served, request["op"])(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    use_tree(Path(sys.argv[1]).resolve())
    answers = os.fdopen(os.dup(1), "w")  # other output goes to stderr, not into the answers
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()

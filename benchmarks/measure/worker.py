"""One side of `bench --base`: a process that computes with the fastattn of one source tree.

    python worker.py TREE        requests and answers, one JSON object a line, on stdin and stdout

The benchmark's own code is this file's neighbours in both processes, so that two commits are
measured by one protocol; only fastattn is the tree's.

    {"op": "open", "row": {...} or "workload": name, "device": ..., "threads": n}
        -> {"backend": ..., "errors": {...}, "why_not": null or a sentence}
    {"op": "sample", "repeats": n}  -> {"ns": ...}      one call before the clock starts warms up
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
    """fastattn from a source tree, its benchmarks from here."""

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
    """`import fastattn` means the tree's from here on, whatever is installed."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    sys.meta_path.insert(0, _Tree(tree))


class Served:
    """The cell that is open, and the answers about it."""

    def __init__(self) -> None:
        self.step = self.scope = None

    def open(self, request: dict) -> dict:
        from dataclasses import asdict

        import torch
        from fastattn.benchmarks.cases import Row
        from fastattn.benchmarks.end_to_end import WORKLOADS
        from fastattn.benchmarks.measure import protocol
        from fastattn.benchmarks.measure.devices import DEVICES

        torch.set_num_threads(request["threads"] or torch.get_num_threads())
        if request.get("row"):
            cell = Row(**request["row"])
        else:
            cell = next(w for w in WORKLOADS if w.name == request["workload"])
        plan = protocol.Plan(DEVICES[request["device"]](), ())
        result = protocol.Result(cell)
        protocol.open_cell(result, plan)
        ours = result.sides["fastattn"]
        self.step, self.scope = ours.step, ours.scope
        errors = asdict(ours.errors) if ours.errors else None
        return {"backend": ours.backend, "errors": errors, "why_not": result.red}

    def sample(self, request: dict) -> dict:
        repeats, step = request["repeats"], self.step
        with self.scope():
            step()  # the other side's process has had the caches since
            start = time.perf_counter_ns()
            for _ in range(repeats):
                step()
            return {"ns": time.perf_counter_ns() - start}

    def close(self, request: dict) -> dict:
        self.step = self.scope = None
        return {}


def serve(requests, answers) -> None:
    """Answers each line until there are no more."""
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
    answers = os.fdopen(os.dup(1), "w")  # whatever else prints must not get into the answers
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()

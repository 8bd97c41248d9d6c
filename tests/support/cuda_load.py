"""What `make cuda-load` asks of an installed wheel, in an environment with a CUDA build of torch.

    python tests/support/cuda_load.py

No GPU is needed: the library loads, finds in torch what it looks up there, and every operator has
a kernel for CUDA tensors. Exits with 1 and a sentence for each thing that is not so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastattn
from fastattn.backends import library

NATIVE = ("flash_attn_fwd", "flash_attn_bwd", "flash_attn_fwd_float8")  # csrc/cuda/ops.cu's
ONLY_CPU = ("fastattn::linear_bwd_weight",)  # nn/linear.py asks for it there alone


def without_kernel() -> list[str]:
    """The operators, including those of the library, that have no kernel for CUDA tensors."""
    names = {n.partition(".")[0] for n in torch._C._dispatch_get_all_op_names()}
    names = {n for n in names if n.startswith("fastattn::")} | {f"fastattn::{n}" for n in NATIVE}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CUDA", "CompositeExplicitAutograd")
    return sorted(n for n in names.difference(ONLY_CPU) if not any(has(n, key) for key in keys))


def problems() -> list[str]:
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} was built without CUDA"]
    if library.CUDA_MISSING:
        return [library.CUDA_MISSING]
    found = [f"{name} has no kernel for CUDA tensors" for name in without_kernel()]
    if missing := library.cuda_question("fastattn_torch_problem"):
        found.append(missing)
    if not torch.cuda.is_available() and "driver" not in (library.cuda_problem(0) or ""):
        found.append(f"a machine without a GPU is told {library.cuda_problem(0)!r}")
    return found


if __name__ == "__main__":
    where = Path(fastattn.__file__).parent
    print(f"fastattn {fastattn.__version__} in {where}, torch {torch.__version__}")
    for problem in problems():
        print(f"cuda-load: {problem}", file=sys.stderr)
    if not problems():
        print("the CUDA library loads, and every operator has a kernel for CUDA tensors")
    sys.exit(1 if problems() else 0)

"""The CUDA kernels on the CPU: builds tests/emulator with g++, once, and calls it through ctypes.

    out, lse = forward(problem, seed=2)     a cases.Problem in fp16 or bf16; raises Fault

The library is kept in build/emulator under a hash of its sources and of the compiler's flags; one
with gcov's counters, where FASTATTN_COVERAGE is set (make coverage), in build/coverage/emulator.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastattn.backends.cuda import documents_as_sequences
from fastattn.core.spec import Descales, Operands

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests/emulator"
FLAGS = [
    *("-std=c++17", "-O2", "-march=native", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-DFASTATTN_EMULATE", f"-I{EMULATOR}", f"-I{ROOT / 'csrc/cuda'}"),
]
COVERAGE = ["--coverage"] if os.environ.get("FASTATTN_COVERAGE") else []
SINK_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Fault(Exception):
    """What the emulator found wrong, with source lines."""


def why_not() -> str | None:
    """Why the emulator cannot run here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulator switches fibers in x86-64 assembly, for Linux"
    return None if shutil.which("g++") else "g++ was not found"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@contextmanager
def locked(folder: Path):
    """Exclusive access to a folder in which several processes build."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _built() -> Path:
    """The library, compiled if necessary."""
    sources = sorted(EMULATOR.glob("*.cpp"))
    read = [*sources, *EMULATOR.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
    read += [p for p in (ROOT / "csrc/cuda").iterdir() if p.is_file()]
    flags = [*FLAGS, *COVERAGE]
    digest = hashlib.sha256(repr(flags).encode() + Path("/proc/cpuinfo").read_bytes()[:400])
    for path in sorted(read):
        digest.update(path.read_bytes())
    folder = ROOT / ("build/coverage/emulator" if COVERAGE else "build/emulator")
    target = folder / f"emulator-{digest.hexdigest()[:16]}.so"
    with locked(folder):
        if target.exists():
            return target
        for old in folder.glob("emulator-*.so"):
            old.unlink()
        objects = [folder / f"{path.stem}.o" for path in sources]
        jobs = [["g++", *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_run, jobs))
        _run(["g++", "-shared", *map(str, objects), "-o", f"{target}.part", "-ldl", *COVERAGE])
        Path(f"{target}.part").rename(target)
    return target


@cache
def library() -> ctypes.CDLL:
    """The emulator with the kernels and its own tests in it."""
    loaded = ctypes.CDLL(str(_built()))
    loaded.emulated_layouts.restype = ctypes.c_char_p
    check_layouts(loaded.emulated_layouts().decode(), STRUCTURES)
    loaded.emulated_register.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p]
    for name in ("forward_sm90", "forward_sm80", "backward_sm90", "backward_sm80"):
        getattr(loaded, f"emulated_{name}").restype = ctypes.c_char_p
    return loaded


# ---- the structs that calls pass, and whether they are the kernels' ------------------------------


class TensorView(ctypes.Structure):
    """csrc/cuda/host_params.h: a tensor [batch, heads, rows, D]."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "head_dim")),
        *((name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "row_stride")),
        ("bytes", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> TensorView:
        batch, heads, rows, head_dim = x.shape
        strides = zip(("batch_stride", "head_stride", "row_stride"), x.stride())
        return cls(data=x.data_ptr(), batch=batch, heads=heads, rows=rows, head_dim=head_dim,
                   bytes=x.element_size(), **dict(strides))  # fmt: skip


class Descale(ctypes.Structure):
    """csrc/cuda/params.h: fp32 [kv_heads] or [batch or sequences, kv_heads], or None."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int)]

    @classmethod
    def of(cls, x: Tensor | None) -> Descale:
        stride = x.shape[1] if x is not None and x.dim() == 2 else 0
        return cls(data=_address(x), stride=stride)


class AttentionCall(ctypes.Structure):
    """csrc/cuda/host_params.h, Call: what both passes have."""

    _fields_ = [
        *((name, TensorView) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("kv_lens", "kv_starts", "cu_q", "cu_k")),
        *(("sequences", ctypes.c_int), ("documents", ctypes.c_bool)),
        *(("sinks", ctypes.c_void_p), ("sink_type", ctypes.c_int)),
        *(("scale", ctypes.c_double), ("softcap", ctypes.c_double)),
        *(("left", ctypes.c_int64), ("right", ctypes.c_int64), ("align_end", ctypes.c_bool)),
    ]


class ForwardCall(AttentionCall):
    """csrc/cuda/host_params.h; working memory is the emulator's."""

    _fields_ = [
        *(("lse", ctypes.c_void_p), ("page_table", ctypes.c_void_p)),
        *(("pages", ctypes.c_int64), ("page_row", ctypes.c_int64), ("splits", ctypes.c_int)),
        *(("split_out", ctypes.c_void_p), ("split_lse", ctypes.c_void_p)),
        *((name, Descale) for name in ("q_descale", "k_descale", "v_descale")),
    ]


class BackwardCall(AttentionCall):
    """csrc/cuda/host_params.h; working memory is the emulator's."""

    _fields_ = [
        *((name, TensorView) for name in ("dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "dlse", "lse2", "delta", "dq_sums")),
        *((name, ctypes.c_void_p) for name in ("semaphores", "large", "dsinks")),
    ]


STRUCTURES = (TensorView, Descale, ForwardCall, BackwardCall)


def layout_of(structure: type[ctypes.Structure]) -> dict[str, tuple[int, ...]]:
    """As tests/emulator/layouts.cpp gives it: the size of the struct, then the offset and size of
    each field."""
    name = structure.__name__
    found: dict[str, tuple[int, ...]] = {name: (ctypes.sizeof(structure),)}
    for base in reversed(structure.__mro__):
        for field, *_ in vars(base).get("_fields_", ()):
            place = getattr(structure, field)
            found[f"{name}.{field}"] = (place.offset, place.size)
    return found


def check_layouts(text: str, structures) -> None:
    """Raises where a struct of this file is not the kernels', whose layouts are in `text`."""
    lines = (line.split() for line in text.splitlines())
    theirs = {name: tuple(map(int, numbers)) for name, *numbers in lines}
    ours = {k: v for structure in structures for k, v in layout_of(structure).items()}
    for name in [*(n for n in theirs if "." in n), *(n for n in ours if "." in n), *theirs]:
        if theirs.get(name) != ours.get(name):
            what = "(offset, size)" if "." in name else "(size)"
            raise RuntimeError(
                f"{name} is at {ours.get(name, 'no place')} in tests/support/emulated.py and at "
                f"{theirs.get(name, 'no place')} in csrc/cuda {what}: the ctypes struct and the "
                "table in tests/emulator/layouts.cpp must have the fields of the C++ struct"
            )


# ---- calls -------------------------------------------------------------------------------------


def is_expanded(x: Tensor) -> bool:
    """csrc/cuda/host_params.h's rule."""
    return any(n > 1 and stride == 0 for n, stride in zip(x.shape[:3], x.stride()))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sink_type(sinks: Tensor | None) -> int:
    return 0 if sinks is None else SINK_TYPES[sinks.dtype]


def _sequences(x: Operands) -> tuple[int, bool]:
    """How many segments there are, and whether they are documents."""
    cu = x.cu_seqlens_q
    return (0, False) if cu is None else (cu.shape[-1] - 1, cu.dim() == 2)


def register(**tensors: Tensor | None) -> None:
    """Allows access to exactly these tensors."""
    library().emulated_forget()
    for name, x in tensors.items():
        if x is not None:
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
            size = (last + 1) * x.element_size()
            library().emulated_register(x.data_ptr(), size, name.encode())


def _set_operands(call: AttentionCall, spec, x: Operands) -> None:
    """All of a call but its four-dimensional tensors, as csrc/cuda/call.h's function does."""
    call.kv_lens, call.kv_starts = _address(x.kv_lens), _address(x.kv_starts)
    call.cu_q, call.cu_k = _address(x.cu_seqlens_q), _address(x.cu_seqlens_k)
    call.sequences, call.documents = _sequences(x)
    call.sinks, call.sink_type = _address(x.sinks), _sink_type(x.sinks)
    call.scale, call.softcap = spec.scale, spec.softcap
    call.left, call.right, call.align_end = spec.left, spec.right, spec.align_end


def _set_tensors(call: ctypes.Structure, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        setattr(call, name, TensorView.of(x))


def _forward_call(problem, out: Tensor, lse: Tensor, num_splits: int) -> ForwardCall:
    q, k, v, spec, x = problem
    call = ForwardCall(lse=_address(lse), splits=num_splits)
    _set_tensors(call, q=q, k=k, v=v, out=out)
    _set_operands(call, spec, x)
    if x.page_table is not None:
        call.page_table = _address(x.page_table)
        call.pages, call.page_row = x.page_table.shape[1], x.page_table.stride(0)
    for name, scale in zip(("q_descale", "k_descale", "v_descale"), x.descales or Descales()):
        setattr(call, name, Descale.of(scale))
    return call


def plan(problem, multiprocessors: int, num_splits: int = 0, hopper: bool = False) -> dict:
    """csrc/cuda/host_params80.h's ForwardPlan."""
    numbers = (ctypes.c_int * 3)()
    call = _forward_call(problem, problem.q, problem.q, num_splits)
    library().emulated_forward_plan(ctypes.byref(call), multiprocessors, hopper, numbers)
    return dict(zip(("few", "pack_gqa", "splits"), numbers))


def forward(
    problem, seed: int = 0, grid: int = 2, arch: str = "sm90", num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) from an emulated GPU with `grid` multiprocessors; results start as NaN."""
    problem = problem._replace(operands=documents_as_sequences(problem.operands))
    q, k, v, _, x = problem
    float8 = q.dtype == torch.float8_e4m3fn
    out = torch.full_like(q, torch.nan, dtype=torch.bfloat16 if float8 else q.dtype)
    lse = torch.full(q.shape[:3], torch.nan)
    scales = zip(("q_descale", "k_descale", "v_descale"), x.descales or ())
    register(q=q, k=k, v=v, out=out, lse=lse, kv_lens=x.kv_lens, kv_starts=x.kv_starts,
             cu_q=x.cu_seqlens_q, cu_k=x.cu_seqlens_k, sinks=x.sinks,
             page_table=x.page_table, **dict(scales))  # fmt: skip
    call = _forward_call(problem, out, lse, num_splits)
    bf16 = q.dtype == torch.bfloat16
    run = getattr(library(), f"emulated_forward_{arch}")
    fault = run(ctypes.byref(call), ctypes.c_bool(bf16), grid, ctypes.c_uint64(seed))
    if fault:
        raise Fault(fault.decode())
    return out, lse


def backward(
    problem,
    dout,
    dlse,
    out,
    lse,
    seed: int = 0,
    grid: int = 2,
    deterministic: bool = True,
    arch: str = "sm90",
    more: tuple = (),
):
    """(dq, dk, dv, dsinks or None), NaN at first.

    deterministic: CTAs add to dq in one order; arch: whose kernels; more: what else their function
    in tests/emulator takes.
    """
    q, k, v, spec, x = problem
    x = documents_as_sequences(x)
    if arch == "sm90":  # as csrc/cuda/ops.cu does: tensor maps have no stride of 0
        q, k, v, dout = (y.contiguous() if is_expanded(y) else y for y in (q, k, v, dout))
    dq, dk, dv = (torch.full_like(y, torch.nan) for y in (q, k, v))
    dsinks = None if x.sinks is None else torch.full(x.sinks.shape, torch.nan)
    register(q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv, lse=lse, dlse=dlse,
             kv_lens=x.kv_lens, kv_starts=x.kv_starts, cu_q=x.cu_seqlens_q, cu_k=x.cu_seqlens_k,
             sinks=x.sinks, dsinks=dsinks)  # fmt: skip
    call = BackwardCall(lse=_address(lse), dlse=_address(dlse), dsinks=_address(dsinks))
    _set_tensors(call, q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
    _set_operands(call, spec, x)
    call.semaphores = q.data_ptr() if deterministic else None  # any address: see hosts.h
    bf16 = q.dtype == torch.bfloat16
    run = getattr(library(), f"emulated_backward_{arch}")
    fault = run(ctypes.byref(call), ctypes.c_bool(bf16), grid, ctypes.c_uint64(seed), *more)
    if fault:
        raise Fault(fault.decode())
    return dq, dk, dv, dsinks

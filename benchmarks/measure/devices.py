"""How a device is measured, CPU or CUDA: samples, clocks, memory, and the machine's peaks.

CPU    Torch's number of threads is fixed for the whole run. Samples use the host's clock. Memory is
       what the process got from the system (VmHWM), so that no library's workspace is missed.
CUDA   Samples use events around the calls, optionally of a CUDA graph, which removes the launches
       from the time, and optionally with the L2 cache flushed before each call. A pause follows
       each long sample, because a GPU lowers its clock after some milliseconds of continuous work.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import Contender

# ---- the CPU ------------------------------------------------------------------------------------


@dataclass
class Cpu:
    """Host threads and the host's clock."""

    name: str = "cpu"
    threads: int = 0  # 0: torch's
    meminfo: Path = Path("/proc/meminfo")

    def __enter__(self) -> Cpu:
        self._before = torch.get_num_threads()
        self.threads = self.threads or self._before
        torch.set_num_threads(self.threads)
        return self

    def __exit__(self, *_) -> None:
        torch.set_num_threads(self._before)

    def contender(self, name: str, fn: Callable[[], object], scope) -> Contender:
        return Contender(name, fn, scope)

    def synchronize(self) -> None:
        pass

    def free_memory(self) -> int | None:
        """Bytes available without swapping, or None if the system does not tell."""
        try:
            return _field(self.meminfo, "MemAvailable:")
        except (OSError, ValueError):
            return None

    def peak_memory(self, fn: Callable[[], object]) -> int | None:
        """Peak bytes of a call beyond those held before it, results included, to about 0.5 MB; None
        if the system does not tell."""
        status, fn_result = Path("/proc/self/status"), fn()
        del fn_result
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory that the heap keeps would hide use
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            before = _field(status, "VmRSS:")
            fn_result = fn()
            del fn_result
            return max(0, _field(status, "VmHWM:") - before)
        except (OSError, ValueError, AttributeError):
            return None

    def clocks(self) -> dict:
        """MHz as the system reports it, which may be constant in a virtual machine, and the seconds
        of a fixed amount of work on one core, which shows the real speed."""
        start = time.perf_counter()
        total = 0
        for i in range(300_000):
            total += i & 7
        seconds = time.perf_counter() - start
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        mhz = [float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz")]
        return {"mhz": max(mhz, default=None), "fixed_work_s": seconds}

    def throttled(self, before: dict, after: dict) -> str | None:
        """Why the machine seems slower after the run than before, or None."""
        slower = after["fixed_work_s"] / before["fixed_work_s"]
        if slower > 1.1:
            return f"a fixed amount of work took {slower - 1:.0%} longer after the run than before"
        return None


def _field(path: Path, name: str) -> int:
    """Bytes of a line `name  123 kB`."""
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} has no {name}")


# ---- CUDA ---------------------------------------------------------------------------------------

SUSTAINED = 5e-3  # seconds of continuous work after which a GPU may lower its clock
COOLDOWN = 1.0  # seconds of pause per second of work, at most MAX_COOLDOWN
MAX_COOLDOWN = 1.0
FLUSH = 2  # bytes to overwrite, in sizes of the L2 cache


class Cuda:
    """One CUDA device. `api` is torch.cuda, or a stand-in with the same names.

    graphs   replay a captured graph instead of launching. A call that cannot be captured runs
             eagerly, and `eager` has the reason
    cold     flush the L2 cache before each call, outside the events
    """

    name = "cuda"
    threads = 0

    def __init__(
        self, *, graphs: bool = False, cold: bool = False, api=torch.cuda, sleep=time.sleep,
        zeros=None,
    ):  # fmt: skip
        self.graphs, self.cold, self.api, self.sleep = graphs, cold, api, sleep
        self.eager: dict[str, str] = {}  # contender: why it was not captured
        self._zeros = zeros or (lambda n: torch.zeros(n, dtype=torch.uint8, device="cuda"))
        self._flushed = None

    def __enter__(self) -> Cuda:
        if not self.api.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device on this machine")
        return self

    def __exit__(self, *_) -> None:
        self._flushed = None

    def synchronize(self) -> None:
        self.api.synchronize()

    def contender(self, name: str, fn: Callable[[], object], scope) -> Contender:
        run = self._captured(name, fn) if self.graphs else fn
        return Contender(name, fn, scope, lambda repeats: self.sample(run, repeats))

    def _captured(self, name: str, fn: Callable[[], object]) -> Callable[[], object]:
        try:
            side = self.api.Stream()
            side.wait_stream(self.api.current_stream())
            with self.api.stream(side):
                for _ in range(3):  # autotuning and lazy initialisation must not be captured
                    fn()
            self.api.current_stream().wait_stream(side)
            graph = self.api.CUDAGraph()
            with self.api.graph(graph):
                fn()
        except RuntimeError as error:
            self.eager[name] = str(error).split("\n")[0]
            return fn
        return graph.replay

    def sample(self, fn: Callable[[], object], repeats: int) -> float:
        """Nanoseconds of `repeats` calls, by events on the device."""
        batches = [1] * repeats if self.cold else [repeats]  # cold: each call has its own events
        pairs = []
        for calls in batches:
            if self.cold:
                self._flush()
            start, end = (self.api.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                fn()
            end.record()
            pairs.append((start, end))
        self.api.synchronize()
        seconds = sum(start.elapsed_time(end) for start, end in pairs) * 1e-3
        if seconds > SUSTAINED:
            self.sleep(min(COOLDOWN * seconds, MAX_COOLDOWN))
        return seconds * 1e9

    def _flush(self) -> None:
        if self._flushed is None:
            size = getattr(self.api.get_device_properties(0), "L2_cache_size", 0) or 1 << 26
            self._flushed = self._zeros(FLUSH * size)
        self._flushed.zero_()

    def free_memory(self) -> int | None:
        return self.api.mem_get_info()[0]

    def peak_memory(self, fn: Callable[[], object]) -> int | None:
        """Bytes that torch's allocator handed out beyond those held before the call."""
        fn_result = fn()
        del fn_result
        self.api.synchronize()
        self.api.reset_peak_memory_stats()
        before = self.api.memory_allocated()
        fn_result = fn()
        self.api.synchronize()
        del fn_result
        return max(0, self.api.max_memory_allocated() - before)

    def clocks(self) -> dict:
        """nvidia-smi's clocks of the first GPU; {} if it cannot run."""
        fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "clocks_throttle_reasons.active")
        fields = (*fields, "driver_version")
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        values = [value.strip() for value in run.stdout.splitlines()[0].split(",")]
        return dict(zip(fields, values))

    def throttled(self, before: dict, after: dict) -> str | None:
        """nvidia-smi's throttle reasons, except idleness (bit 0) and application clocks (bit 1)."""
        active = after.get("clocks_throttle_reasons.active", "0")
        try:
            reasons = int(active, 0) & ~0b11
        except ValueError:
            return None
        return f"the GPU reports throttle reasons {reasons:#x}" if reasons else None


DEVICES = {"cpu": Cpu, "cuda": Cuda}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- peaks --------------------------------------------------------------------------------------


def peak_flops(
    dtype: torch.dtype = torch.float32, seconds: float = 0.5, device: str = "cpu"
) -> float:
    """The peak in FLOP/s with torch's current threads: the fastest matrix product within `seconds`.
    In half precision, take the better of this and fp32's: on a CPU without half-precision
    instructions a kernel can always convert to fp32, however slow the library's product is."""
    small = device == "cpu" and dtype != torch.float32
    size = 256 if small else 1024 if device == "cpu" else 8192  # a CPU may take 1 s for 512 in fp16
    a, b = torch.rand(2, size, size, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), seconds, device)


def peak_bandwidth(nbytes: int = 1 << 28, seconds: float = 0.4, device: str = "cpu") -> float:
    """Bytes per second through a working set of `nbytes`: the better of reading it (sum) and
    copying one half onto the other. Beyond the last-level cache this is the memory's bandwidth;
    below, the cache's, which is the roof for work of that size."""
    data = torch.ones(max(nbytes // 8, 1024) * 2, device=device)  # fp32, an even number of elements
    source, target = data.chunk(2)
    moved = data.numel() * 4
    read = moved / _fastest(data.sum, seconds / 2, device)
    copy = moved / _fastest(lambda: target.copy_(source), seconds / 2, device)
    return max(read, copy)


def _fastest(fn: Callable[[], object], seconds: float, device: str) -> float:
    """The shortest time of the calls that fit into `seconds`, of at least three."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    fn()
    wait()
    best, end, calls = math.inf, time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter_ns()
        fn()
        wait()
        best = min(best, time.perf_counter_ns() - start)
        calls += 1
    return best * 1e-9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is torch's: a class from the GPU allocator, a message from the CPU's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)

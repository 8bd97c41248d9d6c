"""Where the self-tests of the CUDA kernels run: on a GPU, or with the CPU kernels in their place.
Next hop: the rows of registry.py."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core.call import Call, Gradients, Result
from ..core.spec import LEAVES
from . import library, registry

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
DIMS = (64, 128, 256)


class Failed(Exception):
    """What a step found wrong, in a sentence."""


class Device:
    """What the steps ask of a device. `heads` of 128 rows each are more tiles than a quarter of the
    multiprocessors, below which Hopper takes its kernels for few rows; `length` fills the GPU."""

    backend: str
    where: str
    heads, length, runs = 40, 4096, 30
    dims: tuple[int, ...] = DIMS

    def forward(self, call: Call) -> Result:
        return registry.BY_NAME[self.backend].forward(call)

    def backward(self, call: Call, result: Result, dout, dlse=None, *, sinks=False) -> Gradients:
        needs = tuple(name == "sinks" and sinks for name in LEAVES)
        return registry.BY_NAME[self.backend].backward(call, result, dout, dlse, needs)


class Cuda(Device):
    backend = "cuda"

    def __init__(self, index: int):
        self.index, self.where = index, f"cuda:{index}"
        torch.cuda.set_device(index)

    def problem(self) -> str | None:
        missing = library.CUDA_MISSING or library.cuda_question("fastattn_torch_problem")
        return missing or library.cuda_problem(self.index)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def tensor_map(self, x: Tensor, rows: int) -> str | None:
        """What the driver says against a map of x [batch, heads, rows, D] with boxes of `rows`."""
        shape, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 3)(*x.stride()[:3])
        data, size = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.element_size())
        return library.cuda_question("fastattn_cuda_tensor_map", data, shape, strides, size, rows)

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the tensor that it writes) of a CUDA graph of the function."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result

    def aside(self, function: Callable[[], Tensor]) -> Tensor:
        """The function's result from a stream of its own."""
        stream = torch.cuda.Stream(self.index)
        stream.wait_stream(torch.cuda.current_stream(self.index))
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream(self.index).wait_stream(stream)
        return result

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """What waits for the GPU raises."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class OnCpu(Device):
    """The same questions to the CPU kernels, of fewer and smaller calls."""

    backend, where = "cpu", "cpu"
    heads, length, runs, dims = 2, 150, 3, (32,)

    def problem(self) -> str | None:
        return library.NATIVE_MISSING

    def synchronize(self) -> None:
        pass

    def tensor_map(self, x: Tensor, rows: int) -> str | None:
        return None

    def capture(self, function):
        result = function()
        return lambda: result.copy_(function()), result

    def aside(self, function):
        return function()

    def no_waiting(self):
        return contextlib.nullcontext()

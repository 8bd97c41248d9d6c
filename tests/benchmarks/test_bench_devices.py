"""How the benchmark measures on a device: threads, events, graphs, caches and clocks, with
stand-ins.

No test here asserts a time.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from bench_data import FakeClock
from fastattn.benchmarks.measure import devices

# ---- devices ------------------------------------------------------------------------------------


def test_cpu_pins_its_threads_and_gives_them_back():
    before = torch.get_num_threads()
    with devices.Cpu(threads=before + 1) as cpu:
        assert torch.get_num_threads() == before + 1 == cpu.threads
    assert torch.get_num_threads() == before
    with devices.Cpu() as cpu:
        assert cpu.threads == before


def test_cpu_memory_is_what_a_call_takes():
    size = 1 << 26
    found = devices.Cpu().peak_memory(lambda: torch.ones(size // 4))
    if found is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 0.9 * size < found < 1.5 * size
    assert devices.Cpu().peak_memory(lambda: None) < size // 16
    assert devices.Cpu().free_memory() > 0


def test_cpu_without_proc_says_nothing(tmp_path):
    assert devices.Cpu(meminfo=tmp_path / "none").free_memory() is None


def test_throttling_is_a_slower_fixed_piece_of_work():
    cpu, before = devices.Cpu(), {"fixed_work_s": 0.01}
    assert cpu.throttled(before, {"fixed_work_s": 0.0105}) is None
    assert "30% longer" in cpu.throttled(before, {"fixed_work_s": 0.013})
    assert {"mhz", "fixed_work_s"} == cpu.clocks().keys()


class FakeCuda:
    """torch.cuda's names, on a simulated clock that work advances."""

    def __init__(self, clock: FakeClock, capture: bool = True) -> None:
        self.clock, self.capture, self.log = clock, capture, []
        self.held = self.high = 0

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def Event(self, enable_timing):
        api = self

        class Event:
            def record(self):
                self.at = api.clock.now

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e6

        assert enable_timing
        return Event()

    def Stream(self):
        class Stream:
            def wait_stream(self, other):
                pass

        return Stream()

    current_stream = Stream

    @contextmanager
    def stream(self, stream):
        yield

    def CUDAGraph(self):
        api = self

        class Graph:
            def replay(self):
                api.log.append("replay")
                api.clock.now += 1_000_000

        return Graph()

    @contextmanager
    def graph(self, graph):
        if not self.capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    def get_device_properties(self, index):
        class Properties:
            L2_cache_size = 1000

        return Properties()

    def mem_get_info(self):
        return 123, 456

    def memory_allocated(self):
        return self.held

    def reset_peak_memory_stats(self):
        self.high = self.held

    def max_memory_allocated(self):
        return self.high


class Flushed:
    def __init__(self, log, clock, size):
        self.log, self.clock, self.size = log, clock, size

    def zero_(self):
        self.log.append(f"flush {self.size}")
        self.clock.now += 50_000_000  # may not be part of the time


def cuda(capture=True, **options):
    clock = FakeClock()
    api, slept = FakeCuda(clock, capture), []
    zeros = lambda size: Flushed(api.log, clock, size)  # noqa: E731
    return clock, api, slept, devices.Cuda(api=api, sleep=slept.append, zeros=zeros, **options)


def test_cuda_times_by_events_and_cools_down():
    clock, _, slept, device = cuda()
    with device:
        contender = device.contender("a", clock.work(2_000_000), None)
        assert contender.sample(2) == pytest.approx(4e6) and slept == []  # 4 ms: no pause
        assert contender.sample(10) == pytest.approx(2e7) and slept == [pytest.approx(0.02)]
        assert contender.sample(2000) == pytest.approx(4e9) and slept[-1] == devices.MAX_COOLDOWN


def test_cuda_cold_flushes_before_each_call_outside_the_events():
    clock, api, _, device = cuda(cold=True)
    assert device.sample(clock.work(1_000_000), 3) == pytest.approx(3e6)
    assert api.log.count("flush 2000") == 3


def test_cuda_graphs_replay_or_say_why_not():
    clock, api, _, device = cuda(graphs=True)
    contender = device.contender("a", clock.work(9_000_000), None)
    assert contender.sample(4) == pytest.approx(4e6) and api.log.count("replay") == 4
    clock, _, _, device = cuda(capture=False, graphs=True)
    contender = device.contender("a", clock.work(9_000_000), None)
    assert contender.sample(1) == pytest.approx(9e6)
    assert device.eager == {"a": "operation not permitted when stream is capturing"}


def test_cuda_memory_and_throttling():
    _, api, _, device = cuda()

    def call():
        api.high = max(api.high, api.held + 700)

    api.held = 50
    assert device.peak_memory(call) == 700 and device.free_memory() == 123
    key = "clocks_throttle_reasons.active"
    assert device.throttled({}, {key: "0x0000000000000001"}) is None  # idle
    assert "0x4" in device.throttled({}, {key: "0x0000000000000004"})
    assert device.throttled({}, {key: "[N/A]"}) is None and device.throttled({}, {}) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="no CUDA device"), devices.Cuda():
        pass


def test_out_of_memory_is_told_from_other_errors():
    assert devices.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert devices.is_out_of_memory(raised.value)
    assert not devices.is_out_of_memory(RuntimeError("shapes differ"))

"""Memory that the native code allocates: written before it is read, bounded, freed, and safe if the
system refuses it; and forked children. Many of these tests run in separate processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_calls import Call

from fastattn.backends import library
from fastattn.core.reference import reference

pytestmark = pytest.mark.native
no_sanitizer = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer takes memory of its own"
)
CSRC = Path(__file__).resolve().parents[2] / "csrc"


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(script: str, *arguments: str, **environment: str) -> str:
    """The output of the script in a fresh interpreter, which must succeed within the time limit."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- what nobody has written is NaN --------------------------------------------------------------


def test_new_memory_is_poisoned():
    """Otherwise this suite would not notice what a kernel fails to write."""
    assert library.NATIVE.fastattn_poison_on() == 1


def test_every_allocation_can_be_poisoned():
    """Tensors come from tensors.h and other memory from arena.h: both are poisoned."""
    for path in sorted(CSRC.rglob("*")):
        if path.is_dir() or path.name in ("tensors.h", "arena.h"):
            continue
        text = path.read_text()
        found = re.findall(
            r"\bnew_empty\(|\bempty_like\(|stable::empty\(|\bnew \w+\[|malloc\(", text
        )
        assert not found, f"{path.name} allocates with {found}"
        made = len(re.findall(r"aoti_torch_empty\w+\(", text))
        assert made == text.count("poisoned(Tensor(made))"), path.name


def gradients(call: Call) -> dict[str, torch.Tensor]:
    out, lse = call.forward()
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    got = call.backward(torch.ones_like(out), torch.ones_like(lse), out, lse)
    return {"out": out, **dict(zip(names, got))}


UNSEEN = {
    "no sequences": ((1, 2, 5), (1, 2, 6), {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)}),
    "rows and keys past the last sequence": (
        (1, 2, 5), (1, 2, 6), {"cu_seqlens_q": ints(0, 2), "cu_seqlens_k": ints(0, 3)},
    ),
    "no query heads": ((2, 0, 5), (2, 2, 6), {}),
    "no rows": ((2, 2, 0), (2, 2, 6), {}),
    "no keys": ((2, 2, 5), (2, 2, 0), {}),
    "keys past kv_lens": ((2, 2, 5), (2, 2, 6), {"kv_lens": ints(4, 0)}),
    "a bias longer than the longest sequence": (
        (1, 2, 7), (1, 2, 9),
        {"cu_seqlens_q": ints(0, 7), "cu_seqlens_k": ints(0, 9), "bias": torch.zeros(1, 2, 10, 12)},
    ),
    "a bias of packed sequences past kv_lens": (
        (1, 2, 7), (1, 2, 9),
        {
            "cu_seqlens_q": ints(0, 7), "cu_seqlens_k": ints(0, 9), "kv_lens": ints(5),
            "bias": torch.zeros(1, 2, 7, 9),
        },
    ),
    "a bias with no sequences": (
        (1, 2, 7), (1, 2, 9),
        {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0), "bias": torch.zeros(1, 2, 10, 12)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_nothing_sees_has_a_gradient_of_zero(name):
    q_shape, k_shape, tensors = UNSEEN[name]
    q, k, v = (torch.randn(*shape, 16) for shape in (q_shape, k_shape, k_shape))
    call = Call(q, k, v, tensors)
    got = gradients(call)
    for what, x in got.items():
        assert x.isfinite().all(), f"{what} has elements that nobody wrote"
    rows = tensors.get("cu_seqlens_q", ints(q.shape[2]))[-1]
    keys = tensors.get("cu_seqlens_k", ints(k.shape[2] if q.numel() else 0))[-1]
    seen_rows, seen_keys = (rows, tensors.get("kv_lens", ints(keys))[0])
    for what, x, n in (("dq", got["dq"], rows), ("dk", got["dk"], keys), ("dv", got["dv"], keys)):
        assert (x[:, :, n:] == 0).all(), what
    if "bias" in tensors:
        assert (got["dbias"][:, :, seen_rows:] == 0).all()
        assert (got["dbias"][..., seen_keys:] == 0).all()


def test_rows_of_no_values():
    """Statistics of empty rows are written. Strides of 0 give any number of rows, and no call may
    loop over them all."""
    y, _, mean, rstd = torch.ops.fastattn.norm_fwd(
        torch.empty(3, 0), None, None, None, 1e-5, True, None, 0.0
    )
    assert y.shape == (3, 0) and mean.isfinite().all() and rstd.isfinite().all()
    many = torch.empty(1, 0).expand(2**60, 0)
    assert torch.ops.fastattn.gate_fwd(many, many, "silu").shape == many.shape
    dx, dbias = torch.ops.fastattn.activate_bwd(many, None, None, None, 0.0, "identity", True)
    assert dx.shape == many.shape and dbias.shape == (0,)
    x, table = torch.empty(1, 1, 1, 0).expand(2**30, 2**20, 1, 0), torch.empty(1, 0)
    assert torch.ops.fastattn.rotate(x, table, table, None, False, False).shape == x.shape
    with pytest.raises(RuntimeError, match="at least one column"):
        labels = torch.full((3,), -100)
        torch.ops.fastattn.cross_entropy_(torch.empty(3, 0), labels, None, -100, 0.0, 0.0, 0.0)


# ---- sums of the backward: by what each part sees ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(900, 900), (500, 1400), (1400, 500)])
@pytest.mark.parametrize(
    "window", [(-1, -1), (-1, 0), (40, 0), (0, 40), (100, 3), (0, 0), (700, -1)]
)
def test_parts_that_see_other_keys_sum_right(window, lengths, dtype):
    """The rows of one head are split into up to eight items, each with sums for the keys it
    sees."""
    q_len, kv_len = lengths
    numbers = {"scale": 0.3, "left": window[0], "right": window[1]}
    # Two entries with different lengths share a bias, so their items must split rows alike.
    tensors = {"bias": torch.randn(1, 1, q_len, kv_len), "kv_lens": ints(kv_len, kv_len // 3)}
    q, k, v = (torch.randn(2, 1, n, 16).to(dtype) for n in (q_len, kv_len, kv_len))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(gradients(Call(q, k, v, dict(tensors), numbers)))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), f"{name} depends on the number of threads"
    leaves = [x.double().requires_grad_() for x in (q, k, v, tensors["bias"])]
    call = Call(*leaves[:3], {**tensors, "bias": leaves[3]}, numbers)
    out, lse = reference(*leaves[:3], call.spec(), call.operands())
    loss = out.sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
    want = dict(zip(("dq", "dk", "dv", "dbias"), torch.autograd.grad(loss, leaves)))
    for name, x in want.items():
        allowed = (3e-5 if dtype == torch.float32 else 3e-2) * x.abs().max().item()
        torch.testing.assert_close(found[0][name].double(), x, atol=allowed, rtol=0, msg=name)


PEAKS = """
import torch, fastattn

def field(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def above(call):  # bytes taken beside what is held afterwards; and the result
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    result = call()
    return field("VmHWM") - field("VmRSS"), result

def operators(*shapes, dtype=torch.float32, left=-1, right=-1):
    q, k, v = (torch.randn(*shape).to(dtype) for shape in shapes)
    numbers = (0.125, 0.0, left, right, True, 0.0)
    def forward(splits=0):
        return torch.ops.fastattn.flash_attn_fwd(q, k, v, *[None] * 13, *numbers, splits)
    def backward():
        out, lse = forward()
        return torch.ops.fastattn.flash_attn_bwd(
            out, None, out, lse, q, k, v, *[None] * 13, *numbers, False, False)
    return forward, backward

torch.set_num_threads(2)
operators(*[(1, 1, 500, 64)] * 3)[1]()  # what a first call takes
for dtype, length, left, right in BACKWARDS:
    _, backward = operators(
        *[(1, 1, length, 64)] * 3, dtype=getattr(torch, dtype), left=left, right=right)
    print(above(backward)[0])
_, backward = operators((1, 1, 8, 32), *[(1, 1, 400_000, 32)] * 2)
before = field("VmRSS")
backward()
print(field("VmRSS") - before)
forward, _ = operators((1, 1, 64, 64), *[(1, 1, 2**18, 64)] * 2)
want = forward()
peak, got = above(lambda: forward(2**20))
for x, y in zip(got, want):
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
print(peak)
"""
BACKWARDS = (  # dtype, length, left, right
    ("bfloat16", 2**16, 255, 0), ("bfloat16", 2**16, 0, 255), ("float32", 6144, -1, 0),
    ("float16", 6144, -1, -1),
)  # fmt: skip


@no_sanitizer
def test_scratch_memory_is_bounded_and_given_back():
    # Large blocks go back to the system when they are freed. By default malloc adapts the threshold
    # to earlier frees, and then a peak may be that of an earlier call, or none at all.
    printed = run(f"BACKWARDS = {BACKWARDS}" + PEAKS, MALLOC_MMAP_THRESHOLD_="131072")
    *backwards, left, splits = map(int, printed.split())
    for (dtype, length, *window), taken in zip(BACKWARDS, backwards, strict=True):
        k_and_v = 2 * length * 64 * getattr(torch, dtype).itemsize
        # Out and lse of the forward come in; packed keys and tiles are the threads' own.
        allowed = max(4 * k_and_v, 16 << 20) + k_and_v // 2 + (12 << 20)
        assert taken <= allowed, f"{dtype}, {length} keys, window {window}: {taken} bytes"
        assert taken > k_and_v, "less than the sums of one part: the peak was not seen"
    assert left < 24 << 20, "the sums of 400000 keys take 98 MiB, and are to be given back"
    assert splits < 320 << 20, "a split for each key would take 4.4 GB"


# ---- memory that the system refuses --------------------------------------------------------------

REFUSALS = """
import resource, sys, threading, time, torch, fastattn

def limit(spare):  # bytes that may still be had; None: no limit
    pages = int(open("/proc/self/statm").read().split()[0])
    soft = -1 if spare is None else pages * 4096 + spare
    resource.setrlimit(resource.RLIMIT_AS, (soft, -1))

def both_passes(q_len, kv_len, heads, splits=0, **options):
    q, k, v = (torch.randn(1, heads, n, 64) for n in (q_len, kv_len, kv_len))
    numbers = (0.125, 0.0, -1, -1, True, 0.0)
    none = [None] * 13
    def call():
        out, lse = torch.ops.fastattn.flash_attn_fwd(q, k, v, *none, *numbers, splits)
        dq, dk, dv, _, _ = torch.ops.fastattn.flash_attn_bwd(
            out, None, out, lse, q, k, v, *none, *numbers, False, False)
        return out, lse, dq, dk, dv
    return call

def linear(rows, dim):
    x, dout = torch.randn(rows, dim), torch.randn(rows, dim)
    return lambda: torch.ops.fastattn.linear_bwd_weight(dout, x, True)

def norm(rows, dim):
    x, dy, weight = torch.randn(rows, dim), torch.randn(rows, dim), torch.randn(dim)
    def call():
        y, _, mean, rstd = torch.ops.fastattn.norm_fwd(x, None, weight, None, 1e-5, True, None, 0.0)
        return y, *torch.ops.fastattn.norm_bwd(
            dy, None, x, weight, mean, rstd, 1e-5, True, True, True, None, 0.0)[:3]
    return call

CALLS = [
    both_passes(8, 100_000, 2), both_passes(600, 600, 1), both_passes(64, 4096, 1),
    both_passes(64, 2**17, 1, splits=2**12), linear(3000, 1000), norm(2000, 3000),
]
def refused(call, want):
    try:
        got = call()
    except (RuntimeError, MemoryError) as error:
        assert len(str(error)) > 30 or isinstance(error, MemoryError), error
        return str(error)
    assert all(torch.equal(x, y) for x, y in zip(got, want)), "a result is wrong"
"""


@no_sanitizer
def test_a_refused_allocation_harms_no_later_call():
    """Allocations fail at one size after another, and so at one place after another; then all
    works."""
    script = (
        REFUSALS
        + """
messages = []
for threads in (2, 1):
    torch.set_num_threads(threads)
    wants = [call() for call in CALLS]
    for spare in [0, *(2**n << 20 for n in range(0, 9, 2 if threads == 2 else 1))]:
        for call, want in zip(CALLS, wants):
            limit(spare)
            messages.append(refused(call, want))
            limit(None)
            for small, right in list(zip(CALLS, wants))[1:3]:
                assert refused(small, right) is None
assert any("bytes of scratch memory" in x for x in messages if x), messages
print(sum(x is not None for x in messages))
"""
    )
    assert int(run(script, OMP_NUM_THREADS="2")) > 10, "memory was refused"


@no_sanitizer
def test_refusals_of_one_thread_do_not_touch_another():
    script = (
        REFUSALS
        + """
torch.set_num_threads(1)
wants = [call() for call in CALLS]
ready, stop, failures = threading.Barrier(5), threading.Event(), []
counts = [0] * 4
def work(n):
    pairs = list(zip(CALLS, wants))[n % 2 :: 2]
    torch.set_num_threads(1)
    try:
        for call, want in pairs:  # what a thread takes for itself it takes before there is a limit
            assert refused(call, want) is None
        ready.wait()
        while not stop.is_set():
            for call, want in pairs:
                counts[n] += refused(call, want) is not None
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
ready.wait()
end = time.monotonic() + 2
while time.monotonic() < end:
    for spare in (1 << 20, 16 << 20, 64 << 20, None):
        limit(spare)
        time.sleep(0.02)
limit(None)
stop.set()
for thread in threads: thread.join()
assert not failures, failures
for call, want in zip(CALLS, wants):
    assert refused(call, want) is None
print(sum(counts))
"""
    )
    assert int(run(script, OMP_NUM_THREADS="1")) > 0, "memory was refused"


# ---- fork ----------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, time, torch, fastattn
torch.set_num_threads(2)
q, k, v = (torch.randn(2, 8, 300, 64) for _ in range(3))
numbers = (0.125, 0.0, -1, 0, True, 0.0)
def call():
    out, lse = torch.ops.fastattn.flash_attn_fwd(q, k, v, *[None] * 13, *numbers, 0)
    return out, lse, *torch.ops.fastattn.flash_attn_bwd(
        out, None, out, lse, q, k, v, *[None] * 13, *numbers, False, False)[:3]
def same(results, others):  # torch.equal would wait for threads that a child does not have
    return all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(results, others))
def packed():  # what no sequence covers is filled
    cu = torch.tensor([0, 2], dtype=torch.int32)
    operands = [None] * 9 + [cu, cu] + [None] * 2
    one = [x[:1] for x in (q, k, v)]
    out, lse = torch.ops.fastattn.flash_attn_fwd(*one, *operands, *numbers, 0)
    return out, lse, *torch.ops.fastattn.flash_attn_bwd(
        out, None, out, lse, *one, *operands, *numbers, False, False)[:3]
if sys.argv[1] == "after":
    want = call() + packed()
child = os.fork()
if child == 0:
    signal.alarm(90)  # a child that waits for threads that are not there ends so
    got = call() + packed()
    if sys.argv[1] == "before":
        want = got
    grandchild = os.fork()
    if grandchild == 0:
        signal.alarm(90)
        os._exit(0 if same(call(), want) else 1)
    _, status = os.waitpid(grandchild, 0)
    os._exit(status or (0 if same(got, want) else 1))
again = call()
_, status = os.waitpid(child, 0)
assert status == 0, f"the child ended with {status}"
"""


@pytest.mark.parametrize("when", ["after", "before"])
def test_a_forked_child_attends(when):
    """After its parent ran on two threads, which the child does not have; or before that."""
    run(FORK, when, OMP_NUM_THREADS="2")

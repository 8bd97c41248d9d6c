"""The switch across threads, forks and exit, each in a separate process, so that a crash or a hang
is a failed test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.native

START = """
import os, sys, threading, time
import torch, fastattn
import torch.nn.functional as F
torch.set_num_threads(1)
"""

RACE = """
import torch._dynamo
kind, seconds = sys.argv[1], float(sys.argv[2])
q = torch.randn(1, 2, 16, 8).requires_grad_()
mask = torch.ones(16, 16, dtype=torch.bool).tril()
F.scaled_dot_product_attention(q, q, q).sum().backward()  # what comes once comes before the clock
if kind == "compiled":
    torch.compile(lambda x: x.sin(), backend="aot_eager")(q).sum().backward()
start, wrong, counts = threading.Barrier(4), [], [0] * 4

def attend(q, mask):
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

if kind == "compiled":
    attend = torch.compile(attend, backend="aot_eager")

def call(n):
    given = mask if n == 2 else None
    scores = q @ q.mT / 8**0.5
    if n == 2:
        scores = scores.masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ q
    (dwant,) = torch.autograd.grad(want.sin().sum(), q)
    while time.monotonic() < until:
        counts[n] += 1
        out = attend(q, given)
        (dq,) = torch.autograd.grad(out.sin().sum(), q)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(dq, dwant, rtol=0, atol=1e-5)

def switch(n):
    while time.monotonic() < until:
        counts[n] += 1
        with fastattn.override_sdpa():
            if kind == "functorch":
                torch.func.vmap(F.scaled_dot_product_attention)(*[q.detach()[None]] * 3)

def work(n):
    try:
        start.wait()
        (switch if n % 2 else call)(n)
    except BaseException as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
until = time.monotonic() + seconds
[t.start() for t in threads]
[t.join() for t in threads]
fastattn.disable()
print("right" if not wrong and all(counts) else (wrong, counts))
"""

FORK = """
q = torch.randn(1, 2, 16, 8).requires_grad_()
stop = threading.Event()

def switch():
    while not stop.is_set():
        with fastattn.override_sdpa():
            pass

def served():
    return F.scaled_dot_product_attention(q, q, q).grad_fn.name()

torchs = served()
with fastattn.override_sdpa():
    ours = served()
thread = threading.Thread(target=switch)
thread.start()
children = []
for n in range(20):
    child = os.fork()
    if child == 0:
        fastattn.enable()  # the parent's other thread held the lock, perhaps, and is not here
        right = served() == ours
        fastattn.disable()
        fastattn.disable()  # of the parent, if the fork came within its block
        os._exit(0 if right and served() == torchs else 1)
    children.append(child)
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
thread.join()
with fastattn.override_sdpa():
    child = os.fork()
    if child == 0:  # what is on in the parent is on in the child, and can be turned off there
        right = served() == ours
        fastattn.disable()
        os._exit(0 if right and served() == torchs else 1)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert served() == ours
print("right" if not any(statuses) else statuses)
"""

EXIT = """
import atexit, weakref
how = sys.argv[1]
q = torch.randn(1, 2, 16, 8).requires_grad_()

def call():
    F.scaled_dot_product_attention(q, q, q).sum().backward()
    torch.func.vmap(F.scaled_dot_product_attention)(*[q.detach()[None]] * 3)

class Late:
    def __del__(self):
        call()

fastattn.enable()
call()
if how == "off":
    fastattn.disable()
elif how == "atexit":
    atexit.register(call)
elif how == "late object":
    sys.late = Late()
elif how == "threads":
    def forever():
        for _ in range(300):
            call()
    for _ in range(3):
        threading.Thread(target=forever).start()  # the interpreter waits for these
print("right", flush=True)
"""


def run(code, *arguments, limit=120, **environment):
    """The output of a process. A signal, an error or a hang fails the test."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", START + code, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"no end after {limit} s: {process.communicate()}")
    code = process.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    assert code == 0, f"{how}: {errors[-3000:]}"
    return out.strip().splitlines()[-1:]


@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_switching_races_with_calls(kind):
    assert run(RACE, kind, "2") == ["right"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["plain", "functorch", "compiled"])
def test_switching_races_with_calls_for_long(kind):
    assert run(RACE, kind, "30", limit=300) == ["right"]


def test_a_forked_child_has_a_switch_of_its_own():
    assert run(FORK) == ["right"]


@pytest.mark.parametrize(
    "how",
    [
        "threads",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("on", "off", "atexit")),
        "late object",
    ],
)
def test_the_interpreter_ends_with_the_switch(how):
    assert run(EXIT, how) == ["right"]


OFF = """
def dumps():
    return [torch._C._dispatch_dump("aten::" + name) for name in sys.argv[1:]]

def bits(x):
    return x.detach().double().numpy().tobytes()

def answers():
    found = []
    torch.manual_seed(3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        q, k, v = (torch.randn(2, 4, n, 8, dtype=dtype, requires_grad=True) for n in (9, 11, 11))
        mask = torch.rand(9, 11) > 0.3
        for options in (
            {}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask, "is_causal": True},
            {"attn_mask": torch.randn(9, 11).to(dtype).requires_grad_()}, {"dropout_p": 0.5},
            {"scale": -0.3}, {"scale": "no"}, {"dropout_p": 2.0}, {"attn_mask": mask[:3]},
            {"enable_gqa": True}, {"attn_mask": mask.int()}, {"dropout_p": -1},
        ):
            for tensors in (
                (q, k, v), (q[0], k[0], v[0]), (q, k[:, :2], v[:, :2]), (q, k, v[:, :, :5]),
            ):
                try:
                    out = F.scaled_dot_product_attention(*tensors, **options)
                    grads = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
                    found.append((out.grad_fn.name(), *map(bits, (out, *grads))))
                except Exception as error:
                    found.append((type(error).__name__, str(error)))
    x = q.detach().double()
    total = lambda q: F.scaled_dot_product_attention(q, x, x).sum()
    found.append(bits(torch.func.hessian(total)(x[:1, :1, :2])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(x.float(), x.float(), x.float())
        found.append((str(out.dtype), bits(out)))
    try:
        torch._scaled_dot_product_flash_attention_for_cpu(x, x, x[:, :2])
    except Exception as error:
        found.append(str(error))
    return found

kernels, before = dumps(), answers()
assert "fastattn" not in str(kernels), "importing fastattn registered something"
for _ in range(2):
    with fastattn.override_sdpa():
        assert answers() != before
    after = answers()
    different = [pair for pair in zip(before, after) if pair[0] != pair[1]]
    assert not different, (len(different), [(str(a)[:200], str(b)[:200]) for a, b in different[:3]])
print("right")
"""


def test_torch_is_bit_for_bit_itself_while_the_switch_is_off():
    """Values, gradients, nodes and errors are the same after the first enable() as before it."""
    efficient = "_scaled_dot_product_efficient_attention"
    operators = ("scaled_dot_product_attention", efficient, efficient + "_backward")
    assert run(OFF, *operators) == ["right"]

"""What the CUDA kernels must show on a GPU. proof.py runs each step in a process of its own:

    python -m fastattn.backends.proof_steps "one tile" --device 0

prints "passed: ..." last and exits with 0, or says what is wrong and exits with 1. Each result is
held against float64 by the rule of core/tolerance.py. `--device cpu` puts the CPU kernels in the
place of the CUDA kernels: so the steps themselves are tested on machines without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from ..core.call import Call
from ..core.reference import reference
from ..core.spec import NO_OPERANDS, Descales, Operands, Spec
from ..core.tolerance import Tolerance
from . import library
from .proof import gpu_of
from .proof_device import BF16, E4M3, FP16, Cuda, Failed, OnCpu

# ---- one call ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call in the operators' normal form; `operands` makes the optional tensors, and may change
    keys and values that do not exist."""

    q_len: int = 128
    kv_len: int = 128
    dim: int = 128
    dtype: torch.dtype = BF16
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0  # 0: as many as heads
    layout: str = "bhsd"
    numbers: dict = field(default_factory=dict)  # of Spec
    operands: Callable[[Tensor, Tensor, Tensor], Operands] | None = None
    splits: int = 0

    def __str__(self) -> str:
        numbers = "".join(f", {name} {value}" for name, value in self.numbers.items())
        of = f", {self.operands.__name__.strip('_')}" if self.operands else ""
        return (
            f"[{self.batch}, {self.heads}, {self.q_len}, {self.dim}] of "
            f"{str(self.dtype).removeprefix('torch.')}, {self.kv_heads or self.heads} kv heads, "
            f"{self.kv_len} keys, {self.layout}{numbers}{of}"
        )

    def spec(self) -> Spec:
        return Spec(**{"scale": self.dim**-0.5, **self.numbers})

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        operands = self.operands(q, k, v) if self.operands else NO_OPERANDS
        return Call(q, k, v, self.spec(), operands, self.splits)

    def tensors(self, where: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        kv_heads = self.kv_heads or self.heads

        def normal(*shape):
            return torch.randn(shape, generator=draw).to(where, self.dtype)

        b, d = self.batch, self.dim
        if self.layout == "qkv":
            q, k, v = normal(b, self.q_len, 3, self.heads, d).permute(2, 0, 3, 1, 4).unbind()
            return q, k, v
        if self.layout == "expanded":  # k from one kv head, v from one batch entry
            q = normal(b, self.heads, self.q_len, d)
            k, v = normal(b, 1, self.kv_len, d), normal(1, kv_heads, self.kv_len, d)
            return q, k.expand(b, kv_heads, -1, -1), v.expand(b, -1, -1, -1)
        q = (b, self.heads, self.q_len, d)
        k = (b, kv_heads, self.kv_len, d)
        if self.layout == "bshd":
            q, k, v = (normal(s[0], s[2], s[1], s[3]).transpose(1, 2) for s in (q, k, k))
            return q, k, v
        return normal(*q), normal(*k), normal(*k)


def truth(call: Call, dtype, cotangents):
    """(out, lse, gradients of q, k, v and sinks where cotangents are given), computed in dtype."""
    tensors, operands = (call.q, call.k, call.v), call.operands
    leaves = [x.detach().to(dtype).requires_grad_(bool(cotangents)) for x in tensors]
    if operands.sinks is not None:
        leaves.append(operands.sinks.detach().to(dtype).requires_grad_(bool(cotangents)))
        operands = replace(operands, sinks=leaves[3])
    out, lse = reference(leaves[0], leaves[1], leaves[2], call.spec, operands)
    if not cotangents:
        return out, lse
    dout, dlse = (x.to(dtype) for x in cotangents)
    seen = lse.detach() > -torch.inf
    loss = (out * dout).sum() + (lse.masked_fill(~seen, 0) * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def check(device: Cuda | OnCpu, case: Case, gradients: bool = False) -> float:
    """The largest error, as a share of what is allowed; raises Failed where that is over 1."""
    call = case.call(*case.tensors(device.where))
    q, sinks = call.q, call.operands.sinks is not None
    out, lse = result = device.forward(call)
    got, cotangents = [out, lse], ()
    if gradients:
        draw = torch.Generator().manual_seed(1)
        dout = torch.randn(q.shape, generator=draw).to(q)
        dlse = torch.randn(lse.shape, generator=draw).to(lse)
        dlse = dlse.masked_fill(lse == -torch.inf, 0)
        cotangents = (dout, dlse)
        grads = device.backward(call, result, *cotangents, sinks=sinks)
        got += [grads.dq, grads.dk, grads.dv, *([grads.dsinks] if sinks else [])]
    device.synchronize()
    want = truth(call, torch.float64, cotangents)
    plain = truth(call, torch.float32, cotangents)
    tolerance = Tolerance(
        q, call.k, call.v, call.spec.scale, want[1], *cotangents, probs_rounded=True
    )
    worst = 0.0
    for name, x, true, rough in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want, plain):
        found = tolerance.compare(name, x, true, rough if name == "lse" else rough.to(x.dtype))
        if not found.passed:
            raise Failed(f"{name} of {case}: {found}")
        worst = max(worst, found.ratio)
    return worst


def check_all(device: Cuda | OnCpu, cases, gradients: bool = False) -> str:
    ratios = [check(device, case, gradients) for case in cases]
    return f"{len(ratios)} calls, the largest error {max(ratios):.2f} of what is allowed"


def same_bits(device: Cuda | OnCpu, what: str, first, again) -> None:
    device.synchronize()
    for x, y in zip(first, again, strict=True):
        if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            raise Failed(f"{what}: {int((x != y).sum())} of {x.numel()} values differ")


# ---- operands ------------------------------------------------------------------------------------


def _ints(like: Tensor, *values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def kv_lens(q, k, v) -> Operands:
    """Of entries with no key, one, and almost all; NaN lies beyond."""
    lens = [0, 1, k.shape[2] - 3, k.shape[2]][: q.shape[0]]
    for entry, n in enumerate(lens):
        k[entry, :, n:], v[entry, :, n:] = torch.nan, torch.nan
    return Operands(kv_lens=_ints(q, *lens))


def kv_starts(q, k, v) -> Operands:
    n = k.shape[2]
    starts, lens = [0, 3, n // 2, n - 1][: q.shape[0]], [n, n - 5, n, n][: q.shape[0]]
    for entry, (start, end) in enumerate(zip(starts, lens)):
        for x in (k, v):
            x[entry, :, :start], x[entry, :, end:] = torch.nan, torch.nan
    return Operands(kv_starts=_ints(q, *starts), kv_lens=_ints(q, *lens))


def packed(q, k, v) -> Operands:
    """Four sequences, one of them without rows, and keys at the end that are nobody's."""
    rows, keys = q.shape[2], k.shape[2]
    cu_q = _ints(q, 0, rows // 3, rows // 3, rows - 7, rows)
    cu_k = _ints(q, 0, keys // 2, keys // 2 + 5, keys - 30, keys - 9)
    k[:, :, keys - 9 :], v[:, :, keys - 9 :] = torch.nan, torch.nan
    return Operands(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def documents(q, k, v) -> Operands:
    n = q.shape[2]
    ids = (torch.arange(n, device=q.device) * 5 // n).int().expand(q.shape[0], n).contiguous()
    return Operands(document_ids=ids)


def sinks(q, k, v) -> Operands:
    """Large enough that their gradients stand out of rounding."""
    return Operands(sinks=torch.linspace(1, 5, q.shape[1], device=q.device).to(q.dtype))


def descales(q, k, v) -> Operands:
    of_heads = torch.linspace(0.5, 1.5, k.shape[1], device=q.device)
    return Operands(descales=Descales(of_heads, of_heads.flip(0), None))


# ---- the steps -----------------------------------------------------------------------------------

MASKS = {
    "full": {},
    "causal": {"right": 0},
    "causal, top left": {"right": 0, "align_end": False},
    "window": {"left": 70, "right": 11},
}


def driver(d: Cuda | OnCpu) -> str:
    if problem := d.problem():
        raise Failed(problem)
    x = torch.ones(64, 64, device=d.where)
    if float((x @ x).sum()) != 64.0**3:
        raise Failed("torch itself multiplies wrongly")
    d.synchronize()
    return "the library is loaded, and torch computes"


def tensor_maps(d: Cuda | OnCpu) -> str:
    number = 0
    for dim, dtype, layout in product(d.dims, (BF16, E4M3), ("bhsd", "bshd", "qkv")):
        for case in (
            Case(300, 300, dim, dtype, layout=layout, batch=2, heads=4),
            Case(5, 5, dim, dtype, layout=layout),  # fewer rows than a box has
        ):
            for x in case.tensors(d.where):
                number += 1
                if problem := d.tensor_map(x, 128):
                    raise Failed(f"{case}: {problem}")
    return f"{number} maps"


def one_tile(d: Cuda | OnCpu) -> str:
    few = Case(q_len=64, kv_len=64, splits=1)
    cases = [few, replace(few, kv_len=33), Case(heads=d.heads), Case(100, 90, heads=d.heads)]
    return check_all(d, cases)


def loops(d: Cuda | OnCpu) -> str:
    many = [Case(n, n, heads=d.heads, numbers=MASKS[m])
            for n in (256, 384, 449) for m in ("full", "causal")]  # fmt: skip
    few = [Case(64, 1000, splits=splits) for splits in (1, 4, 0)]
    decoding = Case(1, 1000, heads=8, kv_heads=2)
    long = Case(d.length // 2, d.length // 2, heads=4, numbers=MASKS["causal"])
    return check_all(d, [*many, *few, decoding, long])


def _shapes(dims, heads: int) -> Iterator[Case]:
    for dim, dtype, mask in product(dims, (BF16, FP16), MASKS):
        yield Case(210, 330, dim, dtype, heads=heads, numbers=MASKS[mask])
    for dim in dims:
        base = Case(200, 200, dim, batch=2, heads=heads, kv_heads=heads // 2)
        yield from (replace(base, layout=layout) for layout in ("bshd", "expanded"))
        yield replace(base, layout="qkv", kv_heads=0)
        yield replace(base, operands=sinks, numbers=MASKS["window"])
        yield replace(base, numbers={"softcap": 3.0})
        yield replace(base, numbers={"scale": -0.3, "right": 0})
        yield replace(base, kv_len=70, numbers=MASKS["causal"])  # rows that see nothing
        yield replace(base, q_len=1, kv_len=300)


def all_shapes(d: Cuda | OnCpu) -> str:
    return check_all(d, _shapes(d.dims, d.heads))


def backward(d: Cuda | OnCpu) -> str:
    first = [Case(n, n, heads=2, numbers=MASKS[m]) for n in (128, 256) for m in ("full", "causal")]
    return check_all(d, [*first, *_shapes(d.dims, 4)], gradients=True)


def _heavy(d: Cuda | OnCpu, dim: int) -> Case:
    return Case(d.length, d.length, dim, batch=2, heads=16, kv_heads=8, numbers={"right": 0})


def orders(d: Cuda | OnCpu) -> str:
    runs = 0
    for dim in d.dims:
        case = _heavy(d, dim)
        call, first = case.call(*case.tensors(d.where)), None
        for _ in range(d.runs):
            result = d.forward(call)
            got = *result, *d.backward(call, result, call.q)[:3]
            if not all(bool(x.isfinite().all()) for x in got):
                raise Failed(f"{case}: NaN or infinity where there can be none")
            same_bits(d, f"{case}: two runs", first or got, got)
            first, runs = first or got, runs + 1
    return f"{runs} runs, and the same bits in all of each kind"


def _graph(d: Cuda | OnCpu, case: Case, function: Callable) -> None:
    """function(q, k, v) captured, replayed with other numbers in its tensors, and run aside."""
    tensors = case.tensors(d.where)
    function(*tensors)
    other = case.tensors(d.where, seed=5)
    with d.no_waiting():
        function(*tensors)
    replay, result = d.capture(lambda: function(*tensors))
    replay()
    same_bits(d, f"{case}: a graph and the call", [function(*tensors)], [result])
    for x, y in zip(tensors, other):
        x.copy_(y)
    replay()
    want = function(*other)
    same_bits(d, f"{case}: a graph with other values and the call", [want], [result])
    same_bits(d, f"{case}: another stream", [want], [d.aside(lambda: function(*other))])


def graphs(d: Cuda | OnCpu) -> str:
    cases = [
        *(Case(200, 330, dim, heads=d.heads, numbers=MASKS["causal"]) for dim in d.dims),
        Case(1, 1000, heads=8, kv_heads=2),
    ]
    for case in cases:
        _graph(d, case, lambda *tensors, case=case: d.forward(case.call(*tensors)).out)
    return f"{len(cases)} graphs"


def graphs_of_gradients(d: Cuda | OnCpu) -> str:
    for dim in d.dims:
        case = Case(200, 330, dim, heads=4, numbers=MASKS["causal"])

        def gradients(*tensors, case=case):
            call = case.call(*tensors)
            grads = d.backward(call, d.forward(call), call.q)
            return torch.cat([x.flatten() for x in grads[:3]])

        _graph(d, case, gradients)
    return f"{len(d.dims)} graphs"


def _lengths(dims, heads: int) -> Iterator[Case]:
    for dim in dims:
        base = Case(150, 300, dim, batch=4, heads=heads, kv_heads=heads // 2)
        for mask, make in product(("full", "causal"), (kv_lens, kv_starts)):
            yield replace(base, numbers=MASKS[mask], operands=make)
        yield replace(base, q_len=1, operands=kv_lens)
        for mask in ("full", "causal"):
            row = replace(base, batch=1, numbers=MASKS[mask])
            yield replace(row, operands=packed)
            yield replace(row, q_len=230, kv_len=230, batch=2, operands=documents)


def lengths(d: Cuda | OnCpu) -> str:
    return check_all(d, _lengths(d.dims, d.heads))


def gradients_of_lengths(d: Cuda | OnCpu) -> str:
    return check_all(d, _lengths(d.dims, 4), gradients=True)


def pages(d: Cuda | OnCpu) -> str:
    """k and v are made of pages in any order; NaN lies in pages and slots that nobody has."""
    cases = 0
    for dim, size, q_len in product(d.dims, (16, 100), (1, 90)):
        case = Case(q_len, 400, dim, batch=2, heads=8, kv_heads=2, numbers={"right": 0})
        q, k, v = case.tensors(d.where)
        lens, each = [37, 400], -(-400 // size)
        table = torch.randperm(2 * each, generator=torch.Generator().manual_seed(size))
        table = table.view(2, each).int().to(d.where)
        caches = [x.new_full((2 * each, 2, size, dim), torch.nan) for x in (k, v)]
        for cache, x in zip(caches, (k, v)):
            for entry, n in enumerate(lens):
                for j in range(0, n, size):
                    end = min(j + size, n)
                    cache[table[entry, j // size], :, : end - j] = x[entry, :, j:end]
        lens, cases = _ints(q, *lens), cases + 1
        operands = Operands(kv_lens=lens, page_table=table)
        k_cache, v_cache = caches
        out, lse = d.forward(Call(q, k_cache, v_cache, case.spec(), operands))
        d.synchronize()
        alone = Call(q, k, v, case.spec(), Operands(kv_lens=lens))
        want, plain = (truth(alone, dtype, ()) for dtype in (torch.float64, torch.float32))
        tolerance = Tolerance(q, k, v, case.spec().scale, want[1], probs_rounded=True)
        for name, x, true, rough in zip(("out", "lse"), (out, lse), want, plain):
            found = tolerance.compare(name, x, true, rough.to(x.dtype))
            if not found.passed:
                raise Failed(f"{name} of {case} in pages of {size}: {found}")
    return f"{cases} calls"


def float8(d: Cuda | OnCpu) -> str:
    """Each probability is rounded to float8 by itself: the error of out is that of their
    squares, of which scores twice as large are the logarithm."""
    cases = 0
    for dim, mask in product(d.dims, MASKS):
        case = Case(450, 450, dim, E4M3, heads=4, kv_heads=2, numbers=MASKS[mask])
        q, k, v = case.tensors(d.where)
        spec, operands = case.spec(), descales(q, k, v)
        out, lse = d.forward(Call(q, k, v, spec, operands))
        d.synchronize()
        given = [x.double() for x in operands.descales or () if x is not None]
        scales = given[0].repeat_interleave(4 // 2)[:, None, None], given[1][:, None, None]
        q, k, v = q.double() * scales[0], k.double() * scales[1], v.double()
        want, want_lse = reference(q, k, v, spec)
        squares, lse2 = reference(q, k, v.square(), replace(spec, scale=2 * spec.scale))
        seen = want_lse > -torch.inf
        squares = squares * torch.where(seen, lse2 - 2 * want_lse, 0).exp()[..., None]
        rounded = 2**-4 * 3**-0.5 * squares.mean().sqrt() + 2**-9 * want.square().mean().sqrt()
        error = (out - want).square().mean().sqrt()
        wrong = (lse - want_lse)[seen].abs().max()
        cases += 1
        if not (error <= rounded and wrong <= 2e-3 + 1e-3 * want_lse[seen].abs().max()):
            raise Failed(
                f"out of {case}: error {error:.2e}, allowed {rounded:.2e}; lse {wrong:.2e}"
            )
    return f"{cases} calls"


STEPS = {f.__name__.replace("_", " "): f for f in (
    driver, tensor_maps, one_tile, loops, all_shapes, graphs, backward, orders,
    graphs_of_gradients, lengths, gradients_of_lengths, pages, float8,
)}  # fmt: skip


def list_gpus() -> int:
    """Prints them as JSON. A driver that is too old for torch itself shows none."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problem = None if number else library.cuda_problem(0)
    if problem and "needs a driver" in problem:
        print(f"failed: {problem}")
        return 1
    print(json.dumps([asdict(gpu_of(index)) for index in range(number)]))
    return 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m fastattn.backends.proof_steps", description=__doc__)
    p.add_argument("step", choices=("gpus", *STEPS))
    p.add_argument("--device", default="0", help="number of a GPU, or cpu")
    args = p.parse_args(argv)
    if args.step == "gpus":
        return list_gpus()
    try:
        device = OnCpu() if args.device == "cpu" else Cuda(int(args.device))
        said = STEPS[args.step](device)
    except Failed as failure:
        print(f"failed: {failure}")
        return 1
    print(f"passed: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

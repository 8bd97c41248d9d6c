"""The reference against an independent loop, Philox against its published vectors, and every
derivative against finite differences.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import CASES, Case, Problem, select

from fastattn.core.philox import keep_block, keep_mask, keep_probability, philox4x32
from fastattn.core.reference import reference
from fastattn.core.spec import OPERANDS, Operands, Spec

# torch's forward-mode derivatives of logsumexp and softmax still go through torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")

# ---- an independent implementation: numpy, one row and one key at a time ------------------------


def philox_numpy(counter, key):
    """Philox4x32-10 in uint64 arithmetic: the product of two 32-bit words fits."""
    c = [np.uint64(x) for x in counter]
    k = [np.uint64(x) for x in key]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> half) ^ c[1] ^ k[0], b & low, (a >> half) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [int(x) for x in c]


def kept_numpy(seed: int, offset: int, bh: int, i: int, j: int, p: float) -> bool:
    seed, offset = seed % 2**64, offset % 2**64
    key = (seed % 2**32, (seed // 2**32) ^ (offset // 2**32))
    row, column = 8 * (i // 16) + i % 8, 4 * (j // 16) + j % 8 // 2
    words = philox_numpy((row, column, bh, offset % 2**32), key)
    word = words[2 * (i // 8 % 2) + j // 8 % 2]
    half = word // 65536 if j % 2 else word % 65536
    return half < max(1, math.floor((1 - p) * 65536 + 0.5))


def naive(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a problem in fp64, written only from the contract."""
    q, k, v = (x.double().numpy() for x in problem[:3])
    spec = problem.spec
    o = {}
    for name in Operands.__dataclass_fields__:
        x = getattr(problem.operands, name)
        o[name] = None if x is None else (x.double() if x.is_floating_point() else x).numpy()
    heads, kv_heads = q.shape[1], k.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)

    def broadcast(x, *index):
        return x[tuple(0 if size == 1 else at for size, at in zip(x.shape, index, strict=True))]

    def key_at(x, n, head, j):
        if o["page_table"] is not None:
            page = o["page_table"][n, j // x.shape[2]]
            return x[page, head, j % x.shape[2]]
        if o["cu_seqlens_k"] is not None:
            return x[0, head, o["cu_seqlens_k"][n] + j]
        return x[n, head, j]

    def one_row(n, h, i, query, q_len, kv_len):
        start = 0 if o["kv_starts"] is None else o["kv_starts"][n]
        shift = kv_len - q_len if spec.align_end else 0
        scores = {}
        for j in range(start, kv_len):
            documents = o["document_ids"]
            if documents is not None and documents[n, i] != documents[n, j]:
                continue
            if spec.left >= 0 and j < i + shift - spec.left:
                continue
            if spec.right >= 0 and j > i + shift + spec.right:
                continue
            if o["key_begin"] is not None:
                begin, end = (broadcast(o[name], n, h, i, 0) for name in ("key_begin", "key_end"))
                if not begin <= j < end:
                    continue
            if o["mask"] is not None and not broadcast(o["mask"], n, h, i, j):
                continue
            s = spec.scale * float(query @ key_at(k, n, h * kv_heads // heads, j))
            if spec.softcap:
                s = spec.softcap * math.tanh(s / spec.softcap)
            if o["bias"] is not None:
                s += broadcast(o["bias"], n, h, i, j)
            if o["alibi_slopes"] is not None:
                slopes = o["alibi_slopes"]
                s -= (slopes[h] if slopes.ndim == 1 else slopes[n, h]) * abs(i + shift - j)
            if s != -math.inf:
                scores[j] = s
        if not scores:
            return 0.0, -math.inf
        top = max(scores.values())
        total = sum(math.exp(s - top) for s in scores.values())
        if o["sinks"] is not None:
            total += math.exp(o["sinks"][h] - top)
        row = 0.0
        for j, s in scores.items():
            weight = math.exp(s - top) / total
            if spec.dropout_p:
                seeds = [int(x) for x in o["dropout_seed"]]
                keep = kept_numpy(*seeds, n * heads + h, i, j, spec.dropout_p)
                weight *= keep / keep_probability(spec.dropout_p)
            row = row + weight * key_at(v, n, h * kv_heads // heads, j)
        return row, math.log(total) + top

    packed = o["cu_seqlens_q"] is not None
    entries = len(o["cu_seqlens_q"]) - 1 if packed else q.shape[0]
    for n in range(entries):
        first, q_len, kv_len, b = 0, q.shape[2], k.shape[2], n
        if packed:
            first, b = o["cu_seqlens_q"][n], 0
            q_len = o["cu_seqlens_q"][n + 1] - first
            kv_len = o["cu_seqlens_k"][n + 1] - o["cu_seqlens_k"][n]
        if o["kv_lens"] is not None:
            kv_len = o["kv_lens"][n]
        for h, i in itertools.product(range(heads), range(q_len)):
            at = (b, h, first + i)
            out[at], lse[at] = one_row(n, h, i, q[at], q_len, kv_len)
    return out, lse


def small_enough(case: Case) -> bool:
    pairs = sum(a * b for a, b in case.packed) or case.batch * case.q_len * case.kv_len
    return pairs * case.heads * (10 if case.dropout else 1) < 40_000


# One in five pairs: the loop is slow, and the reference has no branch for any pair.
NAIVE = [c for c in CASES if not c.name.startswith("pair/")] + select("pair")[::5]


@pytest.mark.parametrize("case", [c for c in NAIVE if small_enough(c)], ids=lambda case: case.name)
def test_against_the_naive_loop(case):
    problem = case.make(torch.float64)
    out, lse = reference(*problem)
    want_out, want_lse = naive(problem)
    np.testing.assert_allclose(out.numpy(), want_out, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=1e-11, atol=1e-12)


# The options whose cases are too large for the loop: dropout calls Philox once per pair.
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.3, "causal": True, "heads": 4, "kv_heads": 2},
        {"dropout": 0.5, "documents": (3, 16, 2), "q_len": 21, "kv_len": 21, "kv_lens": (21, 9)},
        {"dropout": 0.1, "packed": ((5, 19), (17, 3), (0, 2)), "kv_lens": (19, 2, 2)},
        {"dropout": 0.7, "page_size": 4, "kv_lens": (18, 7), "kv_starts": (3, 0), "sinks": True},
        {"documents": (1, 20, 9), "q_len": 30, "kv_len": 30, "kv_starts": (2, 0), "alibi": "batch"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_against_the_naive_loop_small(settings):
    case = Case("small", **{"q_len": 19, "kv_len": 20, "head_dim": 5, **settings})
    test_against_the_naive_loop(case)


# ---- Philox -------------------------------------------------------------------------------------

VECTORS = [  # Random123's known answers for philox4x32-10: counter, key, result
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_known_answers(counter, key, words):
    words = [int(word, 16) for word in words.split()]
    assert list(philox4x32(counter, key)) == words
    assert philox_numpy(counter, key) == words
    tensors = [torch.tensor([x, 0]) for x in counter]
    assert [int(x[0]) for x in philox4x32(tensors, key)] == words


SEEDS = [(0, 0), (1, 0), (0, 1), (-1, -1), (2**63 - 1, -(2**63)), (-(2**40), 2**33 + 5)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_keep_mask_against_numpy(seed, p):
    mask = keep_mask(seed, 3, 19, 35, p)
    assert mask.shape == (3, 19, 35) and mask.dtype == torch.bool
    for bh, i, j in itertools.product((0, 2), (0, 7, 8, 15, 16, 18), range(0, 35)):
        assert bool(mask[bh, i, j]) == kept_numpy(*seed, bh, i, j, p), (bh, i, j)
    assert torch.equal(mask, keep_mask(torch.tensor(seed), 3, 19, 35, p))


def test_keep_block_is_the_mask_at_chosen_places():
    mask = keep_mask((5, 6), 4, 40, 50, 0.4)
    bh, i, j = torch.tensor([3, 1]), torch.arange(9, 31), torch.tensor([49, 0, 17, 18])
    assert torch.equal(keep_block((5, 6), bh, i, j, 0.4), mask[bh][:, i][:, :, j])


def test_keep_block_takes_large_positions():
    far = torch.tensor([2**31 - 1])
    bits = keep_block((1, 2), far, far, far, 0.5)
    assert bool(bits) == kept_numpy(1, 2, 2**31 - 1, 2**31 - 1, 2**31 - 1, 0.5)


def test_keep_probability_is_the_nearest_sixteen_bit_fraction():
    for p in np.linspace(0, 1, 1000, endpoint=False):
        assert abs(keep_probability(p) - (1 - p)) <= 0.5 / 65536
    assert keep_probability(0.0) == 1.0
    assert keep_probability(0.5) == 0.5
    assert keep_probability(1 - 1e-9) == 1 / 65536


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_mask_statistics(p):
    keep, n = keep_probability(p), 8 * 256 * 512
    mask = keep_mask((11, 0), 8, 256, 512, p).double()
    deviation = math.sqrt(keep * (1 - keep) / n)
    assert abs(mask.mean() - keep) < 5 * deviation
    noise = (mask - keep) / math.sqrt(keep * (1 - keep))
    for shift in ((1, 0, 0), (0, 1, 0), (0, 8, 0), (0, 0, 1), (0, 0, 8), (0, 8, 8), (0, 16, 4)):
        correlation = (noise * noise.roll(shift, (0, 1, 2))).mean()
        assert abs(correlation) < 5 / math.sqrt(n), shift
    other = keep_mask((12, 0), 8, 256, 512, p).double()
    assert abs(((other - keep) * (mask - keep)).mean()) < 5 * keep * (1 - keep) / math.sqrt(n)


def test_dropout_keeps_the_expectation():
    q, k, v = (torch.randn(1, 1, 32, 8) for _ in range(3))
    want, want_lse = reference(q, k, v, Spec(0.3))
    outs = []
    for offset in range(400):
        seed = Operands(dropout_seed=torch.tensor([7, offset]))
        out, lse = reference(q, k, v, Spec(0.3, dropout_p=0.25), seed)
        assert torch.equal(lse, want_lse)
        outs.append(out)
    outs = torch.stack(outs)
    error = (outs.mean(0) - want).abs() / (outs.std(0) / math.sqrt(len(outs)))
    assert error.max() < 5


# ---- derivatives --------------------------------------------------------------------------------

TINY = [
    {},
    {"causal": True, "q_len": 5, "kv_len": 3},
    {"window": (1, 1), "align": "start", "q_len": 6, "kv_len": 3, "sinks": True},
    {"mask": "dead_rows", "bias": "full", "sinks": True},
    {"bias": "minus_inf", "softcap": 1.0},
    {"bias": "heads", "alibi": "batch", "kv_lens": (4, 0), "kv_starts": (1, 0)},
    {"bias": "keys", "sinks": True, "dropout": 0.4, "heads": 4, "kv_heads": 2, "v_dim": 2},
    {"documents": (2, 1, 2), "q_len": 5, "kv_len": 5, "bias": "plane", "causal": True},
    {"packed": ((2, 3), (0, 2), (3, 1), (2, 0)), "bias": "full", "sinks": True, "causal": True},
    {"packed": ((2, 3), (3, 4)), "kv_lens": (2, 4), "dropout": 0.3, "bias": "t5"},
    {"kv_len": 0, "sinks": True},
    {"q_len": 0, "sinks": True},
]


def differentiable(settings: dict):
    """A function of the floats of a tiny fp64 case, NaN-free, and those floats."""
    batch = len(settings.get("kv_lens", (0,)))
    shape = {"batch": batch, "heads": 2, "q_len": 3, "kv_len": 4, "head_dim": 2}
    problem = Case("tiny", **{**shape, **settings}).make(torch.float64, seed=3)
    operands = problem.operands
    names = [name for name in ("bias", "sinks") if getattr(operands, name) is not None]
    # Finite differences touch every number, so the function puts NaN and -inf back in.
    fixed = [*problem[:3], *(getattr(operands, name) for name in names)]
    finite = [x.isfinite() for x in fixed]
    inputs = [torch.where(ok, x, 0.0) for ok, x in zip(finite, fixed, strict=True)]

    def function(*inputs):
        q, k, v, *rest = (
            torch.where(ok, x, original)
            for ok, x, original in zip(finite, inputs, fixed, strict=True)
        )
        changed = {n: getattr(operands, n) for n in Operands.__dataclass_fields__}
        changed.update(zip(names, rest, strict=True))
        out, lse = reference(q, k, v, problem.spec, Operands(**changed))
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return function, tuple(x.requires_grad_() for x in inputs)


@pytest.mark.parametrize("settings", TINY, ids=lambda s: "+".join(s) or "plain")
def test_gradcheck_twice(settings):
    function, inputs = differentiable(settings)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("settings", TINY, ids=lambda s: "+".join(s) or "plain")
def test_torch_func(settings):
    function, inputs = differentiable(settings)
    inputs = tuple(x.detach() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    outs, pushed = torch.func.jvp(function, inputs, tangents)
    cotangents = tuple(torch.randn_like(x) for x in outs)
    pulled = torch.func.vjp(function, *inputs)[1](cotangents)
    forward = sum((a * b).sum() for a, b in zip(pushed, cotangents, strict=True))
    reverse = sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True))
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-12)

    def loss(*inputs):
        out, lse = function(*inputs)
        return out.sin().sum() + lse.cos().sum()

    argnums = tuple(range(len(inputs)))
    gradient = torch.func.grad(loss, argnums)
    hessian_vector = torch.func.jvp(gradient, inputs, tangents)[1]
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(first, tangents, strict=True))
    for want, got in zip(torch.autograd.grad(product, leaves), hessian_vector, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_vmap():
    q, k, v = (torch.randn(3, 2, 2, n, 4) for n in (5, 6, 6))
    spec = Spec(0.5, right=0)
    out, lse = torch.func.vmap(lambda *x: reference(*x, spec))(q, k, v)
    for n in range(3):
        want_out, want_lse = reference(q[n], k[n], v[n], spec)
        torch.testing.assert_close(out[n], want_out)
        torch.testing.assert_close(lse[n], want_lse)


@pytest.mark.parametrize("case", select("alone", "edge", "everything"), ids=lambda c: c.name)
def test_absent_keys_and_dead_rows_reach_nothing(case):
    """make() fills keys and rows that do not exist with NaN: results and gradients stay finite, and
    empty rows are 0."""
    problem = case.make(torch.float32)
    leaves = [x.requires_grad_() for x in problem[:3]]
    for x in (problem.operands.bias, problem.operands.sinks):
        if x is not None:
            leaves.append(x.requires_grad_())
    out, lse = reference(*problem)
    assert out.isfinite().all()
    assert not lse.isnan().any() and not (lse == torch.inf).any()
    dead = lse == -torch.inf
    assert not out[dead].any()
    gradients = torch.autograd.grad((out.sum(), lse[~dead].sum()), leaves, allow_unused=True)
    for x, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:  # no row sees anything
            assert dead.all()
            continue
        assert gradient.isfinite().all()
        assert not gradient[x.isnan()].any()
    if gradients[0] is not None:
        assert not gradients[0][dead].any()


def test_visible_nan_and_inf_propagate():
    q, k, v = (torch.randn(1, 1, 4, 3) for _ in range(3))
    for index in range(3):
        broken = [x.clone() for x in (q, k, v)]
        broken[index][0, 0, 1] = torch.nan
        out, _ = reference(*broken, Spec(0.5, right=0))
        poisoned = out.isnan().any(-1)[0, 0]
        assert poisoned[1], "row 1 is, or sees, the broken one"
        if index == 0:
            assert poisoned.tolist() == [False, True, False, False]
        else:
            assert poisoned[2:].all()
    v[0, 0, 2, 1] = torch.inf
    out, _ = reference(q, k, v, Spec(0.5))
    assert out[..., 1].isinf().all() and out[..., 0].isfinite().all()


def test_half_inputs_are_computed_in_single_precision():
    case = select("everything")[0]
    problem = case.make(torch.bfloat16)
    out, lse = reference(*problem)
    wide_out, wide_lse = reference(*problem.to(torch.float32))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, wide_out.bfloat16()) and torch.equal(lse, wide_lse)


def test_autocast_does_not_reach_inside():
    problem = select("alone")[0].make(torch.float32)
    want = reference(*problem)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference(*problem)[0], want)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_out_keeps_the_memory_order_of_q(order):
    shape = [2, 3, 4]
    memory = torch.randn(*(shape[d] for d in order), 5)
    inverse = sorted(range(3), key=order.__getitem__)
    q = memory.permute(*inverse, 3)
    out, lse = reference(q, q, q, Spec(1.0))
    assert out.stride() == q.stride() and lse.is_contiguous()
    assert reference(q, q, q[..., :2], Spec(1.0))[0].is_contiguous()
    gaps = torch.randn(2, 3, 4, 9)[..., 2:7]
    assert reference(gaps, gaps, gaps, Spec(1.0))[0].is_contiguous()


def test_packed_with_documents_is_refused():
    q = torch.randn(1, 1, 4, 2)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    operands = Operands(cu_seqlens_q=cu, cu_seqlens_k=cu, document_ids=torch.zeros(1, 4).int())
    with pytest.raises(ValueError, match="document_ids"):
        reference(q, q, q, Spec(1.0), operands)


# ---- Spec ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_end", [True, False])
@pytest.mark.parametrize("left, right", list(itertools.product((-1, 0, 2, 9), repeat=2)))
def test_interval_is_the_predicate(left, right, align_end):
    spec = Spec(1.0, left=left, right=right, align_end=align_end)
    for q_len, kv_len in itertools.product(range(8), repeat=2):
        shift = kv_len - q_len if align_end else 0
        rows = torch.arange(q_len)
        lo, hi = spec.lo(rows, q_len, kv_len), spec.hi(rows, q_len, kv_len)
        for i in range(q_len):
            seen = [
                j
                for j in range(kv_len)
                if (left < 0 or j >= i + shift - left) and (right < 0 or j <= i + shift + right)
            ]
            first, end = spec.lo(i, q_len, kv_len), spec.hi(i, q_len, kv_len)
            assert list(range(first, end)) == seen
            assert 0 <= first <= end <= kv_len
            assert (first, end) == (lo[i], hi[i])
        assert (lo.diff() >= 0).all() and (hi.diff() >= 0).all()


def test_interval_takes_lengths_by_entry():
    spec = Spec(1.0, left=2, right=0)
    lengths = torch.tensor([0, 3, 7])[:, None]
    rows = torch.arange(5)
    lo, hi = spec.lo(rows, 5, lengths), spec.hi(rows, 5, lengths)
    assert lo.shape == hi.shape == (3, 5)
    for n, kv_len in enumerate((0, 3, 7)):
        assert lo[n].tolist() == [spec.lo(i, 5, kv_len) for i in range(5)]
        assert hi[n].tolist() == [spec.hi(i, 5, kv_len) for i in range(5)]


def test_operands_order():
    names = "mask bias alibi_slopes sinks kv_lens kv_starts document_ids key_begin key_end"
    names = [*names.split(), "cu_seqlens_q", "cu_seqlens_k", "page_table", "dropout_seed"]
    assert list(OPERANDS) == names
    tensors = [torch.tensor(n) for n in range(len(names))]
    operands = Operands(*tensors)
    assert all(a is b for a, b in zip(operands.tensors(), tensors, strict=True))
    assert operands.varlen and operands.paged
    assert not Operands().varlen and not Operands().paged
    assert hash(Spec(1.0)) == hash(Spec(1.0)) and Spec(1.0) == Spec(1.0)

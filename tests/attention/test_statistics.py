"""return_stats= of the public functions: what comes back, derivatives, compilation, errors. The
kernels' numbers: tests/backends/test_cpu_statistics.py and test_triton_statistics.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import OPTIONS, Case, combine
from statistics_calls import true_statistics
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.core.spec import Operands
from fastattn.core.statistics import TopK, Wanted

ROWS = ("max_logit", "entropy", "max", "argmax", "sink_mass", "diagonal_mass")
NAMES = (*ROWS, "col_mass", "topk:3", "pooled:4")
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.native)]
SIZE = {"q_len": 7, "kv_len": 11, "head_dim": 5}
SMALL = {
    "window": {"window": (4, 2)},
    "kv_lens": {"kv_lens": (9, 4)},
    "kv_starts": {"kv_starts": (2, 4)},
    "documents": {"documents": (1, 4, 2, 4), "q_len": 11},
    "key_ranges": {"ranges": "random_by_head"},
    "packed": {"packed": ((7, 11), (1, 3), (0, 2), (3, 0))},
    "paged": {"page_size": 4, "kv_lens": (9, 3)},
    "long_q": {"q_len": 13},
}
CASES = {name: combine(name, SIZE | SMALL.get(name, option)) for name, option in OPTIONS.items()}
CASES |= {"sinks_gqa_dead": Case("", kv_heads=1, sinks=True, causal=True, q_len=9, kv_len=5)}


def tensors(x):
    return list(x) if isinstance(x, TopK) else [x]


def call(case, problem, names, backend, **leaves):
    """The statistics of a case's public call; `leaves` take the place of its tensors."""
    values = {name: getattr(problem.operands, name) for name in Operands.__slots__}
    values |= {name: x for name, x in leaves.items() if name in values}
    given = problem._replace(
        **{n: leaves.get(n, getattr(problem, n)) for n in "qkv"}, operands=Operands(**values)
    )
    arguments, options = case.call(given)
    function = getattr(fastattn, case.function)
    return function(*arguments, **options, backend=backend, return_lse=True, return_stats=names)


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_statistic(name, backend):
    case = CASES[name]
    problem = case.make(torch.float64)
    names = NAMES[:-1] if case.packed else NAMES
    out, lse, found = call(case, problem, names, backend)
    assert tuple(found) == names
    want = true_statistics(problem)
    probs, lead = want["probs"], 1 if case.packed else 0
    dead = want["lse"] == -torch.inf
    plain = dict(zip(("out", "lse"), call(case, problem, (), backend)))
    assert torch.equal(out, plain["out"]) and torch.equal(lse, plain["lse"])
    sinks = problem.operands.sinks
    exact = {
        "max_logit": want["max_logit"],
        "entropy": want["entropy"],
        "max": probs.amax(-1),
        "sink_mass": torch.zeros_like(want["lse"]) if sinks is None else 1 - probs.sum(-1),
        "col_mass": want["col_mass"],
    }
    exact["sink_mass"] = exact["sink_mass"].masked_fill(dead, 0.0)
    for key, value in exact.items():
        torch.testing.assert_close(found[key], value[0] if lead else value, msg=key)
    largest = torch.nn.functional.pad(probs, (0, 3)).topk(3).values
    torch.testing.assert_close(found["topk:3"].probs, largest[0] if lead else largest)
    assert torch.equal(found["topk:3"].keys[..., 0], found["argmax"])
    if not case.packed and not case.documents:
        rows, keys = probs.shape[2:]
        lens = problem.operands.kv_lens
        lens = torch.full((len(probs),), keys) if lens is None else lens
        offset = lens - rows if case.align == "end" else lens * 0
        at = torch.arange(rows) + offset[:, None]
        inside = (at >= 0) & (at < keys)
        own = probs.gather(3, at.clamp(0, keys - 1)[:, None, :, None].expand(*probs.shape[:3], 1))
        own = own[..., 0] * inside[:, None]
        torch.testing.assert_close(found["diagonal_mass"], own)
        torch.testing.assert_close(found["pooled:4"].sum(-1).sum(-1) > 0, (~dead).any(-1))


def test_ranks_and_shapes():
    q = torch.randn(2, 6, 8)
    out, found = fastattn.attention(q, q, q, return_stats=NAMES)
    assert out.shape == q.shape and found["entropy"].shape == (2, 6)
    assert found["topk:3"].probs.shape == (2, 6, 3) and found["pooled:4"].shape == (2, 4, 4)
    out, lse, found = fastattn.attention(q[0], q[0], q[0], return_lse=True, return_stats=["max"])
    assert lse.shape == found["max"].shape == (6,)
    packed, cu = torch.randn(9, 3, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    out, found = fastattn.varlen_attention(
        packed, packed, packed, cu, cu, 5, 5, causal=True, return_stats=("argmax", "col_mass")
    )
    assert found["argmax"].shape == (3, 9) and found["argmax"].max() <= 4
    assert found["col_mass"].shape == (3, 9)
    cache = torch.randn(2, 3, 16, 8)
    out, found = fastattn.decode_attention(
        q.view(2, 1, 6, 8)[:, :, :1].expand(-1, 3, -1, -1), cache, cache, cache_lens=10,
        num_splits=3, return_stats=("col_mass", "topk:2", "entropy"),
    )  # fmt: skip
    assert found["col_mass"].shape == (2, 3, 16) and not found["col_mass"][..., 10:].any()
    several = fastattn.attention(q, q, q, return_stats=("topk:1", "topk:4", "pooled:2", "pooled:3"))
    found = several[1]
    assert torch.equal(found["topk:1"].keys, found["topk:4"].keys[..., :1])
    assert found["pooled:2"].shape == (2, 2, 2) and found["pooled:3"].shape == (2, 3, 3)


def test_int8_caches_are_widened():
    cache = torch.randint(-100, 100, (2, 2, 16, 8), dtype=torch.int8)
    scale, q = torch.tensor([0.01, 0.02]), torch.randn(2, 4, 1, 8)
    options = {"cache_lens": 9, "return_stats": ("entropy", "col_mass", "topk:2")}
    narrow = {"k_descale": scale, "v_descale": scale}
    wide = cache * scale[:, None, None]
    _, got = fastattn.decode_attention(q, cache, cache, **narrow, **options)
    _, want = fastattn.decode_attention(q, wide, wide, **options)
    for name in options["return_stats"]:
        for x, y in zip(tensors(got[name]), tensors(want[name])):
            torch.testing.assert_close(x, y)


# ---- derivatives ---------------------------------------------------------------------------------

DIFFERENTIABLE = ("max_logit", "entropy", "max", "sink_mass", "diagonal_mass", "col_mass", "topk:3")


def leaves_of(problem):
    found = {"q": problem.q, "k": problem.k, "v": problem.v}
    found |= {name: getattr(problem.operands, name) for name in ("bias", "sinks")}
    return {n: x.detach().clone().requires_grad_() for n, x in found.items() if x is not None}


def finite(x):
    return torch.where(x.isfinite(), x, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("paged", "kv_starts")])
def test_gradients(name, backend):
    case = CASES[name]
    problem = case.make(torch.float64)
    names = DIFFERENTIABLE if case.packed else (*DIFFERENTIABLE, "pooled:4")
    leaves = leaves_of(problem)

    def function(*values):
        _, lse, found = call(case, problem, names, backend, **dict(zip(leaves, values)))
        found = [tensors(found[n])[0] for n in names]
        return [finite(x) for x in (lse, *found) if x.requires_grad]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "gqa", "sinks", "bias", "softcap", "dropout"])
def test_second_derivatives(name, backend):
    case = combine(name, {"q_len": 3, "kv_len": 5, "head_dim": 3} | OPTIONS[name])
    problem = case.make(torch.float64)
    leaves = leaves_of(problem)
    names = ("max_logit", "entropy", "max", "col_mass", "pooled:2")

    def function(*values):
        out, _, found = call(case, problem, names, backend, **dict(zip(leaves, values)))
        return [out, *(found[n] for n in names)]

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_and_vmap(backend):
    q, k, v = torch.randn(3, 2, 2, 4, 3, dtype=torch.float64).unbind(0)
    names = ("max_logit", "entropy", "max", "col_mass", "pooled:2", "topk:2")

    def function(q, k, v):
        _, found = fastattn.attention(q, k, v, causal=True, backend=backend, return_stats=names)
        return [tensors(found[n])[0] for n in names]

    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    values, pushed = torch.func.jvp(function, (q, k, v), tangents)
    moved = [x + 1e-6 * t for x, t in zip((q, k, v), tangents)]
    for one, two, tangent in zip(values, function(*moved), pushed):
        torch.testing.assert_close((two - one) / 1e-6, tangent, rtol=1e-4, atol=1e-4)
    many = [torch.stack([x, 2 * x, -x]) for x in (q, k, v)]
    got = torch.func.vmap(function)(*many)
    for n in range(3):
        for x, y in zip(got, function(*(x[n] for x in many))):
            torch.testing.assert_close(x[n], y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend):
    q = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)

    def loss(q):
        out, found = fastattn.attention(
            q, q, q, backend=backend, return_stats=("entropy", "col_mass")
        )
        return out.sum() + found["entropy"].sum() + found["col_mass"].square().sum()

    want = torch.autograd.grad(loss(q), q)[0]
    got = torch.autograd.grad(checkpoint(loss, q, use_reentrant=False), q)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.native
def test_compiles_whole():
    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def loss(q, k, v):
        out, found = fastattn.attention(q, k, v, causal=True, return_stats=NAMES)
        parts = (tensors(found[n])[0] for n in NAMES if n != "argmax")
        return out.sum() + sum(x.square().sum() for x in parts)

    want = loss(*leaves)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, error, sentence",
    [
        ("entropy", TypeError, "return_stats is 'entropy'; accepted is a tuple of names"),
        (("entropie",), ValueError, "return_stats has 'entropie'; accepted are 'max_logit', 'ent"),
        (("topk",), ValueError, "return_stats has 'topk'; accepted is 'topk' with a number"),
        (("topk:0",), ValueError, "return_stats has 'topk:0'; accepted is 'topk' with a number"),
        (("topk:12",), ValueError, "return_stats has 'topk:12' and k has 9 keys"),
        (("pooled:9",), ValueError, "return_stats has 'pooled:9' for 6 rows and 9 keys"),
        (("max:3",), ValueError, "return_stats has 'max:3'; accepted are"),
    ],
)
def test_unknown_names_and_sizes(names, error, sentence):
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4)
    with pytest.raises(error, match=sentence):
        fastattn.attention(q, k, k, return_stats=names)


def test_what_packed_calls_cannot_have():
    q, cu = torch.randn(9, 2, 4), torch.tensor([0, 4, 9], dtype=torch.int32)
    call = partial(fastattn.varlen_attention, q, q, q, cu, cu, 5, 5)
    with pytest.raises(NotImplementedError, match="'pooled:2' for packed sequences"):
        call(return_stats=("pooled:2",))
    pages, table = torch.randn(4, 4, 2, 4), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="'col_mass' for packed sequences with page"):
        fastattn.varlen_attention(
            q, pages, pages, cu, cu, 5, 5, page_table=table, return_stats=("col_mass",)
        )


def test_a_refused_decode_call_has_written_nothing():
    q, cache = torch.randn(1, 2, 1, 4), torch.zeros(1, 2, 8, 4)
    with pytest.raises(ValueError, match="'topk:9'"):
        fastattn.decode_attention(
            q, cache, cache.clone(), cache_lens=2, k=q, v=q, return_stats=("topk:9",)
        )
    assert not cache.any()


def test_a_call_of_no_names_has_an_empty_dict():
    q = torch.randn(1, 2, 3, 4)
    assert fastattn.attention(q, q, q, return_stats=())[1] == {}
    assert Wanted.parse(["topk:2", "topk:5"]).topk == 5


@pytest.mark.native
def test_explain_names_the_passes():
    q = torch.randn(1, 2, 8, 4)
    told = fastattn.explain(q, q, q, return_stats=("entropy", "diagonal_mass", "pooled:2"))
    assert told.statistics == {
        "entropy": "in the forward pass",
        "diagonal_mass": "from lse, in plain torch",
        "pooled:2": "by a second pass",
    }
    assert "statistic entropy" in str(told)
    assert fastattn.explain(q, q, q).statistics == {}


@pytest.mark.native
def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(1, 2, 8, 4)
    forward = 2 * 2 * 8 * 8 * (4 + 4)
    for names, flops in ((("entropy",), forward), (("entropy", "col_mass"), forward * 3 // 2)):
        with FlopCounterMode(display=False) as counter:
            fastattn.attention(q, q, q, return_stats=names)
        assert counter.get_total_flops() == flops

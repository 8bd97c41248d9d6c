"""nn.MultiheadAttention, the drop-in, against torch's module. Nested: test_nn_nested.py."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import nn as fnn
from fastattn.core import probabilities
from fastattn.core.philox import keep_mask, keep_probability
from fastattn.core.tolerance import allowed_error
from fastattn.nn import torch_masks

pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype stage|mismatched):UserWarning")
E, H, B, L, S = 12, 3, 2, 5, 7


def pair(*args, dtype=torch.float64, **kwargs):
    """torch's module and ours, from the same seed."""
    made = []
    for cls in (nn.MultiheadAttention, fnn.MultiheadAttention):
        torch.manual_seed(0)
        made.append(cls(*args, dtype=dtype, **kwargs))
    for module in made:
        for p in module.parameters():
            if p.dim() == 1:  # biases start at 0, where their mistakes would not show
                torch.manual_seed(p.numel())
                nn.init.normal_(p)
    return made


def inputs(kdim=E, vdim=E, dtype=torch.float64, batch_first=True, batched=True):
    """query, key and value, each with its own length and width."""
    torch.manual_seed(1)
    made = [torch.randn(B, n, c, dtype=dtype) for n, c in ((L, E), (S, kdim), (S, vdim))]
    if not batched:
        made = [x[0] for x in made]
    elif not batch_first:
        made = [x.transpose(0, 1) for x in made]
    return [x.detach().clone().requires_grad_() for x in made]


def results(module, tensors, **kwargs):
    """Outputs, and the gradients of a sum that weights every element differently."""
    out = [x for x in module(*tensors, **kwargs) if x is not None]
    loss = sum((x * torch.linspace(1, 2, x.numel()).view_as(x)).sin().sum() for x in out)
    floats = [x for x in kwargs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves = [*{id(x): x for x in tensors}.values(), *module.parameters(), *floats]
    return [*out, *torch.autograd.grad(loss, leaves)]


def same(modules, tensors, **kwargs):
    with warnings.catch_warnings():  # torch's: masks of two kinds, nested prototypes
        warnings.simplefilter("ignore")
        theirs, ours = (results(m, tensors, **kwargs) for m in modules)
    torch.testing.assert_close(ours, theirs)


def padding(kind, where="right"):
    """[B, S]; no row is fully masked."""
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[0, slice(-3, None) if where == "right" else slice(0, 2)] = True
    hidden[1, 3] = where == "holes"
    return hidden if kind == "bool" else torch.randn(B, S).double().masked_fill(hidden, -torch.inf)


def attn_mask(kind, rank):
    shape = (L, S) if rank == 2 else (B * H, L, S)
    x = torch.randn(shape, dtype=torch.float64)
    hidden = x > 0.8
    hidden[..., 3:5] = False
    if kind == "bool":
        return hidden
    return x.masked_fill(hidden, -torch.inf) if kind == "float" else x.requires_grad_()


# ---- torch's own samples, constructors, states -------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_torchs_samples(training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    (info,) = (i for i in module_db if i.module_cls is nn.MultiheadAttention)
    found = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    assert len(found) >= 60
    for sample in found:
        made, call = sample.constructor_input, sample.forward_input
        modules = pair(*made.args, **made.kwargs)
        same([m.train(training) for m in modules], call.args, **call.kwargs)


OPTIONS = [
    {}, {"bias": False}, {"kdim": 5}, {"vdim": 4, "kdim": 5}, {"add_bias_kv": True},
    {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_initialisation_and_state_dict(options):
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(7)
    ours = fnn.MultiheadAttention(E, H, **options)
    assert isinstance(ours, nn.MultiheadAttention)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(8)
    theirs._reset_parameters()
    torch.manual_seed(8)
    ours._reset_parameters()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_signatures_are_torchs():
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(lib.MultiheadAttention, method)).parameters
            for lib in (fnn, nn)
        )
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


# ---- shapes and masks --------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", ["batch first", "batch second", "unbatched"])
def test_layouts(options, layout):
    first = layout == "batch first"
    modules = pair(E, H, batch_first=first, **options)
    widths = {n: options.get(n, E) for n in ("kdim", "vdim")}
    tensors = inputs(batch_first=first, batched=layout != "unbatched", **widths)
    hidden = padding("bool") if layout != "unbatched" else padding("bool")[0]
    for need_weights in (False, True):
        same(modules, tensors, need_weights=need_weights, key_padding_mask=hidden)
    same(modules, tensors, average_attn_weights=False)


def test_shared_inputs_are_projected_together():
    q, k, v = inputs()
    modules = pair(E, H, batch_first=True)
    for tensors in ((q, q, q), (q, k, k), (q, v, v), (k, k, v)):
        same(modules, tensors)


PADDINGS = [None, ("bool", "right"), ("bool", "left"), ("bool", "holes"), ("float", "right")]
ATTN_MASKS = [None, *itertools.product(("bool", "float", "learned"), (2, 3))]


@pytest.mark.parametrize("extra", [False, True], ids=["", "extra keys"])
@pytest.mark.parametrize("hide", PADDINGS, ids=str)
@pytest.mark.parametrize("attn", ATTN_MASKS, ids=str)
def test_masks(hide, attn, extra):
    modules = pair(E, H, batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    call = {
        "key_padding_mask": None if hide is None else padding(*hide),
        "attn_mask": None if attn is None else attn_mask(*attn),
    }
    for need_weights in (False, True):
        same(modules, inputs(), need_weights=need_weights, **call)
    same(modules, inputs(), average_attn_weights=False, **call)


def test_unbatched_masks_of_each_head():
    modules = pair(E, H)
    tensors = inputs(batched=False)
    same(modules, tensors, attn_mask=attn_mask("bool", 3)[:H])
    same(modules, tensors, attn_mask=attn_mask("float", 3)[:H], need_weights=False)


@pytest.mark.parametrize("extra", [False, True], ids=["", "extra keys"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("hide", [None, "right", "left"])
def test_causal(kind, hide, extra):
    """The mask alone, the mask with the hint, and the hint alone give the same."""
    modules = pair(E, H, batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
    mask = hidden if kind == "bool" else torch.zeros(L, S).double().masked_fill(hidden, -torch.inf)
    call = {"key_padding_mask": None if hide is None else padding("bool", hide)}
    if hide == "left":
        call["key_padding_mask"][:, 0] = False  # otherwise row 0 sees nothing: NaN in torch
    same(modules, inputs(), attn_mask=mask, **call)
    theirs = results(modules[0], inputs(), attn_mask=mask, **call)
    for hint in ({"is_causal": True}, {"is_causal": True, "attn_mask": mask}):
        torch.testing.assert_close(results(modules[1], inputs(), **hint, **call), theirs)


def test_is_causal_never_discards_a_mask():
    """torch ignores the mask in favour of the hint with need_weights=False, and the hint with
    True."""
    theirs, ours = pair(E, H, batch_first=True)
    mask = attn_mask("bool", 2)
    both = mask | torch.ones(L, S, dtype=torch.bool).triu(1)
    both[:, 0] = mask[:, 0] = False
    for need_weights in (False, True):
        want = theirs(*inputs(), attn_mask=both, need_weights=need_weights)
        got = ours(*inputs(), attn_mask=mask, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(got, want)


def test_masks_take_their_cheapest_form():
    """No tensor of size rows x keys is made from padding or a causal mask."""

    def form(hide, attn, causal=False, extra=0):
        found = torch_masks.operands(hide, attn, causal, B, H, S, S, extra, torch.float32)
        return {n: x if isinstance(x, tuple) else tuple(x.shape)
                for n, x in found.items() if x is not None}  # fmt: skip

    triangle = torch.ones(S, S, dtype=torch.bool).triu(1)
    right, left = padding("bool"), padding("bool", "left")
    assert form(right, None) == {"kv_lens": (B,)}
    assert form(right, triangle) == {"kv_lens": (B,), "window": (None, 0)}
    assert form(right, triangle, extra=2) == {"kv_lens": (B,), "window": (None, 2)}
    assert form(left, None) == {"mask": (B, 1, 1, S)}
    assert form(left, nn.Transformer.generate_square_subsequent_mask(S)) == {
        "mask": (B, 1, 1, S), "window": (None, 0)}  # fmt: skip
    other = ~torch.eye(S, dtype=torch.bool)
    assert form(left, other) == {"mask": (1, 1, S, S), "bias": (B, 1, 1, S)}
    assert form(right, other) == {"mask": (1, 1, S, S), "kv_lens": (B,)}
    assert form(None, torch.zeros(S, S)) == {"bias": (1, 1, S, S)}
    almost = triangle.clone()
    almost[2, 1] = True  # both corners are a triangle's
    assert form(None, almost) == {"mask": (1, 1, S, S)}


def test_a_row_that_sees_nothing_gives_the_bias():
    ours = pair(E, H, batch_first=True)[1]
    q, k, v = inputs()
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1] = True
    for mask in (hidden, torch.zeros(B, S).double().masked_fill(hidden, -torch.inf)):
        for need_weights in (False, True):
            out, w = ours(q, k, v, key_padding_mask=mask, need_weights=need_weights)
            assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
            assert w is None or ((w[1] == 0).all() and torch.allclose(w[0].sum(-1), q.new_ones(L)))
            loss = out.sum() if w is None else out.sum() + w.square().sum()
            for grad in torch.autograd.grad(loss, (q, k, v)):
                assert grad.isfinite().all() and (grad[1] == 0).all()


def test_padding_is_never_read():
    _, ours = pair(E, H, batch_first=True)
    q, k, v = inputs()
    hidden = padding("bool")
    want = ours(q, k, v, key_padding_mask=hidden)
    k, v = (x.detach().masked_fill(hidden[..., None], torch.nan) for x in (k, v))
    torch.testing.assert_close(ours(q, k, v, key_padding_mask=hidden), want)


# ---- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_dropout_of_weights_and_output_is_the_same(average):
    """Drawn once from torch's generator: the probs written out with exactly that mask."""
    p, n = 0.3, 50
    ours = fnn.MultiheadAttention(E, H, dropout=p, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, n, E, dtype=torch.float64)
    q, k, v = ours._project(x, x, x)
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (q, k, v))
    torch.manual_seed(3)
    kept = keep_mask(torch.randint(0, 2**63 - 1, (2,)), B * H, n, n, p).view(B, H, n, n)
    probabilities = (q @ k.mT * (E // H) ** -0.5).softmax(-1) * kept / keep_probability(p)
    want = ours.out_proj((probabilities @ v).transpose(1, 2).flatten(2))
    for need_weights in (True, False):
        torch.manual_seed(3)
        out, w = ours(x, x, x, need_weights=need_weights, average_attn_weights=average)
        torch.testing.assert_close(out, want)
        if need_weights:
            torch.testing.assert_close(w, probabilities.mean(1) if average else probabilities)
    assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x)[0])


def test_dropout_of_everything():
    theirs, ours = pair(E, H, dropout=1.0, batch_first=True)
    same((theirs, ours), inputs())
    same((theirs, ours), inputs(), need_weights=False)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("kv_len", [1, 16, 45, 700])
def test_the_kernel_says_which_weights_it_keeps(p, kv_len):
    seed = torch.tensor([-(2**62) - 12345, 2**61 + 99])
    q, k = torch.zeros(2, 3, 21, 1), torch.zeros(2, 3, kv_len, 1)
    lse, options = torch.full((2, 3, 21), math.log(kv_len)), {"dropout_p": p, "dropout_seed": seed}
    weights = fastattn.attention_weights(q, k, lse, **options)
    want = keep_mask(seed, 6, 21, kv_len, p).view(2, 3, 21, kv_len)
    torch.testing.assert_close(weights, want / (kv_len * keep_probability(p)))
    one = slice(2, 3)  # the last of the three heads
    part = fastattn.attention_weights(
        q[:, one], k[:, one], lse[:, one], head_origin=(2, 3), **options
    )
    assert torch.equal(part, weights[:, one])


def test_checkpointing_drops_the_same():
    ours = fnn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    found = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(4)
        x = torch.ones(B, L, E).cumsum(1).requires_grad_()
        out, w = run(lambda x: ours(x, x, x), x)
        found.append([out, w, *torch.autograd.grad((out.sum() + w.square().sum()), [x])])
    torch.testing.assert_close(*found)


# ---- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_weights_in_chunks(monkeypatch, average):
    """The gradient in chunks of one row, each with its part of masks, triangle and gradient."""
    monkeypatch.setattr(probabilities, "CHUNK", 1)
    modules = pair(E, H, batch_first=True)
    x = torch.randn(B, 50, E, dtype=torch.float64, requires_grad=True)
    hidden = torch.arange(50) >= torch.tensor([[30], [50]])
    triangle = torch.ones(50, 50, dtype=torch.bool).triu(1)
    bias = torch.randn(B * H, 50, 50, dtype=torch.float64, requires_grad=True)
    for attn in (None, triangle, bias):
        call = {"key_padding_mask": hidden, "attn_mask": attn, "average_attn_weights": average}
        same(modules, (x, x, x), **call)


def test_weights_never_take_the_memory_of_all_heads():
    heads, n = 16, 512
    module = fnn.MultiheadAttention(64, heads, batch_first=True)
    x = torch.randn(4, n, 64)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=cpu) as profile:
        out, w = module(x, x, x)
        (out.sum() + w.square().sum()).backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    all_heads = 4 * 4 * heads * n * n
    assert peak < all_heads, "the scores of all heads were in memory at once"


def test_second_derivatives_through_weights():
    _, ours = pair(6, 2, batch_first=True)
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, x, x), (x,))


# ---- around the module -------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    theirs, ours = pair(E, H, batch_first=True, dtype=torch.float32, add_bias_kv=True)
    tensors = [x.float() for x in inputs()]
    mask = attn_mask("float", 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (m(*tensors, attn_mask=mask, need_weights=need_weights) for m in (theirs, ours))
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    theirs, ours = pair(E, H, batch_first=True, dtype=dtype)
    tensors = [x.to(dtype) for x in inputs()]
    exact = [copy.deepcopy(theirs).double()(*(x.double() for x in tensors))]
    for got, want, right in zip(ours(*tensors), theirs(*tensors), exact[0]):
        assert got.dtype == dtype
        error, bar = ((x.double() - right).abs().max() for x in (got, want))
        assert error <= allowed_error("result", bar, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_double_module_with_parts_of_another_dtype(dtype):
    """torch accepts such a bias, and a float32 mask only without need_weights; ours takes any float
    mask."""
    modules = pair(E, H, batch_first=True)
    for module in modules:
        module.in_proj_bias.data = module.in_proj_bias.data.to(dtype)
    x = inputs()[0]
    same(modules, [x] * 3)
    mask, hide = (torch.randn(n, L).to(dtype) for n in (L, B))
    for call in ({"attn_mask": mask}, {"key_padding_mask": hide, "attn_mask": mask}):
        if dtype == torch.float32:
            same(modules, [x] * 3, need_weights=False, **call)
        double = {name: m.double() for name, m in call.items()}
        for found, want in zip(modules[1](x, x, x, **call), modules[1](x, x, x, **double)):
            torch.testing.assert_close(found, want)


def test_compiles_whole():
    """fullgraph, with masks that cannot be inspected while compiling, with weights and dropout."""
    _, ours = pair(E, H, batch_first=True, dropout=0.2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    for call in (
        {"need_weights": False},
        {"key_padding_mask": padding("bool"), "attn_mask": attn_mask("bool", 2)},
        {"key_padding_mask": padding("float"), "is_causal": True, "average_attn_weights": False},
    ):
        found = []
        for module in (ours, compiled):
            torch.manual_seed(6)
            out, w = module(*tensors, **call)
            loss = out.sin().sum() + (0 if w is None else w.square().sum())
            found.append([out, w, *torch.autograd.grad(loss, tensors)])
        torch.testing.assert_close(*found)


def test_out_proj_is_a_module():
    """Its hooks run, and replacing the module takes effect."""
    ours = fnn.MultiheadAttention(E, H, batch_first=True)
    x, seen = torch.randn(B, L, E), []
    ours.out_proj.register_forward_hook(lambda *_: seen.append(1))
    out, _ = ours(x, x, x)
    assert seen == [1]
    ours.out_proj = nn.Sequential(ours.out_proj, nn.ReLU())
    assert torch.equal(ours(x, x, x)[0], out.relu())


def test_vmap_and_jvp():
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(3, B, L, E, dtype=torch.float64)
    for need_weights in (False, True):

        def run(x, need_weights=need_weights):
            return ours(x, x, x, need_weights=need_weights)[0]

        torch.testing.assert_close(torch.vmap(run)(x), torch.stack([run(y) for y in x]))
        _, tangent = torch.func.jvp(run, (x[0],), (x[1],))
        step = 1e-6 * x[1]
        numeric = (run(x[0] + step) - run(x[0] - step)) / 2e-6
        torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-6)


def test_runs_on_a_named_backend(monkeypatch):
    _, ours = pair(E, H, batch_first=True)
    want = ours(*inputs(), key_padding_mask=padding("bool"))
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    torch.testing.assert_close(ours(*inputs(), key_padding_mask=padding("bool")), want)
    assert fastattn.explain(*(torch.randn(1, 1, 4, 4) for _ in range(3))).backend == "reference"


REFUSED = [
    ({"key_padding_mask": torch.zeros(B, S, dtype=torch.int64)}, AssertionError,
     "key_padding_mask is torch.int64; accepted are torch.bool and floating types"),
    ({"key_padding_mask": torch.zeros(B, L, dtype=torch.bool)}, RuntimeError,
     r"key_padding_mask has shape \[2, 5\]; accepted is \[2, 7\]"),
    ({"attn_mask": torch.zeros(S, L)}, RuntimeError,
     r"attn_mask has shape \[7, 5\]; accepted is \[5, 7\] and \[6, 5, 7\]"),
    ({"attn_mask": torch.zeros(B, L, S)}, RuntimeError, r"attn_mask has shape \[2, 5, 7\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, error, text", REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_refusals(call, error, text):
    ours = fnn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    with pytest.raises(error, match=text):
        ours(*inputs(), **call)


def test_refuses_other_lengths():
    ours = fnn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    q, k, v = inputs()
    with pytest.raises(AssertionError, match="value has shape"):
        ours(q, k, v[:, 1:])
    with pytest.raises(AssertionError, match="key has batch size 1"):
        ours(q, k[:1], v[:1])
    with pytest.raises(AssertionError, match="2D or batched 3D"):
        ours(q[None], k, v)
    with pytest.raises(AssertionError, match="divisible"):
        fnn.MultiheadAttention(5, 2)

"""torch's own samples under enable(): the OpInfos and ModuleInfos of everything that calls SDPA.
Values and gradients are compared with torch's, and gradients also checked by gradcheck in
float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastattn
from fastattn.core.tolerance import ROUNDINGS, allowed_error

pytest.importorskip("expecttest")  # required by torch's samples
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OPERATORS = {  # the others are for CUDA
    op.name: op for op in op_db if "attention" in op.name and torch.float32 in op.dtypes
}
MODULES = {
    info.name: info for info in module_db if "Transformer" in info.name or "Attention" in info.name
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EVERY = 7  # without --long, one sample in this many runs


@pytest.fixture(autouse=True)
def torch_again():
    yield
    for _ in range(9):
        fastattn.disable()


def of_gradients(results, inputs):
    """The results that have a gradient, and the gradients of a loss of them for the inputs."""
    found = [x for x in tree_flatten(results)[0] if isinstance(x, torch.Tensor)]
    wanted = [x for x in inputs if x.requires_grad]
    with_grad = [x for x in found if x.requires_grad]
    if not (with_grad and wanted):
        return found, []
    loss = sum((x.double() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()
               for x in with_grad)  # fmt: skip
    return found, torch.autograd.grad(loss, wanted, allow_unused=True)


def answer(call, inputs, on=False):
    """(results, gradients), or the exception."""
    torch.manual_seed(0)
    try:
        if not on:
            return of_gradients(call(*inputs), inputs)
        with fastattn.override_sdpa():
            return of_gradients(call(*inputs), inputs)
    except Exception as error:
        return error


def widened(x):
    wide = x.detach().double() if x.is_floating_point() else x
    return wide.requires_grad_(x.requires_grad)


def compare(call, inputs, random):
    """call(*inputs) with and without the switch: both are equally close to float64, or both refuse.
    With dropout only the shapes are compared."""
    want, got = answer(call, inputs), answer(call, inputs, on=True)
    if isinstance(want, Exception) or isinstance(got, Exception):
        assert isinstance(want, Exception), f"torch answers, and fastattn raises {got!r}"
        if isinstance(got, Exception):
            assert isinstance(got, type(want)) or isinstance(want, type(got)), (got, want)
        return
    truth = answer(call, [widened(x) for x in inputs])
    results = len(got[0])
    floats = [x.detach().double() for x in inputs if x.is_floating_point() and x.numel()]
    score = max(float(x.abs().max()) for x in floats) ** 2
    product = max(float(x.square().mean()) for x in floats)
    got, want, truth = (tree_flatten(x)[0] for x in (got, want, truth))
    for n, (a, b, exact) in enumerate(zip(got, want, truth, strict=True)):
        if a is None or b is None:  # the gradient of an unused result
            assert all(x is None or not x.any() for x in (a, b))
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        if random or not b.numel():
            continue
        kind = "result" if n < results else "gradient"
        compute = torch.float64 if a.dtype == torch.float64 else torch.float32
        rounding, finer = (ROUNDINGS[kind][t] * torch.finfo(t).eps for t in (a.dtype, compute))
        a, b, exact = a.double(), b.double(), exact.double()
        assert torch.equal(a.isfinite(), b.isfinite())
        a, b, exact = (x.nan_to_num(0, 0, 0) for x in (a, b, exact))
        # As in tolerance.py, a gradient is a small difference of products of inputs, and probs have
        # the rounding errors of the scores. A broadcast input sums the errors of all its uses.
        shared = max(1.0, truth[0].numel() / exact.numel()) ** 0.5
        size = float(exact.abs().max()) + (product if kind == "gradient" else 0.0)
        roundings = shared * (rounding * size + finer * max(1.0, score))
        if compute == torch.float64:  # the truth is no more precise, and has as many
            roundings *= 2
        error, plain = (float((x - exact).abs().max()) for x in (a, b))
        assert error <= allowed_error(kind, plain, roundings)


def tensors_of(*trees):
    return [x for x in tree_flatten(trees)[0] if isinstance(x, torch.Tensor)]


def drops(options) -> bool:
    return bool(options.get("dropout_p")) and options.get("training", True)


def check_operator(name, dtype, every):
    op = OPERATORS[name]
    if dtype not in op.dtypes:
        pytest.skip(f"torch has no samples in {dtype}")
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples[::every]:
        leaves, structure = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [n for n, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

        def call(*tensors, leaves=leaves, structure=structure, places=places):
            full = list(leaves)
            for n, x in zip(places, tensors):
                full[n] = x
            first, args, kwargs = tree_unflatten(full, structure)
            return op(first, *args, **kwargs)

        compare(call, [leaves[n] for n in places], drops(sample.kwargs))


def check_module(name, dtype, every):
    info = MODULES[name]
    count = 0
    for training in (False, True):
        samples = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
        for sample in samples[::every]:
            built = sample.constructor_input
            torch.manual_seed(1)
            module = info.module_cls(*built.args, **built.kwargs)
            module.train(training)
            given = sample.forward_input
            dropout = training and any(
                (isinstance(m, torch.nn.Dropout) and m.p) or getattr(m, "dropout", 0)
                for m in module.modules()
            )
            names = [name for name, _ in module.named_parameters()]
            leaves, structure = tree_flatten((given.args, given.kwargs))
            places = [n for n, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

            def call(*tensors, m=module, names=names, leaves=leaves, at=places, tree=structure):
                full = list(leaves)
                for n, x in zip(at, tensors[len(names) :]):
                    full[n] = x
                args, kwargs = tree_unflatten(full, tree)
                parameters = dict(zip(names, tensors))
                return torch.func.functional_call(m, parameters, args, kwargs)

            compare(call, [*module.parameters(), *(leaves[n] for n in places)], dropout)
            count += 1
    assert count


@pytest.mark.native
@pytest.mark.parametrize("name", OPERATORS)
def test_some_operator_samples(name):
    check_operator(name, torch.float32, EVERY)


@pytest.mark.long
@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_samples(name, dtype):
    check_operator(name, dtype, 1)


@pytest.mark.native
@pytest.mark.parametrize("name", MODULES)
def test_some_module_samples(name):
    check_module(name, torch.float32, 3 * EVERY)


@pytest.mark.long
@pytest.mark.native
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name, dtype):
    check_module(name, dtype, 1)


def gradchecks(every, second):
    op = OPERATORS["nn.functional.scaled_dot_product_attention"]
    for sample in list(op.sample_inputs("cpu", torch.float64, requires_grad=True))[::every]:
        if drops(sample.kwargs):
            continue
        inputs = tensors_of(sample.input, sample.args)
        assert len(inputs) == 3 and all(x.requires_grad for x in inputs)
        options = dict(sample.kwargs)

        def call(*qkv, options=options):
            return F.scaled_dot_product_attention(*qkv, **options)

        with fastattn.override_sdpa():
            assert torch.autograd.gradcheck(call, inputs, check_forward_ad=second, fast_mode=True)
            if second:
                assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.native
def test_some_gradchecks():
    gradchecks(EVERY, second=False)


@pytest.mark.long
@pytest.mark.native
def test_gradchecks():
    gradchecks(1, second=True)

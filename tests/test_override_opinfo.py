"""torch's own samples under enable(): its OpInfos and ModuleInfos of everything that calls SDPA.
Values and gradients are compared with torch's; gradients also by gradcheck in float64.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

import fastattn

pytest.importorskip("expecttest")  # torch's samples need it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OPERATORS = {  # the others are CUDA's
    op.name: op for op in op_db if "attention" in op.name and torch.float32 in op.dtypes
}
MODULES = {
    info.name: info for info in module_db if "Transformer" in info.name or "Attention" in info.name
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.float64: 1e-9}
EVERY = 7  # of the samples, the share that runs unasked


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


def compare(call, inputs, dtype, random):
    """call() with the switch and without: equal, or both refuse. With dropout, equal are only the
    shapes, and what is not finite."""
    answers = []
    for on in (False, True):
        if on:
            fastattn.enable()
        torch.manual_seed(0)
        try:
            answers.append(of_gradients(call(), inputs))
        except Exception as error:
            answers.append(error)
        if on:
            fastattn.disable()
    want, got = answers
    if isinstance(want, Exception) or isinstance(got, Exception):
        assert isinstance(want, Exception), f"torch answers, and fastattn raises {got!r}"
        if isinstance(got, Exception):
            assert isinstance(got, type(want)) or isinstance(want, type(got)), (got, want)
        return
    for a, b in zip(tree_flatten(got)[0], tree_flatten(want)[0], strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            if not random:
                largest = float(b.detach().abs().max()) if b.numel() else 1.0
                bound = TOLERANCES[dtype] * max(1.0, largest)
                torch.testing.assert_close(a, b, rtol=0, atol=bound)
        else:  # the gradient of what was not used
            assert all(x is None or not isinstance(x, torch.Tensor) or not x.any() for x in (a, b))


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
        tensors = tensors_of(sample.input, sample.args, sample.kwargs)
        compare(
            lambda s=sample: op(s.input, *s.args, **s.kwargs), tensors, dtype, drops(sample.kwargs)
        )


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
            inputs = [*tensors_of(given.args, given.kwargs), *module.parameters()]
            compare(lambda m=module, g=given: m(*g.args, **g.kwargs), inputs, dtype, dropout)
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
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
            if second and torch._fused_sdp_choice(*inputs, **options) != 1:
                assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.native
def test_some_gradchecks():
    gradchecks(EVERY, second=False)


@pytest.mark.long
@pytest.mark.native
def test_gradchecks():
    gradchecks(1, second=True)

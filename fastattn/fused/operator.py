"""What the operators around attention share: when a kernel runs, and how it is differentiated.

The kernels run in eager mode, on CPU tensors and on GPUs that Triton supports. Plain torch runs on
other devices, under torch.func and forward-mode derivatives, and under torch.compile: inductor's
code alone takes 0.8 (rotate, forward) to 1.6 times (RMSNorm with residual and gradients) the CPU
kernels' time at 2048 x 768 on two AVX-512 cores, but it is fused with its neighbours. Second
derivatives differentiate the references. All operators keep their input's dtype under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.autograd import BELOW_AUTOGRAD
from ..backends.gpu import gpu_missing, launcher
from ..backends.library import NATIVE_MISSING
from ..backends.schema import LIBRARY
from ..core import checks
from ..core.transforms import pull_back


def floating(name, x) -> Tensor:
    """x, or an error where it is not a tensor of a floating dtype."""
    if checks.tensor(name, x).dtype not in checks.DTYPES:
        raise TypeError(f"{name} is {x.dtype}; accepted are float32, bfloat16, float16, float64")
    return x


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.ops.aten.alias(x.trigger_wait())

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        return dout


def arrived(x: Tensor | None) -> Tensor | None:
    """x itself or, where x is the result of a collective that may still be running (the sum over
    the ranks of tensor parallelism), a plain tensor once it has ended. Kernels take plain tensors
    only; with them, dropout also drops what it drops in one process."""
    if type(x) in _PLAIN or torch.compiler.is_compiling() or not hasattr(x, "trigger_wait"):
        return x
    return _Arrive.apply(x)


def has_kernel(first: Tensor, *others: Tensor | None) -> bool:
    """Do the kernels take these tensors in the present mode?"""
    # Tested first, so that nothing below is traced.
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    on_cpu = first.is_cpu
    return (
        (on_cpu or first.is_cuda)
        and all(
            type(x) in _PLAIN and (x is None or (x.is_cpu if on_cpu else x.is_cuda))
            for x in (first, *others)
        )
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and (NATIVE_MISSING if on_cpu else gpu_missing(first.get_device())) is None
    )


def on_gpu(module: str, *names: str) -> None:
    """Registers the functions of kernels/<module>.py as the operators' CUDA kernels."""
    for name in names:
        LIBRARY.impl(name, launcher(module, name), "CUDA")


# ---- derivatives ---------------------------------------------------------------------------------


def differentiable(name, setup, gradient):
    """torch.ops.fastattn.<name> as a differentiable function; the derivative is registered with
    torch.library too.

    The function is an autograd.Function around the operator or, where no gradient is needed, the
    operator's kernel itself. That costs half as much per call as torch.library's autograd
    (backends/autograd.py has the numbers).
    """
    operator = getattr(torch.ops.fastattn, name).default
    torch.library.register_autograd(f"fastattn::{name}", gradient, setup_context=setup, lib=LIBRARY)

    def forward(*args):
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD):
            return operator(*args)

    members = {"forward": forward, "setup_context": setup, "backward": gradient}
    members = {key: staticmethod(function) for key, function in members.items()}
    function = type(name, (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply  # as in backends/autograd.py

    def call(*args):
        if torch.compiler.is_compiling():
            return operator(*args)
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return apply(*args)
        return forward(*args)

    return call


def save_inputs(ctx, inputs, output) -> None:
    """setup_context of an operator whose derivative needs its inputs only."""
    ctx.tensors = [n for n, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[n] for n in ctx.tensors))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def saved_inputs(ctx) -> list:
    """The inputs that save_inputs saved, in order."""
    inputs = list(ctx.others)
    for n, x in zip(ctx.tensors, ctx.saved_tensors):
        inputs[n] = x
    return inputs


def through(function, primals):
    """The gradient of a backward operator. function(*inputs) returns the reference as a function of
    the first `primals` inputs, and that is differentiated."""

    def gradient(ctx, *cotangents):
        inputs = saved_inputs(ctx)
        if all(c is None for c in cotangents):
            return (None,) * len(inputs)
        grads = pull_back(function(*inputs), inputs[:primals], cotangents)
        return (*grads, *(None,) * (len(inputs) - primals))

    return gradient

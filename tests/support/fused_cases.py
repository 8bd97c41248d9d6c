"""The operators around attention and their plain-torch versions, for tests on several devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastattn.backends import isa as cpu_isa
from fastattn.fused import norm, rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = torch.ops.fastattn
ISAS = cpu_isa.supported()


def ours_norm(x, residual, weight, bias, center=True):
    return norm.norm(x, residual, weight, bias, 1e-5, center)


def torch_norm(x, residual, weight, bias, center=True):
    summed = x if residual is None else x + residual
    shape = (x.shape[-1],)
    if center:
        return F.layer_norm(summed, shape, weight, bias, 1e-5), summed
    return F.rms_norm(summed, shape, weight, 1e-5), summed


def exact_norm(x, residual, weight, bias, center=True):
    return norm.norm_reference(x, residual, weight, bias, 1e-5, center)


def ours_rotate(x, interleaved=False):
    return (rope.rotate(x, *table(x), None, interleaved),)


def torch_rotate(x, interleaved=False):
    cos, sin = (t.to(x.dtype) for t in table(x))
    return (rope.rotate_reference(x, cos, sin, None, interleaved),)


def table(x):
    """Angles of S positions for all but the last channel or two; exact in every dtype."""
    pairs = max(1, (x.shape[-1] - 1) // 2)
    angles = torch.arange(x.shape[-2]).unsqueeze(1) * 0.3 + torch.arange(pairs)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(t.bfloat16().to(dtype) for t in (angles.cos(), angles.sin()))


def ours_gate(gate, up, activation="silu"):
    return (gate.gate(gate, up, activation),)


def torch_gate(gate, up, activation="silu"):
    return (gate.GATES[activation](gate) * up,)


def check(ours, theirs, inputs, dtype, exact=None, **options):
    """Forward and gradients: at most twice the error of torch's own way in the same dtype, plus a
    rounding floor (three times for gradients)."""
    results = {}
    for name, function, kind in (
        ("exact", exact or theirs, torch.float64), ("torch", theirs, dtype), ("ours", ours, dtype)
    ):  # fmt: skip
        leaves = [None if x is None else like(x, kind) for x in inputs]
        outs = function(*leaves, **options)
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(y.shape, dtype=torch.float64, generator=generator).to(dtype).to(y.dtype)
            for y in outs
        ]
        wanted = [x for x in leaves if x is not None]
        grads = torch.autograd.grad(outs, wanted, cotangents)
        results[name] = [*outs, *grads]
        outputs = len(outs)
    for n, (right, theirs, mine) in enumerate(zip(*results.values())):
        assert mine.shape == right.shape
        scale = right.abs().max().item() if right.numel() else 0.0
        ulps = 32 if dtype == torch.float64 else 2 if n < outputs else 4  # float64 is the truth too
        floor = ulps * torch.finfo(dtype).eps * scale + 1e-30
        error, allowed = ((x.double() - right).abs().max().item() for x in (mine, theirs))
        assert error <= (2 if n < outputs else 3) * allowed + floor, (n, error, allowed, floor)


def like(x, dtype):
    """A leaf with x's strides."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return y.copy_(x).requires_grad_()


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).double()


LOSSES = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z": {"z_loss": 0.1},
    "softcap": {"softcap": 1.5},
    "all": {"label_smoothing": 0.3, "z_loss": 0.05, "softcap": 2.0, "ignore_index": 3},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "label_smoothing": 0.1},
}
LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "half of a wider one": lambda x: x[..., :10],
    "rows apart": lambda x: x[:, ::2],
    "columns apart": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "columns transposed": lambda x: x.transpose(0, 2),
}


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)

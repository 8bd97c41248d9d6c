"""The calls that `verify` checks, and the measurement of one on one backend against float64.
Next hop: core/tolerance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import masks
from ..backends import registry
from ..core.tolerance import Tolerance
from ..functional import attention, varlen_attention

# ---- the calls ---------------------------------------------------------------------------------


class Draw:
    """Random tensors for one call, drawn on the CPU in fp64 so that every backend gets the same."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device)

    def bools(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.6).to(self.device)

    def ints(self, *values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Feature:
    """One call with q [2, heads, q_len, head_dim], or with packed sequences."""

    name: str
    options: Callable[[Draw], dict] = lambda draw: {}
    heads: int = 4
    kv_heads: int = 4
    q_len: int = 150
    kv_len: int = 230
    head_dim: int = 64
    v_dim: int = 64

    def call(self, dtype: torch.dtype, device: str):
        """(function, q, k, v, options)."""
        draw = Draw(dtype, device)
        options = self.options(draw)
        if "cu_seqlens_q" in options:
            q = draw.normal(self.q_len, self.heads, self.head_dim)
            k, v = (draw.normal(self.kv_len, self.kv_heads, n) for n in (self.head_dim, self.v_dim))
            return varlen_attention, q, k, v, options
        q = draw.normal(2, self.heads, self.q_len, self.head_dim)
        k, v = (draw.normal(2, self.kv_heads, self.kv_len, n) for n in (self.head_dim, self.v_dim))
        return attention, q, k, v, options


FEATURES = (
    Feature("plain"),
    Feature("causal", lambda d: {"causal": True}),
    Feature("causal, top left", lambda d: {"causal": True, "align": "start"}),
    Feature("window", lambda d: {"window": (40, 10)}),
    Feature("bool mask", lambda d: {"mask": d.bools(2, 4, 150, 230)}),
    Feature("padding mask", lambda d: {"mask": d.bools(2, 1, 1, 230)}),
    Feature("bias", lambda d: {"bias": d.normal(1, 4, 150, 230)}),
    Feature("ALiBi", lambda d: {"alibi_slopes": d.normal(4).float().abs() / 8, "causal": True}),
    Feature("softcap", lambda d: {"softcap": 2.0}),
    Feature("sinks", lambda d: {"sinks": d.normal(4), "window": (30, 0)}),
    Feature("kv_lens", lambda d: {"kv_lens": d.ints(97, 230), "causal": True}),
    Feature(
        "documents",
        lambda d: {"document_ids": d.ints(*[0] * 33, *[1] * 80, *[5] * 37), "causal": True},
        kv_len=150,
    ),
    Feature(
        "key ranges",
        lambda d: {
            "key_ranges": masks.chunked(64, 150, offset=80, device=d.device),
            "causal": True,
        },
    ),
    Feature("dropout", lambda d: {"dropout_p": 0.2, "dropout_seed": (3, 7)}),
    Feature("grouped heads", lambda d: {"causal": True}, heads=8, kv_heads=2),
    Feature("v_dim 40, D 80", head_dim=80, v_dim=40),
    Feature("D 256", lambda d: {"causal": True}, head_dim=256, v_dim=256),
    Feature("one row, many keys", lambda d: {"causal": True}, 8, 2, 1, 2000),
    Feature("rows that see nothing", lambda d: {"causal": True}, q_len=230, kv_len=150),
    Feature(
        "packed sequences",
        lambda d: {
            "cu_seqlens_q": d.ints(0, 60, 61, 150),
            "cu_seqlens_k": d.ints(0, 60, 90, 230),
            "max_seqlen_q": 89,
            "max_seqlen_k": 140,
            "causal": True,
        },
    ),
)
QUICK = ("plain", "causal", "bool mask", "bias", "dropout", "grouped heads", "packed sequences")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- one measurement ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """The largest error relative to the largest value, over output, lse and all gradients."""

    error: float
    torch_error: float
    failures: tuple[str, ...]


def results_of(feature: Feature, dtype: torch.dtype, device: str, backend: str, given=None) -> dict:
    """Output, lse and gradients in dtype, from inputs that were first rounded to `given`."""
    function, q, k, v, options = feature.call(given or dtype, device)
    tensors = {"q": q, "k": k, "v": v} | {n: options[n] for n in ("bias", "sinks") if n in options}
    leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    q, k, v = (leaves[name] for name in "qkv")
    options |= {name: x for name, x in leaves.items() if name in options}
    out, lse = function(q, k, v, **options, return_lse=True, backend=backend)
    draw = Draw(given or dtype, device)
    dout, dlse = draw.normal(*out.shape).to(dtype), draw.normal(*lse.shape).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    results = {"out": out.detach(), "lse": lse.detach()}
    results |= {f"d{name}": x for name, x in zip(leaves, gradients)}
    inputs = {name: x.detach() for name, x in leaves.items()}
    return results | {"inputs": (inputs["q"], inputs["k"], inputs["v"]), "cotangents": (dout, dlse)}


@cache
def truth(feature: Feature, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """(results in float64, results of plain torch in dtype), both from inputs rounded to dtype."""
    want = results_of(feature, torch.float64, device, "reference", given=dtype)
    compute = torch.promote_types(dtype, torch.float32)  # half precision: fp32, rounded once
    return want, results_of(feature, compute, device, "reference", given=dtype)


def measure(feature: Feature, dtype: torch.dtype, device: str, backend: str) -> Measurement:
    got = results_of(feature, dtype, device, backend)
    inputs, cotangents = got.pop("inputs"), got.pop("cotangents")
    want, plain = truth(feature, dtype, device)
    if backend == "reference":  # it is plain torch, so it is compared with the rounded truth
        plain = want
    rounded = registry.BY_NAME[backend].probs_rounded
    scale = inputs[0].shape[-1] ** -0.5
    tolerance = Tolerance(*inputs, scale, want["lse"], *cotangents, probs_rounded=rounded)
    errors, torch_errors, failures = [0.0], [0.0], []
    for name, result in got.items():
        rounded = plain[name].to(result.dtype)
        comparison = tolerance.compare(name, result, want[name], rounded)
        if not comparison.passed:
            failures.append(f"{name}: {comparison}")
        finite = want[name].isfinite()
        largest = want[name][finite].abs().amax()
        for x, found in ((result, errors), (rounded, torch_errors)):
            found.append(float((x.double() - want[name])[finite].abs().amax() / largest))
    return Measurement(max(errors), max(torch_errors), tuple(failures))

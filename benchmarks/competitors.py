"""Who fastattn is measured against: a table. Each says in one sentence why it cannot run, here or a
row, how it is called, and names the code it really ran."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case, eager

Forward = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Competitor:
    """One way to compute attention. dense: it may keep every weight, so it may not fit."""

    name: str
    about: str
    forward: Callable[[Case], Forward]
    missing: Callable[[str], str | None] = lambda device: None  # why it is not on this machine
    why_not: Callable[[Case], str | None] = lambda case: None  # why it cannot run this row
    backend: Callable[[Case, Forward], str] | None = None  # None: watched, see ran()
    dense: bool = False
    checks_dropout: bool = True  # its dropout draws can be repeated in float64


# ---- what ran -----------------------------------------------------------------------------------

SIGNS = {  # in an operator's name: what it is called in the tables
    "_flash_attention": "flash",
    "_efficient_attention": "efficient",
    "_cudnn_attention": "cudnn",
    "fused_attention_overrideable": "overrideable",
    "flash_attn::": "flash_attn",
    "xformers": "xformers",
}


class _Watch(TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def ran(forward: Forward) -> str:
    """The code that a call of torch's operators really runs, from watching one."""
    with _Watch() as watch:
        forward()
    for sign, name in SIGNS.items():
        if any(sign in seen for seen in watch.names):
            return name
    return "math" if any("bmm" in seen or "::mm" in seen for seen in watch.names) else "unknown"


def torch_backend(q, k, v, mask=None, dropout=0.0, causal=False, enable_gqa=False) -> str:
    """What torch's own scaled_dot_product_attention would choose for these operands."""
    choice = torch._fused_sdp_choice(
        q, k, v, mask, dropout, causal, scale=None, enable_gqa=enable_gqa
    )
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    return names.get(int(choice), f"unknown ({choice})").removesuffix("_ATTENTION").lower()


# ---- torch's SDPA, as a user of it would write each row -----------------------------------------


def _sdpa_arguments(case: Case) -> dict:
    row = case.row
    mask, causal = case.padding if case.padding is not None else case.shape_mask, row.causal
    if case.shape_mask is not None:
        causal = False  # it is in the mask
    if row.bias or row.alibi:
        bias = case.bias if case.bias is not None else case.alibi_bias
        if causal:  # torch refuses a mask beside is_causal on some devices, so it goes in
            mask, causal = case.causal_mask, False
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return {"attn_mask": mask, "dropout_p": row.dropout, "is_causal": causal}


def _sdpa(case: Case) -> Forward:
    arguments = _sdpa_arguments(case)
    return lambda: F.scaled_dot_product_attention(
        case.q, case.k, case.v, **arguments, enable_gqa=case.gqa
    )


def _by(backend: SDPBackend) -> Callable[[Case], Forward]:
    """SDPA held to one of its kernels."""

    def build(case: Case) -> Forward:
        forward = _sdpa(case)

        def held() -> Tensor:
            with sdpa_kernel(backend):
                return forward()

        return held

    return build


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else "this kernel of SDPA runs on CUDA devices only"


def _maskless_why_not(case: Case) -> str | None:
    if _sdpa_arguments(case)["attn_mask"] is not None:
        return "SDPA's flash kernel takes no mask and no bias"
    return _sdpa_why_not(case)


def _sdpa_why_not(case: Case) -> str | None:
    if case.row.softcap:
        return "scaled_dot_product_attention has no softcap"
    return None


# ---- plain operators ----------------------------------------------------------------------------


def visible(case: Case) -> list[Tensor | None]:
    """The masks that hide what a row does not see."""
    causal = case.causal_mask if case.row.causal and case.shape_mask is None else None
    return [case.padding, case.shape_mask, causal]


def _eager(case: Case) -> Forward:
    masks, row = visible(case), case.row
    biases = (case.bias, case.alibi_bias)
    options = {"masks": masks, "biases": biases, "softcap": row.softcap, "dropout": row.dropout}
    return lambda: eager(case.q, case.k, case.v, **options)


# ---- torch's flex_attention, compiled ------------------------------------------------------------


def _flex_missing(device: str) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} has no flex_attention"
    return None


def _flex_why_not(case: Case) -> str | None:
    row = case.row
    if row.dropout:
        return "flex_attention has no dropout"
    if row.backward and case.device == "cpu":
        return "flex_attention has no backward on a CPU"
    return None


def _flex(case: Case) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    row, slopes, bias, cap = case.row, case.slopes, case.bias, case.row.softcap
    ids, padding = case.document_ids, case.padding

    def seen(b, h, i, j):
        found = i == i
        if row.causal or row.window:
            found = found & (i >= j)
        if row.window:
            found = found & (i - j < row.window)
        if ids is not None:
            found = found & (ids[i] == ids[j])
        if row.chunk:
            found = found & (i // row.chunk == j // row.chunk)
        return found if padding is None else found & padding[b, 0, 0, j]

    def score(s, b, h, i, j):
        if cap:
            s = cap * torch.tanh(s / cap)
        if bias is not None:
            s = s + bias[0, h, i, j]
        return s if slopes is None else s - slopes[h] * (i - j).abs()

    masked = any(mask is not None for mask in visible(case))
    place = (row.q_len, row.keys, case.device)
    blocks = create_block_mask(seen, row.batch, None, *place) if masked else None
    scored = cap or bias is not None or slopes is not None
    torch._dynamo.reset()  # else the eighth row is refused: too many recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"score_mod": score if scored else None, "block_mask": blocks, "enable_gqa": case.gqa}
    return lambda: compiled(case.q, case.k, case.v, **options)


# ---- packages -----------------------------------------------------------------------------------


def _package(module: str, package: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if device != "cuda":
            return f"{package} runs on CUDA devices only"
        if importlib.util.find_spec(module) is None:
            return f"the package {package} is not installed (pip install {package})"
        return None

    return missing


def _halves_only(case: Case, *lacks: str) -> str | None:
    if case.row.dtype == "fp32":
        return "its kernels take fp16 and bf16 only"
    had = [name for name in lacks if getattr(case.row, name)]
    return f"it has no argument for {', '.join(had)}" if had else None


def _flash_attn(case: Case) -> Forward:
    from flash_attn import flash_attn_func

    row = case.row
    q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
    options = {"causal": row.causal or bool(row.window), "softcap": row.softcap}
    options |= {"window_size": (row.window - 1, 0) if row.window else (-1, -1)}
    options |= {"alibi_slopes": case.slopes}
    return lambda: flash_attn_func(q, k, v, row.dropout, **options).transpose(1, 2)


def _xformers(case: Case) -> Forward:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
    bias = LowerTriangularMask() if case.row.causal else case.bias
    p = case.row.dropout
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias, p=p).transpose(1, 2)


COMPETITORS = [
    Competitor("sdpa", "torch's scaled_dot_product_attention", _sdpa, why_not=_sdpa_why_not),
    Competitor("math", "its math path", _by(SDPBackend.MATH), why_not=_sdpa_why_not,
               dense=True),
    Competitor("sdpa-flash", "SDPA held to FlashAttention 2", _by(SDPBackend.FLASH_ATTENTION),
               _cuda_only, _maskless_why_not),
    Competitor("sdpa-efficient", "SDPA held to its memory-efficient kernel",
               _by(SDPBackend.EFFICIENT_ATTENTION), _cuda_only, _sdpa_why_not),
    Competitor("sdpa-cudnn", "SDPA held to cuDNN", _by(SDPBackend.CUDNN_ATTENTION), _cuda_only,
               _sdpa_why_not),
    Competitor("flex", "torch's flex_attention, compiled", _flex, _flex_missing, _flex_why_not,
               backend=lambda case, forward: "inductor"),
    Competitor("flash_attn", "the package flash-attn", _flash_attn,
               _package("flash_attn", "flash-attn"),
               lambda case: _halves_only(case, "bias", "padding", "documents", "chunk"),
               checks_dropout=False),
    Competitor("xformers", "xformers' memory_efficient_attention", _xformers,
               _package("xformers", "xformers"),
               lambda case: _halves_only(
                   case, "padding", "documents", "chunk", "alibi", "window", "softcap"),
               checks_dropout=False),
    Competitor("eager", "the formula in plain torch operators", _eager, dense=True),
]  # fmt: skip
BY_NAME = {row.name: row for row in COMPETITORS}


def named(names: str) -> list[Competitor]:
    """The competitors of a list with commas, each of which must be known, once."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in BY_NAME:
            raise ValueError(f"--vs: {name!r} is not known; accepted are {', '.join(BY_NAME)}")
    if len(set(asked)) != len(asked) or not asked:
        raise ValueError(f"--vs: got {names!r}, needs one or more names, each once")
    return [BY_NAME[name] for name in asked]

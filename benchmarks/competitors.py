"""The table of implementations that fastattn is measured against. Each one says in a sentence why
it cannot run on this machine or for this case, makes the call, and names the kernel that really
ran."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn

from .cases import Problem, eager

Forward = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Competitor:
    """One way to compute attention. `dense` ones materialise the probabilities, so they may run out
    of memory."""

    name: str
    about: str
    forward: Callable[[Problem], Forward]
    missing: Callable[[str], str | None] = lambda device: None  # why it cannot run here
    why_not: Callable[[Problem], str | None] = lambda problem: None  # or for this case
    backend: Callable[[Problem, Forward], str] | None = None  # None: observed by ran()
    dense: bool = False
    checks_dropout: bool = True  # its dropout draws can be repeated in float64


# ---- which kernel ran ---------------------------------------------------------------------------

SIGNS = {  # part of an operator's name: the kernel's name in the tables
    "_flash_attention": "flash",
    "_efficient_attention": "efficient",
    "_cudnn_attention": "cudnn",
    "fused_attention_overrideable": "overrideable",
    "flash_attn::": "flash_attn",
    "xformers": "xformers",
}


class _Watch(TorchDispatchMode):
    """Records the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def ran(forward: Forward) -> str:
    """The kernel that a call really runs, found by recording the operators of one call."""
    with _Watch() as watch:
        forward()
    for sign, name in SIGNS.items():
        if any(sign in seen for seen in watch.names):
            return name
    return "math" if any("bmm" in seen or "::mm" in seen for seen in watch.names) else "unknown"


def torch_backend(q, k, v, mask=None, dropout=0.0, causal=False, enable_gqa=False) -> str:
    """The backend that torch's scaled_dot_product_attention would choose for these operands."""
    choice = torch._fused_sdp_choice(
        q, k, v, mask, dropout, causal, scale=None, enable_gqa=enable_gqa
    )
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    return names.get(int(choice), f"unknown ({choice})").removesuffix("_ATTENTION").lower()


# ---- torch's SDPA, as a user would call it for each case ----------------------------------------


def _sdpa_arguments(problem: Problem) -> dict:
    case = problem.case
    mask, causal = (
        problem.padding if problem.padding is not None else problem.shape_mask,
        case.causal,
    )
    if problem.shape_mask is not None:
        causal = False  # the mask includes it
    if case.bias or case.alibi:
        bias = problem.bias if problem.bias is not None else problem.alibi_bias
        if causal:  # some devices refuse a mask with is_causal, so it joins the mask
            mask, causal = problem.causal_mask, False
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return {"attn_mask": mask, "dropout_p": case.dropout, "is_causal": causal}


def _sdpa(problem: Problem) -> Forward:
    arguments = _sdpa_arguments(problem)
    return lambda: F.scaled_dot_product_attention(
        problem.q, problem.k, problem.v, **arguments, enable_gqa=problem.gqa
    )


def _by(backend: SDPBackend) -> Callable[[Problem], Forward]:
    """SDPA restricted to one of its kernels."""

    def build(problem: Problem) -> Forward:
        forward = _sdpa(problem)

        def restricted() -> Tensor:
            with sdpa_kernel(backend):
                return forward()

        return restricted

    return build


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else "this kernel of SDPA runs on CUDA devices only"


def _maskless_why_not(problem: Problem) -> str | None:
    if _sdpa_arguments(problem)["attn_mask"] is not None:
        return "SDPA's flash kernel takes no mask and no bias"
    return _sdpa_why_not(problem)


def _sdpa_why_not(problem: Problem) -> str | None:
    if problem.case.softcap:
        return "scaled_dot_product_attention has no softcap"
    return None


# ---- plain operators ----------------------------------------------------------------------------


def visible(problem: Problem) -> list[Tensor | None]:
    """The masks that together hide every key that a query may not see."""
    causal = problem.causal_mask if problem.case.causal and problem.shape_mask is None else None
    return [problem.padding, problem.shape_mask, causal]


def _eager(problem: Problem) -> Forward:
    masks, case = visible(problem), problem.case
    biases = (problem.bias, problem.alibi_bias)
    options = {"masks": masks, "biases": biases, "softcap": case.softcap, "dropout": case.dropout}
    return lambda: eager(problem.q, problem.k, problem.v, **options)


# ---- fastattn's own forward, which says what statistics and tangents cost ------------------------

BARE = "bare"


def _bare(problem: Problem) -> Forward:
    q, k, v = problem.q, problem.k, problem.v  # without the tangents that the case's call gets
    options = problem.call_options()
    return lambda: fastattn.attention(q, k, v, **options)


def _bare_why_not(problem: Problem) -> str | None:
    if problem.case.stats or problem.case.mode == "jvp":
        return None
    return "the case has neither statistics nor tangents"


# ---- torch's flex_attention, compiled ------------------------------------------------------------


def _flex_missing(device: str) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} has no flex_attention"
    return None


def _flex_why_not(problem: Problem) -> str | None:
    case = problem.case
    if case.dropout:
        return "flex_attention has no dropout"
    if case.backward and problem.device == "cpu":
        return "flex_attention has no backward on a CPU"
    return None


def _flex(problem: Problem) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, slopes, bias, cap = problem.case, problem.slopes, problem.bias, problem.case.softcap
    ids, padding = problem.document_ids, problem.padding

    def seen(b, h, i, j):
        found = i == i
        if case.causal or case.window:
            found = found & (i >= j)
        if case.window:
            found = found & (i - j < case.window)
        if ids is not None:
            found = found & (ids[i] == ids[j])
        if case.chunk:
            found = found & (i // case.chunk == j // case.chunk)
        return found if padding is None else found & padding[b, 0, 0, j]

    def score(s, b, h, i, j):
        if cap:
            s = cap * torch.tanh(s / cap)
        if bias is not None:
            s = s + bias[0, h, i, j]
        return s if slopes is None else s - slopes[h] * (i - j).abs()

    masked = any(mask is not None for mask in visible(problem))
    place = (case.q_len, case.keys, problem.device)
    blocks = create_block_mask(seen, case.batch, None, *place) if masked else None
    scored = cap or bias is not None or slopes is not None
    torch._dynamo.reset()  # else the eighth case exceeds the recompilation limit
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {
        "score_mod": score if scored else None,
        "block_mask": blocks,
        "enable_gqa": problem.gqa,
    }
    return lambda: compiled(problem.q, problem.k, problem.v, **options)


# ---- packages -----------------------------------------------------------------------------------


def _package(module: str, package: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if device != "cuda":
            return f"{package} runs on CUDA devices only"
        if importlib.util.find_spec(module) is None:
            return f"the package {package} is not installed (pip install {package})"
        return None

    return missing


def _half_precision_only(problem: Problem, *lacks: str) -> str | None:
    if problem.case.dtype == "fp32":
        return "its kernels take fp16 and bf16 only"
    had = [name for name in lacks if getattr(problem.case, name)]
    return f"it has no argument for {', '.join(had)}" if had else None


def _flash_attn(problem: Problem) -> Forward:
    from flash_attn import flash_attn_func

    case = problem.case
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    options = {"causal": case.causal or bool(case.window), "softcap": case.softcap}
    options |= {"window_size": (case.window - 1, 0) if case.window else (-1, -1)}
    options |= {"alibi_slopes": problem.slopes}
    return lambda: flash_attn_func(q, k, v, case.dropout, **options).transpose(1, 2)


def _xformers(problem: Problem) -> Forward:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    bias = LowerTriangularMask() if problem.case.causal else problem.bias
    p = problem.case.dropout
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias, p=p).transpose(1, 2)


COMPETITORS = [
    Competitor("sdpa", "torch's scaled_dot_product_attention", _sdpa, why_not=_sdpa_why_not),
    Competitor("math", "its math path", _by(SDPBackend.MATH), why_not=_sdpa_why_not,
               dense=True),
    Competitor("sdpa-flash", "SDPA restricted to FlashAttention 2", _by(SDPBackend.FLASH_ATTENTION),
               _cuda_only, _maskless_why_not),
    Competitor("sdpa-efficient", "SDPA restricted to its memory-efficient kernel",
               _by(SDPBackend.EFFICIENT_ATTENTION), _cuda_only, _sdpa_why_not),
    Competitor("sdpa-cudnn", "SDPA restricted to cuDNN", _by(SDPBackend.CUDNN_ATTENTION),
               _cuda_only, _sdpa_why_not),
    Competitor("flex", "torch's flex_attention, compiled", _flex, _flex_missing, _flex_why_not,
               backend=lambda problem, forward: "inductor"),
    Competitor("flash_attn", "the package flash-attn", _flash_attn,
               _package("flash_attn", "flash-attn"),
               lambda problem: _half_precision_only(
                   problem, "bias", "padding", "documents", "chunk"),
               checks_dropout=False),
    Competitor("xformers", "xformers' memory_efficient_attention", _xformers,
               _package("xformers", "xformers"),
               lambda problem: _half_precision_only(
                   problem, "padding", "documents", "chunk", "alibi", "window", "softcap"),
               checks_dropout=False),
    Competitor("eager", "the formula in plain torch operators", _eager, dense=True),
    Competitor(BARE, "fastattn's own forward, without the case's statistics and tangents", _bare,
               why_not=_bare_why_not, backend=lambda problem, forward: problem.fastattn_backend()),
]  # fmt: skip
BY_NAME = {competitor.name: competitor for competitor in COMPETITORS}


def named(names: str) -> list[Competitor]:
    """The competitors in a comma-separated list. Unknown and repeated names are refused."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in BY_NAME:
            raise ValueError(f"--vs: {name!r} is not known; accepted are {', '.join(BY_NAME)}")
    if len(set(asked)) != len(asked) or not asked:
        raise ValueError(f"--vs: got {names!r}, needs one or more names, each once")
    return [BY_NAME[name] for name in asked]

"""A benchmark case: AttentionCase describes it as data, Problem holds its tensors and counts its
work. Next hop: suites.py for the lists of cases, competitors.py for the implementations that run
them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn.core.work import MODES, Work, attention_work, pairs_of_band

SEED = 20  # for the inputs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the modes, in a case's name. "jvp" is the forward with tangents of q, k and v, "double" the
# forward, the backward and the backward of that.
LABELS = {"fwd": "fwd", "bwd": "bwd", "fwdbwd": "fwd+bwd", "jvp": "jvp", "double": "double"}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One attention call to measure. `floor` is the project's target on a two-core AVX2 machine,
    SDPA's time / fastattn's, or 0 for none. Reports show it; no test depends on it."""

    group: str
    floor: float = 0.0
    dtype: str = "fp32"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    q_len: int = 512
    kv_len: int = 0  # 0: q_len
    dim: int = 64
    causal: bool = False  # top-left aligned, as in SDPA
    window: int = 0  # keys per query, its own included; a bool mask where windows are missing
    padding: bool = False  # a bool mask [B, 1, 1, S] hides the second half of the keys
    bias: bool = False  # a learned bias [1, H, S, S]
    alibi: bool = False  # slopes per head; a bias where ALiBi is missing
    documents: int = 0  # number of equally long documents packed into the sequence
    chunk: int = 0  # tokens per chunk of chunked attention: a token sees its own chunk only
    softcap: float = 0.0
    dropout: float = 0.0
    stats: str = ""  # names of statistics, separated by commas, that the forward computes too
    mode: str = "fwd"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, accepted are {', '.join(MODES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, accepted are {', '.join(DTYPES)}")

    @property
    def keys(self) -> int:
        return self.kv_len or self.q_len

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.mode in ("bwd", "fwdbwd", "double")

    @property
    def options(self) -> list[str]:
        """The options beyond plain attention, as they appear in the name."""
        flags = ("causal", "padding", "bias", "alibi")
        numbers = {"window": "window", "documents": "documents", "chunk": "chunk",
                   "softcap": "softcap"}  # fmt: skip
        return [
            *(flag for flag in flags if getattr(self, flag)),
            *(f"{word} {getattr(self, name):g}" for name, word in numbers.items()
              if getattr(self, name)),
            *([f"p {self.dropout:g}"] if self.dropout else []),
            *([f"+{self.stats}"] if self.stats else []),
        ]  # fmt: skip

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" + ("" if self.heads == self.kv_heads else f"/{self.kv_heads}")
        lengths = f"S{self.keys}" if self.q_len in (1, self.keys) else f"S{self.q_len}x{self.keys}"
        batch = [f"B{self.batch}"] if self.batch > 1 else []
        parts = [self.group, self.dtype, LABELS[self.mode], *batch, heads, f"D{self.dim}", lengths]
        return " ".join([*parts, *self.options])


class Problem:
    """The tensors of a case on a device. They are made once, outside every timing."""

    def __init__(self, case: AttentionCase, device: str = "cpu") -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(device)

        self.q = normal(case.batch, case.heads, case.q_len, case.dim)
        self.k = normal(case.batch, case.kv_heads, case.keys, case.dim)
        self.v = normal(case.batch, case.kv_heads, case.keys, case.dim)
        self.dout = normal(case.batch, case.heads, case.q_len, case.dim) if case.backward else None
        self.bias = normal(1, case.heads, case.q_len, case.keys) if case.bias else None
        # of q, k and v in mode jvp; cotangents of all gradients in mode double
        directions = {"jvp": self.inputs[:3], "double": self.inputs}.get(case.mode, [])
        self.tangents = [normal(*x.shape) for x in directions]
        if case.backward:
            for tensor in self.inputs:
                tensor.requires_grad_()

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v] + ([] if self.bias is None else [self.bias])

    @property
    def gqa(self) -> bool:
        return self.case.heads != self.case.kv_heads

    @cached_property
    def slopes(self) -> Tensor | None:
        """fp32 [heads], ALiBi's powers of two."""
        heads = torch.arange(1, self.case.heads + 1, device=self.device)
        return torch.exp2(-8.0 * heads / self.case.heads) if self.case.alibi else None

    @cached_property
    def document_ids(self) -> Tensor | None:
        """int32 [q_len]."""
        case = self.case
        if not case.documents:
            return None
        return (torch.arange(case.q_len, device=self.device) * case.documents // case.q_len).int()

    @cached_property
    def padding(self) -> Tensor | None:
        """bool [B, 1, 1, keys]."""
        if not self.case.padding:
            return None
        seen = torch.arange(self.case.keys, device=self.device) < self.case.keys // 2
        return seen.expand(self.case.batch, 1, 1, -1).contiguous()

    @cached_property
    def shape_mask(self) -> Tensor | None:
        """bool [q_len, keys]: windows, documents and chunks as a mask, for implementations that
        lack these options. It includes causality if the case has one of them."""
        case = self.case
        if not (case.window or case.documents or case.chunk):
            return None
        age = torch.arange(case.q_len, device=self.device)[:, None] - torch.arange(
            case.keys, device=self.device
        )
        seen = torch.ones_like(age, dtype=torch.bool)
        if case.causal or case.window:
            seen &= age >= 0
        if case.window:
            seen &= age < case.window
        if case.documents:
            seen &= self.document_ids[:, None] == self.document_ids
        if case.chunk:
            chunk = torch.arange(case.q_len, device=self.device) // case.chunk
            seen &= chunk[:, None] == chunk
        return seen

    @cached_property
    def alibi_bias(self) -> Tensor | None:
        """-slope |i - j| as a bias [1, heads, q_len, keys], for implementations without ALiBi."""
        if self.slopes is None:
            return None
        case = self.case
        rows, keys = (torch.arange(n, device=self.device) for n in (case.q_len, case.keys))
        return (-self.slopes[:, None, None] * (rows[:, None] - keys).abs())[None].to(self.dtype)

    @cached_property
    def causal_mask(self) -> Tensor:
        """bool [q_len, keys]."""
        case = self.case
        return torch.ones(case.q_len, case.keys, dtype=torch.bool, device=self.device).tril()

    def step(
        self, forward: Callable[[], Tensor], mode: str = ""
    ) -> Callable[[], tuple[Tensor, ...]]:
        """The function to time, in the case's mode unless another is given. It returns (out,), or
        (out, dq, dk, dv, dbias), or in mode jvp (out, tout). In mode double the gradients are those
        of the first gradients' product with `tangents`. In mode bwd the forward pass runs once,
        here, and every call repeats its backward pass."""
        mode = mode or self.case.mode
        if mode == "fwd":
            return lambda: (forward(),)
        if mode == "jvp":
            return lambda: self._with_tangents(forward)
        inputs, dout = self.inputs, self.dout
        if mode == "bwd":
            kept = forward()
            return lambda: (kept, *torch.autograd.grad(kept, inputs, dout, retain_graph=True))

        def step() -> tuple[Tensor, ...]:
            out = forward()
            if mode == "fwdbwd":
                return (out, *torch.autograd.grad(out, inputs, dout))
            first = torch.autograd.grad(out, inputs, dout, create_graph=True)
            return (out, *torch.autograd.grad(first, inputs, self.tangents))

        return step

    def _with_tangents(self, forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """(out, tout) of a forward that reads this problem's tensors."""
        primals = self.q, self.k, self.v
        with forward_ad.dual_level():
            try:
                self.q, self.k, self.v = map(forward_ad.make_dual, primals, self.tangents)
                return tuple(forward_ad.unpack_dual(forward()))
            finally:
                self.q, self.k, self.v = primals

    def double(self) -> Problem:
        """The same problem in float64."""
        twin = copy(self)
        twin.__dict__.pop("alibi_bias", None)
        twin.dtype = torch.float64
        for name in ("q", "k", "v", "dout", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                twin_tensor = tensor.detach().double().requires_grad_(tensor.requires_grad)
                setattr(twin, name, twin_tensor)
        twin.tangents = [x.double() for x in self.tangents]
        return twin

    # ---- fastattn ----

    def fastattn(self) -> Callable[[], Tensor]:
        """The forward call: the SDPA drop-in if torch's signature has the options, else
        attention()."""
        case = self.case
        if case.stats:
            options = self.call_options() | {"return_stats": case.stats.split(",")}
            return lambda: fastattn.attention(self.q, self.k, self.v, **options)[0]
        if case.window or case.alibi or case.documents or case.chunk or case.softcap:
            options = self.call_options()
            return lambda: fastattn.attention(self.q, self.k, self.v, **options)
        mask = self.bias if case.bias else self.padding
        return lambda: fastattn.scaled_dot_product_attention(
            *(self.q, self.k, self.v, mask, case.dropout, case.causal), enable_gqa=self.gqa
        )

    def call_options(self) -> dict:
        """attention()'s keyword arguments for this case."""
        case, ranges = self.case, None
        if case.chunk:
            ranges = fastattn.masks.chunked(case.chunk, case.q_len, device=self.device)
        return {
            "causal": case.causal,
            "window": (case.window - 1, 0) if case.window else None,
            "align": "start",
            "mask": self.padding,
            "bias": self.bias,
            "alibi_slopes": self.slopes,
            "document_ids": self.document_ids,
            "key_ranges": ranges,
            "softcap": case.softcap,
            "dropout_p": case.dropout,
        }

    def fastattn_backend(self) -> str:
        """The backend that fastattn selects for these operands, as explain() reports it."""
        found = fastattn.explain(self.q, self.k, self.v, **self.call_options())
        return f"{found.backend}, {found.isa}" if found.isa else str(found.backend)

    # ---- work ----

    def work(self) -> Work:
        case = self.case
        keys = case.keys // 2 if case.padding else case.keys  # hidden keys need not be read
        left, right = (case.window - 1, 0) if case.window else (-1, 0 if case.causal else -1)
        if case.documents or case.chunk:
            ids = self.document_ids
            if ids is None:
                ids = torch.arange(case.q_len) // case.chunk
            lengths = torch.bincount(ids).tolist()
            pairs = sum(pairs_of_band(n, n, left=left, right=right) for n in lengths)
        else:
            pairs = pairs_of_band(case.q_len, keys, left=left, right=right)
        return attention_work(
            pairs=pairs * case.batch * case.heads,
            batch=case.batch,
            heads=case.heads,
            kv_heads=case.kv_heads,
            q_len=case.q_len,
            kv_len=keys,
            dim=case.dim,
            itemsize=DTYPES[case.dtype].itemsize,
            mask_bytes=self.padding.numel() if case.padding else 0,
            bias_bytes=self.bias.numel() * self.bias.itemsize if case.bias else 0,
            mode=case.mode,
        )

    def dense_bytes(self) -> int:
        """The least memory of an implementation that materialises scores and probabilities: both
        matrices, and in the backward pass their gradients."""
        case = self.case
        pairs = case.batch * case.heads * case.q_len * case.keys
        return pairs * self.q.itemsize * (4 if case.backward else 2)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    masks: Sequence[Tensor | None] = (),
    biases: Sequence[Tensor | None] = (),
    softcap: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """The attention formula in plain torch, in the dtype of its inputs. In float64 it is the
    reference for the other results. Masks and biases broadcast to [B, H, q_len, keys]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in biases:
        if bias is not None:
            scores = scores + bias
    for mask in masks:
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
    probs = scores.softmax(-1)
    return (F.dropout(probs, dropout) if dropout else probs) @ v

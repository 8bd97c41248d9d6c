"""A cell of the benchmark: a row as data, and as tensors with the work they are. Next hop:
suites.py for the lists of rows, competitors.py for who computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.core.work import MODES, Work, attention_work, pairs_of_band

SEED = 20  # of the inputs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LABELS = {"fwd": "fwd", "bwd": "bwd", "fwdbwd": "fwd+bwd"}  # of the modes, in a row's name


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `floor` is the ratio to SDPA that the project asks of a two-core AVX2
    machine (SDPA's time / fastattn's), 0 where it asks for none: information, never a test."""

    group: str
    floor: float = 0.0
    dtype: str = "fp32"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    q_len: int = 512
    kv_len: int = 0  # 0: q_len
    dim: int = 64
    causal: bool = False  # from the top left, as SDPA's
    window: int = 0  # that many keys, the newest one included; who lacks windows gets a bool mask
    padding: bool = False  # a bool mask [B, 1, 1, S] hides the second half of the keys
    bias: bool = False  # a learned bias [1, H, S, S]
    alibi: bool = False  # slopes by head; who lacks them gets them as a bias
    documents: int = 0  # that many of equal length in a row
    chunk: int = 0  # tokens see only the chunk of that many which they are in
    softcap: float = 0.0
    dropout: float = 0.0
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
        return self.mode != "fwd"

    @property
    def options(self) -> list[str]:
        """What is more than plain attention, in words."""
        flags = ("causal", "padding", "bias", "alibi")
        numbers = {"window": "window", "documents": "documents", "chunk": "chunk",
                   "softcap": "softcap"}  # fmt: skip
        return [
            *(flag for flag in flags if getattr(self, flag)),
            *(f"{word} {getattr(self, name):g}" for name, word in numbers.items()
              if getattr(self, name)),
            *([f"p {self.dropout:g}"] if self.dropout else []),
        ]  # fmt: skip

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" + ("" if self.heads == self.kv_heads else f"/{self.kv_heads}")
        lengths = f"S{self.keys}" if self.q_len in (1, self.keys) else f"S{self.q_len}x{self.keys}"
        batch = [f"B{self.batch}"] if self.batch > 1 else []
        parts = [self.group, self.dtype, LABELS[self.mode], *batch, heads, f"D{self.dim}", lengths]
        return " ".join([*parts, *self.options])


class Case:
    """The tensors of a row on a device, made once, outside every timing."""

    def __init__(self, row: Row, device: str = "cpu") -> None:
        self.row, self.device, self.dtype = row, device, DTYPES[row.dtype]
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(device)

        self.q = normal(row.batch, row.heads, row.q_len, row.dim)
        self.k = normal(row.batch, row.kv_heads, row.keys, row.dim)
        self.v = normal(row.batch, row.kv_heads, row.keys, row.dim)
        self.dout = normal(row.batch, row.heads, row.q_len, row.dim) if row.backward else None
        self.bias = normal(1, row.heads, row.q_len, row.keys) if row.bias else None
        if row.backward:
            for tensor in self.inputs:
                tensor.requires_grad_()

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v] + ([] if self.bias is None else [self.bias])

    @property
    def gqa(self) -> bool:
        return self.row.heads != self.row.kv_heads

    @cached_property
    def slopes(self) -> Tensor | None:
        """fp32 [heads], ALiBi's powers of two."""
        heads = torch.arange(1, self.row.heads + 1, device=self.device)
        return torch.exp2(-8.0 * heads / self.row.heads) if self.row.alibi else None

    @cached_property
    def document_ids(self) -> Tensor | None:
        """int32 [q_len]."""
        row = self.row
        if not row.documents:
            return None
        return (torch.arange(row.q_len, device=self.device) * row.documents // row.q_len).int()

    @cached_property
    def padding(self) -> Tensor | None:
        """bool [B, 1, 1, keys]."""
        if not self.row.padding:
            return None
        seen = torch.arange(self.row.keys, device=self.device) < self.row.keys // 2
        return seen.expand(self.row.batch, 1, 1, -1).contiguous()

    @cached_property
    def shape_mask(self) -> Tensor | None:
        """What window, documents and chunks show, for those who have none: bool [q_len, keys];
        causal is in it where there is one of them."""
        row = self.row
        if not (row.window or row.documents or row.chunk):
            return None
        age = torch.arange(row.q_len, device=self.device)[:, None] - torch.arange(
            row.keys, device=self.device
        )
        seen = torch.ones_like(age, dtype=torch.bool)
        if row.causal or row.window:
            seen &= age >= 0
        if row.window:
            seen &= age < row.window
        if row.documents:
            seen &= self.document_ids[:, None] == self.document_ids
        if row.chunk:
            chunk = torch.arange(row.q_len, device=self.device) // row.chunk
            seen &= chunk[:, None] == chunk
        return seen

    @cached_property
    def alibi_bias(self) -> Tensor | None:
        """-slope |i - j| as a bias [1, heads, q_len, keys], for those who have no slopes."""
        if self.slopes is None:
            return None
        row = self.row
        rows, keys = (torch.arange(n, device=self.device) for n in (row.q_len, row.keys))
        return (-self.slopes[:, None, None] * (rows[:, None] - keys).abs())[None].to(self.dtype)

    @cached_property
    def causal_mask(self) -> Tensor:
        """bool [q_len, keys]."""
        row = self.row
        return torch.ones(row.q_len, row.keys, dtype=torch.bool, device=self.device).tril()

    def step(
        self, forward: Callable[[], Tensor], mode: str = ""
    ) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed, in the row's mode unless another is named: (out,), or (out, dq, dk, dv,
        dbias). In mode bwd one forward pass is run here and every call goes back through it."""
        mode = mode or self.row.mode
        if mode == "fwd":
            return lambda: (forward(),)
        inputs, dout = self.inputs, self.dout
        if mode == "bwd":
            kept = forward()
            return lambda: (kept, *torch.autograd.grad(kept, inputs, dout, retain_graph=True))

        def step() -> tuple[Tensor, ...]:
            out = forward()
            return (out, *torch.autograd.grad(out, inputs, dout))

        return step

    def double(self) -> Case:
        """The same case in float64."""
        twin = copy(self)
        twin.__dict__.pop("alibi_bias", None)
        twin.dtype = torch.float64
        for name in ("q", "k", "v", "dout", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                twin_tensor = tensor.detach().double().requires_grad_(tensor.requires_grad)
                setattr(twin, name, twin_tensor)
        return twin

    # ---- fastattn ----

    def fastattn(self) -> Callable[[], Tensor]:
        """The forward call: the drop-in where torch's signature can say it, else attention()."""
        row = self.row
        if row.window or row.alibi or row.documents or row.chunk or row.softcap:
            options = self.call_options()
            return lambda: fastattn.attention(self.q, self.k, self.v, **options)
        mask = self.bias if row.bias else self.padding
        return lambda: fastattn.scaled_dot_product_attention(
            *(self.q, self.k, self.v, mask, row.dropout, row.causal), enable_gqa=self.gqa
        )

    def call_options(self) -> dict:
        """attention()'s keyword arguments for this row."""
        row, ranges = self.row, None
        if row.chunk:
            ranges = fastattn.masks.chunked(row.chunk, row.q_len, device=self.device)
        return {
            "causal": row.causal,
            "window": (row.window - 1, 0) if row.window else None,
            "align": "start",
            "mask": self.padding,
            "bias": self.bias,
            "alibi_slopes": self.slopes,
            "document_ids": self.document_ids,
            "key_ranges": ranges,
            "softcap": row.softcap,
            "dropout_p": row.dropout,
        }

    def fastattn_backend(self) -> str:
        """What fastattn runs for these operands, from its own explain()."""
        found = fastattn.explain(self.q, self.k, self.v, **self.call_options())
        return f"{found.backend}, {found.isa}" if found.isa else str(found.backend)

    # ---- work ----

    def work(self) -> Work:
        row = self.row
        keys = row.keys // 2 if row.padding else row.keys  # hidden keys need not be read
        left, right = (row.window - 1, 0) if row.window else (-1, 0 if row.causal else -1)
        if row.documents or row.chunk:
            ids = self.document_ids
            if ids is None:
                ids = torch.arange(row.q_len) // row.chunk
            lengths = torch.bincount(ids).tolist()
            pairs = sum(pairs_of_band(n, n, left=left, right=right) for n in lengths)
        else:
            pairs = pairs_of_band(row.q_len, keys, left=left, right=right)
        return attention_work(
            pairs=pairs * row.batch * row.heads,
            batch=row.batch,
            heads=row.heads,
            kv_heads=row.kv_heads,
            q_len=row.q_len,
            kv_len=keys,
            dim=row.dim,
            itemsize=DTYPES[row.dtype].itemsize,
            mask_bytes=self.padding.numel() if row.padding else 0,
            bias_bytes=self.bias.numel() * self.bias.itemsize if row.bias else 0,
            mode=row.mode,
        )

    def dense_bytes(self) -> int:
        """What keeping the weights takes at least: scores and weights, and their gradients."""
        row = self.row
        pairs = row.batch * row.heads * row.q_len * row.keys
        return pairs * self.q.itemsize * (4 if row.backward else 2)


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
    """Attention as it is written down, in the dtype of its inputs: the truth in float64, and what
    an "eager" implementation runs. Masks and biases broadcast to [B, H, q_len, keys]."""
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
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v

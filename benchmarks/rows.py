"""The benchmark's rows as data, and a row as tensors and two callables. bench.py measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import fastattn

from . import timing
from .timing import Work

SEED = 20  # of the inputs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- the rows ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `floor` is the ratio asked for (torch's time / fastattn's)."""

    group: str
    floor: float
    dtype: str = "fp32"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    q_len: int = 512
    kv_len: int = 0  # 0: q_len
    dim: int = 64
    causal: bool = False
    window: int = 0  # that many keys, the newest one included; torch gets a bool mask
    padding: bool = False  # a bool mask [B, 1, 1, S] hides the second half of the keys
    bias: bool = False  # a learned bias [1, H, S, S]
    dropout: float = 0.0
    backward: bool = False

    @property
    def keys(self) -> int:
        return self.kv_len or self.q_len

    @property
    def name(self) -> str:
        shape = f"B{self.batch} " if self.batch > 1 else ""
        shape += (
            f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        )
        extras = ("causal", "padding", "bias")
        parts = [
            self.group,
            self.dtype,
            "fwd+bwd" if self.backward else "fwd",
            shape,
            f"D{self.dim}",
            f"S{self.keys}",
            *(extra for extra in extras if getattr(self, extra)),
            *([f"window {self.window}"] if self.window else []),
            *([f"p {self.dropout}"] if self.dropout else []),
        ]
        return " ".join(parts)


def _rows() -> Iterator[Row]:
    for q_len in (512, 1024, 2048, 4096):
        for causal in (False, True):
            yield Row("dense", 1.5 if causal else 1.25, q_len=q_len, causal=causal)
    for q_len in (1024, 2048, 4096):
        yield Row("dense", 1.0, q_len=q_len, dim=128)
    for q_len in (512, 1024, 2048):
        for causal in (False, True):
            yield Row("train", 1.6 if causal else 1.3, q_len=q_len, causal=causal, backward=True)
    for dtype in ("bf16", "fp16"):
        for q_len in (512, 1024):
            yield Row("half", 1.3, dtype, q_len=q_len)
            yield Row("half", 1.3, dtype, q_len=q_len, causal=True)
            yield Row("half", 5.0, dtype, q_len=q_len, backward=True)
    for dtype, floor in (("fp32", 3.0), ("bf16", 8.0)):
        for kv_len in (2048, 4096, 8192, 16384):
            yield Row("decode", floor, dtype, 1, 32, 8, q_len=1, kv_len=kv_len, dim=128)
    for q_len in (512, 1024, 2048):
        for group, options in (("dropout", {"dropout": 0.1}), ("bias", {"bias": True})):
            yield Row(group, 3.0, q_len=q_len, backward=True, **options)
            if q_len < 2048:
                yield Row(group, 3.0, "bf16", q_len=q_len, backward=True, **options)
    yield Row("dropout", 3.0, q_len=512, causal=True, dropout=0.1, backward=True)
    yield Row("bias", 3.0, batch=4, q_len=512, bias=True, backward=True)  # one bias for the batch
    yield Row("window", 6.0, q_len=4096, window=256)
    for backward in (False, True):
        yield Row("padding", 1.8, batch=4, q_len=512, padding=True, backward=backward)
    for q_len in (16, 32, 64):
        for backward in (False, True):
            yield Row("short", 1.0, batch=64, q_len=q_len, backward=backward)


ROWS = tuple(_rows())


# ---- a row as tensors and callables -----------------------------------------------------------


def torch_backend(q, k, v, mask=None, dropout=0.0, causal=False, enable_gqa=False) -> str:
    """What torch's own scaled_dot_product_attention runs for these operands."""
    choice = torch._fused_sdp_choice(
        q, k, v, mask, dropout, causal, scale=None, enable_gqa=enable_gqa
    )
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    return names.get(int(choice), f"unknown ({choice})").removesuffix("_ATTENTION").lower()


class Case:
    """The tensors of a row, the two contenders, and what they must agree with."""

    def __init__(self, row: Row) -> None:
        self.row, dtype = row, DTYPES[row.dtype]
        self.dtype = dtype
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.q = normal(row.batch, row.heads, row.q_len, row.dim)
        self.k = normal(row.batch, row.kv_heads, row.keys, row.dim)
        self.v = normal(row.batch, row.kv_heads, row.keys, row.dim)
        self.dout = normal(row.batch, row.heads, row.q_len, row.dim) if row.backward else None
        self.bias = normal(1, row.heads, row.q_len, row.keys) if row.bias else None
        self.mask = self._mask()
        if row.backward:
            for tensor in self.inputs:
                tensor.requires_grad_()

    def _mask(self) -> Tensor | None:
        """The bool mask torch is given; built once, outside every timing."""
        row = self.row
        keys = torch.arange(row.keys)
        if row.padding:
            return (keys < row.keys // 2).expand(row.batch, 1, 1, row.keys).contiguous()
        if row.window:
            age = torch.arange(row.q_len)[:, None] - keys
            return (age >= 0) & (age < row.window)
        return None

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v] + ([] if self.bias is None else [self.bias])

    # ---- contenders ----

    def sdpa(self, call: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """`call` with torch's signature on this row's tensors."""
        row = self.row
        mask = self.bias if row.bias else self.mask
        gqa = row.heads != row.kv_heads
        return lambda: call(self.q, self.k, self.v, mask, row.dropout, row.causal, enable_gqa=gqa)

    def torch(self) -> Callable[[], object]:
        return self.step(self.sdpa(F.scaled_dot_product_attention))

    def fastattn(self) -> Callable[[], object]:
        if self.row.window:  # the one thing here that torch's signature cannot say
            window = (self.row.window - 1, 0)
            return self.step(lambda: fastattn.attention(self.q, self.k, self.v, window=window))
        return self.step(self.sdpa(fastattn.scaled_dot_product_attention))

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """Forward, or forward and every gradient: (out, dq, dk, dv, dbias)."""
        if not self.row.backward:
            return lambda: (forward(),)
        inputs, dout = self.inputs, self.dout

        def step() -> tuple[Tensor, ...]:
            out = forward()
            return (out, *torch.autograd.grad(out, inputs, dout))

        return step

    def torch_backend(self) -> str:
        row = self.row
        mask = self.bias if row.bias else self.mask
        gqa = row.heads != row.kv_heads
        return torch_backend(self.q, self.k, self.v, mask, row.dropout, row.causal, gqa)

    def fastattn_backend(self) -> str:
        """What fastattn runs for these operands, from its own explain()."""
        row = self.row
        window = (row.window - 1, 0) if row.window else None
        return fastattn.explain(
            *(self.q, self.k, self.v),
            causal=row.causal,
            window=window,
            align="start",
            mask=None if row.window else self.mask,
            bias=self.bias,
            dropout_p=row.dropout,
        ).backend

    def double(self) -> Case:
        """The same case in float64."""
        twin = copy(self)
        for name in ("q", "k", "v", "dout", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                twin_tensor = tensor.detach().double().requires_grad_(tensor.requires_grad)
                setattr(twin, name, twin_tensor)
        return twin

    # ---- work ----

    def work(self) -> Work:
        row = self.row
        keys = row.keys // 2 if row.padding else row.keys  # hidden keys need not be read
        left, right = (row.window - 1, 0) if row.window else (-1, 0 if row.causal else -1)
        pairs = timing.visible_pairs(row.q_len, keys, left=left, right=right)
        return timing.attention_work(
            pairs=pairs * row.batch * row.heads,
            batch=row.batch,
            heads=row.heads,
            kv_heads=row.kv_heads,
            q_len=row.q_len,
            kv_len=keys,
            dim=row.dim,
            itemsize=self.dtype.itemsize,
            mask_bytes=self.mask.numel() if row.padding else 0,
            bias_bytes=self.bias.numel() * self.bias.itemsize if row.bias else 0,
            backward=row.backward,
        )

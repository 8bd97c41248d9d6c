"""New keys and values go into a cache: rotated, quantised, written. Called by cache.py.

On GPUs one kernel does all of it, kernels/cache.py; write() is the same in plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .descales import quantize
from .fused import rotate, rotate_reference
from .gpu import launcher
from .ops import _LIBRARY

_LIBRARY.define(
    "cache_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, "
    "Tensor? page_table, Tensor? cos, Tensor? sin, bool interleaved, Tensor? k_descale, "
    "Tensor? v_descale) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CUDA", "CPU"):  # on the CPU by Triton's interpreter
    _LIBRARY.impl("cache_append", launcher("cache", "append"), _key)


@torch.library.register_fake("fastattn::cache_append", lib=_LIBRARY)
def _append_fake(k, v, k_cache, v_cache, cache_lens, *rest):
    others = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "cache_lens": cache_lens}
    for name, x in others.items():
        if x.device != k.device:
            raise RuntimeError(f"fastattn: {name} is on {x.device} and k on {k.device}; one device "
                               "is accepted")  # fmt: skip


class Rotary(NamedTuple):
    """Where new tokens stand and what turns them."""

    cos: Tensor  # [positions, pairs]
    sin: Tensor
    interleaved: bool
    cache_lens: Tensor  # int32 [B]: the position of each entry's first new token

    def turn(self, x: Tensor, moving: bool) -> Tensor:
        """x [B, H, S, D] rotated at positions cache_lens[b] (+ i when moving)."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        position = self.cache_lens.long().unsqueeze(1)  # [B, 1] or [B, S]
        if moving:
            position = position + torch.arange(x.shape[2], device=x.device)
        if self.cos.dtype == self.sin.dtype == dtype:
            position = position.expand(-1, x.shape[2])
            return rotate(x, self.cos, self.sin, position, self.interleaved)
        cos, sin = (table[position].to(dtype) for table in (self.cos, self.sin))
        return rotate_reference(x, cos, sin, None, self.interleaved)


class Append(NamedTuple):
    """Checked, and not yet done."""

    k: Tensor  # [B, kv_heads, Snew, D]
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor  # int32 [B]: where the new keys start
    table: Tensor | None  # int32 [B, max_pages]
    rotary: Rotary | None
    descales: tuple[Tensor | None, Tensor | None]

    def by_kernel(self) -> None:
        turn = (None, None, True) if self.rotary is None else self.rotary[:3]
        torch.ops.fastattn.cache_append.default(*self[:6], *turn, *self.descales)

    def in_torch(self) -> None:
        k = self.k if self.rotary is None else self.rotary.turn(self.k, True)
        for cache, new, descale in zip((self.k_cache, self.v_cache), (k, self.v), self.descales):
            if descale is not None:  # written as bytes, which every device can
                new = quantize(new, descale, cache.dtype).view(torch.int8)
                cache = cache.view(torch.int8)
            _write(cache, new, self.cache_lens, self.table)


def _write(cache, new, cache_lens, table) -> None:
    """cache slots cache_lens[b] + i = new[b, :, i], in place."""
    new_len, page_size = new.shape[2], cache.shape[2]
    if table is None and checks.has_values(cache_lens):
        lens = cache_lens.tolist()
        if len(set(lens)) == 1:  # a plain slice: no index tensors
            cache[:, :, lens[0] : lens[0] + new_len] = new
            return
    slot = cache_lens.long().unsqueeze(1) + torch.arange(new_len, device=cache.device)  # [B, Snew]
    if table is None:
        row = torch.arange(cache.shape[0], device=cache.device).unsqueeze(1)
    else:
        row = table.long().gather(1, slot // page_size)
        slot = slot % page_size
    cache[row, :, slot] = new.transpose(1, 2)  # [B, Snew, Hkv, D]


def check_rotary(rotary, interleaved, q, cache_lens, longest) -> Rotary:
    """decode_attention()'s rotary, checked; each entry turns at most `longest` tokens."""
    checks.flag("rotary_interleaved", interleaved)
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary is of type {type(rotary).__name__}; accepted is a pair (cos, sin)")
    for name, x in zip(("cos", "sin"), rotary):
        checks.on_device(f"rotary's {name}", x, q.device)
        if x.dim() != 2 or x.shape != rotary[0].shape or not 1 <= x.shape[1] <= q.shape[3] // 2:
            raise ValueError(
                f"rotary's {name} has shape {checks.show(x)}; accepted is [positions, rotary_dim / "
                f"2], the same for cos and sin, with rotary_dim at most D = {q.shape[3]}"
            )
        if not x.is_floating_point():
            raise TypeError(f"rotary's {name} is {x.dtype}; accepted are floating dtypes")
    positions = rotary[0].shape[0]
    checks.lengths("cache_lens", cache_lens, 0, positions - longest, "a position of rotary's in")
    return Rotary(*rotary, interleaved, cache_lens)

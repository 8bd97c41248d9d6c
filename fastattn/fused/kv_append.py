"""Appends new keys and values to a KV cache: rotated, quantized, written. Called by decoding.py.

On GPUs one kernel does all of it (kernels/kv_append.py); Append.in_torch() is the same in plain
torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.gpu import launcher
from ..backends.schema import LIBRARY
from ..core import checks, memory
from ..core.quantization import INT8, quantize
from .rope import rotate, rotate_reference

LIBRARY.define(
    "cache_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, "
    "Tensor? page_table, Tensor? cos, Tensor? sin, bool interleaved, Tensor? k_descale, "
    "Tensor? v_descale) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CUDA", "CPU"):  # on the CPU in Triton's interpreter, for tests
    LIBRARY.impl("cache_append", launcher("kv_append", "append"), _key)


@torch.library.register_fake("fastattn::cache_append", lib=LIBRARY)
def _append_fake(k, v, k_cache, v_cache, cache_lens, *rest):
    others = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "cache_lens": cache_lens}
    for name, x in others.items():
        if x.device != k.device:
            raise RuntimeError(f"fastattn: {name} is on {x.device} and k on {k.device}; one device "
                               "is accepted")  # fmt: skip


class Rotary(NamedTuple):
    """The rotary tables of a call, and the positions at which its new tokens are rotated."""

    cos: Tensor  # [positions, rotary_dim / 2]
    sin: Tensor
    interleaved: bool
    cache_lens: Tensor  # int32 [B]: the position of each sequence's first new token

    def rotate(self, x: Tensor, moving: bool) -> Tensor:
        """x [B, H, S, D] rotated: token s of sequence b at position cache_lens[b] + s if moving,
        else every token at cache_lens[b]."""
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
    """One append to a cache, with its arguments; by_kernel() or in_torch() performs it."""

    k: Tensor  # [B, kv_heads, Snew, D]
    v: Tensor
    k_cache: Tensor  # [B, kv_heads, slots, D]; paged: [pages, kv_heads, page_size, D]
    v_cache: Tensor
    cache_lens: Tensor  # int32 [B]: where the new keys start
    table: Tensor | None  # int32 [B, max_pages]; None: the caches are not paged
    rotary: Rotary | None
    descales: tuple[Tensor | None, Tensor | None]

    def checked(self) -> Append:
        """Self, with copies of k and v where they overlap with the caches. Raises for writes whose
        result would not be defined."""
        caches = self.k_cache, self.v_cache
        for name, cache in zip(("k_cache", "v_cache"), caches):
            memory.writable(name, cache)
        if all(map(checks.has_memory, caches)) and memory.share_memory(*caches):
            raise ValueError(
                "v_cache shares memory with k_cache, and k and v are written to both; write the "
                "new keys yourself and call without k and v"
            )
        if self.table is not None and checks.has_values(self.table):
            self._check_slots()
        k, v = (memory.copied_if_overlapping(x, *caches) for x in (self.k, self.v))
        new = self._replace(k=k, v=v)
        if self.k_cache.dtype == INT8 and checks.has_values(k) and checks.has_values(v):
            new._check_numbers()
        return new

    def by_kernel(self) -> None:
        """Writes the caches with one kernel."""
        rotary = (None, None, True) if self.rotary is None else self.rotary[:3]
        torch.ops.fastattn.cache_append.default(*self[:6], *rotary, *self.descales)

    def in_torch(self) -> None:
        """Writes the caches with plain torch operators."""
        caches = self.k_cache, self.v_cache
        if self.descales[0] is not None:  # as bytes, because not every device can index FP8
            caches = (cache.view(torch.int8) for cache in caches)
        new_len = self.k.shape[2]
        first = None  # if all sequences start at one slot, a slice replaces index tensors
        if self.table is None and checks.has_values(self.cache_lens):
            lens = set(self.cache_lens.tolist())
            first = lens.pop() if len(lens) == 1 else None
        row, slot = self._places() if first is None else (None, None)
        for cache, new in zip(caches, self._stored()):
            if first is None:
                cache[row, :, slot] = new.transpose(1, 2)  # [B, Snew, Hkv, D]
            else:
                cache[:, :, first : first + new_len] = new

    def _stored(self) -> list[Tensor]:
        """k and v as they are stored: rotated, and 8-bit ones as bytes."""
        k = self.k if self.rotary is None else self.rotary.rotate(self.k, True)
        if self.descales[0] is None:
            return [k, self.v]
        dtype = self.k_cache.dtype
        return [
            quantize(x, scale, dtype).view(torch.int8)
            for x, scale in zip((k, self.v), self.descales)
        ]

    def _places(self) -> tuple[Tensor, Tensor]:
        """(row of the cache, or page; slot in it) of each new key: [B, Snew] or broadcastable."""
        device = self.cache_lens.device
        slot = self.cache_lens.long().unsqueeze(1) + torch.arange(self.k.shape[2], device=device)
        if self.table is None:
            return torch.arange(self.k_cache.shape[0], device=device).unsqueeze(1), slot
        page_size = self.k_cache.shape[2]
        return self.table.long().gather(1, slot // page_size), slot % page_size

    def _check_slots(self) -> None:
        page, slot = self._places()
        place = (page * self.k_cache.shape[2] + slot).flatten()
        order = place.argsort(stable=True)
        place = place[order]
        for n in (place[1:] == place[:-1]).nonzero()[:1].flatten().tolist():
            at = order[n], order[n + 1]
            a, b = (int(i) // slot.shape[1] for i in at)
            raise ValueError(
                f"page_table puts new keys of batch entries {a} and {b} into the same slot, "
                f"{int(slot.flatten()[at[0]])} of page {int(page.flatten()[at[0]])}; a page that "
                "is written to must belong to one sequence only"
            )

    def _check_numbers(self) -> None:
        k = self.k if self.rotary is None else self.rotary.rotate(self.k, True)
        for name, x, scale in zip("kv", (k, self.v), self.descales):
            if bool((x.float() / scale[..., None, None]).isnan().any()):
                raise ValueError(f"{name} holds NaN once divided by {name}_descale, and int8 has "
                                 "no NaN; accepted are numbers")  # fmt: skip


def check_rotary(rotary, interleaved, q, cache_lens, longest) -> Rotary:
    """decode_attention()'s rotary=(cos, sin), checked: the tables must reach position
    cache_lens[b] + longest - 1 of every sequence b."""
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
        checks.no_gradient(f"rotary's {name}", x)
    positions = rotary[0].shape[0]
    checks.lengths("cache_lens", cache_lens, 0, positions - longest, "a position of rotary's in")
    return Rotary(*rotary, interleaved, cache_lens)

"""KVCache: the keys and values of one attention layer during decoding.
Next hop: ../decoding.py.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ..core import checks
from ..decoding import check_decode, decode_attention
from ._arguments import positive


class KVCache:
    """Preallocated keys and values of one layer, and the number that each sequence has.

    Args:
        batch: B, sequences in the batch.
        kv_heads: Hkv. None: as many as the keys of the first call have, which then allocates the
            memory (with tensor parallelism a process has some of the heads).
        max_len: slots of each sequence; a call that would overrun them raises and writes nothing.
        head_dim: D, channels of the keys.
        v_dim: Dv, channels of the values; None: head_dim.
        device, dtype: of k and v; None: torch's defaults.

    Attributes:
        k, v: [B, Hkv, max_len, D] and [B, Hkv, max_len, Dv].
        lens: int32 [B]: the keys of sequence b are in slots 0 to lens[b] - 1. Slots past them may
            hold anything and are never read.
        filled: whether anything was appended since construction or reset().
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int | None,
        max_len: int,
        head_dim: int,
        *,
        v_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "max_len": max_len, "head_dim": head_dim}
        for name, x in sizes.items():
            if name != "kv_heads" or x is not None:
                positive(name, x)
        kv_heads = kv_heads or 0
        v_dim = head_dim if v_dim is None else positive("v_dim", v_dim)
        place = {"device": device, "dtype": dtype}
        self.k = torch.zeros(batch, kv_heads, max_len, head_dim, **place)
        self.v = torch.zeros(batch, kv_heads, max_len, v_dim, **place)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.filled = False

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def max_len(self) -> int:
        return self.k.shape[2]

    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        new_lens: Tensor | None = None,
        **options,
    ) -> Tensor:
        """Appends k and v, then attends to all keys in the cache; without gradients.

        Args:
            q: [B, Hq, Sq, D].
            k, v: [B, Hkv, Snew, D] and [B, Hkv, Snew, Dv], in the cache's dtype; None: nothing is
                appended.
            new_lens: integers [B] in [0, Snew]: how many of the new keys sequence b has (prompts
                padded on the right); None: Snew. Later calls never read the keys past them; in
                this call only causal=True hides them from earlier rows.
            options: those of decode_attention: causal, window, mask, bias, softcap, sinks, scale...

        Returns:
            [B, Hq, Sq, Dv] in q's dtype.

        Raises:
            ValueError or TypeError: an argument is not accepted, or the new keys do not fit; then
            nothing is written.
        """
        added = 0 if k is None else _new_keys(k)
        if added:
            self.reserve(k.shape[1])
        if new_lens is not None:
            new_lens = checks.int_vector("new_lens", new_lens, (self.batch,), q.device, "[B]")
            checks.lengths("new_lens", new_lens, 0, added, "a number of new keys in")
        out = decode_attention(q, self.k, self.v, cache_lens=self.lens, k=k, v=v, **options)
        self.lens = self.lens + (added if new_lens is None else new_lens)
        self.filled = self.filled or added > 0
        return out

    def reserve(self, kv_heads: int) -> None:
        """Allocates the memory for kv_heads heads, if the cache was made with kv_heads=None."""
        if self.k.shape[1] == 0:
            shapes = ((self.batch, kv_heads, self.max_len, x.shape[3]) for x in (self.k, self.v))
            self.k, self.v = (self.k.new_zeros(shape) for shape in shapes)

    def check(self, q: Tensor, **options) -> None:
        """Raises what attend(q, **options) would raise, and does nothing else. cache_lens= replaces
        the present lengths."""
        check_decode(q, self.k, self.v, **{"cache_lens": self.lens} | options)

    def positions(self, rows: int) -> Tensor:
        """[B, rows] int64: the positions of the next `rows` keys of each sequence."""
        return self.lens.long().unsqueeze(1) + torch.arange(rows, device=self.lens.device)

    def reorder(self, index: Tensor) -> None:
        """Makes sequence b a copy of what sequence index[b] was, for beam search. index is int32 or
        int64 [B'] with values in [0, B). B' may differ from B: arange(B).repeat_interleave(beams)
        makes `beams` copies of each sequence."""
        if checks.on_device("index", index, self.k.device).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index is {index.dtype}; accepted are int32 and int64")
        if index.dim() != 1:
            raise ValueError(f"index has shape {checks.show(index)}; accepted is [B']")
        checks.lengths("index", index, 0, self.batch - 1, "the index of a batch entry in")
        self.k, self.v, self.lens = (x.index_select(0, index) for x in (self.k, self.v, self.lens))

    def truncate(self, lens: Tensor | int) -> None:
        """Removes the keys past the first `lens`, an int or integers [B] (the rejected drafts of
        speculative decoding). A sequence with fewer keys keeps them all."""
        if isinstance(lens, Integral) and not isinstance(lens, bool):
            self.lens = self.lens.clamp(max=checks.length("lens", lens))
            return
        lens = checks.int_vector("lens", lens, (self.batch,), self.k.device, "[B], or an int")
        checks.lengths("lens", lens, 0, checks.MAX_LENGTH - 1, "a number of keys in")
        self.lens = self.lens.minimum(lens)

    def reset(self) -> None:
        """Empties every sequence; the memory is kept."""
        self.lens, self.filled = torch.zeros_like(self.lens), False

    def __repr__(self) -> str:
        return (f"KVCache(batch={self.batch}, kv_heads={self.k.shape[1]}, max_len={self.max_len}, "
                f"head_dim={self.k.shape[3]}, {self.k.dtype})")  # fmt: skip


def _new_keys(k) -> int:
    """The number of new keys; decode_attention checks the rest."""
    if checks.tensor("k", k).dim() != 4:
        raise ValueError(f"k has shape {checks.show(k)}; accepted is [B, kv_heads, Snew, head_dim]")
    return k.shape[2]

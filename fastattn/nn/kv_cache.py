"""KVCache: the keys and values of one attention layer while it decodes.
Next hop: cache.decode_attention.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ..core import checks
from ..decoding import check_decode, decode_attention
from ._arguments import positive


class KVCache:
    """Preallocated keys and values of one layer, and how many of them each batch entry has.

    Args:
        batch: B, entries.
        kv_heads: Hkv. None: as many as the first keys have, whose call takes the memory (a sharded
            model's processes have some heads each).
        max_len: slots of each entry; a call that would overrun them raises and writes nothing.
        head_dim: D of the keys, and of the values unless v_dim says otherwise.

    Attributes:
        k, v: [B, Hkv, max_len, D] and [B, Hkv, max_len, Dv].
        lens: int32 [B]: entry b's keys are in slots 0 to lens[b] - 1. Slots past them hold anything
            and are never read.
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
        self.filled = False  # has anything been written since it was made or reset?

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
        """Appends k and v, then attends to all that is held; no gradient.

        Args:
            q: [B, Hq, Sq, D]; k: [B, Hkv, Snew, D]; v: [B, Hkv, Snew, Dv]. k and v None: nothing is
                appended.
            new_lens: integers [B] in [0, Snew]: how many of the new keys entry b has (its prompt is
                padded on the right); None: Snew. Keys past them are forgotten by the next call; in
                this one only causal=True keeps the rows before them from seeing them.
            options: decode_attention's: causal, window, mask, bias, softcap, sinks, scale, ...

        Returns:
            [B, Hq, Sq, Dv].
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
        """Takes the memory for so many heads, where their number was not known yet."""
        if self.k.shape[1] == 0:
            shapes = ((self.batch, kv_heads, self.max_len, x.shape[3]) for x in (self.k, self.v))
            self.k, self.v = (self.k.new_zeros(shape) for shape in shapes)

    def check(self, q: Tensor, **options) -> None:
        """Raises what attend(q, **options) would, and does nothing else; cache_lens= stands in for
        the lengths held."""
        check_decode(q, self.k, self.v, **{"cache_lens": self.lens} | options)

    def positions(self, rows: int) -> Tensor:
        """[B, rows] int64: the positions that the next `rows` keys of each entry will have."""
        return self.lens.long().unsqueeze(1) + torch.arange(rows, device=self.lens.device)

    def reorder(self, index: Tensor) -> None:
        """Entry b becomes what entry index[b] was: int [B'], in [0, B). For beam search; B' may
        differ from B, so that index = arange(B).repeat_interleave(beams) makes room for beams."""
        if checks.on_device("index", index, self.k.device).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index is {index.dtype}; accepted are int32 and int64")
        if index.dim() != 1:
            raise ValueError(f"index has shape {checks.show(index)}; accepted is [B']")
        checks.lengths("index", index, 0, self.batch - 1, "an entry in")
        self.k, self.v, self.lens = (x.index_select(0, index) for x in (self.k, self.v, self.lens))

    def truncate(self, lens: Tensor | int) -> None:
        """Forgets keys past lens, an int or integers [B] (rejected drafts of speculative
        decoding). An entry that has fewer keys keeps those."""
        if isinstance(lens, Integral) and not isinstance(lens, bool):
            self.lens = self.lens.clamp(max=checks.length("lens", lens))
            return
        lens = checks.int_vector("lens", lens, (self.batch,), self.k.device, "[B], or an int")
        checks.lengths("lens", lens, 0, checks.MAX_LENGTH - 1, "a number of keys in")
        self.lens = self.lens.minimum(lens)

    def reset(self) -> None:
        """Empties every entry; the memory is kept."""
        self.lens, self.filled = torch.zeros_like(self.lens), False

    def __repr__(self) -> str:
        return (f"KVCache(batch={self.batch}, kv_heads={self.k.shape[1]}, max_len={self.max_len}, "
                f"head_dim={self.k.shape[3]}, {self.k.dtype})")  # fmt: skip


def _new_keys(k) -> int:
    """How many keys come; what else k must be decode_attention says."""
    if checks.tensor("k", k).dim() != 4:
        raise ValueError(f"k has shape {checks.show(k)}; accepted is [B, kv_heads, Snew, head_dim]")
    return k.shape[2]

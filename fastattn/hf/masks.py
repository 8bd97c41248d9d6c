"""Masks for transformers without a tensor of B x S x S. Next hop: interface.py, which reads them.

transformers defines a mask by a function of (batch, head, row, key) and a padding mask [B, S].
Where that function combines known functions (causal, window, packed documents, chunks, blocks that
see all of themselves), attention() has an option for each, and no mask is materialised. Any other
mask is materialised by transformers.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from ..masks import chunked

# ---- a mask that is materialised only when an operator reads it ----------------------------------


class CompactMask(Tensor):
    """A bool mask [B, 1, q_len, kv_len], True = attend, that occupies no memory.

    attention() reads its attributes. torch's operators (models crop, combine and invert masks) run
    on the dense tensor instead. Arithmetic raises: a model that adds its mask to scores, or pads it
    with zeros, expects eager's float mask, and a bool mask would hide nothing, or the opposite.

    Row i sees keys i + offset - left <= j <= i + offset + right (-1: unbounded) of its own
    document, below offset + q_len, where keys [B, offset + q_len] is True, and within ranges, which
    are attention()'s key_ranges. The result of an operator is dense, in `given`, and the other
    attributes are then not set.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape, left, right, offset, keys, documents, device, given=None, ranges=None):
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.left, mask.right, mask.offset = left, right, offset
        mask.keys, mask.documents, mask.given, mask.ranges = keys, documents, given, ranges
        return mask

    @classmethod
    def of(cls, given: Tensor) -> CompactMask:
        """A CompactMask of a bool mask in memory, which raises for arithmetic like the others."""
        return cls(given.shape, -1, -1, 0, None, None, given.device, given)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].copy()  # gradient checkpointing detaches its inputs
        kwargs = kwargs or {}
        _refuse_arithmetic(func, args, kwargs)
        args, kwargs = tree_map_only(CompactMask, CompactMask.dense, (args, kwargs))
        found = func(*args, **kwargs)
        is_mask = isinstance(found, Tensor) and found.dtype == torch.bool and found.dim() > 1
        return CompactMask.of(found) if is_mask else found

    def __repr__(self) -> str:
        return (
            f"CompactMask(shape={list(self.shape)}, left={self.left}, right={self.right}, "
            f"offset={self.offset}, keys={self.keys}, documents={self.documents}, "
            f"ranges={self.ranges})"
        )

    @property
    def plain(self) -> bool:
        """Is it a band over as many keys as rows, without padding, documents or ranges?"""
        parts = (self.keys, self.documents, self.given, self.ranges)
        return all(x is None for x in parts) and self.shape[2] == self.shape[3]

    @property
    def hides_nothing(self) -> bool:
        parts = (self.keys, self.documents, self.given, self.ranges)
        return self.left < 0 and self.right < 0 and all(x is None for x in parts)

    def copy(self) -> CompactMask:
        return CompactMask(
            self.shape, self.left, self.right, self.offset, self.keys, self.documents, self.device,
            self.given, self.ranges,
        )  # fmt: skip

    def dense(self) -> Tensor:
        """The bool tensor [B, 1, q_len, kv_len] that this represents."""
        if self.given is not None:
            return self.given
        batch, _, q_len, kv_len = self.shape
        visible = band(q_len, kv_len, self.left, self.right, self.offset, self.device)
        if self.documents is not None:
            visible = visible & same_document(self.documents)
        if self.keys is not None:
            missing = kv_len - self.keys.shape[1]
            visible = visible & torch.nn.functional.pad(self.keys, (0, missing))[:, None, None]
        if self.ranges is not None:
            begin, end = (x.unsqueeze(3) for x in self.ranges)
            j = torch.arange(kv_len, device=begin.device)
            visible = visible & (j >= begin) & (j < end)
        return visible.expand(batch, 1, q_len, kv_len)


_ATEN = torch.ops.aten


def _named(*names: str) -> frozenset:
    return frozenset(getattr(_ATEN, name) for name in names)


_JOINS = _named("cat", "stack", "constant_pad_nd")
_COMPARES = _named("eq", "ne", "lt", "le", "gt", "ge")
_CHOOSES = _named(  # a bool operand selects elements of the other tensors
    "where", "masked_fill", "masked_fill_", "masked_select", "index", "index_put", "index_put_"
)
_ARITHMETIC = _named(  # with numbers, of two masks, or of one
    "add", "sub", "rsub", "mul", "div", "cumsum", "minimum", "maximum", "clamp"
)


def _refuse_arithmetic(func, args, kwargs) -> None:
    """Raises for operators that treat the mask as a float mask.

    -inf and 0 written into a bool mask become True and False, the opposite of their meaning in a
    float mask. A write into a mask that is not in memory would be lost.
    """
    packet, first = func.overloadpacket, args[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    among_floats = any(x.is_floating_point() for x in tensors)
    with_numbers = any(type(x) in (int, float) for x in args[1:])
    if packet in _JOINS:
        wrong = packet is _ATEN.constant_pad_nd
        wrong |= not all(isinstance(x, CompactMask) for x in tensors)
    elif isinstance(first, CompactMask) and (
        packet is _ATEN.masked_fill or func._schema.is_mutable
    ):
        wrong = func._schema.is_mutable or among_floats or with_numbers
    elif packet in _COMPARES:
        wrong = among_floats or with_numbers
    elif packet in _CHOOSES:
        wrong = packet is _ATEN.where and any(isinstance(x, CompactMask) for x in args[1:])
        wrong &= among_floats
    elif packet is _ATEN._to_copy:
        wrong = kwargs.get("dtype", torch.bool).is_floating_point
    else:
        wrong = packet in _ARITHMETIC or (among_floats and "attention" not in str(packet))
    if wrong:
        raise NotImplementedError(
            f"the model applies {packet} to its attention mask, as if it were the float mask that "
            "eager attention adds, but fastattn's is bool (True = attend); use "
            'attn_implementation="eager" for this model'
        )


def band(q_len: int, kv_len: int, left: int, right: int, offset: int, device) -> Tensor:
    """bool [q_len, kv_len]: -left <= key - row - offset <= right, where -1 is unbounded."""
    i = torch.arange(q_len, device=device).unsqueeze(1) + offset
    j = torch.arange(kv_len, device=device)
    visible = (j < offset + q_len).expand(q_len, kv_len)
    if left >= 0:
        visible = visible & (j >= i - left)
    return visible & (j <= i + right) if right >= 0 else visible


def same_document(documents: Tensor) -> Tensor:
    """bool [B, 1, S, S]: whether row and key are in one document; documents are ids [B, S]."""
    return documents[:, None, :, None] == documents[:, None, None, :]


# ---- recognising transformers' mask functions ----------------------------------------------------


class Pattern(NamedTuple):
    """What a mask function means, in terms of attention()'s options."""

    left: int = -1
    right: int = -1
    documents: Tensor | None = None  # [B, S], non-decreasing
    remapped: bool = False  # rows and keys are positions that restart with each document
    chunks: tuple[int, Tensor] | None = None  # (size, the position [B] where chunks begin)
    blocks: Tensor | None = None  # ids [B, positions]: rows also see all of their block; < 0: none


def recognise(function) -> Pattern | None:
    """The pattern of one of transformers' mask functions; None if it is not made of known ones."""
    if function is causal_mask_function:
        return Pattern(right=0)
    if function is bidirectional_mask_function:
        return Pattern()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    rule = _RULES.get(function.__qualname__.partition(".")[0])
    return rule and rule(inspect.getclosurevars(function).nonlocals)


def _all_of(variables) -> Pattern | None:
    whole = Pattern()
    for function in variables["mask_functions"]:
        part = recognise(function)
        if part is None or part.blocks is not None:
            return None
        if any(mine is not None and theirs is not None for mine, theirs in (
            (whole.documents, part.documents), (whole.chunks, part.chunks),
        )):  # fmt: skip
            return None
        whole = Pattern(
            _narrower(whole.left, part.left),
            _narrower(whole.right, part.right),
            part.documents if whole.documents is None else whole.documents,
            whole.remapped or part.remapped,
            part.chunks if whole.chunks is None else whole.chunks,
        )
    return whole


def _either(variables) -> Pattern | None:
    """A causal band, windowed or not, or the row's own block (PaliGemma prefix, Gemma 3 images)."""
    parts = [recognise(function) for function in variables["mask_functions"]]
    if len(parts) != 2 or None in parts:
        return None
    band, blocks = parts
    if band != Pattern(band.left, right=0) or blocks._replace(blocks=None) != Pattern():
        return None
    return band._replace(blocks=blocks.blocks)


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _remapped(variables) -> Pattern | None:
    """Positions within a document count up by one, so their differences equal those of rows."""
    inner = recognise(variables["mask_function"])
    return inner and inner._replace(remapped=True)


_RULES = {  # function of transformers.masking_utils: pattern of what it made, from its variables
    "and_masks": _all_of,
    "or_masks": _either,
    "sliding_window_overlay": lambda x: Pattern(left=x["sliding_window"] - 1),
    "sliding_window_bidirectional_overlay": lambda x: Pattern(*[x["sliding_window"]] * 2),
    "chunked_overlay": lambda x: Pattern(chunks=(x["chunk_size"], x["left_padding"])),
    "blockwise_overlay": lambda x: Pattern(blocks=x["block_sequence_ids"]),
    "packed_sequence_mask_function": lambda x: Pattern(documents=x["packed_sequence_mask"]),
    "remap_positions_for_packed_sequence": _remapped,
}


# ---- the mask function registered with transformers ----------------------------------------------

# Types of configurations whose models must get a mask even where None would do (models.py fills it
# in). It is read only under tracing; eager calls always get a mask.
WANT_EVERY_MASK: set[type] = set()


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others,
) -> Tensor | None:
    """The mask that transformers passes to attention_forward, in the smallest form.

    Arguments are transformers' (transformers.masking_utils.sdpa_mask documents them).

    Returns:
        A CompactMask for causal, full, windowed, packed, chunked and block masks, with or without
            padding. Not None, because the module's is_causal would then decide, and some decoders
            do not set it.
        A bool mask [B, 1, q, kv] for any other mask, and under tracing, where values cannot be
            read.
        None only under tracing, for a causal or full mask that agrees with the module's is_causal,
            without padding.
    """
    traced = not _readable(attention_mask, q_offset)
    if not use_vmap and not traced:
        found = _compact(
            recognise(mask_function), batch_size, q_length, kv_length, int(q_offset), kv_offset,
            attention_mask, device,
        )  # fmt: skip
        if found is not NotImplemented:
            return found
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    if type(others.get("config")) in WANT_EVERY_MASK:
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    mask = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, use_vmap=use_vmap, device=device,
        **others,
    )  # fmt: skip
    return mask if traced or mask is None else CompactMask.of(mask)


def _readable(*tensors) -> bool:
    """May values be read, that is, is nothing being traced?"""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(isinstance(x, Tensor) and (type(x) is not Tensor or x.is_meta) for x in tensors)
    )


def _compact(pattern, batch, q_len, kv_len, q_offset, kv_offset, padding, device):
    """A CompactMask, or NotImplemented where none can represent the pattern."""
    if pattern is None or (pattern.remapped and pattern.documents is None):
        return NotImplemented
    left, right, documents, _, chunks, blocks = pattern
    if chunks is not None and (documents is not None or pattern.remapped):
        return NotImplemented  # chunks that restart with each document
    if (documents is not None and q_len != kv_len) or (padding is not None and padding.dim() != 2):
        return NotImplemented
    if blocks is not None and right != 0:
        return NotImplemented  # blocks without a causal band
    full = left < 0 and right < 0 and documents is None and chunks is None
    offset = kv_len - q_len if full else q_offset - kv_offset  # the key on row 0's diagonal
    used = offset + q_len if right == 0 else kv_len  # no row of a causal mask sees a later key
    if (offset < 0 and not full) or used != offset + q_len or used > kv_len:
        return NotImplemented
    ranges = None
    if chunks is not None:
        size, first = chunks
        ranges = chunked(size, q_len, offset=offset, first=first - kv_offset, device=device)
    elif blocks is not None:
        ranges = _around_blocks(blocks, left, q_offset, q_len, kv_offset)
        if ranges is None or bool((ranges[1] > used).any()):
            return NotImplemented
        left = right = -1  # the ranges include the band
    if chunks is not None and bool((ranges[0] <= 0).all() & (ranges[1] >= used).all()):
        ranges = None  # everything is in one chunk
    keys = None if padding is None else _visible_keys(padding, kv_len, kv_offset)
    if keys is not None:
        keys = keys[:, :used].contiguous()
        keys = None if bool(keys.all()) else keys
    left = -1 if left >= used - 1 else left  # as wide as the farthest pair: unbounded
    right = -1 if right >= used - 1 and right > 0 else right
    shape = (batch, 1, q_len, kv_len)
    return CompactMask(
        shape, left, right, offset, keys, documents, torch.device(device), None, ranges
    )


def _around_blocks(blocks, left, q_offset, q_len, kv_offset) -> tuple[Tensor, Tensor] | None:
    """key_ranges of a causal band and each row's own block, given as ids [B, positions]; None if a
    block is not contiguous, so that keys between its pieces are hidden."""
    at = torch.arange(blocks.shape[1], device=blocks.device)
    changes = blocks[:, 1:] != blocks[:, :-1]
    starts = torch.nn.functional.pad(changes, (1, 0), value=True)
    ends = torch.nn.functional.pad(changes, (0, 1), value=True)
    ids = torch.where(starts & (blocks >= 0), blocks, -1 - at).sort(-1).values
    if bool((ids[:, 1:] == ids[:, :-1]).any()) or blocks.shape[1] < q_offset + q_len:
        return None
    first = torch.where(starts, at, 0).cummax(-1).values
    last = torch.where(ends, at, len(at)).flip(-1).cummin(-1).values.flip(-1)
    first, last = (torch.where(blocks >= 0, x, at) for x in (first, last))
    begin = torch.zeros_like(first) if left < 0 else torch.minimum(at - left, first) - kv_offset
    both = (x[:, None, q_offset : q_offset + q_len] for x in (begin, last + 1 - kv_offset))
    return tuple(x.int() for x in both)


def _visible_keys(padding: Tensor, kv_len: int, kv_offset: int) -> Tensor | None:
    """bool [B, kv_len]: which keys exist; None if all do."""
    padding = padding[:, kv_offset : kv_offset + kv_len]
    keys = torch.nn.functional.pad(padding.bool(), (0, kv_len - padding.shape[1]))
    return None if bool(keys.all()) else keys

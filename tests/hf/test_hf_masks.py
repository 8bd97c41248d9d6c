"""fastattn.hf's masks: they represent transformers' own masks without their memory."""

from __future__ import annotations

import pytest
import torch
from hf_models import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils as theirs

from fastattn.hf import CompactMask, attention_mask


def remap(function, positions):
    """Newer versions count rows from the start of each document, older ones from that of the
    row."""
    known = getattr(theirs, "remap_positions_for_packed_sequence", lambda function, _: function)
    return known(function, positions)


FUNCTIONS = {  # mask_function, local_size
    "causal": (theirs.causal_mask_function, None),
    "full": (theirs.bidirectional_mask_function, None),
    "window": (theirs.sliding_window_causal_mask_function(3), 3),
    "wide window": (theirs.sliding_window_causal_mask_function(100), 100),
    "window both ways": (theirs.sliding_window_bidirectional_mask_function(2), 2),
    "chunks": (theirs.chunked_causal_mask_function(3, torch.tensor([0, 2])), 3),
    "one chunk": (theirs.chunked_causal_mask_function(100, torch.tensor([0, 0])), 100),
}


def dense(mask, module_is_causal, q_len, kv_len):
    """What a mask means for [B, 1, q_len, kv_len]; None is causal from the start, or full."""
    if mask is None:
        mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
        return mask.tril() if module_is_causal and q_len > 1 else mask
    return mask.dense() if isinstance(mask, CompactMask) else mask


def expected(function, batch, q_len, kv_len, q_offset, kv_offset, padding):
    return theirs.sdpa_mask(
        batch_size=batch, q_length=q_len, kv_length=kv_len, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=padding, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
    )  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_stands_for_transformers_mask(data):
    name = data.draw(st.sampled_from(sorted(FUNCTIONS)))
    q_len, past, kv_offset = (data.draw(st.integers(*x)) for x in ((1, 6), (0, 5), (0, 3)))
    room = data.draw(st.integers(0, 4))  # keys of a static cache that are not there yet
    past = max(past, kv_offset)
    kv_len = past + q_len + room - kv_offset
    padding = None
    if data.draw(st.booleans()):
        width = data.draw(st.sampled_from([past + q_len, kv_offset + kv_len]))
        bits = data.draw(st.lists(st.booleans(), min_size=2 * width, max_size=2 * width))
        padding = torch.tensor(bits).view(2, width)
    q_offset = data.draw(st.sampled_from([past, torch.tensor(past)]))
    function, local_size = FUNCTIONS[name]
    causal = name not in ("full", "window both ways")
    got = attention_mask(
        batch_size=2, q_length=q_len, kv_length=kv_len, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=padding, local_size=local_size,
        allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal,
    )  # fmt: skip
    want = expected(function, 2, q_len, kv_len, past, kv_offset, padding)
    assert torch.equal(dense(got, causal, q_len, kv_len).expand_as(want), want)
    assert isinstance(got, CompactMask)
    if past - kv_offset >= 0 or not causal:
        assert got.given is None or name == "window both ways"


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("ids", ["prefix", "images", "none"])
def test_blocks_are_ranges(ids, window, past):
    """PaliGemma's prefix sees all of itself, as do Gemma 3's images, whether or not wider than a
    window."""
    ids = {
        "prefix": [[0, 0, 0, 0, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1, -1, -1]],
        "images": [[-1, 0, 0, 0, 0, 1, 1, -1], [3, 3, -1, -1, 4, 4, 4, 4]],
        "none": [[-1] * 8] * 2,
    }[ids]
    function = theirs.causal_mask_function
    if window:
        function = theirs.sliding_window_causal_mask_function(window)
    function, padding = blockwise(ids, function), torch.ones(2, 8, dtype=torch.long)
    padding[1, :3] = 0
    got = attention_mask(
        2, 8 - past, 8, q_offset=past, mask_function=function, attention_mask=padding,
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert isinstance(got, CompactMask) and got.given is None and len(got.ranges) == 2
    assert torch.equal(got.dense(), expected(function, 2, 8 - past, 8, past, 0, padding))
    copy = got.detach()
    assert torch.equal(copy.dense(), got.dense()) and not got.plain and not got.hides_nothing


def test_chunks_are_ranges_where_there_is_more_than_one():
    function = theirs.chunked_causal_mask_function(4, torch.tensor([0, 3]))
    got = attention_mask(2, 6, 6, mask_function=function)
    assert got.given is None and got.ranges is not None and got.right == 0
    one = attention_mask(2, 6, 6, mask_function=FUNCTIONS["one chunk"][0])
    assert one.ranges is None and one.plain


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_are_recognised(window):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    function = theirs.causal_mask_function
    if window:
        function = theirs.sliding_window_causal_mask_function(window)
    documents = theirs.find_packed_sequence_indices(positions)
    whole = theirs.and_masks(
        remap(function, positions),
        theirs.packed_sequence_mask_function(documents),
    )
    got = attention_mask(1, 9, 9, mask_function=whole, allow_is_causal_skip=False)
    assert isinstance(got, CompactMask) and torch.equal(got.documents, documents)
    assert torch.equal(got.dense(), expected(whole, 1, 9, 9, 0, 0, None))


def blockwise(ids, function=theirs.causal_mask_function):
    """The function, or block ids: what multimodal models make of their images."""
    return theirs.or_masks(function, theirs.blockwise_overlay(torch.tensor(ids)))


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1]] * 2)
IRREGULAR = torch.tensor([[0, 3, 1, 2, 5, 4]] * 2)
OTHERS = {
    "or": theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k == 4),
    "chunks of packed documents": theirs.and_masks(
        remap(theirs.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)), PACKED),
        theirs.packed_sequence_mask_function(theirs.find_packed_sequence_indices(PACKED)),
    ),
    "a block in two pieces": blockwise([[0, 0, -1, 0, -1, -1]] * 2),
    "blocks alone": theirs.blockwise_overlay(torch.zeros(2, 6, dtype=torch.long)),
    "own": theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: (q + k) % 3 != 1),
    "positions without documents": remap(theirs.causal_mask_function, IRREGULAR),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_materialised(name):
    function = OTHERS[name]
    if function is theirs.causal_mask_function:
        pytest.skip("this version of transformers does not remap positions")
    got = attention_mask(2, 6, 6, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(got.given, expected(function, 2, 6, 6, 0, 0, None))


def test_use_vmap_is_materialised():
    """Where the mask function may be the user's own, under any name."""
    got = attention_mask(
        2, 6, 6, mask_function=theirs.causal_mask_function, use_vmap=True,
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert torch.equal(got.given, expected(theirs.causal_mask_function, 2, 6, 6, 0, 0, None))


def test_operators_see_the_mask_it_stands_for():
    padding = torch.tensor([[True] * 5, [False, True, True, True, True]])
    mask = attention_mask(2, 5, 5, attention_mask=padding)
    full = expected(theirs.causal_mask_function, 2, 5, 5, 0, 0, padding)
    assert isinstance(mask, CompactMask) and "offset=0" in repr(mask)
    assert mask.shape == full.shape and mask.dtype == torch.bool
    for operation in (
        lambda x: x[:, :, -2:, :4],
        lambda x: ~x,
        lambda x: x & full,
        lambda x: torch.where(x, 0.0, -1.0),
        lambda x: torch.zeros(2, 1, 5, 5).masked_fill(~x, -1.0),
        lambda x: torch.cat((x, x), dim=-1),
        lambda x: x[:, 0],
        lambda x: x.to(torch.int64),
        lambda x: x.sum(-1),
        lambda x: x == False,  # noqa: E712
        lambda x: x.masked_fill(full, False),
        lambda x: torch.where(full, x, False),
        lambda x: x.logical_not().any(-1),
    ):
        result, want = operation(mask), operation(full)
        if want.dtype == torch.bool:  # still a mask, and guarded as one
            assert isinstance(result, CompactMask) and result.given is not None
            result = result.dense()
        assert type(result) is torch.Tensor and torch.equal(result, want)
    copy = mask.detach()
    assert isinstance(copy, CompactMask) and torch.equal(copy.dense(), full)


SCORES = torch.zeros(2, 1, 5, 5)
ARITHMETIC = {
    "scores + mask": lambda x: SCORES + x,
    "mask + scores": lambda x: x + SCORES,
    "scores += mask": lambda x: SCORES.clone().add_(x),
    "scores - mask": lambda x: SCORES - x,
    "1.0 - mask": lambda x: 1.0 - x.float(),
    "mask * a number": lambda x: x * -1e4,
    "as floats": lambda x: x.to(torch.float32),
    "as the scores' type": lambda x: x.type_as(SCORES),
    "lengthened by floats": lambda x: torch.cat((x, SCORES), dim=-1),
    "lengthened by a bool made of floats": lambda x: torch.cat((x, SCORES.bool()), dim=-1),
    "padded with 0": lambda x: torch.nn.functional.pad(x, (0, 2), value=0.0),
    "a part of it": lambda x: SCORES[:, :, :2] + x[:, :, :2],
    "its opposite": lambda x: SCORES + ~x,
    "copied into floats": lambda x: SCORES.clone().copy_(x),
    "written to a part of floats": lambda x: SCORES.clone().__setitem__((..., slice(0, 5)), x),
    "stacked with floats": lambda x: torch.stack((SCORES, x)),
    "the lesser of both": lambda x: torch.minimum(SCORES, x),
    "chosen among floats": lambda x: torch.where(SCORES > 0, x, -1.0),
    "summed up": lambda x: x.cumsum(-1),
    "clamped": lambda x: x.clamp(-1.0, 0.0),
    "hidden where below 0": lambda x: x < 0,
    "hidden where not 0": lambda x: x != 0,
    "visible where 0": lambda x: x == 0.0,
    "compared with floats": lambda x: x >= SCORES,
    "more hidden by -inf": lambda x: x.masked_fill(SCORES == 0, -torch.inf),
    "more hidden by the least float": lambda x: x.masked_fill(SCORES == 0, -3e38),
    "written into": lambda x: x.__setitem__((..., 0), -torch.inf),
    "filled": lambda x: x.masked_fill_(SCORES == 0, False),
}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("kind", ["compact", "given"])
def test_arithmetic_on_masks_is_refused(name, kind):
    """A model that does this expects a float mask, and would silently be wrong."""
    function = theirs.causal_mask_function if kind == "compact" else OTHERS["own"]
    mask = attention_mask(2, 5, 5, mask_function=function)
    assert (mask.given is None) == (kind == "compact")
    with pytest.raises(NotImplementedError, match=r"the model applies aten\.\w+ to its attention "):
        ARITHMETIC[name](mask)


@pytest.mark.parametrize(
    "function", [theirs.causal_mask_function, theirs.bidirectional_mask_function]
)
@pytest.mark.parametrize("lengths", [(5, 5), (1, 5), (1, 1), (3, 5)])
def test_no_mask_is_left_to_the_modules_is_causal(function, lengths):
    """There are decoders whose is_causal is False, and encoders without the attribute."""
    q_len, kv_len = lengths
    mask = attention_mask(
        2, q_len, kv_len, q_offset=kv_len - q_len, mask_function=function,
        allow_is_causal_skip=True, allow_is_bidirectional_skip=True,
    )  # fmt: skip
    assert isinstance(mask, CompactMask) and mask.given is None and mask.keys is None
    assert torch.equal(mask.dense(), expected(function, 2, *lengths, kv_len - q_len, 0, None))


# ---- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage, in bytes, of any operator's result."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if type(x) is torch.Tensor:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


LONG = 1024
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


@pytest.mark.parametrize(
    "name, changes, padding",
    [
        ("bert", {}, "right"),
        ("llama", {"num_key_value_heads": 1}, "left"),
        ("llama", {"num_key_value_heads": 1}, "right"),
        ("llama", {"num_key_value_heads": 1}, "packed"),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 64}, "left"),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 64}, "packed"),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 64}, "none"),
    ],
)
def test_no_tensor_of_rows_times_keys(name, changes, padding):
    """Forward and backward of 2 rows of 1024 tokens: the mask alone would be 2 MiB."""
    model = build(name, **SMALL, **changes, max_position_embeddings=LONG, num_hidden_layers=1)
    inputs = {"input_ids": torch.randint(3, 20, (2, LONG)), "use_cache": False}
    if padding == "packed":
        inputs["position_ids"] = torch.arange(LONG).remainder(300).expand(2, -1)
    elif padding != "none":
        mask = torch.ones(2, LONG, dtype=torch.long)
        mask[1, slice(-300, None) if padding == "right" else slice(0, 300)] = 0
        inputs["attention_mask"] = mask
    largest = {}
    for implementation in ("sdpa", "fastattn"):
        model.set_attn_implementation(implementation)
        with Largest() as seen:
            model(**inputs).logits.sum().backward()
        largest[implementation] = seen.bytes
    assert largest["sdpa"] >= 2 * LONG * LONG
    assert largest["fastattn"] < LONG * LONG / 2

"""torch's Transformer classes around fastattn's attention: multihead.py. Only what would bypass it,
or cost for nothing, is replaced; the rest is torch's, inherited.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

from torch import Tensor, nn

from .feedforward import Steps
from .multihead import MultiheadAttention

Init = TypeVar("Init", bound=Callable[..., None])


def _as(theirs: Init) -> Callable[[Callable[..., None]], Init]:
    """wraps(theirs), which type checkers read as theirs too."""
    return cast("Callable[[Callable[..., None]], Init]", wraps(theirs))


class TransformerEncoderLayer(Steps, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: its constructor, parameters, initialisation, state_dict.

    forward(src, src_mask=None, src_key_padding_mask=None, is_causal=False) -> like src

    src and masks are those of MultiheadAttention, whose rules hold (a row that sees nothing,
    is_causal together with a mask). Nested src works in training too. There is no fast path apart:
    evaluation and training run the same code.
    """

    @_as(nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask)
        return self._run(
            src,
            self._step("_sa_block", self.dropout1, self.norm1, *masks, is_causal=is_causal),
            self._step("_ff_block", self.dropout2, self.norm2),
        )


class TransformerDecoderLayer(Steps, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: its constructor, parameters, initialisation, state_dict.

    forward(tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
            memory_key_padding_mask=None, tgt_is_causal=False, memory_is_causal=False) -> like tgt

    Masks are those of MultiheadAttention, whose rules hold.
    """

    @_as(nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        others = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        return self._run(
            tgt,
            self._step("_sa_block", self.dropout1, self.norm1, *own),
            self._step("_mha_block", self.dropout2, self.norm2, *others),
            self._step("_ff_block", self.dropout3, self.norm3),
        )


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: its constructor, parameters and state_dict.

    forward(src, mask=None, src_key_padding_mask=None, is_causal=None) -> like src

    The copies of a torch.nn.TransformerEncoderLayer become fastattn.nn's. A causal mask is
    recognised where its values can be read, is_causal or not.

    enable_nested_tensor and mask_check have nothing to switch: padding costs no attention in any
    mode, and outputs at padded places are what the layers compute there, in evaluation as in
    training. (torch's evaluation may pass through nested tensors and then gives 0 there.)
    """

    @_as(nn.TransformerEncoder.__init__)
    def __init__(
        self, encoder_layer, num_layers, norm=None, enable_nested_tensor=True, mask_check=True
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        adopt(self.layers)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        is_causal = bool(is_causal)
        if any(type(x).forward is not TransformerEncoderLayer.forward for x in self.layers):
            # Layers of other classes get what torch's encoder gives: float masks.
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: its constructor, parameters and state_dict.

    forward(tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
            memory_key_padding_mask=None, tgt_is_causal=None, memory_is_causal=False) -> like tgt

    The copies of a torch.nn.TransformerDecoderLayer become fastattn.nn's. A causal mask is
    recognised where its values can be read, tgt_is_causal or not.
    """

    @_as(nn.TransformerDecoder.__init__)
    def __init__(self, decoder_layer, num_layers, norm=None) -> None:
        super().__init__(decoder_layer, num_layers, norm)
        adopt(self.layers)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        return super().forward(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            bool(tgt_is_causal),  # None: torch would compare the mask with a causal one here
            memory_is_causal,
        )  # fmt: skip


class Transformer(nn.Transformer):
    """torch.nn.Transformer: its constructor, parameters, initialisation and state_dict.

    forward(src, tgt, src_mask=None, tgt_mask=None, memory_mask=None, src_key_padding_mask=None,
            tgt_key_padding_mask=None, memory_key_padding_mask=None, src_is_causal=None,
            tgt_is_causal=None, memory_is_causal=False) -> like tgt

    Masks are those of MultiheadAttention, whose rules hold. custom_encoder and custom_decoder stay
    what they are.
    """

    @_as(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        given = [*args, *kwargs.values()]
        for part in (self.encoder, self.decoder):
            if not any(part is x for x in given):
                adopt(part)


# torch's classes and what they become. Instances change class: parameters, hooks and whoever holds
# the module stay, and so does every number drawn at construction.
OURS = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}


def adopt(module: nn.Module) -> None:
    """Every module here of exactly one of torch's classes becomes ours."""
    for x in module.modules():
        if type(x) in OURS:
            x.__class__ = OURS[type(x)]

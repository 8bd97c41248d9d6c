"""torch's Transformer classes with fastattn's attention. Only the methods that would bypass it or
are slower than need be are replaced; the rest is inherited from torch. Next hop: multihead.py.
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
    """functools.wraps(theirs), typed so that type checkers see the signature of theirs."""
    return cast("Callable[[Callable[..., None]], Init]", wraps(theirs))


class TransformerEncoderLayer(Steps, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: its constructor, parameters, initialisation, state_dict.

    forward(src, src_mask=None, src_key_padding_mask=None, is_causal=False) -> like src

    src and masks are as in MultiheadAttention, with its differences from torch (a row that sees no
    key, is_causal together with a mask). Nested src works in training too. There is no separate
    fast path: evaluation and training run the same code.
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

    Masks are as in MultiheadAttention, with its differences from torch.
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

    enable_nested_tensor and mask_check are accepted for compatibility and change nothing: padding
    costs no attention in any mode, and the outputs at padded positions are what the layers compute
    there, in evaluation as in training. (In evaluation torch may convert to nested tensors, and
    these outputs are then 0.)
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
            # Layers of other classes get float masks, as from torch's encoder.
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
            bool(tgt_is_causal),  # for None torch would compare the mask with a causal one
            memory_is_causal,
        )  # fmt: skip


class Transformer(nn.Transformer):
    """torch.nn.Transformer: its constructor, parameters, initialisation and state_dict.

    forward(src, tgt, src_mask=None, tgt_mask=None, memory_mask=None, src_key_padding_mask=None,
            tgt_key_padding_mask=None, memory_key_padding_mask=None, src_is_causal=None,
            tgt_is_causal=None, memory_is_causal=False) -> like tgt

    Masks are as in MultiheadAttention, with its differences from torch. custom_encoder and
    custom_decoder are not changed.
    """

    @_as(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        given = [*args, *kwargs.values()]
        for part in (self.encoder, self.decoder):
            if not any(part is x for x in given):
                adopt(part)


# torch's classes and their replacements. An instance changes its class in place, so that it keeps
# its parameters as initialised, its hooks, and every reference to it.
OURS = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}


def adopt(module: nn.Module) -> None:
    """Changes the class of every submodule that is exactly of one of torch's classes to ours."""
    for x in module.modules():
        if type(x) in OURS:
            x.__class__ = OURS[type(x)]

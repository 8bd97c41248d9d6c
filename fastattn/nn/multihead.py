"""MultiheadAttention: torch's module, computed by fastattn. Next hop: ../functional.py.

torch_masks.py converts its masks to options of attention(), and ../weights.py computes the
attention weights that it returns.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks
from ..functional import attention, varlen_attention
from ..weights import attention_weights
from . import torch_masks
from .linear import call_linear, linear


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its constructor, parameters, initialisation and state_dict.

    forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
            average_attn_weights=True, is_causal=False) -> (attn_output, attn_output_weights | None)

        query: [B, L, E] if batch_first, else [L, B, E]; unbatched [L, E]; or nested (jagged or
            strided) with B sequences of any lengths, if key and value are nested too.
        key: [B, S, kdim], [S, B, kdim] or [S, kdim].
        value: the same with vdim.
        key_padding_mask: [B, S], unbatched [S]. bool: True hides the key. float: added to scores.
        need_weights: also return the attention weights, after dropout as in torch. They are
            computed from the fused kernel's lse, a few rows at a time, so that only the result
            takes O(L S) memory.
        attn_mask: [L, S] or [B * num_heads, L, S], bool (True hides) or float (added to scores).
        average_attn_weights: weights are the mean over heads, [B, L, S]; False: [B, heads, L, S].
        is_causal: row i sees keys 0 to i, on top of the masks. It needs no attn_mask.

    bool and float masks may be combined. Nested inputs accept is_causal, and no mask.

    Intended differences from torch:
    - a row whose keys are all hidden attends to nothing: its output is out_proj.bias and its
      weights are 0, where torch gives NaN or 0 depending on the path it takes;
    - is_causal together with a mask applies both, where torch may discard the mask;
    - out_proj is called as a module, so that its hooks, pruning and replacements take effect;
    - nested inputs work in training too, and jagged ones are accepted.

    Raises what torch raises: AssertionError for ranks and mask dtypes, RuntimeError for shapes.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """torch's flag: do query, key and value have one width? The fast path of torch's encoder
        layer reads False instead, because it would compute attention without calling forward."""
        return self.__dict__["_qkv_same_embed_dim"] and not _fast_path_asks()

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        call = (key_padding_mask, attn_mask, is_causal, need_weights, average_attn_weights)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, *call)
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        _check_lengths(query, key, value, batched, self.batch_first)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            call = (None if key_padding_mask is None else key_padding_mask[None], *call[1:])
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out, weights = self._attend(q, k, v, *call)
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return call_linear(self.out_proj, out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v [..., E], their heads still concatenated, by one product for each different
        input."""
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        biases = [None] * 3 if bias is None else bias.split(dim)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            tail = None if bias is None else bias[dim:]
            k, v = linear(key, weight[dim:], tail).chunk(2, -1)
            return [linear(query, weight[:dim], biases[0]), k, v]
        else:
            weights = weight.split(dim)
        return [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]

    def _attend(self, q, k, v, padding, attn_mask, is_causal, need_weights, average):
        """(out [B, L, E] before out_proj, weights or None) from q [B, L, E] and k, v [B, S, E]."""
        batch, q_len, _ = q.shape
        heads, kv_len = self.num_heads, k.shape[1]
        visible = self._visible_keys(batch, k, v)
        extra = len(visible)
        operands = torch_masks.operands(
            padding, attn_mask, is_causal, batch, heads, q_len, kv_len, extra, q.dtype
        )
        if extra:  # in front of the keys, where they shift neither the diagonal nor the padding
            k, v = (torch.cat([*rows, x], 1) for rows, x in zip(zip(*visible), (k, v)))
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout_p, everything = self._dropout()
        if need_weights and dropout_p:
            operands["dropout_seed"] = checks.dropout_key(None, q.device)
        operands["dropout_p"] = dropout_p
        out = attention(q, k, v, align="start", return_lse=need_weights, **operands)
        weights = None
        if need_weights:
            out, lse = out
            if torch.is_autocast_enabled(q.device.type):
                q, k = (x.to(out.dtype) for x in (q, k))
            weights = attention_weights(q, k, lse, align="start", average=average, **operands)
            weights = weights.roll(-extra, -1) if extra else weights
        if everything:  # dropout of 1
            out, weights = (x if x is None else F.dropout(x, 1.0) for x in (out, weights))
        return out.transpose(1, 2).flatten(2), weights

    def _dropout(self) -> tuple[float, bool]:
        """(dropout_p for attention(), whether p is 1, which attention() does not accept)."""
        p = self.dropout if self.training else 0.0
        return (0.0, True) if p == 1 else (p, False)

    def _visible_keys(self, batch: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(key, value) pairs [B, 1, E] of add_bias_kv and add_zero_attn, which every row sees."""
        pairs = []
        if self.bias_k is not None:
            pairs.append(
                tuple(b.to(x.dtype).expand(batch, 1, -1)
                      for b, x in ((self.bias_k, k), (self.bias_v, v)))
            )  # fmt: skip
        if self.add_zero_attn:
            pairs.append((k.new_zeros(batch, 1, k.shape[2]), v.new_zeros(batch, 1, v.shape[2])))
        return pairs

    # ---- nested tensors ------------------------------------------------------------------------

    def _nested(self, query, key, value, padding, attn_mask, is_causal, need_weights, average):
        """forward for nested tensors, by varlen_attention(); padded only for need_weights."""
        tensors = {"query": query, "key": key, "value": value}
        for name, x in tensors.items():
            if not x.is_nested or x.layout != query.layout or x.dim() != 3:
                raise ValueError(
                    f"{name} is not a nested tensor of {query.layout} layout and 3 dimensions; "
                    "either all of query, key and value must be, or none"
                )
        for name, x in (("key_padding_mask", padding), ("attn_mask", attn_mask)):
            if x is not None:
                raise ValueError(f"{name} came with nested tensors, which have no padding; "
                                 "accepted is None")  # fmt: skip
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError(
                "nested tensors came to a module with add_bias_kv or add_zero_attn; accepted are "
                "strided tensors with a key_padding_mask"
            )
        packs = {id(x): _Packed(x) for x in tensors.values()}
        rows, keys, values = (packs[id(x)] for x in tensors.values())
        if keys is not values and keys.lengths != values.lengths:
            raise RuntimeError("key and value are nested tensors of different lengths")
        if len(rows.lengths) != len(keys.lengths):
            raise RuntimeError(f"query has {len(rows.lengths)} sequences and key "
                               f"{len(keys.lengths)}; they must be equal")  # fmt: skip
        q, k, v = self._project(rows.values, keys.values, values.values)  # [tokens, E]
        weights = None
        if need_weights:
            q, k, v = (x.padded(y) for x, y in ((rows, q), (keys, k), (values, v)))
            hidden = ~keys.exists()
            out, weights = self._attend(q, k, v, hidden, None, is_causal, True, average)
            exists = rows.exists()
            out = out[exists]
            weights = weights * (exists[..., None] if average else exists[:, None, :, None])
        else:
            dropout_p, everything = self._dropout()
            out = varlen_attention(
                *(x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v)), rows.offsets,
                keys.offsets, rows.longest, keys.longest, causal=is_causal, align="start",
                dropout_p=dropout_p,
            ).flatten(1)  # fmt: skip
            out = F.dropout(out, 1.0) if everything else out
        return rows.like(call_linear(self.out_proj, out)), weights


class _Packed:
    """A nested tensor [B, any length, C] as its values [tokens, C], one sequence after another."""

    def __init__(self, x: Tensor) -> None:
        self.nested = x
        if x.layout == torch.jagged:
            if x._ragged_idx != 1 or x.lengths() is not None:
                raise ValueError(
                    "a jagged tensor has holes between its sequences, or its ragged dimension is "
                    "not dimension 1; call contiguous() on it"
                )
            self.values, self.offsets = x.values(), x.offsets().int()
            self.lengths = self.offsets.diff().tolist()
        else:
            sizes = x._nested_tensor_size()  # [B, 2] on the CPU
            self.lengths = sizes[:, 0].tolist()
            self.values = x.contiguous().values().view(sum(self.lengths), -1)
            ends = F.pad(sizes[:, 0].cumsum(0), (1, 0))
            self.offsets = ends.to(x.device, torch.int32)
        self.longest = max(self.lengths, default=0)

    def like(self, values: Tensor) -> Tensor:
        """values [tokens, *] as a nested tensor with this tensor's lengths and layout."""
        if self.nested.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(values, self.nested.offsets())
        return torch.nested.as_nested_tensor(list(values.split(self.lengths)))

    def exists(self) -> Tensor:
        """bool [B, longest]: True where the padded tensor has a token."""
        places = torch.arange(self.longest, device=self.values.device)
        return places < self.offsets.diff()[:, None]

    def padded(self, values: Tensor) -> Tensor:
        """values [tokens, C] as [B, longest, C], padded with 0."""
        exists = self.exists()
        out = values.new_zeros(*exists.shape, values.shape[-1])
        return out.masked_scatter(exists[..., None], values)


def _fast_path_asks() -> bool:
    """Is the property read by a function that calls torch's fused encoder layer, directly or
    through a wrapper's property? Under torch.compile the reader is unknown, and the answer yes."""
    if torch.compiler.is_compiling():
        return True
    reader = sys._getframe(2)
    readers = (reader, reader.f_back)
    return any(x is not None and "_transformer_encoder_layer_fwd" in x.f_code.co_names
               for x in readers)  # fmt: skip


def _check_lengths(query, key, value, batched: bool, batch_first: bool) -> None:
    """Checks batch sizes and numbers of keys; the projections check the widths."""
    if key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(f"value has shape {list(value.shape)} and key {list(key.shape)}; all "
                             "sizes but the last must be equal")  # fmt: skip
    n = 0 if batch_first else 1
    if batched and key.shape[n] != query.shape[n]:
        raise AssertionError(f"key has batch size {key.shape[n]} (shape {list(key.shape)}) and "
                             f"query {query.shape[n]} (shape {list(query.shape)}); they must be "
                             "equal")  # fmt: skip

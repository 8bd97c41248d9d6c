"""S_dmask, the attention weights that flash_attn returns to show what dropout dropped: the weights
without dropout, negative where dropout drops them. O(S^2) memory.

Those of dense calls are made from lse by attention_weights(). For packed calls the attention
kernels compute them, without reading lengths on the host: with the j-th unit vector as the value of
key j, the output is the attention weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.functional import varlen_attention
from fastattn.weights import attention_weights

ROUND = 128  # flash_attn rounds the sizes of S_dmask up to multiples of this


def signed_weights(weights: Callable[..., Tensor], **dropout) -> Tensor:
    """The attention weights without dropout, negative where dropout drops them.

    weights(**dropout) computes them with that dropout, and weights() without dropout.
    """
    plain, dropped = weights(), weights(**dropout)
    return torch.where(dropped == 0, 0.0 - plain, plain)  # not -plain, which makes 0 into -0


def dense_weights(q: Tensor, k: Tensor, lse: Tensor, options: dict) -> Callable[..., Tensor]:
    """Weights [B, H, Sq, Skv] of attention(q, k, _, **options), Sq and Skv padded with zeros to
    multiples of ROUND. lse is that of the call, which dropout does not change."""
    options = {name: x for name, x in options.items() if name != "deterministic"}

    def weights(**dropout):
        made = attention_weights(q, k, lse, **options, **dropout)
        rows, keys = (_round(n) - n for n in made.shape[2:])
        return torch.nn.functional.pad(made, (0, keys, 0, rows))

    return weights


def packed_weights(q, k, cu_q, cu_k, longest_q, longest_k, page_table, options):
    """Weights [N, H, longest_q, longest_k] of varlen_attention(q, k, _, ...), padded with zeros to
    multiples of ROUND. Rows and keys are counted from the first of each sequence.
    """
    sequences, heads = cu_q.shape[0] - 1, q.shape[1]
    height, width = _round(longest_q), _round(longest_k)
    lens = None
    if page_table is not None:  # the same keys without pages, longest_k slots for each sequence
        lens = cu_k.diff()
        k = _gather(k, page_table, longest_k)
        cu_k = torch.arange(sequences + 1, device=k.device, dtype=torch.int32) * longest_k
    _, place = _places(cu_k, k.shape[0])
    v = _unit_vectors(place, longest_k, q.dtype).unsqueeze(1).expand(-1, k.shape[1], -1)
    n, i = _places(cu_q, q.shape[0])
    # Tokens of no sequence go to one more row at the end.
    row = torch.where(n < sequences, n * height + i, sequences * height)

    def weights(**dropout):
        out = varlen_attention(
            q, k, v, cu_q, cu_k, longest_q, longest_k, kv_lens=lens, **options, **dropout
        )
        rows = out.new_zeros(sequences * height + 1, heads, width)
        rows.index_copy_(0, row, out[..., :width])
        return rows[:-1].view(sequences, height, heads, width).transpose(1, 2)

    return weights


def _round(n: int) -> int:
    return -(-n // ROUND) * ROUND


def _unit_vectors(places: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[T] -> [T, W]: row t is 1 at places[t]. W is at least ROUND, since no head dimension is 0."""
    columns = torch.arange(max(_round(longest), ROUND), device=places.device)
    return (places.unsqueeze(1) == columns).to(dtype)


def _places(cu: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each of `total` packed tokens; N for tokens of no sequence."""
    token = torch.arange(total, device=cu.device)
    n = torch.bucketize(token, cu[1:].contiguous(), right=True)
    return n, token - cu[n]


def _gather(k: Tensor, page_table: Tensor, longest: int) -> Tensor:
    """k [pages, page_size, heads, D] -> [N * longest, heads, D]; padding slots hold anything."""
    j = torch.arange(longest, device=k.device)
    page = page_table[:, (j // k.shape[1]).clamp(max=page_table.shape[1] - 1)].long()
    return k[page.clamp(0, k.shape[0] - 1), j % k.shape[1]].flatten(0, 1)

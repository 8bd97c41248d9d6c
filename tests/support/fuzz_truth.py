"""The fuzzer's reference: plain loops in float64. Of the package it uses only dropout's mask."""

from __future__ import annotations

import math

import torch
from fuzz_cases import DTYPES, Tensors

from fastattn.core.philox import keep_block, keep_probability


def truth(t: Tensors):
    """(out, lse, leaves in float64, (k_cache, v_cache)) by loops over entries and heads."""
    case, named = t.case, dict(t.named)
    wide = {n: x.detach().double().requires_grad_() for n, x in t.leaves.items()}

    def operand(name):
        x = named.get(name)
        return wide[name] if name in wide else None if x is None else x.double()

    named |= {name: operand(name) for name in ("bias", "sinks", "alibi_slopes")}
    q, k, v = (wide.get(n, x.detach().double()) for n, x in zip("qkv", t.positional))
    caches = (k, v)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    outs, lses = [], []
    if case.call == "decode":
        q, caches = decoded(case, named, q, k, v)
    for n in range(case.batch):
        out, lse = one_entry(case, named, n, scale, *entry(t, named, n, q, *caches))
        outs.append(out), lses.append(lse)
    heads = case.kv_heads * case.group
    if case.call == "varlen":
        rest = q.shape[0] - sum(x.shape[1] for x in outs)
        out = torch.cat([*outs, q.new_zeros(heads, rest, case.v_dim)], 1).transpose(0, 1)
        lse = torch.cat([*lses, q.new_full((heads, rest), -math.inf)], 1)
    elif case.batch:
        out, lse = torch.stack(outs), torch.stack(lses)
    else:
        out, lse = q.new_zeros(0, heads, case.q_len, case.v_dim), q.new_zeros(0, heads, case.q_len)
    return out, lse, wide, caches


def entry(t, named, n, q, k, v):
    """(rows [H, m, D], keys [Hkv, n, D], values, first key that exists) of entry n."""
    case = t.case
    if case.call == "varlen":
        cu_q, cu_k = (x.tolist() for x in t.positional[3:5])
        rows = q[cu_q[n] : cu_q[n + 1]].transpose(0, 1)
        if case.page_size:
            length = cu_k[n + 1] - cu_k[n]
            pages = named["page_table"][n].long()
            keys, values = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (k, v))
        else:
            keys, values = (x[cu_k[n] : cu_k[n + 1]].transpose(0, 1) for x in (k, v))
    elif case.call == "decode":
        keys, values = (x[n] if named.get("page_table") is None and not case.rows else
                        gathered(named, n, x) for x in (k, v))  # fmt: skip
        length = int(named["cache_lens"][n]) + case.new
        return (
            q[n],
            keys[:, :length],
            values[:, :length],
            (int(named["cache_leftpad"][n]) if case.leftpad else 0),
        )
    else:
        rows, keys, values = q[n], k[n], v[n]
    if named.get("kv_lens") is not None:
        length = int(named["kv_lens"][n])
        keys, values = keys[:, :length], values[:, :length]
    return rows, keys, values, 0


def gathered(named, n, x):
    if named.get("page_table") is None:
        return x[int(named["cache_batch_idx"][n])]
    return torch.cat([x[int(page)] for page in named["page_table"][n]] or [x[:0].sum(0)], 1)


def one_entry(case, named, n, scale, q, k, v, start):
    """(out [H, m, Dv], lse [H, m]): every score is computed, and invisible ones are dropped."""
    (heads, m, _), length = q.shape, k.shape[1]
    k, v = (x.repeat_interleave(case.group, 0) for x in (k, v))
    i, j = torch.arange(m)[:, None], torch.arange(length)[None, :]
    diagonal = i + (length - m if case.align == "end" else 0)
    seen = (j >= start) & (i >= 0)
    left, right = case.window or (None, None)
    if case.causal:
        right = 0
    if left is not None and left >= 0:
        seen = seen & (j >= diagonal - left)
    if right is not None and right >= 0:
        seen = seen & (j <= diagonal + right)
    if case.documents:
        ids = named["document_ids"][n]
        seen = seen & (ids[:, None] == ids[None, :length])
    if named.get("mask") is not None:
        seen = seen & cut(named["mask"], n, m, length)
    if named.get("key_ranges") is not None:
        # [B or 1, heads or 1, rows or 1]; the rows of a packed sequence are the first of them.
        begin, end = (x[n if len(x) > 1 else 0, :, :m, None].long() for x in named["key_ranges"])
        seen = seen & (begin <= j) & (j < end)
    scores = scale * (q @ k.mT)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if named["bias"] is not None:
        scores = scores + cut(named["bias"], n, m, length)
    if named["alibi_slopes"] is not None:
        slopes = named["alibi_slopes"]
        slopes = slopes if slopes.dim() == 1 else slopes[n]
        scores = scores - slopes[:, None, None] * (diagonal - j).abs()
    seen = seen & (scores > -math.inf)
    scores = scores.masked_fill(~seen, -math.inf)
    dead = ~seen.any(-1, keepdim=True)
    columns = scores.masked_fill(dead, 0.0)
    if named["sinks"] is not None:
        columns = torch.cat([columns, named["sinks"][:, None, None].expand(-1, m, 1)], -1)
    lse = columns.logsumexp(-1, keepdim=True) if columns.shape[-1] else dead.double()
    weights = (columns[..., :length] - lse).exp().masked_fill(dead, 0.0)
    if case.dropout:
        bh = torch.arange(n * heads, (n + 1) * heads)
        kept = keep_block((case.seed, 5), bh, torch.arange(m), torch.arange(length), case.dropout)
        weights = weights * kept / keep_probability(case.dropout)
    return weights @ v, lse.masked_fill(dead, -math.inf)[..., 0]


def cut(x, n, m, length):
    """The part of a mask or bias [1 or B, 1 or H, 1 or m, 1 or keys] that one entry has."""
    x = x[n if x.shape[0] > 1 else 0]
    x = x[:, :m] if x.shape[1] > 1 else x
    return x[..., :length] if x.shape[2] > 1 else x


def decoded(case, named, q, k, v):
    """q after rotation, and the caches after the new keys were written."""
    k, v, dtype = k.clone(), v.clone(), DTYPES[case.dtype]
    moving = case.causal or any(s is not None and s >= 0 for s in case.window or ())
    lens = named["cache_lens"].tolist()
    q = q.clone()
    for n, length in enumerate(lens):
        for i in range(case.q_len if case.rotary else 0):
            q[n, :, i] = rotated(case, named, q[n, :, i], length + i * moving).to(dtype).double()
        for i in range(case.new):
            slot = length + i
            new = named["k"][n, :, i].double()
            if case.rotary:
                new = rotated(case, named, new, slot).to(dtype).double()
            row = int(named["cache_batch_idx"][n]) if case.rows else n
            if case.page_size:
                row = int(named["page_table"][n, slot // case.page_size])
                slot %= case.page_size
            k[row, :, slot], v[row, :, slot] = new, named["v"][n, :, i].double()
    return q, (k, v)


def rotated(case, named, x, position):
    cos, sin = (table[position].double() for table in named["rotary"])
    pairs, x = len(cos), x.clone()
    for p in range(pairs):
        a, b = (2 * p, 2 * p + 1) if case.rotary == "interleaved" else (p, p + pairs)
        x[:, a], x[:, b] = x[:, a] * cos[p] - x[:, b] * sin[p], x[:, a] * sin[p] + x[:, b] * cos[p]
    return x

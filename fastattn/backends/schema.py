"""The schemas of the operators torch.ops.fastattn.flash_attn_fwd and _bwd, and of Triton's, whose
names end with _triton. Kernels: csrc/cpu/ops_attention.cpp, csrc/cuda/ops.cu, kernels/launch.py.

operators.py has what else torch needs of them: fake kernels, autograd, vmap and autocast; flops.py
has the FLOP formulas. Arguments are in the normal form that forms.py makes: q [B, heads, q_len,
D], k [B, kv_heads, kv_len, D], v [B, kv_heads, kv_len, v_dim], with unit last stride and one dtype;
the operands of `Operands` and the six numbers of `Spec`, in order.

Triton's forward operator also takes 8-bit tensors, with the three `Descales` at the end: q, k and v
(out is then bfloat16), or k and v alone; it has no gradient of these. flash_attn_fwd_float8 is the
CUDA kernels' forward of float8_e4m3fn q, k and v, with the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..core.call import Call, Gradients
from ..core.spec import (
    LEAVES,
    NO_OPERANDS,
    NUMBERS,
    OPERANDS,
    Operands,
    Spec,
    numbers_of,
    split_arguments,
)

LIBRARY = torch.library.Library("fastattn", "DEF")
TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_OPERANDS = ", ".join(f"Tensor? {name}" for name in OPERANDS)
_SPEC = ", ".join(f"{x.type} {x.name}" for x in fields(Spec))  # float scale, ...
_NEEDS = ", ".join(f"bool need_d{name}" for name in LEAVES)
_GRADIENTS = ", ".join(f"Tensor {name}" for name in Gradients._fields)
_TANGENTS = ", ".join(f"Tensor? t{name}" for name in ("q", "k", "v", *LEAVES))

FAMILIES = ("", "_triton")  # suffixes of the operators' names: each pair has kernels of its own
FLOAT8 = "_float8"  # the suffix of a forward that has no backward

_DESCALES = ", Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None"

for _end in (*FAMILIES, FLOAT8):
    LIBRARY.define(
        f"flash_attn_fwd{_end}(Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC}, int num_splits"
        f"{_DESCALES if _end else ''}) -> (Tensor out, Tensor lse)",
        tags=TAGS,
    )

for _end in FAMILIES:
    LIBRARY.define(
        f"flash_attn_bwd{_end}(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q,"
        f" Tensor k, Tensor v, {_OPERANDS}, {_SPEC}, {_NEEDS}, Tensor? dentropy=None)"
        f" -> ({_GRADIENTS})",
        tags=TAGS,
    )
    # Forward mode: the results and their tangents, for tangents of q, k, v and LEAVES.
    LIBRARY.define(
        f"flash_attn_jvp{_end}(Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC}, {_TANGENTS})"
        " -> (Tensor out, Tensor lse, Tensor tout, Tensor tlse)",
        tags=TAGS,
    )
    # Its backward: the gradients of <dtout, tout> + <dtlse, tlse> with respect to the primals.
    LIBRARY.define(
        f"flash_attn_jvp_bwd{_end}(Tensor dtout, Tensor? dtlse, Tensor out, Tensor lse,"
        f" Tensor tout, Tensor tlse, Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC},"
        f" {_TANGENTS}, {_NEEDS}) -> ({_GRADIENTS})",
        tags=TAGS,
    )
    # The forward with statistics of each row; what is not needed is empty.
    LIBRARY.define(
        f"flash_attn_fwd_stats{_end}(Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC},"
        " int num_splits, bool need_entropy, bool need_argmax) -> (Tensor out, Tensor lse,"
        " Tensor max_logit, Tensor entropy, Tensor argmax)",
        tags=TAGS,
    )
    # Statistics of the probabilities, made again from lse; v is not read. What is not asked for is
    # empty.
    LIBRARY.define(
        f"flash_attn_maps{_end}(Tensor lse, Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC},"
        " bool need_col_mass, int topk, int pooled) -> (Tensor col_mass, Tensor topk_probs,"
        " Tensor topk_keys, Tensor pooled)",
        tags=TAGS,
    )

# The probabilities themselves, of all rows or of those listed; with `average`, the mean over heads.
LIBRARY.define(
    f"flash_attn_weights(Tensor lse, Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_SPEC},"
    " Tensor? rows, bool average) -> Tensor",
    tags=TAGS,
)
# Its backward, in plain torch.
LIBRARY.define(
    "flash_attn_weights_bwd(Tensor dweights, Tensor lse, Tensor q, Tensor k, Tensor v,"
    f" {_OPERANDS}, {_SPEC}, Tensor? rows, bool average) -> (Tensor dlse, Tensor dq, Tensor dk,"
    " Tensor dbias)",
    tags=TAGS,
)

# The forward for CPU tensors without operands, for calls that need nothing but the kernel
# (attend_simple() in autograd.py). It has few arguments, because torch takes 1 to 2 thousand
# instructions to pass each one.
LIBRARY.define(
    f"flash_attn_fwd_simple(Tensor q, Tensor k, Tensor v, {_SPEC}) -> (Tensor out, Tensor lse)"
)

forward = torch.ops.fastattn.flash_attn_fwd.default
forward_simple = torch.ops.fastattn.flash_attn_fwd_simple.default
backward = torch.ops.fastattn.flash_attn_bwd.default
forward_triton = torch.ops.fastattn.flash_attn_fwd_triton.default
backward_triton = torch.ops.fastattn.flash_attn_bwd_triton.default
forward_float8 = torch.ops.fastattn.flash_attn_fwd_float8.default
jvp = torch.ops.fastattn.flash_attn_jvp.default
jvp_bwd = torch.ops.fastattn.flash_attn_jvp_bwd.default
jvp_triton = torch.ops.fastattn.flash_attn_jvp_triton.default
jvp_bwd_triton = torch.ops.fastattn.flash_attn_jvp_bwd_triton.default
weights = torch.ops.fastattn.flash_attn_weights.default
weights_backward = torch.ops.fastattn.flash_attn_weights_bwd.default
FORWARD_STATISTICS = {
    "": torch.ops.fastattn.flash_attn_fwd_stats.default,
    "_triton": torch.ops.fastattn.flash_attn_fwd_stats_triton.default,
}
MAPS = {
    "": torch.ops.fastattn.flash_attn_maps.default,
    "_triton": torch.ops.fastattn.flash_attn_maps_triton.default,
}
PAIRS: dict[str, tuple] = dict(
    zip(FAMILIES, ((forward, backward), (forward_triton, backward_triton)))
)
JVP_PAIRS: dict[str, tuple] = dict(zip(FAMILIES, ((jvp, jvp_bwd), (jvp_triton, jvp_bwd_triton))))
FORWARDS = {end: pair[0] for end, pair in PAIRS.items()} | {FLOAT8: forward_float8}

_N, _M = len(OPERANDS), len(NUMBERS)
_NOTHING = (None,) * _N


def arguments(call: Call) -> tuple:
    """The arguments that all operators take first: q, k and v, the operands, the numbers."""
    x = call.operands
    tensors = _NOTHING if x is NO_OPERANDS else x.tensors()
    return call.q, call.k, call.v, *tensors, *numbers_of(call.spec)


@dataclass(slots=True)
class Arguments:
    """An operator's arguments by name; `rest` has those after arguments()."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: tuple  # those of OPERANDS
    numbers: tuple  # those of NUMBERS
    rest: tuple

    @classmethod
    def of(cls, q, k, v, *rest) -> Arguments:
        return cls(q, k, v, *split_arguments(rest))

    def call(self) -> Call:
        return Call(self.q, self.k, self.v, Spec(*self.numbers), Operands(*self.tensors))

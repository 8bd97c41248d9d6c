"""Linear cross entropy: a language model's loss without all its logits in memory.
Next hop: cross_entropy_ in csrc/cpu/ops_fused.cpp, for the rows of one chunk, and for GPUs
kernels/linear_cross_entropy.py.

Rows (tokens) are processed in chunks. A matrix product gives a chunk's logits, which are replaced
in place by their gradients, and two more products add these to the gradients of hidden and weight.
For a scalar loss all of that happens in the forward pass, so that the logits are computed once.
Ignored rows are dropped first, so padding costs nothing; on a GPU, where counting them would
synchronize, they are computed as rows of zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.gpu import gpu_missing
from ..backends.library import NATIVE_MISSING
from ..backends.schema import LIBRARY, TAGS
from ..core import checks
from ..core.tensors import accumulate_dtype, autocast_to
from ..core.transforms import pull_back
from .operator import (  # fmt: skip
    differentiable,
    floating,
    on_gpu,
    save_inputs,
    saved_inputs,
    through,
)

# Logits of a chunk, 32 MiB in fp32. The matrix products are faster with more rows: forward and
# backward of 1024 rows of 32000 logits took 1011 ms in chunks of 64 rows, 811 ms of 128 and 712 ms
# of 256; torch with all the logits took 864 ms.
CHUNK_LOGITS = 1 << 23
CHUNK_LOGITS_GPU = 1 << 27  # 256 MiB in bf16: 1024 rows of a 128k vocabulary


def reference(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, softcap):
    """The loss of each row [N], by plain torch from all the logits at once."""
    logits = F.linear(hidden, weight, bias).to(accumulate_dtype(hidden.dtype))
    loss, _, _ = _losses(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    return loss


def _losses(logits, labels, ignore_index, label_smoothing, z_loss, softcap):
    """(loss [N], capped logits [N, V], lse [N]); z_loss adds z_loss * lse^2 (PaLM's z-loss)."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels != ignore_index
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, torch.where(kept, labels, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * target
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(kept, loss, 0.0), logits, lse


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """fastattn.nn.LinearCrossEntropy as a function; its docstring documents the arguments.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V] or None; labels: int64 [...].
        chunk: rows at a time; None chooses by CHUNK_LOGITS.

    Returns:
        fp32 (fp64 for fp64): a scalar, or labels' shape with reduction="none".
    """
    hidden, weight, bias, rows = _checked(hidden, weight, bias, labels, ignore_index)
    if chunk is None:
        logits = CHUNK_LOGITS_GPU if hidden.is_cuda else CHUNK_LOGITS
        chunk = max(1, min(-(-rows.shape[0] // 4), logits // max(1, weight.shape[0])))
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    arguments = (hidden, weight, bias, rows, *numbers)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        loss, scale = reference(*arguments), None
    else:
        scale = None if reduction == "none" else _scale(rows, ignore_index, reduction, hidden)
        needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        if scale is not None and torch.is_grad_enabled() and any(needs):
            return _total(*arguments, scale, chunk, *needs)[0]
        loss = _rows(*arguments, chunk)
    if reduction == "none":
        return loss.view(labels.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (rows != ignore_index).sum()


def _scale(rows, ignore_index, reduction, hidden):
    """The factor of each row's loss in the total, a scalar: 1 for a sum, 1 / (rows that are not
    ignored) for a mean."""
    one = torch.ones((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
    return one / (rows != ignore_index).sum() if reduction == "mean" else one


def _checked(hidden, weight, bias, labels, ignore_index):
    """(hidden [N, D], weight, bias, labels [N] int64) in one dtype."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in tensors.items():
        floating(name, x)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = {name: autocast_to(x, dtype) for name, x in tensors.items()}
        hidden, weight, bias = tensors["hidden"], tensors["weight"], tensors.get("bias")
    for name, x in tensors.items():
        if x.dtype != hidden.dtype or x.device != hidden.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device} and hidden {hidden.dtype} on "
                            f"{hidden.device}; one dtype and device are accepted")  # fmt: skip
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {checks.show(hidden)} and weight {checks.show(weight)};"
                         " accepted are [..., D] and [V, D]")  # fmt: skip
    vocab = weight.shape[0]
    if vocab < 1:
        raise ValueError("weight has no rows; accepted is [V, D] with V at least 1")
    if bias is not None and tuple(bias.shape) != (vocab,):
        raise ValueError(f"bias has shape {checks.show(bias)}; accepted is [V] = [{vocab}]")
    if checks.tensor("labels", labels).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels is {labels.dtype}; accepted is int64 (or int32)")
    if labels.shape != hidden.shape[:-1] or labels.device != hidden.device:
        raise ValueError(f"labels has shape {checks.show(labels)} on {labels.device}; accepted is "
                         f"hidden's {list(hidden.shape[:-1])} on {hidden.device}")  # fmt: skip
    rows = labels.reshape(-1).long()
    if checks.has_values(rows):
        wrong = rows[(rows != ignore_index) & ((rows < 0) | (rows >= vocab))]
        if wrong.numel():
            raise ValueError(f"labels holds {int(wrong[0])}; accepted is [0, {vocab - 1}], or "
                             f"{ignore_index} for a row to ignore")  # fmt: skip
    return hidden.reshape(-1, weight.shape[1]), weight, bias, rows


# ---- one chunk after another --------------------------------------------------------------------


def _chunked(hidden, weight, bias, labels, numbers, scale, chunk, needs):
    """(loss [N], dhidden, dweight, dbias), the latter the gradients of sum(scale * loss). `needs`
    says which are needed; the others are empty. Without a scale there are none."""
    ignored = labels == numbers[0]
    all_rows = not _can_count(hidden)
    if not all_rows and ignored.any():
        kept = (~ignored).nonzero().squeeze(1)
        inside = (hidden[kept], weight, bias, labels[kept], numbers)
        scale = None if scale is None else scale[kept]
        some, dsome, dweight, dbias = _chunked(*inside, scale, chunk, needs)
        loss = some.new_zeros(labels.shape).index_copy_(0, kept, some)
        dhidden = torch.zeros_like(hidden).index_copy_(0, kept, dsome) if needs[0] else dsome
        return loss, dhidden, dweight, dbias

    dtype = accumulate_dtype(hidden.dtype)
    need_dhidden, need_dweight, need_dbias = needs
    loss = hidden.new_empty(labels.shape, dtype=dtype)
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    dweight = weight.new_zeros(weight.shape if need_dweight else (0,), dtype=dtype)
    dbias = weight.new_zeros(weight.shape[:1] if need_dbias else (0,), dtype=dtype)
    for begin in range(0, labels.shape[0], chunk):
        rows = slice(begin, begin + chunk)
        x = hidden[rows]
        if all_rows:
            x = x.masked_fill(ignored[rows, None], 0.0)
        logits = F.linear(x, weight, bias)  # [chunk, V]
        loss[rows] = _loss_rows_(
            logits, labels[rows], numbers, None if scale is None else scale[rows]
        )
        if need_dhidden:
            torch.mm(logits, weight, out=dhidden[rows])
        if need_dweight and weight.dtype == dtype:
            dweight.addmm_(logits.t(), x)
        elif need_dweight:  # summed in fp32, not in half precision
            dweight += logits.t() @ x
        if need_dbias:
            dbias += logits.sum(0, dtype=dtype)
    return loss, dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _can_count(x) -> bool:
    """May x's values be read? On a GPU that synchronizes, and fails in CUDA graph capture."""
    return not x.is_cuda


def _loss_rows_(logits, labels, numbers, scale):
    """Each row's loss. With a scale, the gradients of sum(scale * loss) overwrite logits."""
    missing = gpu_missing(logits.get_device()) if logits.is_cuda else NATIVE_MISSING
    if missing is None and (logits.is_cpu or logits.is_cuda):
        loss, _ = torch.ops.fastattn.cross_entropy_(logits, labels, scale, *numbers)
        return loss
    ignore_index, label_smoothing, z_loss, softcap = numbers
    dtype = accumulate_dtype(logits.dtype)
    loss, capped, lse = _losses(logits.to(dtype), labels, *numbers)
    if scale is not None:
        kept = labels != ignore_index
        scale, labels = torch.where(kept, scale, 0.0), torch.where(kept, labels, 0)
        grad = (capped - lse.unsqueeze(-1)).exp() * (1 + 2 * z_loss * lse).unsqueeze(-1)
        grad -= label_smoothing / logits.shape[-1]
        at_label = grad.new_full((labels.shape[0], 1), label_smoothing - 1)
        grad.scatter_add_(-1, labels.unsqueeze(-1), at_label)
        if softcap:
            grad *= 1 - (capped / softcap).square()
        logits.copy_(grad * scale.unsqueeze(-1))
    return loss


# ---- operators ----------------------------------------------------------------------------------
# They run the loop above on any device, and each is one node of torch.compile's graph.

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_NUMBERS = "int ignore_index, float label_smoothing, float z_loss, float softcap"
_NEEDS = "bool need_dhidden, bool need_dweight, bool need_dbias"
_GRADS = "Tensor dhidden, Tensor dweight, Tensor dbias"
for _schema in (
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? scale, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap) -> (Tensor loss, Tensor lse)",
    f"linear_cross_entropy_fwd({_TENSORS}, {_NUMBERS}, SymInt chunk) -> Tensor",
    f"linear_cross_entropy_bwd(Tensor scale, {_TENSORS}, {_NUMBERS}, SymInt chunk, {_NEEDS})"
    f" -> ({_GRADS})",
    f"linear_cross_entropy_total({_TENSORS}, {_NUMBERS}, Tensor scale, SymInt chunk, {_NEEDS})"
    f" -> (Tensor total, {_GRADS})",
):
    LIBRARY.define(_schema, tags=TAGS)
on_gpu("linear_cross_entropy", "cross_entropy_")


def _forward(hidden, weight, bias, labels, *rest):
    *numbers, chunk = rest
    return _chunked(hidden, weight, bias, labels, numbers, None, chunk, (False,) * 3)[0]


def _backward(scale, hidden, weight, bias, labels, *rest):
    *numbers, chunk, _, _, _ = rest
    return _chunked(hidden, weight, bias, labels, numbers, scale, chunk, rest[-3:])[1:]


def _forward_and_backward(hidden, weight, bias, labels, *rest):
    *numbers, scale, chunk, _, _, _ = rest
    each = scale.expand(labels.shape)
    loss, *grads = _chunked(hidden, weight, bias, labels, numbers, each, chunk, rest[-3:])
    return loss.sum() * scale, *grads


for _name, _loop in (("fwd", _forward), ("bwd", _backward), ("total", _forward_and_backward)):
    LIBRARY.impl(f"linear_cross_entropy_{_name}", _loop, "CompositeExplicitAutograd")


def _gradients_fake(hidden, weight, needs):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs))


@torch.library.register_fake("fastattn::cross_entropy_", lib=LIBRARY)
def _(logits, labels, *rest):
    return tuple(
        logits.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype)) for _ in range(2)
    )


@torch.library.register_fake("fastattn::linear_cross_entropy_fwd", lib=LIBRARY)
def _(hidden, weight, bias, labels, *rest):
    return hidden.new_empty(labels.shape, dtype=accumulate_dtype(hidden.dtype))


@torch.library.register_fake("fastattn::linear_cross_entropy_bwd", lib=LIBRARY)
def _(scale, hidden, weight, bias, labels, *rest):
    return _gradients_fake(hidden, weight, rest[-3:])


@torch.library.register_fake("fastattn::linear_cross_entropy_total", lib=LIBRARY)
def _(hidden, weight, bias, labels, *rest):
    total = hidden.new_empty((), dtype=accumulate_dtype(hidden.dtype))
    return total, *_gradients_fake(hidden, weight, rest[-3:])


# ---- autograd -----------------------------------------------------------------------------------


def _rows_gradient(ctx, dloss):
    inputs = saved_inputs(ctx)
    if dloss is None:
        return (None,) * len(inputs)
    needs = ctx.needs_input_grad[:3]
    grads = _rows_backward(dloss, *inputs, *needs)
    return *(g if need else None for g, need in zip(grads, needs)), *(None,) * 6


def _rows_grads(scale, hidden, weight, bias, labels, *rest):
    numbers, needs = rest[:4], rest[-3:]

    def gradients(scale, hidden, weight, bias):
        def rows(*x):
            return (reference(*x, labels, *numbers),)

        grads = pull_back(rows, (hidden, weight, bias), (scale,))
        return tuple(g if need else hidden.new_empty(0) for g, need in zip(grads, needs))

    return gradients


def _total_setup(ctx, inputs, output):
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    hidden, weight, bias, labels, *numbers, scale, _, _, _, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, scale, *grads)
    ctx.numbers, ctx.needs = numbers, inputs[-3:]
    ctx.set_materialize_grads(False)


def _total_gradient(ctx, dtotal, *_):
    nothing = (None,) * 13
    if dtotal is None:
        return nothing
    hidden, weight, bias, labels, scale, *grads = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: the gradients depend on all inputs

        def total(*x):
            return (reference(*x, labels, *ctx.numbers).sum() * scale,)

        grads = pull_back(total, (hidden, weight, bias), (dtotal,))
    else:
        grads = [(g * dtotal).to(g.dtype) for g in grads]
    return *(g if need else None for g, need in zip(grads, ctx.needs)), *nothing[3:]


_rows = differentiable("linear_cross_entropy_fwd", save_inputs, _rows_gradient)
_rows_backward = differentiable("linear_cross_entropy_bwd", save_inputs, through(_rows_grads, 4))
_total = differentiable("linear_cross_entropy_total", _total_setup, _total_gradient)

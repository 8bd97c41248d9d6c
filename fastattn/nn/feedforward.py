"""The feed-forward block of torch's layers with ReLU and dropout in one step, in training on the
CPU, where torch's dropout costs more than the attention that fastattn leaves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..philox import keep_probability, keep_threshold


class FeedForward:
    """_ff_block of TransformerEncoderLayer and TransformerDecoderLayer; mixed in before them."""

    def _ff_block(self, x: Tensor) -> Tensor:
        drop = self.dropout
        if not (
            self.activation is F.relu
            and type(drop) is nn.Dropout
            and not drop._forward_hooks
            and not drop._forward_pre_hooks
            and drop.training
            and 0 < drop.p < 1
            and type(x) is Tensor
            and x.is_cpu
            and not x.is_nested
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        ):
            return super()._ff_block(x)
        last = self.dropout3 if hasattr(self, "dropout3") else self.dropout2
        return last(self.linear2(ReluDropout.apply(self.linear1(x), drop.p)))


class ReluDropout(torch.autograd.Function):
    """F.dropout(F.relu(x), p). Its result says where the gradient goes: no mask is kept.

    In ms for [2, 512, 2048] float32 on one AVX2 core, new memory included:

        F.dropout(F.relu(x)), forward and backward    20.6 and 6.1
        this                                           6.4 and 3.1

    torch draws a number for each element, on one thread; here a draw of 64 bits serves four, and an
    element is kept with the probability keep_probability(p), as in attention. The draws are from
    torch's generator: the same seed drops the same elements.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits < keep_threshold(p) - 2**15
        ctx.scale = 1 / keep_probability(p)
        out = x.relu().mul_(kept).mul_(ctx.scale)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0) * ctx.scale, None

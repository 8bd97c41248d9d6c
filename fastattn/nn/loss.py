"""LinearCrossEntropy: the loss of a language model's head without all its logits in memory.
Next hop: ../fused/linear_cross_entropy.py.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..core import checks
from ..fused.linear_cross_entropy import linear_cross_entropy
from ._arguments import choice, positive

REDUCTIONS = ("mean", "sum", "none")


class LinearCrossEntropy(nn.Module):
    """F.cross_entropy(hidden @ weight.T + bias, labels) without the logits [N, V] in memory.

    Rows (tokens) are processed in chunks of at most a quarter of them. A chunk's logits are
    overwritten by their gradients, in the forward pass (for reduction="none", in the backward).

    Args:
        ignore_index: rows with this label have no loss and no gradient, default -100.
        label_smoothing: in [0, 1]: the target is (1 - label_smoothing) one-hot plus
            label_smoothing / V everywhere.
        z_loss: adds z_loss * logsumexp(logits)^2 to each row's loss (PaLM, arXiv:2204.02311).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); 0 is off.
        reduction: "mean" over the rows that are not ignored (NaN if all are, as in torch), "sum",
            or "none".
        chunk: rows of a chunk; None: about 8 million logits on the CPU and 134 million on a GPU, at
            most N / 4 rows.

    Raises:
        ValueError or TypeError: an argument, which is named, is not accepted.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        reduction: str = "mean",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        if not 0 <= checks.number("label_smoothing", label_smoothing) <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; accepted is a number in "
                             "[0, 1]")  # fmt: skip
        for name, x in (("z_loss", z_loss), ("softcap", softcap)):
            if not 0 <= checks.number(name, x) < math.inf:
                raise ValueError(f"{name} is {x}; accepted is a finite number >= 0 (0 is off)")
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap
        self.reduction = choice("reduction", reduction, REDUCTIONS)
        self.chunk = None if chunk is None else positive("chunk", chunk)

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The loss: a scalar, or labels' shape for reduction="none".

        Args:
            hidden: [..., D], float32, bfloat16, float16 or float64. The caller shifts it against
                the labels of a language model: hidden[:, :-1] with labels[:, 1:].
            weight: [V, D] in hidden's dtype, a head's or a tied embedding's. Under torch.autocast
                hidden, weight and bias are cast to its dtype.
            labels: [...] int64 (or int32), in [0, V) or ignore_index.
            bias: [V].

        Returns:
            float32 (float64 for float64). Differentiable in hidden, weight and bias; the gradients
            of weight and bias are summed over chunks in float32 and rounded once. Second
            derivatives are plain torch's and need all the logits in memory.
        """
        return linear_cross_entropy(
            hidden, weight, labels, bias, self.ignore_index, self.label_smoothing, self.z_loss,
            self.softcap, self.reduction, self.chunk,
        )  # fmt: skip

    def extra_repr(self) -> str:
        names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction", "chunk")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

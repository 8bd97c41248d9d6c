"""The operators around attention as torch sees them: schemas, graphs, memory, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused_cases import table
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.fused import gate, norm, rope
from fastattn.fused import linear_cross_entropy as fused_loss
from fastattn.fused.linear_cross_entropy import linear_cross_entropy

OPS = torch.ops.fastattn


# ---- as operators -------------------------------------------------------------------------------


@pytest.mark.native
def test_opcheck():
    x, y, dy = (torch.randn(2, 3, 6, requires_grad=n < 2) for n in range(3))
    weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    hidden, head = torch.randn(5, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    labels, q = torch.tensor([0, 8, -100, 3, 3]), torch.randn(1, 2, 3, 6).transpose(1, 2)
    numbers = (-100, 0.1, 0.2, 3.0)
    q = q.requires_grad_()
    _, summed, mean, rstd = OPS.norm_fwd(x, y, weight, bias, 1e-5, True)
    detached = (summed.detach(), weight.detach(), mean, rstd, 1e-5, True, True, True)
    for operator, arguments in (
        (OPS.norm_fwd, (x, y, weight, bias, 1e-5, True)),
        (OPS.norm_fwd, (x[..., ::2], None, None, None, 1e-5, False)),
        (OPS.norm_bwd, (dy, dy, *detached)),
        (OPS.gate_fwd, (x, y, "gelu")),
        (OPS.gate_bwd, (dy, x, y, "silu")),
        (OPS.rotate, (q, torch.randn(2, 3), torch.randn(2, 3), None, True, False)),
        (OPS.cross_entropy_, (torch.randn(5, 9), labels, torch.ones(5), *numbers)),
        (OPS.linear_cross_entropy_fwd, (hidden, head, None, labels, *numbers, 2)),
        (OPS.linear_cross_entropy_bwd,
         (torch.ones(5), hidden, head, None, labels, *numbers, 2, True, True, False)),
        (OPS.linear_cross_entropy_total,
         (hidden, head, None, labels, *numbers, torch.tensor(0.2), 2, True, True, False)),
    ):  # fmt: skip
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.native
def test_operators_under_compile():
    """If called by name in a compiled function, they are nodes of its graph, with gradients."""

    def function(x, weight, gate):
        y, _, _, _ = OPS.norm_fwd(x, None, weight, None, 1e-5, False)
        return OPS.gate_fwd(gate, OPS.rotate(y, *table(y), None, False, False), "silu")

    inputs = [torch.randn(s, requires_grad=True) for s in ((1, 2, 3, 8), (8,), (1, 2, 3, 8))]
    right = function(*inputs)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, right)
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, right))):
        torch.testing.assert_close(a, b)


def test_calls_under_compile():
    labels = torch.tensor([1, 3, -100, 2])

    def function(hidden, head):
        x, summed = norm.norm(hidden, hidden, None, None, 1e-5, True)
        x = gate.gate(x, summed, "gelu")
        return linear_cross_entropy(x, head, labels)

    inputs = [torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)]
    right, got = function(*inputs), torch.compile(function, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, right)
    for a, b in zip(*(torch.autograd.grad(y, inputs) for y in (got, right))):
        torch.testing.assert_close(a, b)


def test_meta():
    x = torch.empty(2, 3, 8, device="meta", requires_grad=True)
    y, _ = norm.norm(x, x, None, None, 1e-5, True)
    y = rope.rotate(gate.gate(y, x, "silu"), *(t.to("meta") for t in table(x)), None, False)
    assert y.shape == x.shape and y.is_meta


# ---- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operator returns. It also enters
    the loss's own operators, whose loops it runs under itself."""

    def __init__(self):
        super().__init__()
        self.loops = {"fwd": "_forward", "bwd": "_backward", "total": "_forward_and_backward"}
        self.elements, self.entered = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function.name().split("::")
        if space == "fastattn" and name.startswith("linear_cross_entropy_"):
            self.entered.append(name.rpartition("_")[2])
            with self:
                return getattr(fused_loss, self.loops[self.entered[-1]])(*args)
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_exist(reduction):
    rows, dim, vocab = 64, 8, 1000
    hidden = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,))
    with Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        loss.sum().backward()
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    steps = {"mean": ["total", "fwd"], "none": ["fwd", "bwd", "fwd"]}
    assert seen.entered == steps[reduction]
    assert seen.elements == rows * vocab // 4  # a chunk's logits are seen, so all would be
    with Largest() as seen:
        F.cross_entropy(F.linear(hidden, weight), labels)
    assert seen.elements == rows * vocab


# ---- bad input: one sentence --------------------------------------------------------------------

_X = torch.randn(4, 6)
_LABELS = torch.zeros(4, dtype=torch.long)
ERRORS = {
    "norm weight": (lambda: norm.norm(_X, None, torch.ones(5), None, 1e-5, True),
                    ValueError, r"x has shape \[4, 6\] and weight \[5\]; accepted is \[..., 5\]"),
    "norm residual": (lambda: norm.norm(_X, _X[:1], None, None, 1e-5, True),
                      ValueError, r"residual has shape \[1, 6\] and x \[4, 6\]"),
    "norm dtype": (lambda: norm.norm(_X.int(), None, None, None, 1e-5, True),
                   TypeError, "x is torch.int32; accepted are float32"),
    "norm type": (lambda: norm.norm([1.0], None, None, None, 1e-5, True),
                  TypeError, "x is of type list"),
    "gate shapes": (lambda: gate.gate(_X, _X[0], "silu"),
                    ValueError, r"up has shape \[6\] and gate \[4, 6\]"),
    "loss label": (lambda: linear_cross_entropy(_X, torch.ones(3, 6), _LABELS + 3),
                   ValueError, r"labels holds 3; accepted is \[0, 2\], or -100"),
    "loss label type": (lambda: linear_cross_entropy(_X, torch.ones(3, 6), _LABELS.float()),
                        TypeError, "labels is torch.float32; accepted is int64"),
    "loss label shape": (lambda: linear_cross_entropy(_X, torch.ones(3, 6), _LABELS[1:]),
                         ValueError, r"labels has shape \[3\] on cpu; accepted is hidden's \[4\]"),
    "loss weight": (lambda: linear_cross_entropy(_X, torch.ones(3, 5), _LABELS),
                    ValueError, r"hidden has shape \[4, 6\] and weight \[3, 5\]"),
    "loss dtype": (lambda: linear_cross_entropy(_X, torch.ones(3, 6).double(), _LABELS),
                   TypeError, "weight is torch.float64 on cpu and hidden torch.float32"),
    "loss bias": (lambda: linear_cross_entropy(_X, torch.ones(3, 6), _LABELS, torch.ones(4)),
                  ValueError, r"bias has shape \[4\]; accepted is \[V\] = \[3\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.native
def test_the_operators_check_what_would_crash():
    x = torch.randn(1, 2, 3, 6)
    cos = torch.randn(2, 3)
    # Each of these would be copied, and the gradients would be lost with the copy.
    for logits in (_X.t().contiguous().t(), _X.repeat(1, 2)[:, ::2], _X[:1].expand(_X.shape)):
        with pytest.raises(RuntimeError, match="logits must be"):
            OPS.cross_entropy_(logits, _LABELS, None, -100, 0.0, 0.0, 0.0)
    for call, words in (
        (lambda: OPS.rotate(x, cos, cos, None, True, False), "cos has 2 rows and x 3"),
        (lambda: OPS.rotate(x, cos, cos, torch.tensor([0, 5, 1]), True, False), "positions holds"),
        (lambda: OPS.norm_fwd(_X, None, torch.ones(5), None, 1e-5, True), "weight has shape"),
        (lambda: OPS.gate_fwd(_X, _X[:2], "silu"), "up has shape"),
        (lambda: OPS.gate_fwd(_X, _X, "tanh"), "activation is 'tanh'"),
        (lambda: OPS.cross_entropy_(_X.clone(), _LABELS + 6, None, -100, 0.0, 0.0, 0.0),
         "labels holds 6"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            call()

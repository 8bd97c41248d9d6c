"""`python -m fastattn verify --model`: compares a user's model, after swap(), with float64 layer by
layer.

Three copies run on the same inputs: the model in float64 (the truth), the plain model in its dtype
(the effect of rounding alone) and the swapped model in its dtype. The error of a layer's output may
be a multiple of the plain model's error plus a few roundings (core/tolerance.py). An error
propagates to all later layers, so the report names the first and innermost layer whose inputs are
right and whose outputs are wrong; in the backward pass, the same for gradients.

One plain run does not show every effect of rounding: if a ReLU's input is within a rounding of 0,
its gradient may go either way, and the swapped model may take the other one. So before a layer
fails, the plain model runs NUDGES more times with each parameter moved by one rounding, and its
error is the largest of all runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import tolerance
from ..swapping import SwapReport, swap

KINDS = {"output": "result", "gradient": "gradient"}  # kinds of core/tolerance.py
NUDGES = 8


@dataclass(frozen=True)
class Layer:
    """One call of one layer: its output or gradient with the largest error / allowed error."""

    name: str
    kind: str  # the layer's class
    what: str  # "output", or "gradient": of its inputs and its own parameters
    error: float  # largest, relative to the largest true value
    plain_error: float  # the same error of the plain model
    allowed: float
    given_right: bool  # whether its inputs (for gradients, its output's gradients) passed

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.kind}): {self.what} is off by {self.error:.1e}, allowed "
            f"{self.allowed:.1e}, unswapped {self.plain_error:.1e}"
        )


@dataclass(frozen=True)
class Audit:
    """All compared layers: outputs in the order of the forward pass, then gradients in the order of
    the backward pass. str() is a report."""

    layers: tuple[Layer, ...]
    swapped: SwapReport
    gradients: str | None  # why gradients could not be compared, or None

    @property
    def passed(self) -> bool:
        return all(layer.passed for layer in self.layers)

    @property
    def first(self) -> Layer | None:
        """The first, innermost layer with right inputs and wrong outputs; None if all passed."""
        for what in ("output", "gradient"):
            failed = [x for x in self.layers if x.what == what and not x.passed]
            guilty = [x for x in failed if x.given_right]
            inner = [
                x for x in guilty
                if not any(y is not x and _inside(y.name, x.name) for y in guilty)
            ]  # fmt: skip
            if failed:
                return (inner or failed)[0]
        return None

    def as_dict(self) -> dict:
        """The result as JSON-serializable data."""
        first = self.first
        return {
            "passed": self.passed,
            "first": str(first) if first else None,
            "swapped": [list(row) for row in self.swapped.swapped],
            "left": [list(row) for row in self.swapped.left],
            "gradients": self.gradients,
            "layers": [asdict(layer) | {"passed": layer.passed} for layer in self.layers],
        }

    def __str__(self) -> str:
        lines = [str(self.swapped), ""]
        for what in ("output", "gradient"):
            rows = [layer for layer in self.layers if layer.what == what]
            if rows:
                worst = max(rows, key=lambda layer: layer.error / max(layer.allowed, 1e-300))
                lines.append(f"{len(rows)} {what}s compared; nearest to its limit: {worst}")
        if self.gradients:
            lines.append(f"gradients not compared: {self.gradients}")
        first = self.first
        lines.append(
            f"FIRST TO DIFFER: {first}" if first else
            "every layer is as near to float64 as rounding allows"
        )  # fmt: skip
        return "\n".join(lines)


# ---- comparing ----------------------------------------------------------------------------------


def audit(model: nn.Module, inputs: dict | tuple, dtype: torch.dtype = torch.float32) -> Audit:
    """Compares a model with its swapped self, layer by layer.

    Args:
        model: any module; it is copied, not changed. Dropout is off (eval mode).
        inputs: the arguments of its forward, a dict by name or a tuple by position. Floating-point
            tensors are converted to each copy's dtype.
        dtype: that of the plain and the swapped copy, default float32.

    Returns:
        The Audit.

    Raises:
        ValueError: the model does not run on these inputs, or swap() changed nothing in it.
    """
    model = copy.deepcopy(model).eval()
    changed = copy.deepcopy(model)
    report = swap(changed)
    if not report.swapped:
        raise ValueError(f"swap() changed nothing in this model, so there is nothing to audit\n"
                         f"{report}")  # fmt: skip
    try:
        truth = _Trace(model, inputs, torch.float64)
        plain = _Trace(model, inputs, dtype)
    except Exception as error:
        sentence = str(error).split("\n")[0]
        raise ValueError(f"the model does not run on these inputs: {sentence}") from error
    ours = _Trace(changed, inputs, dtype)
    found = _layers(truth, [plain], ours, dtype)
    if not all(layer.passed for layer in found):
        nudged = [_Trace(model, inputs, dtype, nudge) for nudge in range(1, NUDGES + 1)]
        found = _layers(truth, [plain, *nudged], ours, dtype)
    return Audit(found, report, truth.why_no_gradients)


@dataclass
class _Call:
    """The inputs and outputs of one call of one layer, and their gradients by position."""

    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, Tensor]
    input_gradients: dict[int, Tensor] = field(default_factory=dict)
    output_gradients: dict[int, Tensor] = field(default_factory=dict)


class _Trace:
    """One run of one copy: the calls of its layers by (name, number), in the order in which they
    finished, with the gradients of a fixed random projection of the outputs. nudge: if not 0, a
    seed with which each parameter is moved up or down by one rounding."""

    def __init__(
        self, model: nn.Module, inputs: dict | tuple, dtype: torch.dtype, nudge: int = 0
    ) -> None:
        model = copy.deepcopy(model).to(dtype)
        if nudge:
            _nudge(model, nudge)
        self.calls: dict[tuple[str, int], _Call] = {}
        self._names = {m: name or "(model)" for name, m in model.named_modules()}
        self._counts: dict[str, int] = {}
        for module in self._names:
            module.register_forward_hook(self._note, with_kwargs=True)
        arguments = _in_dtype(inputs, dtype)
        keywords = arguments if isinstance(arguments, dict) else {}
        with torch.enable_grad():
            out = model(*(() if keywords else arguments), **keywords)
            self.why_no_gradients = self._backward(list(_tensors(out)))

    def _note(self, module, arguments, keywords, out) -> None:
        name, given = self._names[module], list(_tensors((arguments, keywords)))
        gave = list(_tensors(out))
        number = self._counts[name] = self._counts.get(name, -1) + 1
        parameters = dict(module.named_parameters(recurse=False))
        kept = ([x.detach().clone() for x in tensors] for tensors in (given, gave))
        call = _Call(type(module).__name__, *kept, parameters)
        self.calls[name, number] = call
        for tensors, gradients in ((given, call.input_gradients), (gave, call.output_gradients)):
            for index, tensor in enumerate(tensors):
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda g, to=gradients, i=index: to.setdefault(i, g.detach().clone())
                    )

    def _backward(self, outs: list[Tensor]) -> str | None:
        """Computes gradients of the outputs weighted with fixed random numbers, the same in each
        copy. Returns why it cannot, or None."""
        draw = torch.Generator().manual_seed(0)
        weighted = [
            (out * torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)).sum()
            for out in outs
        ]
        losses = [loss for loss in weighted if loss.requires_grad]
        if not losses:
            return "no output requires grad"
        try:
            torch.stack(losses).sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            return str(error).split("\n")[0]
        return None

    def given(self, key: tuple[str, int], what: str) -> list[Tensor | None]:
        """A call's inputs, or for gradients those of its outputs."""
        call = self.calls[key]
        return call.inputs if what == "output" else _by_place(call.output_gradients)

    def gave(self, key: tuple[str, int], what: str) -> list[Tensor | None]:
        """A call's outputs, or for gradients those of its inputs and parameters."""
        call = self.calls[key]
        if what == "output":
            return call.outputs
        return _by_place(call.input_gradients) + [p.grad for p in call.parameters.values()]


def _nudge(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            sign = torch.randint(0, 2, x.shape, generator=draw).to(x.device) * 2 - 1
            x.mul_(1 + sign.double().mul(torch.finfo(x.dtype).eps).to(x.dtype))


def _by_place(gradients: dict[int, Tensor]) -> list[Tensor | None]:
    return [gradients.get(index) for index in range(max(gradients, default=-1) + 1)]


def _tensors(thing: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested dicts, tuples and lists."""
    if isinstance(thing, Tensor):
        if thing.is_floating_point():
            yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, (tuple, list)):
        for value in thing:
            yield from _tensors(value)


def _in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """A copy of the inputs; floating-point tensors are in that dtype and require grad."""
    if isinstance(inputs, Tensor):
        copied = inputs.detach().clone()
        return copied.to(dtype).requires_grad_() if copied.is_floating_point() else copied
    if isinstance(inputs, dict):
        return {name: _in_dtype(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_in_dtype(value, dtype) for value in inputs)
    return inputs


def _layers(truth: _Trace, plains: list[_Trace], ours: _Trace, dtype) -> tuple[Layer, ...]:
    """A Layer for every call that all copies made: outputs, then gradients."""
    traces = (truth, plains, ours)
    calls = [key for key in truth.calls if all(key in x.calls for x in (*plains, ours))]
    layers = [_layer(key, "output", traces, dtype) for key in calls]
    if truth.why_no_gradients is None:
        layers += [_layer(key, "gradient", traces, dtype) for key in reversed(calls)]
    return tuple(layer for layer in layers if layer is not None)


def _layer(key: tuple[str, int], what: str, traces: tuple, dtype: torch.dtype) -> Layer | None:
    """The Layer of a call's worst tensor; None where the copies have no tensor in common."""
    truth, plains, ours = traces

    def errors(side) -> list[tuple[float, float, float]]:
        of = [side(trace, key, what) for trace in (truth, ours, *plains)]
        return _errors(of[0], of[2:], of[1], what, dtype)

    if not (found := errors(_Trace.gave)):
        return None
    right = all(error <= allowed for error, _, allowed in errors(_Trace.given))
    worst = max(found, key=lambda one: one[0] / one[2])
    return Layer(key[0], truth.calls[key].kind, what, *worst, right)


def _errors(truth, plains, ours, what: str, dtype) -> list[tuple[float, float, float]]:
    """(error, plain error, allowed) of each tensor, relative to the largest value of all tensors: a
    gradient that is 0 in exact arithmetic, such as that of a key's bias, has no size of its own."""
    wanted = [want for want in truth if want is not None and want.numel()]
    sizes = [float(want.abs().nan_to_num().max()) for want in wanted]
    size, found = max([1e-30, *sizes]), []
    roundings = tolerance.LAYER_ROUNDINGS * torch.finfo(dtype).eps
    for want, got, *bases in zip(truth, ours, *plains):
        if want is None or got is None or want.numel() == 0 or any(x is None for x in bases):
            continue
        error, *plain_errors = (float(_off(x, want)) / size for x in (got, *bases))
        plain_error = max(plain_errors)
        found.append(
            (error, plain_error, tolerance.allowed_error(KINDS[what], plain_error, roundings))
        )
    return found


def _inside(name: str, outer: str) -> bool:
    return outer == "(model)" or name.startswith(f"{outer}.")


def _off(got: Tensor, want: Tensor) -> Tensor:
    """The largest difference; infinite if shapes differ or NaN is not where want has it."""
    if got.shape != want.shape:
        return torch.tensor(torch.inf, dtype=torch.float64)
    got = got.double()
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf).max()

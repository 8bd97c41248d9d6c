"""The time of attention: the same training steps with fastattn and with torch, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

if TYPE_CHECKING:
    from common import Options, Task


def now() -> float:
    """The time in seconds, after a GPU has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds spent in attention calls, forward and backward, whatever they are made of.

    The backward pass of a call runs between its result's gradient and its last input's: hooks at
    both ends read the time, on a GPU once it has done all that it was given. Right where autograd
    runs in one thread and in order, as it does for one device.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, attend: Callable) -> Callable:
        """attend, which takes and returns tensors (or a tuple with a tensor first), timed."""

        def timed(*args, **kwargs):
            inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
            # views of their own, whose gradients are this call's and nobody else's
            views = {id(x): x.view_as(x) for x in inputs}
            args = [views.get(id(x), x) for x in args]
            began = now()
            result = attend(*args, **kwargs)
            self.seconds += now() - began
            out = result[0] if isinstance(result, tuple) else result
            if out.requires_grad:
                last = [0.0]

                def start(_):
                    last[0] = now()

                def stop(_):
                    ended = now()
                    self.seconds += ended - last[0]
                    last[0] = ended

                out.register_hook(start)
                for x in views.values():
                    x.register_hook(stop)
            return result

        return timed

    def watch(self, model: nn.Module) -> None:
        """Times every fastattn.nn.Attention in the model."""
        from fastattn.nn import Attention

        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = self.timed(module.attend)


@dataclass
class Side:
    """One of the two runs that compare() makes."""

    losses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # seconds
    attention: list[float] = field(default_factory=list)  # seconds

    def medians(self) -> tuple[float, float]:
        """(step, attention) in ms, without the first step, which is the warm-up."""
        late = slice(1 if len(self.steps) > 1 else 0, None)
        return 1000 * median(self.steps[late]), 1000 * median(self.attention[late])


@dataclass
class Cost:
    """The result of compare()."""

    sides: dict[str, Side]

    @property
    def difference(self) -> float:
        """The largest difference between the losses of a step."""
        return max(abs(a - b) for a, b in zip(*(side.losses for side in self.sides.values())))

    def table(self) -> Table:
        count = len(next(iter(self.sides.values())).losses)
        table = Table(title=f"attention on the same {count} steps, median", title_justify="left")
        for name in ("", "step, ms", "attention, ms", "its share"):
            table.add_column(name, justify="right" if name else "left")
        found = {name: side.medians() for name, side in self.sides.items()}
        for name, (step, attention) in found.items():
            table.add_row(name, f"{step:.1f}", f"{attention:.1f}", f"{attention / step:.0%}")
        ratios = [b / a for a, b in zip(found["fastattn"], found["torch"])]
        table.add_row("torch / fastattn", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", "")
        return table


def compare(build: Callable[[Options], Task], options: Options) -> Cost:
    """Trains two equal models for options.compare steps, a step of each in turn.

    The schedule, the data and the seeds are the run's own. Without dropout the losses differ by
    rounding only; dropout's random numbers are not the same in torch and fastattn.
    """
    from common import Stepper

    sides = {name: Side() for name in ("fastattn", "torch")}
    steppers, clocks = {}, {name: Clock() for name in sides}
    for name, clock in clocks.items():
        task = build(replace(options, attention=name, compile=""))
        task.time_attention(task.model, clock)
        steppers[name] = Stepper(task, options)
    for index in range(options.compare):
        for name in sorted(sides, reverse=index % 2 == 1):
            before, began = clocks[name].seconds, time.perf_counter()
            loss = steppers[name].step(index)["loss"]
            side = sides[name]
            side.steps.append(time.perf_counter() - began)
            side.attention.append(clocks[name].seconds - before)
            side.losses.append(loss)
    return Cost(sides)


def report(build: Callable[[Options], Task], options: Options, console: Console) -> Cost | None:
    """Runs and prints compare(); None if options.compare is 0 or there are several processes."""
    from common import processes

    if not options.compare or processes() > 1:
        return None
    cost = compare(build, options)
    console.print(cost.table())
    console.print(f"largest difference between the losses: {cost.difference:.1e}")
    return cost

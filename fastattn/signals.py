"""Signals of attention while a model trains: the largest logits, the entropy and the mass on sinks
of each layer, logged every so many steps, with warnings; and QK-clip. Next hop: capturing.py.

    with fastattn.signals.AttentionSignals(model, writer, every=100) as signals:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            fastattn.signals.qk_clip(model, signals.max_logits)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .capturing import capture
from .nn.sharded import is_sharded
from .projections import projections_of
from .records import Recording

NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm")
STATS = ("max_logit", "entropy", "col_mass", "sink_mass")


class Writer(Protocol):
    """torch.utils.tensorboard.SummaryWriter, or anything with this method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class AttentionSignals:
    """Watches a model that trains, through hooks of the model until close() or the end of a block.

    Every `every`-th forward pass in training mode, it records the statistics of each attention
    module and logs, for each (the largest, means and so on are over its calls, examples and heads):

        attention/NAME/max_logit     the largest score of a query and a key
        attention/NAME/entropy       of a row, in nats, the mean
        attention/NAME/least_entropy the same of the head with the least
        attention/NAME/first_mass    the mean probability of the first key; of padded or packed
                                     batches it is that of slot 0
        attention/NAME/sink_mass     the mean probability of the learned sinks, where there are any

    It warns, once for each module and kind,

    - of entropy collapse, when a module's mean entropy is under `least_entropy` of what a row would
      have that attends to all its keys alike, log(keys): rows that have one key left have no
      gradient to find others, and training diverges (Zhai et al., arXiv:2303.06296);
    - of logit growth, when a logit is larger than `largest_logit`.

    Args:
        model: what is trained, or a wrapper of it that is called. Its attention must be fastattn's.
        writer: where to log; None: nowhere. Values are also in `last`.
        every: steps from one recording to the next; the first step is one.
        least_entropy: as a fraction of log(keys); default 0.02: of 512 keys 0.12 nats, which is a
            row with 97 to 99 % on one key. 0 turns the warning off.
        largest_logit: default 100, Kimi K2's bound for QK-clip (arXiv:2507.20534). bfloat16 has
            steps of 0.5 there, so that rounding alone changes a probability by a factor of up to
            1.3. math.inf turns the warning off.
        stats: statistics to record beside those, as capture() takes them; see `recording`.

    Attributes:
        step: the next forward pass's number; a program that accumulates gradients sets it.
        last: {tag: value} of the newest recording.
        max_logits: {module: largest logit of each head, [heads]} of the newest, for qk_clip();
            empty after a step without a recording.
        recording: the newest.
    """

    def __init__(
        self,
        model: nn.Module,
        writer: Writer | None = None,
        *,
        every: int = 100,
        least_entropy: float = 0.02,
        largest_logit: float = 100.0,
        stats: tuple[str, ...] = (),
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; accepted is a number of steps, from 1 on")
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise TypeError(f"writer is a {type(writer).__name__} without add_scalar(); accepted "
                            "is a TensorBoard SummaryWriter, or None")  # fmt: skip
        self.writer, self.every, self.step = writer, every, 0
        self.least_entropy, self.largest_logit = least_entropy, largest_logit
        self.stats = (*STATS, *(name for name in stats if name not in STATS))
        self.last: dict[str, float] = {}
        self.max_logits: dict[str, Tensor] = {}
        self.recording = Recording()
        self._open: capture | None = None
        self._recorded: int | None = None  # the step of the newest recording
        self._warned: set[tuple[str, str]] = set()
        self._handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def __enter__(self) -> AttentionSignals:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: nn.Module, _arguments) -> None:
        if not module.training or not torch.is_grad_enabled() or self._open is not None:
            return
        if self._recorded == self.step:  # of several passes of a step the first is recorded
            return
        self.max_logits = {}
        if self.step % self.every == 0:
            self._recorded, self._open = self.step, capture(self.stats, model=module)
            self.recording = self._open.__enter__()

    def _after(self, module: nn.Module, _arguments, output) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(RuntimeError if output is None else None)  # None: forward raised
            if output is None:
                return
            self._log()
        self.step += 1

    def _log(self) -> None:
        self.last, self.max_logits = {}, largest_logits(self.recording)
        for name in dict.fromkeys(record.name for record in self.recording):
            records = [record for record in self.recording if record.name == name]
            values = _values(records)
            for kind, value in values.items():
                tag = f"attention/{name or 'model'}/{kind}"
                self.last[tag] = value
                if self.writer is not None:
                    self.writer.add_scalar(tag, value, self.step)
            self._warn(name or "the model", values, max(r.col_mass.shape[2] for r in records))

    def _warn(self, name: str, values: dict[str, float], keys: int) -> None:
        entropy, logit = values["entropy"], values["max_logit"]
        bound = self.least_entropy * math.log(max(keys, 2))
        if entropy < bound and keys > 1:
            self._once(name, "entropy", f"entropy collapse in {name} at step {self.step}: its mean "
                       f"entropy is {entropy:.3g} nats, under {self.least_entropy:g} of "
                       f"log({keys} keys) = {bound:.3g}; a lower learning rate, qk_norm or "
                       "qk_clip() keeps logits small")  # fmt: skip
        if not logit <= self.largest_logit:  # NaN as well
            self._once(name, "logit", f"logit growth in {name} at step {self.step}: its largest "
                       f"attention logit is {logit:.4g}, over {self.largest_logit:g}; qk_clip() "
                       "bounds it, and so does qk_norm")  # fmt: skip

    def _once(self, name: str, kind: str, sentence: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            warnings.warn(f"fastattn: {sentence}", UserWarning, stacklevel=2)


def _values(records: list) -> dict[str, float]:
    rows = [r.entropy.double() for r in records]
    by_head = torch.stack([x.mean((0, 2)) for x in rows]).mean(0)
    first = [r.col_mass[..., 0].sum() / max(1, r.entropy.numel()) for r in records]
    values = {
        "max_logit": max(float(r.max_logit.max()) for r in records),
        "entropy": float(by_head.mean()),
        "least_entropy": float(by_head.min()),
        "first_mass": float(torch.stack(first).mean()),
    }
    sinks = [r.sink_mass.mean() for r in records]
    if any(float(x) for x in sinks):
        values["sink_mass"] = float(torch.stack(sinks).mean())
    return values


def largest_logits(recording: Recording) -> dict[str, Tensor]:
    """{module: the largest logit of each head, [heads]} of a capture(stats=("max_logit",))."""
    found: dict[str, Tensor] = {}
    for record in recording:
        own = record.max_logit.amax((0, 2))
        found[record.name] = torch.maximum(found[record.name], own) if record.name in found else own
    return found


@torch.no_grad()
def qk_clip(
    model: nn.Module, max_logits: Mapping[str, Tensor] | Recording, threshold: float = 100.0
) -> dict[str, Tensor]:
    """QK-clip: makes the weights of queries and keys smaller, in place, where a head's largest
    logit is over the threshold, so that it becomes the threshold. Call it after optimizer.step().

    A logit is bilinear in the two projections. Where each head has keys of its own, both are
    multiplied by sqrt(threshold / logit); where heads share keys, the head's queries alone by
    threshold / logit. Biases are part of the projections.

    Args:
        model: what the names are paths in.
        max_logits: {attention module: [heads]}, AttentionSignals.max_logits (then only steps with a
            recording clip), or a recording of "max_logit".
        threshold: Kimi K2's is 100. With a softcap or a bias, which a logit includes, the weights
            shrink by the same factor, which is then only about right.

    Under torch.distributed the largest logit of all processes counts, so that copies stay equal;
    every process has to call it.

    Returns:
        {module: the factors [heads] that its logits were multiplied by}, of those that changed.

    Raises:
        ValueError: a module whose projections are not known; one that normalises queries and keys
            (qk_norm), on which their weights' size has no effect.

    Source: MuonClip of Kimi K2 (arXiv:2507.20534).
    """
    if isinstance(max_logits, Recording):
        max_logits = largest_logits(max_logits)
    clipped = {}
    for name, logits in max_logits.items():
        if dist.is_available() and dist.is_initialized():
            logits = logits.clone()
            dist.all_reduce(logits, dist.ReduceOp.MAX)
        over = logits > threshold
        if not bool(over.any()):
            continue
        parts = projections_of(model, name)
        if any(getattr(parts.module, norm, None) is not None for norm in NORMS):
            raise ValueError(f"{name} normalises its queries and keys, so that the size of their "
                             "weights has no effect; its logits are bounded already")  # fmt: skip
        if is_sharded(parts.out.weight) or getattr(parts.module, "head_origin", None):
            raise ValueError(f"{name} is sharded over processes, each of which has a part of its "
                             "weights; accepted are whole copies (DDP)")  # fmt: skip
        factors = torch.where(over, threshold / logits.clamp(min=threshold), 1.0)
        own_keys = parts.kv_heads == parts.heads
        scale = factors.sqrt() if own_keys else factors
        for which in (0, 1) if own_keys else (0,):
            for x in parts.rows(which):
                shape = (-1, *(1,) * x.dim())
                x.unflatten(0, (parts.heads, -1)).mul_(scale.to(x.device, x.dtype).view(shape))
        clipped[name] = factors
    return clipped

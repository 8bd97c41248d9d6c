"""AttentionSignals for transformers' Trainer.

Trainer(model, ..., callbacks=[SignalsCallback(every=100, clip=100.0)])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..signals import AttentionSignals, Writer, qk_clip


class SignalsCallback(TrainerCallback):
    """Logs the attention of a model that Trainer trains, and warns, as fastattn.signals does.

    Args:
        writer: where to log; None: a SummaryWriter in output_dir/attention, beside Trainer's own
            event files.
        clip: the threshold of qk_clip(), after each step with a recording; None: no clipping. With
            every=1 it is Kimi K2's QK-clip.
        options: those of AttentionSignals: every, least_entropy, largest_logit.

    Attributes:
        signals: the AttentionSignals, while training runs and after it.
    """

    def __init__(
        self, writer: Writer | None = None, *, clip: float | None = None, **options: Any
    ) -> None:
        self.writer, self.clip, self.options = writer, clip, options
        self.signals: AttentionSignals | None = None

    def on_train_begin(self, args, state, control, model=None, **_: Any) -> None:
        if args.torch_compile:
            raise NotImplementedError(
                "SignalsCallback came with torch_compile=True, and compiled models have no "
                "attention calls to see; train without it, or call fastattn.capture() around an "
                "evaluation"
            )
        if self.signals is not None:  # an earlier train(), which may have raised
            self.signals.close()
        writer = self.writer if state.is_world_process_zero else None
        if self.writer is None and state.is_world_process_zero:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "SignalsCallback logs to TensorBoard: pip install tensorboard, or pass a "
                    "writer with add_scalar()"
                ) from error
            writer = SummaryWriter(str(Path(args.output_dir) / "attention"))
        self.signals = AttentionSignals(model, writer, **self.options)

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        if self.signals is not None:
            self.signals.step = state.global_step

    def on_substep_end(self, args, state, control, **_: Any) -> None:
        self.on_step_begin(args, state, control)  # the same step, which accumulates gradients

    def on_step_end(self, args, state, control, model=None, **_: Any) -> None:
        if self.signals is not None and self.clip is not None and model is not None:
            qk_clip(model, self.signals.max_logits, self.clip)

    def on_train_end(self, args, state, control, **_: Any) -> None:
        if self.signals is not None:
            self.signals.close()
            if self.writer is None and self.signals.writer is not None:
                self.signals.writer.close()  # its own

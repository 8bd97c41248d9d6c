"""Refuses calls under torch's context_parallel, where fastattn would see one shard of the sequence.

It replaces F.scaled_dot_product_attention and tells DTensor how to run aten's attention operators
over all shards; it does not know fastattn's functions, so these raise while it is active.
"""

from __future__ import annotations

import sys

import torch

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
_modules = sys.modules


def refuse_context_parallel() -> None:
    """Raises if torch's context_parallel is active. Costs one dict lookup where the program has not
    imported it."""
    if _MODULE in _modules and _is_active():
        raise NotImplementedError(
            "torch's context_parallel is active, and fastattn would attend to this rank's shard of "
            "the sequence alone; call F.scaled_dot_product_attention without fastattn.enable(), or "
            "attend outside of context_parallel"
        )


def _is_active() -> bool:
    """Whether DTensor has handlers for aten's attention, which both of torch's ways to enable
    context_parallel set."""
    dispatcher = torch.distributed.tensor.DTensor._op_dispatcher
    handlers = dispatcher._custom_op_handlers
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handlers

"""Raises under torch's context_parallel, where fastattn would see only one shard of the sequence.

context_parallel replaces F.scaled_dot_product_attention and registers DTensor handlers that run
aten's attention operators over all shards. It does not know fastattn's functions, so they raise
while it is active.
"""

from __future__ import annotations

import sys

import torch

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
_modules = sys.modules


def refuse_context_parallel() -> None:
    """Raises if torch's context_parallel is active. If it was never imported, this costs one lookup
    in a dict."""
    if _MODULE in _modules and _is_active():
        raise NotImplementedError(
            "torch's context_parallel is active, and fastattn would attend only to this rank's "
            "shard of the sequence; call F.scaled_dot_product_attention without fastattn.enable(), "
            "or attend outside of context_parallel"
        )


def _is_active() -> bool:
    """Whether DTensor has handlers for aten's attention, which both of torch's ways to enable
    context_parallel set."""
    dispatcher = torch.distributed.tensor.DTensor._op_dispatcher
    handlers = dispatcher._custom_op_handlers
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handlers

"""The switch that puts fastattn under every program that calls torch's
scaled_dot_product_attention: override_sdpa(), enable(), disable(). Next hop: sdpa.py.

aten::scaled_dot_product_attention is replaced where torch decides which kernel to use (its
composite kernel), so that programs, modules, autocast, torch.compile and checkpoint recomputation
all reach it, in every thread; and where torch.func's transforms enter it. Maskless calls that
torch's own rules would give to its CPU flash operator go to that operator, under which the native
library puts its kernels: they keep torch's C++ autograd, which is several times faster than a
Python one. Masked calls go to fastattn's own operator, because what the switch puts under aten's
may be gone before it runs (the backward of a block's result after the block, another thread's
disable(), an exported program), and torch's kernels read a bool mask as floats, past its end, and
make NaN of our lse of rows that see nothing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings

import torch
from torch.autograd import forward_ad

from . import backends, checks, ops
from .sdpa import scaled_dot_product_attention

_NAME = "scaled_dot_product_attention"
_lock = threading.RLock()
_depth = 0
_undo = None  # an ExitStack while the override is on
_original = _original_functorch = None  # torch's composite kernel, and functorch's entry to it
_warned = False
_native_flash = False  # are our kernels under aten's CPU flash operator?
_FUNCTORCH = "FuncTorchDynamicLayerFrontMode"  # where torch.func's transforms enter an operator
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION


def enable() -> None:
    """Serves every call of F.scaled_dot_product_attention in this process with fastattn.

    nn.MultiheadAttention, the Transformer layers and anything else that calls it included, in every
    thread and in compiled functions (which are compiled anew). Left to torch: devices other than
    the CPU, dtypes that fastattn lacks, NestedTensors, and calls under
    torch.nn.attention.sdpa_kernel without FLASH_ATTENTION (MATH, say).

    Counted: as many calls of disable() give torch back. Double backward of calls that torch's own
    rules give to its CPU flash operator is not supported, as in torch; call
    fastattn.scaled_dot_product_attention, or use torch.func, where it is.
    """
    global _depth, _undo
    with _lock:
        if _depth == 0:
            _undo = _switch_on()
        _depth += 1


def disable() -> None:
    """Undoes one enable(). The last one restores torch exactly; more have no effect."""
    global _depth, _undo
    with _lock:
        if _depth == 1:
            _undo.close()
            _undo = None
        _depth = max(0, _depth - 1)


@contextlib.contextmanager
def override_sdpa():
    """enable() for a block. It is the process that switches, not only this thread."""
    enable()
    try:
        yield
    finally:
        disable()


def _switch_on() -> contextlib.ExitStack:
    global _original, _original_functorch, _warned
    if ops.NATIVE_MISSING and not backends.forced() and not _warned:
        _warned = True
        warnings.warn(
            f"fastattn.enable() leaves CPU calls to torch, because {ops.NATIVE_MISSING}",
            UserWarning,
            stacklevel=backends.caller_level(),
        )
    with contextlib.ExitStack() as undo:
        _original = torch.library.get_kernel("aten::" + _NAME, "CPU")
        _original_functorch = torch.library.get_kernel("aten::" + _NAME, _FUNCTORCH)
        library = torch.library.Library("aten", "IMPL")
        undo.callback(library._destroy)
        with warnings.catch_warnings():  # "Overriding a previously registered kernel": yes
            warnings.simplefilter("ignore")
            library.impl(_NAME, _dispatch, "CompositeImplicitAutograd", with_keyset=True)
            library.impl(_NAME, _dispatch_functorch, _FUNCTORCH, with_keyset=True)
        if ops.NATIVE is not None:
            _set_native(True)
            undo.callback(_set_native, False)
        _compile_anew(True)
        undo.callback(_compile_anew, False)
        return undo.pop_all()


def _set_native(on: bool) -> None:
    global _native_flash
    _native_flash = bool(ops.NATIVE.fastattn_override_sdpa(int(on)))


_TAG = "fastattn-sdpa"


def _compile_anew(on: bool) -> None:
    """What is compiled, and cached on disk, belongs to one side of the switch."""
    config = torch.compiler.config
    entry = config._config["cache_key_tag"]
    unset = entry.env_value_default is entry.env_value_force  # neither comes from the environment
    entry.env_value_default = _tagged("" if unset else entry.env_value_default, on)  # every thread
    if (_TAG in config.cache_key_tag) != on:  # this thread has set its own
        config.cache_key_tag = _tagged(config.cache_key_tag, on)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _tagged(tags: str, on: bool) -> str:
    others = [tag for tag in tags.split(",") if tag not in ("", _TAG)]
    return ",".join([*others, _TAG] if on else others)


def _dispatch(
    keys, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """What aten::scaled_dot_product_attention does while the override is on."""
    if (
        _native_flash
        and not dropout_p
        and query.is_cpu
        and query.dim() == 4
        and attn_mask is None
        and not backends.forced()
        and forward_ad._current_level < 0
        and torch._fused_sdp_choice(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        == _FLASH
    ):
        return torch._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if _serves(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _original.call_boxed(
        keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _dispatch_functorch(
    keys, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """The same inside torch.func's transforms, before they take the operator apart."""
    if _serves(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _original_functorch.call_boxed(
        keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _serves(query, key, value) -> bool:
    """Is this call fastattn's, or torch's own?"""
    return bool(
        (_native_flash or backends.forced())
        and torch._C._get_flash_sdp_enabled()
        and query.is_cpu
        and query.dtype in checks.DTYPES
        and not (query.is_nested or key.is_nested or value.is_nested)
    )

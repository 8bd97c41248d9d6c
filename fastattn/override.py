"""Makes torch's scaled_dot_product_attention run on fastattn in every program that calls it:
override_sdpa(), enable(), disable(). Next hop: sdpa.py.

aten::scaled_dot_product_attention is replaced where torch decides which kernel to use (its
composite kernel), so that programs, modules, autocast, torch.compile and checkpoint recomputation
all reach it, in every thread; and where torch.func's transforms enter it. The first enable()
registers the replacements, and nothing ever removes them: another thread may be running one at any
time, and freeing a kernel under a running call crashes the process. They read a flag, the switch;
while it is off they call torch's own kernels, to which they keep references.

Calls without a mask that torch's own rules would give to its CPU flash operator go to another
operator of aten's, which has a derivative in C++ and no kernel for the CPU but ours
(csrc/cpu/ops_aten.cpp): torch's C++ autograd is several times faster than a Python one. The other
calls go to fastattn's own operator, and so do those that are traced, whose programs may run where
this operator has no kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from .backends import backend, library, operators_sdpa, registry
from .context_parallel import refuse_context_parallel
from .core import checks
from .sdpa import scaled_dot_product_attention

_NAME = "scaled_dot_product_attention"
_COMPOSITE = "CompositeImplicitAutograd"
_FUNCTORCH = "FuncTorchDynamicLayerFrontMode"  # where torch.func's transforms enter an operator
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
_BORROWED = {  # aten's operators that ops_aten.cpp has kernels for, and the schemas it expects
    "_scaled_dot_product_efficient_attention": "(Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, *, "
    "float? scale=None) -> (Tensor output, Tensor log_sumexp, Tensor philox_seed, "
    "Tensor philox_offset)",
    "_scaled_dot_product_efficient_attention_backward": "(Tensor grad_out_, Tensor query, "
    "Tensor key, Tensor value, Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed, "
    "Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, bool is_causal=False, *, "
    "float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
}
_torch: Any = torch  # its stubs lack what is private
_choice, _attend = _torch._fused_sdp_choice, _torch._scaled_dot_product_efficient_attention
_PLAIN = {torch.Tensor, torch.nn.Parameter}

_PATIENCE = 500  # times 10 ms: how long the first enable() waits for threads that compile

_lock = threading.RLock()
_depth = 0
_on = False  # the switch, which the kernels read
_registered = False
_torchs: Any = None
_torchs_functorch: Any = None  # torch's composite kernel, and functorch's entry to it
_borrowed = False  # whether our kernels are registered for _BORROWED
_warned = False

os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)  # so that no child starts while another thread is switching


def enable() -> None:
    """Serves every call of F.scaled_dot_product_attention in this process with fastattn.

    This includes nn.MultiheadAttention, the Transformer layers and anything else that calls it, in
    every thread and in compiled functions (which are compiled once with the switch on and once with
    it off). Torch still serves devices
    other than the CPU, dtypes that fastattn lacks, NestedTensors, and calls under
    torch.nn.attention.sdpa_kernel without FLASH_ATTENTION (MATH, say).

    Every derivative exists; torch's own CPU kernel has no second derivative and no forward mode.
    Calls nest: as many calls of disable() restore torch.
    """
    global _depth
    for attempt in range(_PATIENCE):
        with _alone():
            if _registered or attempt == _PATIENCE - 1 or not _compiling():
                if _depth == 0:
                    _switch(True)
                _depth += 1
                return
        time.sleep(0.01)


def disable() -> None:
    """Undoes one enable(). After the last, torch's kernels run; further calls have no effect."""
    global _depth
    with _alone():
        if _depth == 1:
            _switch(False)
        _depth = max(0, _depth - 1)


@contextlib.contextmanager
def override_sdpa() -> Iterator[None]:
    """enable() for a block, in the whole process and not only in this thread."""
    enable()
    try:
        yield
    finally:
        disable()


@contextlib.contextmanager
def _alone():
    """Holds the lock, and excludes compiling threads, because a compiled function is valid for one
    state of the switch. Dynamo's lock is taken first, in the same order as by a thread that
    compiles code that switches."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    with getattr(dynamo, "compile_lock", None) or contextlib.nullcontext(), _lock:
        yield


def _switch(on: bool) -> None:
    global _on, _warned
    if on and not _registered:
        _register()
    if on and library.NATIVE_MISSING and not registry.forced() and not _warned:
        _warned = True
        warnings.warn(
            f"fastattn.enable() leaves CPU calls to torch, because {library.NATIVE_MISSING}",
            UserWarning,
            stacklevel=backend.caller_level(),
        )
    _on = on
    _tag_caches(on)


def _register() -> None:
    """Registers our kernels with torch for the rest of the process."""
    global _registered, _torchs, _torchs_functorch, _borrowed
    operator = "aten::" + _NAME
    _torchs = torch.library.get_kernel(operator, "CPU").call_boxed
    _torchs_functorch = torch.library.get_kernel(operator, _FUNCTORCH).call_boxed
    if library.NATIVE is not None and all(
        str(getattr(torch.ops.aten, name).default._schema) == f"aten::{name}{schema}"
        for name, schema in _BORROWED.items()
    ):
        operators_sdpa.define(_BORROWED["_scaled_dot_product_efficient_attention_backward"])
        library.NATIVE.fastattn_register_sdpa()
        _borrowed = True
    # Not a torch.library.Library, which deregisters at interpreter exit, while threads may still
    # run. The extra reference keeps this one until the process ends.
    aten: Any = torch._C._dispatch_library("IMPL", "aten", "", __file__, 0)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(aten))
    with warnings.catch_warnings():  # "Overriding a previously registered kernel" is intended
        warnings.simplefilter("ignore")
        aten.impl(_NAME, _COMPOSITE, _composite, True)
        aten.impl(_NAME, _FUNCTORCH, _functorch, True)
    _registered = True
    if "torch._dynamo" in sys.modules:  # functions compiled before have no _guard()
        _reset_dynamo()


def _reset_dynamo() -> None:
    """Resets Dynamo unless a thread is compiling, because the reset frees memory that such a thread
    still uses. A long switch interval keeps other threads from starting meanwhile."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.2)  # seconds; a reset takes a thousandth
    try:
        compiling = _compiling()
        if not compiling:
            torch._dynamo.reset()
    finally:
        sys.setswitchinterval(interval)
    if compiling:
        warnings.warn(
            "fastattn.enable() was called during a torch.compile: functions compiled before it "
            "keep torch's attention until torch._dynamo.reset()",
            UserWarning,
            stacklevel=backend.caller_level(),
        )


def _compiling() -> bool:
    """Whether any thread is in Dynamo's conversion of a frame."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is None:
        return False
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_globals is dynamo.__dict__:
                return True
            frame = frame.f_back
    return False


_TAG = "fastattn-sdpa"


def _tag_caches(on: bool) -> None:
    """Tags torch.compile's disk cache, whose entries are valid for one state of the switch."""
    config: Any = torch.compiler.config
    entry = config._config["cache_key_tag"]
    unset = entry.env_value_default is entry.env_value_force  # neither is set by the environment
    entry.env_value_default = _tagged("" if unset else entry.env_value_default, on)  # every thread
    if (_TAG in config.cache_key_tag) != on:  # this thread has set its own
        config.cache_key_tag = _tagged(config.cache_key_tag, on)


def _tagged(tags: str, on: bool) -> str:
    others = [tag for tag in tags.split(",") if tag not in ("", _TAG)]
    return ",".join([*others, _TAG] if on else others)


# ---- the kernels, called with the dispatch keys of the call --------------------------------------


def _composite(
    keys, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """aten::scaled_dot_product_attention, from the first enable() on."""
    plain = type(query) in _PLAIN
    if not plain:
        _guard()
    if _on:
        if (
            _borrowed
            and plain
            and attn_mask is None
            and not dropout_p
            and type(key) in _PLAIN
            and type(value) in _PLAIN
            and query.is_cpu
            and query.dim() == key.dim() == 4
            and not registry.forced()
            and forward_ad._current_level < 0
            and not torch._C._len_torch_dispatch_stack()
            and _choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
            == _FLASH
        ):
            refuse_context_parallel()
            return _attend(query, key, value, None, True, 0.0, is_causal, scale=scale)[0]
        if _serves(query, key, value):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
    return _torchs(
        keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _functorch(
    keys, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """The same inside torch.func's transforms, before they decompose the operator."""
    _guard()
    if _on and _serves(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _torchs_functorch(
        keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _guard() -> None:
    """Where Dynamo traces this call, adds a guard on the state of the switch. Guards make switching
    safe while threads run compiled code, which a reset of Dynamo would free."""
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    if dynamo is not None and _torch._guards.TracingContext.try_get() is not None:
        translator = dynamo.InstructionTranslator.current_tx()
        switch = _torch._dynamo.source.AttrSource(translator.import_source(__name__), "_on")
        guard = switch.make_guard(_torch._dynamo.guards.GuardBuilder.CONSTANT_MATCH)
        _torch._dynamo.guards.install_guard(guard)


def _serves(query, key, value) -> bool:
    """Whether fastattn serves this call."""
    return bool(
        (not library.NATIVE_MISSING or registry.forced())
        and torch._C._get_flash_sdp_enabled()
        and query.is_cpu
        and query.dtype in checks.DTYPES
        and not (query.is_nested or key.is_nested or value.is_nested)
    )

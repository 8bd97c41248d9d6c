"""capture(): statistics of every attention call of a model, by module. Next hops: records.py has
what it gives, and functional.py's run_with_statistics() computes it.

functional.py's run() shows each call, with its result, to the watches that are open. The names of
modules come from global module hooks, which exist only while a watch is open. What is watched runs
as it would without: statistics are computed beside it, from the call's own tensors.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from .backends import registry
from .backends.backend import caller_level
from .core.call import Call, Result
from .core.reference import AUTOCAST
from .core.spec import NO_OPERANDS, Operands
from .core.statistics import Wanted
from .records import Record, Recording, shown

watched = False  # is any watch open in this process? All that a call without one asks

_lock = threading.Lock()
_open = 0  # watches of all threads
_stance: Any = None  # what restores torch.compile's stance
_watches: ContextVar[tuple[Watch, ...]] = ContextVar("fastattn's watches", default=())

_UNSEEN = (
    "saw no attention call that fastattn computed: fastattn.swap(model) makes it compute those of "
    "torch's, timm's and diffusers' modules, fastattn.hf.enable(model) those of transformers' "
    "models, and fastattn.enable() every call of F.scaled_dot_product_attention; calls in other "
    "threads and those of exported programs are not seen"
)


def show(call: Call, result: Result) -> None:
    """Shows a call that just ran to the open watches of this thread.

    Calls inside a backward pass are left out: checkpointing computes there what was seen before.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        raise RuntimeError(
            "fastattn.capture() is open while a model is traced, and sees eager calls only; "
            "compile, export or trace before opening it"
        )
    watches = [watch for watch in _watches.get() if watch.is_own_thread()]
    if not watches or torch._C._current_graph_task_id() != -1:
        return
    with _Unseen():
        for watch in watches:
            watch.seen(watch.place(), call, result)


def unseen():
    """A block whose calls and modules no watch of this thread sees: those of fastattn's own
    computations."""
    return _Unseen() if watched else nullcontext()  # the compiler can trace the latter


class _Unseen:
    def __enter__(self) -> None:
        self.token = _watches.set(())

    def __exit__(self, *_) -> None:
        _watches.reset(self.token)


class Watch:
    """Sees the attention calls of its thread while it is open: seen(name, call, result)."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model  # names are paths from it; None: from the outermost that is called
        self._thread: int | None = None  # the one that opened it
        self._handles: list = []
        self._stack: list[nn.Module] = []  # the modules whose forward runs, outermost first
        self._names: dict[int, str] = {}  # by id, those of the outermost's modules

    def seen(self, name: str, call: Call, result: Result) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not implement seen()")

    def is_own_thread(self) -> bool:
        return self._thread == threading.get_ident()

    def place(self) -> str:
        """The path of the innermost module that runs; "" is the one that paths begin at, or no
        module."""
        names = (self._names.get(id(module)) for module in reversed(self._stack))
        path = next((name for name in names if name is not None), "")
        return re.sub(r"\b_orig_mod\b\.?", "", path).rstrip(".")  # of torch.compile's wrapper

    def __enter__(self) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(_IN_COMPILED)
        if self._thread is not None:
            raise RuntimeError(f"this fastattn.{type(self).__name__}() was opened before; make a "
                               "new one for each block")  # fmt: skip
        self._thread = threading.get_ident()
        _count(1)
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        _watches.set((*_watches.get(), self))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack, self._names, self._model = [], [], {}, None
        self._thread = 0  # no thread's: it sees nothing any more, wherever it is still listed
        _watches.set(tuple(watch for watch in _watches.get() if watch is not self))
        _count(-1)

    def _enter(self, module: nn.Module, _arguments) -> None:
        if self in _watches.get() and self.is_own_thread():
            if not self._stack:
                root = module if self._model is None else self._model
                self._names = {id(x): name for name, x in root.named_modules()}
            self._stack.append(module)

    def _leave(self, module: nn.Module, _arguments, _output) -> None:
        for n in reversed(range(len(self._stack))) if self.is_own_thread() else ():
            if self._stack[n] is module:
                del self._stack[n:]
                break


_IN_COMPILED = (
    "fastattn.capture() is opened in compiled code, which it cannot watch; open it around the call "
    "of the compiled function, which then runs eagerly"
)
_EXTRA_HOOK = r"Using `torch.compile\(module\)` when there are global hooks"  # place() expects it


def _count(change: int) -> None:
    """Counts the open watches. While there are any, compiled functions run eagerly, in every
    thread, because torch.compile has one stance for all. Where Dynamo is not imported, which takes
    seconds, nothing is compiled yet, and show() raises for what is compiled meanwhile."""
    global watched, _open, _stance
    with _lock:
        if change > 0 and _stance is None and "torch._dynamo" in sys.modules:
            try:
                _stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:  # after a break of the compiled function's graph
                raise RuntimeError(_IN_COMPILED) from error
            warnings.filterwarnings("ignore", _EXTRA_HOOK, UserWarning)
        _open += change
        watched = _open > 0
        if not watched and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None


_GLOBAL_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def has_other_hooks() -> bool:
    """Are there global module hooks beside the watches'? Those see modules that fastattn.nn may
    leave uncalled, and the watches' do not."""
    if not watched:
        return bool(hooks._has_any_global_hook())
    found = (getattr(hooks, f"_global_{kind}_hooks") for kind in _GLOBAL_HOOKS)
    return sum(map(len, found)) > 2 * _open  # a watch has two


# ---- capture() ---------------------------------------------------------------------------------


class capture(Watch):
    """Records statistics of every attention call that fastattn computes in a block.

        with fastattn.capture(stats=("entropy", "max")) as rec:
            model(x)
        rec[0].name, rec[0].layer, rec[0].entropy  # [B, heads, q_len]

    It sees the calls of models served by swap(), enable(), override_sdpa(), fastattn.hf,
    fastattn.nn, fastattn.flash_attn and fastattn.diffusers, and of the functions themselves, in the
    thread that opened it. The model's outputs and gradients have the same bits as without it.
    Captures may be nested; each records. Calls that a backward pass makes are not recorded, so a
    checkpointed layer is recorded once. Compiled functions run eagerly while a capture is open.

    Args:
        stats: names of statistics; statistics.py has their list. Those of a pooled map and of top
            keys are written with a number, "pooled:32" and "topk:4", and recorded without it.
        layers: the numbers of the layers to record; None: all calls.
        heads: the query heads to record, an index tensor, a slice or a list; None: all.
        grad: keep the graph of the statistics that are differentiable, for regularisers. Else
            they are detached.
        inputs: also record the call itself, as distillation.py takes it. Its tensors are not
            copied.
        device: where the statistics are kept, such as "cpu"; None: where they are computed.
        model: what the records' names are paths from; None: the outermost module that is called.

    Returns:
        A list of records. Leaving a block in which no call was seen warns.

    Raises:
        ValueError, TypeError: an argument that is not accepted; a statistic that a call cannot
            have, from the call.
        RuntimeError: it is opened twice, or in code that is being compiled.
        NotImplementedError: a call under torch.vmap, or with grad=True under any torch.func
            transform.
    """

    def __init__(
        self,
        stats: Iterable[str] = ("entropy", "max"),
        *,
        layers: Iterable[int] | None = None,
        heads: Tensor | slice | Iterable[int] | None = None,
        grad: bool = False,
        inputs: bool = False,
        device: torch.device | str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(model)
        try:
            self._wanted = Wanted.parse(stats)
        except (TypeError, ValueError) as error:
            raise type(error)(_of_capture(error)) from None
        self._layers = None if layers is None else frozenset(_layer(x) for x in layers)
        self._heads = heads if heads is None or isinstance(heads, (slice, Tensor)) else [*heads]
        self._grad, self._inputs = grad, inputs
        self._device = None if device is None else torch.device(device)
        self._calls = 0
        self.recording = Recording()

    def __enter__(self) -> Recording:
        super().__enter__()
        return self.recording

    def __exit__(self, kind=None, *rest) -> None:
        super().__exit__(kind, *rest)
        if kind is not None or self.recording:
            return
        why = _UNSEEN
        if self._calls:
            why = (f"recorded none of {self._calls} calls: layers={sorted(self._layers or ())} "
                   "has none of their layers")  # fmt: skip
        warnings.warn(f"fastattn.capture() {why}", UserWarning, stacklevel=caller_level())

    def seen(self, name: str, call: Call, result: Result) -> None:
        self._calls += 1
        record = Record(name)
        if self._layers is not None and record.layer not in self._layers:
            return
        with ExitStack() as stack:
            call = _aside(call, self._grad, stack)
            for stat, found in self._statistics(call, name).items():
                record[stat] = found
        record.call = call if self._inputs else None
        self.recording.append(record)

    def _statistics(self, call: Call, name: str) -> dict[str, Any]:
        if not self._wanted.names:
            return {}
        from .functional import run_with_statistics

        # No statistic reads the values, so a few channels of them do.
        call = call.but(statistics=self._wanted, v=call.v[..., :8], **_no_dropout(call))
        try:
            self._wanted.check(call)
            found = run_with_statistics(call, registry.pick(None, call))[1]
        except (ValueError, TypeError, NotImplementedError) as error:
            where = f"fastattn.capture(), at the call of {shown(name)}"
            raise type(error)(f"{where}: {_of_capture(error)}") from error
        return {stat: self._kept(x, name) for stat, x in found.items()}

    def _kept(self, x: Any, name: str) -> Any:
        if isinstance(x, tuple):  # a TopK
            return type(x)(*(self._kept(part, name) for part in x))
        if self._heads is not None:
            try:
                x = x[:, self._heads]
            except IndexError as error:
                raise ValueError(f"heads is {self._heads}, and the call of {shown(name)} has "
                                 f"{x.shape[1]} heads") from error  # fmt: skip
        return x if self._device is None else x.to(self._device)


def _layer(x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or x < 0:
        raise ValueError(f"layers has {x!r}; accepted are numbers of layers, from 0 on")
    return x


def _of_capture(error: Exception) -> str:
    """The sentence about attention()'s argument, of which capture() has its own name."""
    return str(error).replace("return_stats", "stats")


def _no_dropout(call: Call) -> dict[str, Any]:
    """Statistics are of the probabilities before dropout."""
    if not call.spec.dropout_p:
        return {}
    operands = replace(call.operands, dropout_seed=None)
    return {"spec": replace(call.spec, dropout_p=0.0), "operands": operands}


def _aside(call: Call, grad: bool, stack: ExitStack) -> Call:
    """The call for computations that leave no trace in the model's own: in no graph
    (unless grad), under no transform, autocast or hook on saved tensors. `stack` holds the modes
    that this takes."""
    transformed = torch._C._are_functorch_transforms_active()
    if grad and transformed:
        raise NotImplementedError(
            "fastattn.capture(grad=True) came with a torch.func transform, out of which no graph "
            "leads; accepted there is grad=False"
        )
    if transformed:
        stack.enter_context(temporarily_clear_interpreter_stack())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(False))
    device = call.q.device.type
    stack.enter_context(torch.autocast(device, enabled=False) if device in AUTOCAST
                        else nullcontext())  # fmt: skip
    if grad:  # checkpoint's hooks would count what a recomputation does not save
        same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        stack.enter_context(same)
        return call
    stack.enter_context(torch.no_grad())

    def plain(x: Any) -> Any:
        return _unwrapped(x).detach() if isinstance(x, Tensor) else x

    operands = call.operands
    if operands is not NO_OPERANDS:
        operands = Operands(*(plain(getattr(operands, x.name)) for x in fields(Operands)))
    return call.but(q=plain(call.q), k=plain(call.k), v=plain(call.v), operands=operands)


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor below torch.func's wrappers."""
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            raise NotImplementedError(
                "fastattn.capture() came with torch.vmap, whose instances have no record of their "
                "own; accepted is a loop over them, or a batch dimension"
            )
        x = get_unwrapped(x)
    return x

"""swap() makes a built model compute its attention with fastattn, in place; unswap() undoes it.

A module is swapped by changing its class. It stays the same object with its parameters, buffers,
hooks and training flag, and every reference to it stays valid. (A new module would need all of that
copied and every reference replaced.) The new class is a subclass of the old one that overrides only
`forward`, or the methods that call attention for it, so isinstance() and other methods still work.
It refers to the original class, so that unswap() needs no record. Objects that modules hold and
call, such as diffusers' attention processors, are swapped in the same way.
"""

from __future__ import annotations

import copyreg
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .nn.transformer import OURS
from .redirect import Redirected, leads, redirect
from .sdpa import scaled_dot_product_attention

_ORIGINAL = "_fastattn_original"  # on a swapped class: the original class
_HELD = "_fastattn_held"  # on a swapped class: the instance's attributes that it overrides
_BEFORE = "_fastattn_attn_implementation"  # on a transformers model: its previous implementations
_SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What swap() or unswap() did, in rows (module's name, its class, what happened or why not).
    str() and repr() are a table."""

    swapped: tuple[tuple[str, str, str], ...]  # what changed; by unswap(), what was swapped back
    left: tuple[tuple[str, str, str], ...]  # attention modules that did not change
    done: str = "swapped"

    def __str__(self) -> str:
        rows = [*self.swapped, *self.left]
        name_width, kind_width = (max((len(row[n]) for row in rows), default=0) for n in (0, 1))
        lines = []
        for title, part in ((self.done, self.swapped), ("left alone", self.left)):
            lines.append(f"{title}: {len(part) or 'none'}")
            for name, kind, what in part:
                lines.append(f"  {name:<{name_width}}  {kind:<{kind_width}}  {what}")
        return "\n".join(lines)

    __repr__ = __str__


def swap(model: nn.Module) -> SwapReport:
    """Makes fastattn compute the attention of a built model, in place; unswap() undoes it.

    It swaps

    - torch.nn.MultiheadAttention, torch.nn's Transformer classes, and subclasses that do not
      override forward: fastattn.nn's forward runs, with its differences from torch (a row that sees
      no key gives no NaN, is_causal never discards a mask);
    - modules whose forward calls torch's scaled_dot_product_attention by any name, directly or in
      methods and functions that it calls by name, such as timm's attention blocks: their own code
      runs with fastattn's function, and a `fused_attn` flag is True;
    - objects that a module holds and calls, if their __call__ does the same or calls diffusers'
      dispatch_attention_fn: the attention processors of diffusers' models;
    - transformers' PreTrainedModels, by fastattn.hf.enable().

    Parameters, hooks, parametrizations, flags, dtypes and devices do not change, and the model can
    be copied, pickled, quantized and compiled as before. A second call changes nothing.

    Returns:
        A report of every module that changed, and of every attention module that did not, with the
        reason.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    swapped, left, served = [], [], []  # served: name prefixes of enabled transformers models
    refused = {}  # the configurations of refused ones, which inner models may share
    found, rows = {}, {}  # redirect() of each class; the modules in the report
    for name, module in _parts(model):
        kind, inside = type(module).__name__, name.startswith(tuple(served))
        if _is_transformers_model(module) and not inside:
            cls, what = None, _enable(module, refused)
            if what in (_ENABLED, _ALREADY):
                served.append("" if module is model else f"{name}.")
        else:
            cls, what = swapped_class(module, found)
        if cls is not None:
            module.__class__ = cls
        if cls is not None or what == _ENABLED:
            swapped.append((name, kind, what))
        elif what is not None and not (inside and what == _UNKNOWN):
            left.append((name, kind, what))
        else:
            continue
        rows[name] = module
    left = [row for row in left if row[2] != _UNKNOWN or not _only_holds(rows, row[0], found)]
    return _report(swapped, left, "swapped")


def _only_holds(rows: dict, name: str, found: dict) -> bool:
    """Does this module only hold the module that computes its attention, which has its own row?"""
    module = rows[name]
    by_hand = "softmax" in found[_without_parametrization(module)].names
    if by_hand or not isinstance(module, nn.Module):
        return False
    inside = {id(part) for _, part in _parts(module) if part is not module}
    return any(id(part) in inside for part in rows.values())


def unswap(model: nn.Module) -> SwapReport:
    """Undoes swap(): restores every class, and every attn_implementation of transformers' models.

    Modules of fastattn.nn stay.

    Returns:
        A report as swap() returns. Modules whose class was changed again after swap() are left
        alone.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    back, left = [], []
    for name, module in _parts(model):
        cls, kind = type(module), type(module).__name__
        if _BEFORE in vars(module):
            module.set_attn_implementation(vars(module).pop(_BEFORE))
            back.append((name, kind, "set_attn_implementation()"))
        original = _original(_without_parametrization(module))
        if original is not None:
            unswap_object(module)
            back.append((name, kind, f"{original.__module__}.{original.__qualname__}"))
        elif any(_ORIGINAL in vars(base) for base in cls.__mro__):
            left.append((name, kind, f"its class became {cls.__qualname__} after swap(); undo that "
                                     "first"))  # fmt: skip
    return _report(back, left, "swapped back")


_ROOT = "(model)"


def _parts(model) -> list[tuple[str, Any]]:
    """(name, part) of the modules, and of the callable objects that they hold, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; accepted is a torch.nn.Module")
    parts = {}
    for name, module in model.named_modules():
        parts[id(module)] = (name or _ROOT, module)
        for attribute, held in vars(module).items():
            call = inspect.getattr_static(type(held), "__call__", None)
            is_part = isinstance(call, FunctionType) and hasattr(held, "__dict__")
            if is_part and not isinstance(held, nn.Module):
                parts.setdefault(id(held), (f"{name}.{attribute}".lstrip("."), held))
    return list(parts.values())


def _report(swapped, left, done) -> SwapReport:
    if swapped and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # code compiled for the previous classes is stale
    return SwapReport(tuple(swapped), tuple(left), done)


# ---- which class -------------------------------------------------------------------------------


def swapped_class(module: Any, found: dict | None = None) -> tuple[type | None, str | None]:
    """(the class to change to, a description), or (None, why not), or (None, None) if the module
    computes no attention.

    found: the results of redirect() by class; new ones are added.
    """
    found = {} if found is None else found
    cls = _without_parametrization(module)
    ours = _ours(cls)
    if _original(cls) is not None or (ours is not None and issubclass(cls, ours)):
        return None, _ALREADY
    if isinstance(module, torch.jit.ScriptModule):
        known = module.original_name in {theirs.__name__ for theirs in OURS}
        return None, "is compiled by TorchScript; swap before compiling" if known else None
    held, why = (), None
    if ours is None:
        if cls not in found:
            found[cls] = _methods_of(cls)
        held, why = _held(module, found[cls])
        if not (found[cls].methods or held or why):
            looks = re.search("attention|attn", cls.__name__, re.IGNORECASE) or _by_hand(found[cls])
            empty = isinstance(module, nn.Module) and not any(True for _ in module.parameters())
            return None, _UNKNOWN if looks and not empty else None
    if "forward" in vars(module):
        return None, "its forward is replaced on the instance"
    if ours is not None:
        theirs = next(theirs for theirs, x in OURS.items() if x is ours)
        if cls.forward is not theirs.forward:
            return None, f"{cls.__qualname__} has a forward of its own"
        what = f"fastattn.nn.{ours.__name__}"
    elif why is not None:
        return None, f"{why}, which swap cannot replace; {_OTHERS}"
    else:
        what = f"its {' and '.join(x.__name__ for x in found[cls].reached) or _SDPA} is fastattn's"
    return _with_parametrization(module, _class_of(cls, held)), what


_KEY_NAMES = re.compile("(^|_)(k|kv|qk|qkv|key)(_|$)")


def _by_hand(found: Redirected) -> bool:
    """Does the code compute a softmax and mention keys? Then it is attention, whatever its name."""
    return "softmax" in found.names and any(map(_KEY_NAMES.search, found.names))


def _ours(cls: type) -> type | None:
    return next((ours for theirs, ours in OURS.items() if issubclass(cls, theirs)), None)


_ALREADY, _ENABLED = "is fastattn's already", "fastattn.hf.enable()"
_OTHERS = "fastattn.enable() serves every call of torch's function"
_UNKNOWN = (
    f"not a class that swap knows, and swap finds no {_SDPA} among the functions that its code "
    f"calls by name; {_OTHERS}"
)

_made: WeakValueDictionary[tuple, type] = WeakValueDictionary()


def _class_of(cls: type, held: tuple[str, ...] = ()) -> type:
    """The subclass of cls whose attention is fastattn's: with fastattn.nn's forward, or with the
    methods of cls redirected. held: attributes of the instance that are torch's function."""
    made = _made.get((cls, held))
    if made is None:
        content = {_ORIGINAL: cls, _HELD: held, "__reduce_ex__": _reduce, "__module__": __name__}
        content |= {"__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        ours = _ours(cls)
        if issubclass(cls, nn.Module):
            on = "fastattn" if ours is None else f"fastattn.nn.{ours.__name__}"
            shown = on if cls in OURS else f"{cls.__name__}[{on}]"
            content["_get_name"] = lambda module: shown  # shown by print(model)
        if ours is None:
            bases, methods = _on_fastattn(cls, held)
            content |= methods
        else:
            bases = (ours,) if cls in OURS else (cls, ours)
        made = _made[cls, held] = type(cls.__name__, bases, content)
    return made


def is_swapped(module: Any) -> bool:
    """Is the module of a class that swap() made?"""
    return _original(_without_parametrization(module)) is not None


def unswap_object(module: Any) -> None:
    """Restores the class of a swapped module, or of a swapped object that a module holds."""
    if (original := _original(_without_parametrization(module))) is not None:
        module.__class__ = _with_parametrization(module, original)


def _original(cls: type) -> type | None:
    return vars(cls).get(_ORIGINAL)


# torch.nn.utils.parametrize gives a module its own class with a property for each tensor, and
# restores the first base when it is removed. So that class is made again with another base.


def _without_parametrization(module: nn.Module) -> type:
    cls = type(module)
    return cls.__bases__[0] if _has_own_class(module) else cls


def _with_parametrization(module: nn.Module, base: type) -> type:
    if not _has_own_class(module):
        return base
    cls = type(module)
    content = {n: x for n, x in vars(cls).items() if n not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), content)


def _has_own_class(module: nn.Module) -> bool:
    return is_parametrized(module) and type(module).__name__.startswith("Parametrized")


# ---- copies ------------------------------------------------------------------------------------


def _reduce(self, protocol: int):
    """Pickles and copies as the original class, which can be imported, and swaps again at load."""
    cls = next(base for base in type(self).__mro__ if _ORIGINAL in vars(base))
    make, arguments, *rest = super(cls, self).__reduce_ex__(max(2, protocol))
    if make is vars(copyreg)["__newobj__"] and arguments[0] is cls:
        make, arguments = _revive, (_original(cls), vars(cls)[_HELD], *arguments[1:])
    return (make, arguments, *rest)


def _revive(original: type, held: tuple[str, ...] = (), *arguments):
    cls = _class_of(original, held)
    return cls.__new__(cls, *arguments)


# ---- functions that are replaced in other classes' methods ---------------------------------------


def _instead() -> dict[Callable, Callable]:
    """Attention functions of other libraries, with fastattn's replacements."""
    functions = {getattr(F, _SDPA): scaled_dot_product_attention}
    if "diffusers.models.attention_dispatch" in sys.modules:
        from . import diffusers

        functions[diffusers.THEIR_DISPATCH] = diffusers.dispatch_attention_fn
    return functions


def _methods_of(cls: type) -> Redirected:
    return redirect(cls, ("forward", "__call__"), _instead())


def _held(module: Any, found: Redirected) -> tuple[tuple[str, ...], str | None]:
    """(attributes of the instance that are torch's function, why it cannot be swapped or None)."""
    instead, held, lost = _instead(), [], list(found.lost)
    for name in sorted(found.names & vars(module).keys()):
        value = vars(module)[name]
        if any(value is theirs for theirs in instead):
            held.append(name)
        elif leads(getattr(value, "func", value), instead):  # of a functools.partial
            lost.append(f"its attribute {name} is a function that calls it")
    return tuple(held), next(iter(lost), None)


def _on_fastattn(cls: type, held: tuple[str, ...]) -> tuple[tuple[type, ...], dict]:
    """(bases, attributes) of the subclass of cls whose methods call fastattn's attention."""
    found, content, shadowed = _methods_of(cls), {}, {}
    for (owner, name), method in found.methods.items():
        first = next(base for base in cls.__mro__ if name in vars(base))
        into = content if first is owner else shadowed.setdefault(owner, {})
        into[name] = method
    for name in held:
        content[name] = _of_instance(name, lambda module, name=name: _ours_for(vars(module)[name]))
    if "fused_attn" in found.names:
        content["fused_attn"] = _FUSED
    # Methods reached by super() come from a class between cls and their owner.
    between = [
        type(owner.__name__, (owner,), {**shadowed[owner], "__module__": __name__})
        for owner in cls.__mro__
        if owner in shadowed
    ]
    return (cls, *between), content


def _ours_for(value):
    return next((ours for theirs, ours in _instead().items() if value is theirs), value)


def _of_instance(name: str, get: Callable) -> property:
    """A property that hides the instance's attribute of this name, which unswap() uncovers."""

    def store(module, value) -> None:
        vars(module)[name] = value

    return property(get, store)


# timm's flag for the branch that calls scaled_dot_product_attention
_FUSED = _of_instance("fused_attn", lambda module: True)


# ---- transformers ------------------------------------------------------------------------------


def _is_transformers_model(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _enable(model: Any, refused: dict) -> str:
    """Calls fastattn.hf.enable(); returns _ENABLED, or why not.

    refused: {id of a configuration: class of the refused model that has it}. An encoder, a decoder
    and the model around them often share one configuration, which names one implementation.
    """
    if _BEFORE in vars(model):
        return _ALREADY
    try:
        from . import hf
    except ImportError as error:
        return f"fastattn.hf cannot be imported: {error}"
    if id(model.config) in refused:
        return f"shares its configuration with {refused[id(model.config)]}, which is refused"
    before = _implementations(model.config)
    try:
        hf.enable(model)
    except Exception as error:
        refused[id(model.config)] = type(model).__name__
        return f"fastattn.hf.enable() refused: {error}"
    vars(model)[_BEFORE] = before
    return _ENABLED


def _implementations(config) -> dict:
    """The argument of set_attn_implementation() that restores the present implementations,
    sub-models included."""
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    inner = {name: _implementations(x) for name, x in inner.items() if x is not None}
    return {"": config._attn_implementation, **inner}

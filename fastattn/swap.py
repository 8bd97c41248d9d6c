"""swap(): a built model computes its attention with fastattn, in place. unswap() takes it back.

A module is swapped by changing its class. It stays the same object: parameters, buffers, hooks,
training flag, whoever holds it, and what is assigned to it later. (A new module in its place would
need all of that copied, and every reference to the old one found.) The new class is a subclass of
the old one in which `forward` alone is another, so isinstance() and unknown methods work on, and
names its original, so going back needs no record.
"""

from __future__ import annotations

import copyreg
import dis
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType, ModuleType
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .nn.transformer import OURS
from .sdpa import scaled_dot_product_attention

_ORIGINAL = "_fastattn_original"  # on a swapped class: the class that it stands for
_BEFORE = "_fastattn_attn_implementation"  # on a transformers model: what it ran before
_SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What swap() or unswap() did. Rows are (module's name, its class, what happened or why not);
    str() is a table, and so is what a console or a notebook shows."""

    swapped: tuple[tuple[str, str, str], ...]  # or swapped back
    left: tuple[tuple[str, str, str], ...]  # attention modules left alone
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
    """Makes fastattn compute the attention of a built model, in place; unswap() takes it back.

    Swapped are

    - torch.nn.MultiheadAttention and torch.nn's Transformer classes, and subclasses that have no
      forward of their own: fastattn.nn's forward runs, with its two differences (a row that sees
      nothing gives no NaN, is_causal never discards a mask);
    - modules whose forward calls F.scaled_dot_product_attention by that name, as timm's attention
      blocks do: their own forward runs on fastattn's, and a `fused_attn` flag reads True;
    - transformers' PreTrainedModels: fastattn.hf.enable().

    Weights are shared, hooks, parametrizations, flags, dtypes and devices stay, and the model can
    be copied, pickled, quantised and compiled as before. Calling it again changes nothing.

    Returns:
        a report of every module that changed and every attention module left alone, with the
        reason. str() is a table.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    swapped, left, served = [], [], []  # served: prefixes of transformers models
    refused = {}  # configurations of those that are not, which models inside may share
    for name, module in _modules(model):
        kind, inside = type(module).__name__, name.startswith(tuple(served))
        if _is_transformers_model(module) and not inside:
            cls, what = None, _enable(module, refused)
            if what in (_ENABLED, _ALREADY):
                served.append("" if module is model else f"{name}.")
        else:
            cls, what = _swapped(module)
        if cls is not None:
            module.__class__ = cls
        if cls is not None or what == _ENABLED:
            swapped.append((name, kind, what))
        elif what is not None and not (inside and what == _UNKNOWN):
            left.append((name, kind, what))
    return _report(swapped, left, "swapped")


def unswap(model: nn.Module) -> SwapReport:
    """Takes swap() back: every class, and every transformers implementation, is what it was.

    fastattn.nn's own modules stay. Returns a report, as swap() does; left alone are modules whose
    class something else has wrapped since.
    """
    back, left = [], []
    for name, module in _modules(model):
        cls, kind = type(module), type(module).__name__
        if _BEFORE in vars(module):
            module.set_attn_implementation(vars(module).pop(_BEFORE))
            back.append((name, kind, "set_attn_implementation()"))
        original = _original(_without_parametrization(module))
        if original is not None:
            module.__class__ = _with_parametrization(module, original)
            back.append((name, kind, f"{original.__module__}.{original.__qualname__}"))
        elif any(_ORIGINAL in vars(base) for base in cls.__mro__):
            left.append((name, kind, f"its class became {cls.__qualname__} after swap(); undo that "
                                     "first"))  # fmt: skip
    return _report(back, left, "swapped back")


def _modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; accepted is a torch.nn.Module")
    return [(name or "(model)", module) for name, module in model.named_modules()]


def _report(swapped, left, done) -> SwapReport:
    if swapped and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled belongs to the other classes
    return SwapReport(tuple(swapped), tuple(left), done)


# ---- which class -------------------------------------------------------------------------------


def _swapped(module: nn.Module) -> tuple[type | None, str | None]:
    """(the class to change to, what it is), or (None, why not), or (None, None): no attention."""
    cls = _without_parametrization(module)
    ours = next((ours for theirs, ours in OURS.items() if issubclass(cls, theirs)), None)
    if _original(cls) is not None or (ours is not None and issubclass(cls, ours)):
        return None, _ALREADY
    if isinstance(module, torch.jit.ScriptModule):
        known = module.original_name in {theirs.__name__ for theirs in OURS}
        return None, "is compiled by TorchScript; swap before that" if known else None
    served = None if ours is not None else _on_fastattn(cls.forward)
    looks = re.search("attention|attn", cls.__name__, re.IGNORECASE)
    if ours is None and served is None:
        return None, _UNKNOWN if looks and any(True for _ in module.parameters()) else None
    if "forward" in vars(module):
        return None, "its forward is replaced on the instance"
    if ours is not None:
        theirs = next(theirs for theirs, x in OURS.items() if x is ours)
        if cls.forward is not theirs.forward:
            return None, f"{cls.__qualname__} has a forward of its own"
        new = _class_of(cls, ours)
        return _with_parametrization(module, new), f"fastattn.nn.{ours.__name__}"
    return _with_parametrization(module, _class_of(cls, None)), f"its {_SDPA} is fastattn's"


_ALREADY, _ENABLED = "is fastattn's already", "fastattn.hf.enable()"
_UNKNOWN = (
    f"not a class that swap knows, and its forward calls no F.{_SDPA}; fastattn.enable() serves "
    "the calls that other functions make for it"
)

_made: WeakValueDictionary[type, type] = WeakValueDictionary()


def _class_of(cls: type, ours: type | None) -> type:
    """The subclass of cls, alike but for forward: fastattn.nn's `ours`, or cls' own on fastattn."""
    made = _made.get(cls)
    if made is None:
        content = {_ORIGINAL: cls, "__reduce_ex__": _reduce, "__module__": __name__}
        content |= {"__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        on = "fastattn" if ours is None else f"fastattn.nn.{ours.__name__}"
        shown = on if cls in OURS else f"{cls.__name__}[{on}]"
        content["_get_name"] = lambda module: shown  # what print(model) calls it
        if ours is None:
            content["forward"] = _on_fastattn(cls.forward)
            if "fused_attn" in cls.forward.__code__.co_names:
                content["fused_attn"] = _FUSED
            bases = (cls,)
        else:
            bases = (ours,) if cls in OURS else (cls, ours)
        made = _made[cls] = type(cls.__name__, bases, content)
    return made


def _original(cls: type) -> type | None:
    return vars(cls).get(_ORIGINAL)


# torch.nn.utils.parametrize gives a module a class of its own, with a property for each tensor,
# and takes the first base when it goes. That class is made again, over another base.


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
    """Pickled and copied as the original class, which can be imported, and swapped again."""
    cls = next(base for base in type(self).__mro__ if _ORIGINAL in vars(base))
    make, arguments, *rest = super(cls, self).__reduce_ex__(max(2, protocol))
    if make is copyreg.__newobj__ and arguments[0] is cls:
        make, arguments = _revive, (_original(cls), *arguments[1:])
    return (make, arguments, *rest)


def _revive(original: type, *arguments):
    ours = next((ours for theirs, ours in OURS.items() if issubclass(original, theirs)), None)
    cls = _class_of(original, ours)
    return cls.__new__(cls, *arguments)


# ---- modules that call F.scaled_dot_product_attention ------------------------------------------

_F = ModuleType(F.__name__, "torch.nn.functional, its attention fastattn's")
vars(_F).update(vars(F), **{_SDPA: scaled_dot_product_attention})


def _on_fastattn(forward) -> FunctionType | None:
    """The same code, in a copy of its global names in which attention is fastattn's.

    None where it calls no F.scaled_dot_product_attention, or reaches it by other ways too.
    """
    if not isinstance(forward, FunctionType) or _SDPA not in forward.__code__.co_names:
        return None
    known, instead = forward.__globals__, {}
    steps = [x for x in dis.get_instructions(forward) if x.opname != "EXTENDED_ARG"]
    for before, step in pairwise(steps):
        if step.argval != _SDPA:
            continue
        if step.opname == "LOAD_GLOBAL" and known.get(_SDPA) is getattr(F, _SDPA):
            instead[_SDPA] = scaled_dot_product_attention
        elif before.opname == "LOAD_GLOBAL" and known.get(before.argval) is F:
            instead[before.argval] = _F
        else:
            return None
    names = {**known, **instead}
    names.pop("__name__", None)  # torch.compile would look names up in the module of this name
    function = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    function.__kwdefaults__, function.__doc__ = forward.__kwdefaults__, forward.__doc__
    function.__annotations__, function.__module__ = forward.__annotations__, forward.__module__
    return function


def _set_fused(module: nn.Module, value: bool) -> None:
    vars(module)["fused_attn"] = value


# timm's flag for the branch that calls it. The instance's own value waits for unswap().
_FUSED = property(lambda module: True, _set_fused)


# ---- transformers ------------------------------------------------------------------------------


def _is_transformers_model(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _enable(model: nn.Module, refused: dict) -> str:
    """Calls fastattn.hf.enable(); returns _ENABLED, or why not.

    refused: {id of a configuration: class of the refused model that reads it}. One configuration
    often serves an encoder, a decoder and the model around them, and names one implementation.
    """
    if _BEFORE in vars(model):
        return _ALREADY
    try:
        from . import hf
    except ImportError as error:
        return f"fastattn.hf is not to be had: {error}"
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
    """What set_attn_implementation() takes to bring back what runs now, sub-models included."""
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    inner = {name: _implementations(x) for name, x in inner.items() if x is not None}
    return {"": config._attn_implementation, **inner}

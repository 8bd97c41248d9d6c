"""Which of transformers' model classes fastattn can serve: refusal(). Next hop: masks.py.

transformers accepts a registered name for every model, even for one whose attention does not go
through the attention interface. Such a model would misread our masks: it would add a bool mask as
if it were a float mask, and see the future or the padding. So a model's source is checked, where
transformers itself checks names, before any layer is made.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from types import ModuleType

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import GeneralInterface

from .masks import WANT_EVERY_MASK


def refusal(cls: type[PreTrainedModel]) -> str | None:
    """Why fastattn cannot serve this class, in one sentence; None if it can."""
    if cls.__module__ not in sys.modules or not cls._can_set_attn_implementation():
        return _sentence(cls, "does not go through transformers' attention interface")
    for part in _parts(cls):
        for rule in RULES:
            why = rule(part)
            if why is not None:
                return _sentence(cls, why)
    return None


def _sentence(cls: type, why: str) -> str:
    return (
        f"{cls.__name__} {why}, so fastattn cannot serve it there; fastattn.enable() serves the "
        "calls of scaled_dot_product_attention that it makes"
    )


# ---- the classes that a model is made of ---------------------------------------------------------


@functools.cache
def _parts(cls: type) -> tuple[type, ...]:
    """The module classes that the class uses, itself included, as far as its source names them.

    PreTrainedModels that it holds are left out; they are checked when they are constructed.
    """
    found, todo = {}, [cls]
    while todo:
        part = todo.pop()
        if part in found or _is_a_library_class(part):
            continue
        found[part] = None
        known = vars(sys.modules.get(part.__module__, ModuleType("")))
        named = {x.id for x in ast.walk(_tree(part)) if isinstance(x, ast.Name)}
        values = [known.get(name) for name in sorted(named)]
        for value in values:  # the values of a dict of classes are used too
            values.extend(value.values() if type(value) is dict else ())
        todo += part.__bases__
        todo += [x for x in values if _is_a_module(x) and x.__module__ == part.__module__]
    return tuple(found)


def _is_a_module(x) -> bool:
    is_module = inspect.isclass(x) and issubclass(x, torch.nn.Module)
    return is_module and not issubclass(x, PreTrainedModel)


def _is_a_library_class(cls: type) -> bool:
    return (
        cls is PreTrainedModel
        or not issubclass(cls, torch.nn.Module)
        or (cls.__module__.partition(".")[0] == "torch")
    )


@functools.cache
def _tree(cls: type) -> ast.AST:
    """The class's syntax tree; an empty one where there is no source."""
    found = _classes_in(cls.__module__).get(cls.__qualname__)
    return ast.Module([], []) if found is None else found


@functools.cache
def _classes_in(module: str) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {x.name: x for x in tree.body if isinstance(x, ast.ClassDef)}


# ---- the rules -----------------------------------------------------------------------------------


def _own_table(part: type) -> str | None:
    """Refuses a class that looks the implementation up in its own table, which lacks our names."""
    known = vars(sys.modules.get(part.__module__, ModuleType("")))
    for x in ast.walk(_tree(part)):
        if (
            isinstance(x, ast.Subscript)
            and isinstance(x.slice, ast.Attribute)
            and x.slice.attr == "_attn_implementation"
            and isinstance(x.value, ast.Name)
            and not isinstance(known.get(x.value.id), GeneralInterface)
        ):
            return (
                "does not go through transformers' attention interface: "
                f"{part.__name__} takes its class from {x.value.id}"
            )
    return None


def _own_attention(part: type) -> str | None:
    """Refuses a class that adds its mask to scores of its own, which needs a float mask."""
    names = _names(part)
    attends = "softmax" in names and any("value" in name for name in names)  # value_layer, too
    if not attends or {"get_interface", "bool"} & names:
        return None
    for method, masks in _masks(part):
        for x in ast.walk(method):
            sides = (x.left, x.right) if isinstance(x, ast.BinOp) else ()
            sides = (x.value,) if isinstance(x, ast.AugAssign) else sides
            if isinstance(getattr(x, "op", None), ast.Add) and any(
                _is_one(y, masks) for y in sides
            ):
                return (
                    "does not go through transformers' attention interface: "
                    f"{part.__name__} computes attention itself"
                )
    return None


def _changes_mask(part: type) -> str | None:
    """Refuses a class that pads its mask with zeros before it calls the interface: 0 is visible in
    a float mask and hidden in a bool mask."""
    if "get_interface" not in _names(part):
        return None
    for method, masks in _masks(part):
        for x in ast.walk(method):
            called = getattr(getattr(x, "func", None), "attr", None)
            if not isinstance(x, ast.Call) or called not in ("cat", "concat", "pad"):
                continue
            given = [y for argument in x.args[:1] for y in getattr(argument, "elts", [argument])]
            filled = next((y.value for y in x.keywords if y.arg == "value"), None)
            if (
                any(_is_one(y, masks) for y in given)
                and getattr(filled, "value", None) is not False
            ):
                return (
                    f"passes masks that {part.__name__} has padded as if they were float masks to "
                    "add"
                )
    return None


def _reads_mask_as_bool(part: type) -> str | None:
    """Refuses a class that casts the 4-D attention mask to bool: a float mask's 0, which is
    visible, becomes False there, and ours has True for visible."""
    for method, masks in _masks(part):
        four = cast = None
        for x in ast.walk(method):
            if isinstance(x, ast.Compare) and getattr(x.comparators[0], "value", None) == 4:
                four = four or _is_one(_of_rank(x.left), masks)
            if isinstance(x, ast.Call) and isinstance(x.func, ast.Attribute):
                cast = cast or (x.func.attr == "bool" and _is_one(x.func.value, masks))
        if four and cast:
            return f"passes its attention mask to {part.__name__}, which reads 0 in it as visible"
    return None


def _leaves_selection(part: type) -> str | None:
    """Refuses a class that puts the keys selected for each row into the mask only for eager and
    sdpa. It passes their indices to other implementations, and attention() has no such option."""
    if "get_interface" not in _names(part):
        return None
    for x in ast.walk(_tree(part)):
        if (
            isinstance(x, ast.Compare)
            and isinstance(x.ops[0], ast.In)
            and getattr(x.left, "attr", None) == "_attn_implementation"
            and {getattr(y, "value", None) for y in getattr(x.comparators[0], "elts", ())}
            == {"eager", "sdpa"}
        ):
            return (
                f"leaves the selection of keys in {part.__name__} to the implementation, unless "
                "that is eager or sdpa"
            )
    return None


RULES = (_own_table, _own_attention, _changes_mask, _reads_mask_as_bool, _leaves_selection)


def _of_rank(x: ast.AST) -> ast.AST | None:
    """The tensor of len(tensor.shape), tensor.dim() and tensor.ndim."""
    if isinstance(x, ast.Call):
        x = x.args[0] if x.args else x.func
    return x.value if isinstance(x, ast.Attribute) else None


def wants_every_mask(cls: type[PreTrainedModel]) -> bool:
    """May this class's attention misread a mask of None?

    A class that declares support for sdpa reads None by the module's is_causal, as sdpa does. In
    any other class, where is_causal is a constructor's argument or missing, None may mean anything.
    """
    if cls._supports_sdpa:
        return False
    for part in _parts(cls):
        stated = [
            not isinstance(x.value, ast.Name)
            for x in ast.walk(_tree(part))
            if isinstance(x, ast.Assign) and getattr(x.targets[0], "attr", None) == "is_causal"
        ]
        if "get_interface" in _names(part) and not any(stated):
            return True
    return False


def _masks(part: type):
    """(method, names of its mask parameters) for each method that has any."""
    for method in getattr(_tree(part), "body", ()):
        if isinstance(method, ast.FunctionDef):
            every = (*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs)
            masks = {x.arg for x in every if "mask" in x.arg}
            if masks:
                yield method, masks


def _is_one(x: ast.AST, masks: set[str]) -> bool:
    x = x.value if isinstance(x, ast.Subscript) else x
    return isinstance(x, ast.Name) and x.id in masks


@functools.cache
def _names(part: type) -> frozenset[str]:
    tree = list(ast.walk(_tree(part)))
    names = {x.attr for x in tree if isinstance(x, ast.Attribute)}
    return frozenset(names | {x.id for x in tree if isinstance(x, ast.Name)})


# ---- at construction -----------------------------------------------------------------------------


def check_names(names: frozenset[str]) -> None:
    """Makes models that are given one of these names be checked; a second call has no effect.

    transformers resolves a name by one of two methods, in every model's __init__ and in
    set_attn_implementation(). They are wrapped to raise if the class cannot serve one of our names.
    """
    for method in ("_check_and_adjust_attn_implementation", "get_correct_attn_implementation"):
        theirs = getattr(PreTrainedModel, method)
        if getattr(theirs, "fastattn", None) is None:
            setattr(PreTrainedModel, method, _checked(theirs, names))


def _checked(theirs, names):
    @functools.wraps(theirs)
    def checked(self, implementation, *arguments, **options):
        if implementation in names:
            why = refusal(type(self))
            if why is not None:
                raise NotImplementedError(why)
            for inner in self.modules():  # inner models often share the configuration
                if isinstance(inner, PreTrainedModel) and wants_every_mask(type(inner)):
                    WANT_EVERY_MASK.add(type(inner.config))
        return theirs(self, implementation, *arguments, **options)

    checked.fastattn = names
    return checked

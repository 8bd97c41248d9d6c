"""The FLOP counter's formulas of the operators: core/work.py counts."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

from ..core.call import Tangents
from ..core.work import count_pairs, flops, flops_of_jvp
from .schema import FORWARD_STATISTICS, FORWARDS, JVP_PAIRS, MAPS, PAIRS, Arguments, weights


def forward_flops(*args, out_val=None, **_) -> int:
    call = Arguments.of(*args).call()
    return flops(count_pairs(call), call.q.shape[-1], call.v.shape[-1], "fwd")


def backward_flops(dout, dlse, out, lse, *args, out_val=None, **_) -> int:
    call = Arguments.of(*args).call()
    return flops(count_pairs(call), call.q.shape[-1], call.v.shape[-1], "bwd")


def jvp_flops(*args, out_val=None, mode="jvp", **_) -> int:
    x = Arguments.of(*args)
    tangents = Tangents(*x.rest[: len(Tangents._fields)])
    return flops_of_jvp(count_pairs(x.call()), x.q.shape[-1], x.v.shape[-1], tangents, mode)


def jvp_bwd_flops(dtout, dtlse, out, lse, tout, tlse, *args, out_val=None, **_) -> int:
    return jvp_flops(*args, mode="jvp_bwd")


def second_pass_flops(lse, *args, out_val=None, **_) -> int:
    """The scores' product alone."""
    call = Arguments.of(*args).call()
    return flops(count_pairs(call), call.q.shape[-1], 0, "fwd")


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for fwd in FORWARDS.values():
        register_flop_formula(fwd.overloadpacket, get_raw=True)(forward_flops)
    for _, bwd in PAIRS.values():
        register_flop_formula(bwd.overloadpacket, get_raw=True)(backward_flops)
    for jvp, jvp_bwd in JVP_PAIRS.values():
        register_flop_formula(jvp.overloadpacket, get_raw=True)(jvp_flops)
        register_flop_formula(jvp_bwd.overloadpacket, get_raw=True)(jvp_bwd_flops)
    for first in FORWARD_STATISTICS.values():
        register_flop_formula(first.overloadpacket, get_raw=True)(forward_flops)
    for second in (*MAPS.values(), weights):
        register_flop_formula(second.overloadpacket, get_raw=True)(second_pass_flops)
    for operator, formula in _more.items():
        register_flop_formula(operator)(formula)


_more: dict = {}  # formulas of operators that are defined later, while the counter is not imported


def register(operator, formula) -> None:
    """Registers the formula of one more operator."""
    if "torch.utils.flop_counter" not in sys.modules:
        _more[operator] = formula
        return
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(operator)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `action` right after module `name` is first imported."""

    def __init__(self, name, action):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or (loader := spec.loader) is None:
            return spec
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            self.action()

        loader.exec_module = exec_module
        return spec


# Importing the counter imports Triton where it is installed, which takes half a second, so the
# formulas are registered only once a program imports it.
if "torch.utils.flop_counter" in sys.modules:
    _register_flops()
else:
    sys.meta_path.insert(0, _AfterImport("torch.utils.flop_counter", _register_flops))

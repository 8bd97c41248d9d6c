"""swap() where a forward reaches scaled_dot_product_attention in one of many ways."""

from __future__ import annotations

import copy
import pickle

import pytest
import swap_models
import torch
import torch.nn.functional as F
from swap_models import (
    LEFT,
    SPELLINGS,
    ProcessedAttention,
    Processor,
    Spelled,
    WithSuper,
    helper,
    model,
    x_of,
)  # fmt: skip
from torch import nn

import fastattn


class Count(torch.overrides.TorchFunctionMode):
    """How often torch's own function is called."""

    def __enter__(self):
        self.calls = 0
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def counted(m):
    """(its output, how often it called torch's function)."""
    with Count() as count:
        return m(x_of()), count.calls


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_swapped_and_comes_back(spelling):
    m = model(SPELLINGS[spelling])
    before, (want, calls) = dict(vars(m)), counted(m)
    assert calls == 1
    report = fastattn.swap(m)
    assert report.left == () and [row[2] for row in report.swapped] == [
        "its scaled_dot_product_attention is fastattn's"
    ]
    got, calls = counted(m)
    assert calls == 0
    torch.testing.assert_close(got, want)
    assert counted(copy.deepcopy(m))[1] == 0
    if hasattr(swap_models, type(m).__name__):  # those made by type() cannot be pickled
        assert counted(pickle.loads(pickle.dumps(m)))[1] == 0
    assert counted(model(SPELLINGS[spelling]))[1] == 1  # another one of the class is not swapped
    fastattn.unswap(m)
    assert type(m) is SPELLINGS[spelling] and vars(m) == before
    assert counted(m)[1] == 1


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_compiles(spelling):
    m, graphs = model(SPELLINGS[spelling]), []
    want = m(x_of())
    fastattn.swap(m)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(m, backend=backend, fullgraph=True)(x_of()), want)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert not any("scaled_dot_product" in target for target in targets)


@pytest.mark.parametrize("way", LEFT)
def test_ways_that_cannot_be_replaced_are_named(way):
    cls, why = LEFT[way]
    m = model(cls)
    report = fastattn.swap(m)
    assert type(m) is cls
    (row,) = [row for row in report.left if row[0] == "(model)"]
    assert why in row[2] and row[2].endswith("enable() serves every call of torch's function")


def test_modules_of_a_name_that_only_hold_attention_are_not_left():
    class Attentions(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = SPELLINGS["F"]()

        def forward(self, x):
            return self.inner(x)

    class SoftAttention(Spelled):
        def attend(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v

    class HidingAttention(WithSuper, SoftAttention):
        attend = SoftAttention.attend

    assert fastattn.swap(model(Attentions)).left == ()
    for cls in (SoftAttention, HidingAttention):
        (row,) = fastattn.swap(model(cls)).left
        assert "swap finds no scaled_dot_product_attention among the functions" in row[2]


def test_attention_written_out_under_another_name_is_left_with_a_row():
    class Mixer(nn.Module):  # as timm's GPSA and SHSA
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def weights(self, q, k):
            return (q @ k.mT).softmax(-1)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.weights(q, k) @ v

    class Router(nn.Module):  # a softmax, and no keys
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 2)

        def forward(self, x):
            return self.gate(x).softmax(-1)

    ((name, kind, why),) = fastattn.swap(nn.Sequential(Mixer(), Router())).left
    assert (name, kind) == ("0", "Mixer") and "not a class that swap knows" in why


def test_the_originals_stay():
    """Only the copies run on fastattn; other callers of the same helper are not affected."""
    m = model(SPELLINGS["a helper's helper"])
    fastattn.swap(m)
    q = torch.randn(1, 2, 3, 4)
    with Count() as count:
        helper(q, q, q)
    assert count.calls == 1


# ---- objects that modules hold ------------------------------------------------------------------


def test_processors_are_swapped_in_place():
    shared = Processor()
    m = nn.ModuleDict({name: model(ProcessedAttention, shared) for name in "ab"})
    want, calls = counted(m["a"])
    assert calls == 1
    report = fastattn.swap(m)
    what = "its scaled_dot_product_attention is fastattn's"
    assert report.swapped == (("a.processor", "Processor", what),) and report.left == ()
    assert m["b"].processor is shared and isinstance(shared, Processor)
    for made in (m, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        got, calls = counted(made["a"])
        assert calls == 0
        torch.testing.assert_close(got, want)
        fastattn.unswap(made)
        assert counted(made["b"])[1] == 1 and type(made["b"].processor) is Processor
    assert vars(shared) == {}

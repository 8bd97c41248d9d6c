"""The examples on a machine with a GPU: every tensor that meets the model is on its device.

No GPU is needed. `Elsewhere` labels tensors that are moved to or made on a GPU, and the results of
their operations, and refuses, as a GPU does, calls that mix labelled and other tensors.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("tokenizers")
from example_runs import EXAMPLES, SIZES, run, write_sources

sys.path.insert(0, str(EXAMPLES))

import common

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BETWEEN = {"copy_", "__set__", "_has_compatible_shallow_copy_type"}  # calls that may mix devices


class Elsewhere(TorchFunctionMode):
    """Labels tensors as being on a GPU; they compute on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept, so that addresses stay theirs

    def has(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.storages

    def take(self, x: Tensor) -> None:
        if x.numel():
            self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage()

    def check(self, name: str, tensors: list[Tensor], options: dict) -> None:
        """Raises what a GPU raises. A number without dimensions, or an index, may be on the CPU."""
        if name in BETWEEN or (name == "__getitem__" and self.has(tensors[0])):
            return
        others = [x for x in tensors if x.numel() and x.dim() and not self.has(x)]
        if others or options.get("generator") or name == "numpy":
            raise RuntimeError(f"{name} has some of its arguments on {GPU} and some on the CPU")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        there = any(map(self.has, tensors))
        if func == Tensor.device.__get__:
            return GPU if there else func(*args)
        if name in ("device", "_parse_to"):  # which create or read a device
            return func(*args, **kwargs)
        if there:
            self.check(name, tensors, kwargs)
        places = [x for x in leaves if isinstance(x, torch.device)]
        args, kwargs = tree_map(
            lambda x: CPU if isinstance(x, torch.device) and x == GPU else x, (args, kwargs)
        )
        results = func(*args, **kwargs)
        if name == "cpu" or (places and tensors and there != (places[0] == GPU)):  # it moves
            results = results.clone()
        if name != "cpu" and (places[0] == GPU if places else there):
            for x in tree_leaves(results):
                if isinstance(x, Tensor):
                    self.take(x)
        return results


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A small folder of Python files, the same on every machine."""
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_is_where_the_model_is(name, tmp_path, sources, monkeypatch):
    """From the first step to the evaluation of the trained model, and from a checkpoint."""
    words = ("--attention", "torch")
    straight = run(name, tmp_path / "straight", sources, *words)[0]
    for module in (common, importlib.import_module(name)):
        monkeypatch.setattr(module, "device", lambda: GPU, raising=False)
    with Elsewhere() as elsewhere:
        found = run(name, tmp_path / "elsewhere", sources, *words)[0]
        for path in (tmp_path / "elsewhere").rglob("step-00000006.pt"):
            path.unlink()
        again = run(name, tmp_path / "elsewhere", sources, *words)[0]
    assert elsewhere.storages
    assert found.losses == again.losses
    assert found.evaluation == again.evaluation
    if name == "distill":  # its loss calls fastattn, which computes such tensors by its reference
        assert found.losses == pytest.approx(straight.losses, abs=1e-6)
        assert found.evaluation == pytest.approx(straight.evaluation, abs=1e-6)
    else:
        assert found.losses == straight.losses
        assert found.evaluation == straight.evaluation


def test_elsewhere_refuses_what_a_gpu_refuses():
    layer = torch.nn.Linear(2, 2)
    with Elsewhere():
        layer.to(GPU)
        x = torch.ones(3, 2)
        with pytest.raises(RuntimeError, match="linear has some of its arguments on cuda:0"):
            layer(x)
        y = layer(x.to(layer.weight.device))
        assert y.device == (y * 2).device == torch.zeros(2, device=y.device).device == GPU
        assert x.device == y.cpu().device == torch.zeros(2).device == CPU
        with pytest.raises(RuntimeError, match="numpy"):
            y.detach().numpy()
        y.sum().backward()
        assert layer.weight.grad.device == GPU


def test_a_process_has_a_gpu_of_its_own(monkeypatch):
    assert torch.cuda.is_available() or common.device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--nproc-per-node is 3; accepted is at most 2"):
        common.device()

"""Shared by all tests: one thread, fixed seeds, and the mark `native` (needs the C++ code). Without
a GPU, Triton's kernels are interpreted, which is decided when they are imported. The C++ library's
allocations start as NaN, so that elements that it fails to write show."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import random
import re
import signal

import fastattn.kernels
import numpy
import pytest
import torch

import fastattn

os.environ["FASTATTN_POISON"] = "1"  # read when the library first allocates, and in its children
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell, for example
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and Ctrl-C reaches what tests start


def _import_interpreted_kernels() -> None:
    """Without a GPU, Triton's kernels are interpreted, which is decided when they are imported. The
    variable is removed afterwards: tests that set it see the backend on the CPU."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.experimental.gluon")  # else by the first kernel that runs
        for module in pkgutil.iter_modules(fastattn.kernels.__path__):
            importlib.import_module(f"fastattn.kernels.{module.name}")
    _replace_the_language_once()


def _replace_the_language_once() -> None:
    """The interpreter patches triton.language in every call of a device function although the
    launch has done so already, which takes 40 % of its time. If it is patched, this does
    nothing."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # a different Triton
        return
    replace = interpreter._patch_lang

    @functools.cache
    def languages(function):
        found = function.__globals__.values()
        return [x for x in (language, language.core) if any(x is y for y in found)]

    def replaced(module) -> bool:
        return not language.core.is_builtin(module.load)

    def replace_once(function):
        if all(map(replaced, languages(function))):
            return interpreter._LangPatchScope()
        return replace(function)

    interpreter._patch_lang = replace_once


_import_interpreted_kernels()


def native_is_built() -> bool:
    """Whether the C++ library has registered the operators' CPU kernels."""
    operator = "fastattn::flash_attn_fwd"
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")
    except RuntimeError:  # no such operator
        return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long lists of cases too")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # what tests start is none of its workers
    config.addinivalue_line("markers", "native: needs the C++ library, skipped without it")
    config.addinivalue_line("markers", "long: takes minutes, run with --long")
    if not config.getoption("--long") and "long" not in config.getoption("-m"):
        chosen = config.getoption("-m")
        config.option.markexpr = f"({chosen}) and not long" if chosen else "not long"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # `make test` runs several processes, whose test names must agree
        if re.search(r" at 0x[0-9a-f]{6}", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} has an address in its name: give it an id")
    if native_is_built():
        return
    skip = pytest.mark.skip(reason="the C++ library (fastattn/_cpu*.so) is not built")
    for item in items:
        if item.get_closest_marker("native"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start():
    """One thread and the same seeds for each test; tests that need more threads set them."""
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)

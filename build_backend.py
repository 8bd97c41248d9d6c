"""The build backend, setuptools' own but for one thing: torch is asked for by wheels alone.

torch is gigabytes. Only compiling needs it, with pybind11 and ninja: a source distribution does
not, nor does a wheel without native code (FASTATTN_BUILD=none).
"""

from __future__ import annotations

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

COMPILING = ["torch>=2.10", "pybind11>=2.13", "ninja"]


def _requires() -> list[str]:
    return [] if os.environ.get("FASTATTN_BUILD") == "none" else COMPILING


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_requires()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_requires()]

"""How a kernel cuts its work: tile sizes, warps and stages, from tables. Next: launch.py.

A row is found by the GPU's generation, the bytes of an element and the head dimension. Every row is
compiled ahead of time by `make gpu-audit`, which fails where one spills or does not fit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    block_q: int
    block_kv: int
    warps: int
    stages: int  # tiles of keys (of rows, in the backward for keys) in flight
    tma: bool = False  # keys by tensor descriptor


class Device(NamedTuple):
    """What a table is chosen by."""

    name: str  # a key of the tables
    processors: int


# Largest block of head dimensions; longer ones are cut into chunks, at the price of reading q again
# for every tile of keys.
MAX_BLOCK_D = 256

# ---- tables: {device: {bytes of an element: {block of head dimensions: Config}}} ------------------

FORWARD = {
    "sm90": {
        2: {
            16: Config(128, 128, 8, 2, True),
            32: Config(128, 128, 8, 2, True),
            64: Config(128, 128, 8, 2, True),
            128: Config(128, 128, 8, 2, True),
            256: Config(128, 64, 8, 2, True),
        },
        4: {
            16: Config(64, 64, 4, 2),
            32: Config(64, 64, 4, 2),
            64: Config(64, 64, 4, 2),
            128: Config(64, 32, 4, 2),
            256: Config(32, 32, 4, 2),
        },
    },
    "sm80": {
        2: {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 4, 3),
            128: Config(128, 64, 8, 2),
            256: Config(64, 32, 4, 2),
        },
        4: {
            16: Config(64, 64, 4, 2),
            32: Config(64, 64, 4, 2),
            64: Config(64, 32, 4, 2),
            128: Config(32, 32, 4, 2),
            256: Config(32, 16, 4, 2),
        },
    },
    "gfx9": {
        2: {
            16: Config(128, 64, 4, 1),
            32: Config(128, 64, 4, 1),
            64: Config(128, 64, 4, 1),
            128: Config(128, 64, 4, 1),
            256: Config(64, 32, 4, 1),
        },
        4: {
            16: Config(64, 64, 4, 1),
            32: Config(64, 64, 4, 1),
            64: Config(64, 32, 4, 1),
            128: Config(32, 32, 4, 1),
            256: Config(32, 16, 4, 1),
        },
    },
    "interpreter": {4: {256: Config(32, 64, 1, 1)}},
}

BACKWARD_ROWS = BACKWARD_KEYS = FORWARD  # to be tuned


def device_of(x: torch.Tensor) -> Device:
    """The tables' name for x's device; RuntimeError says which GPUs have none."""
    if x.is_cpu:
        return Device("interpreter", 1)
    properties = torch.cuda.get_device_properties(x.device)
    if torch.version.hip:
        return Device("gfx9", properties.multi_processor_count)
    generation = properties.major
    name = "sm90" if generation >= 9 else "sm80"
    return Device(name, properties.multi_processor_count)


def block_of(size: int) -> int:
    """The block of channels that holds a head dimension, or a chunk of it."""
    return min(MAX_BLOCK_D, max(16, triton.next_power_of_2(size)))


def find(table, device: Device, itemsize: int, block_d: int) -> Config:
    """The row for these; of the interpreter's few, the first that is large enough."""
    rows = table[device.name]
    rows = rows.get(itemsize) or rows[4]
    return rows[min(size for size in rows if size >= block_d)]

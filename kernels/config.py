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
    fp8: bool = False  # has it float8_e4m3fn; elsewhere its bits are widened by arithmetic


# Head dimensions above the first are cut into chunks, at the price of reading q again for every
# tile of keys, and of making scores again for every chunk of v.
MAX_BLOCK_D, CHUNK_D = 256, 128
CHUNKED = 1 << 16  # the tables' key for them

# ---- tables: {device: {bytes of an element: {block of head dimensions: Config}}} ----------------
# sm90 has tensor descriptors and 227 KiB of shared memory a block, sm80 163, sm86 99, gfx9 64. On
# AMD loads go straight to registers, one stage. 8 warps on sm90 are two warpgroups, each of which
# has 64 rows (keys, in BACKWARD_KEYS) of the tile.

_FP32 = {
    64: Config(64, 32, 4, 2),
    128: Config(32, 32, 4, 2),
    256: Config(32, 16, 4, 1),
    CHUNKED: Config(32, 32, 4, 1),
}
_FP32_SM86 = _FP32 | {256: Config(16, 16, 4, 1)}
_FP32_AMD = {size: row._replace(stages=1) for size, row in _FP32.items()}
_INTERPRETER = {4: {CHUNKED: Config(32, 64, 1, 1)}}

_SM80_FORWARD = {
    64: Config(128, 64, 8, 2),
    128: Config(64, 64, 4, 2),
    256: Config(64, 64, 8, 2),
    CHUNKED: Config(64, 32, 4, 1),
}
_SM80_ROWS = {
    64: Config(128, 64, 8, 2),
    128: Config(64, 64, 8, 2),
    256: Config(64, 32, 8, 1),
    CHUNKED: Config(32, 32, 4, 1),
}
_SM80_KEYS = {
    64: Config(64, 128, 8, 2),
    128: Config(32, 64, 8, 2),
    256: Config(32, 64, 8, 1),
    CHUNKED: Config(32, 32, 4, 1),
}

FORWARD = {
    "sm90": {
        2: {
            64: Config(128, 128, 8, 2, tma=True),
            128: Config(128, 128, 8, 2, tma=True),
            256: Config(128, 64, 8, 2, tma=True),
            CHUNKED: Config(64, 32, 4, 1),
        },
        4: _FP32,
    },
    "sm80": {2: _SM80_FORWARD, 4: _FP32},
    "sm86": {2: _SM80_FORWARD | {256: Config(64, 32, 8, 2)}, 4: _FP32_SM86},
    "gfx9": {
        2: {
            64: Config(128, 64, 4, 1),
            128: Config(64, 64, 4, 1),
            256: Config(32, 32, 4, 1),
            CHUNKED: Config(32, 32, 4, 1),
        },
        4: _FP32_AMD,
    },
    "interpreter": _INTERPRETER,
}

BACKWARD_ROWS = {
    "sm90": {
        2: {
            64: Config(128, 128, 8, 2, tma=True),
            128: Config(128, 64, 8, 2, tma=True),
            256: Config(128, 32, 8, 2, tma=True),
            CHUNKED: Config(32, 32, 4, 1),
        },
        4: _FP32,
    },
    "sm80": {2: _SM80_ROWS, 4: _FP32},
    "sm86": {2: _SM80_ROWS | {256: Config(32, 32, 4, 1)}, 4: _FP32_SM86},
    "gfx9": {
        2: {
            64: Config(64, 64, 4, 1),
            128: Config(64, 32, 4, 1),
            256: Config(32, 32, 4, 1),
            CHUNKED: Config(32, 32, 4, 1),
        },
        4: _FP32_AMD,
    },
    "interpreter": _INTERPRETER,
}

# dk and dv stay in registers: 64 rows instead of 32 at 128 would need 50 reloads a step on sm90.
BACKWARD_KEYS = {
    "sm90": {
        2: {
            64: Config(64, 128, 8, 2, tma=True),
            128: Config(32, 128, 8, 2, tma=True),
            256: Config(32, 64, 8, 2, tma=True),
            CHUNKED: Config(32, 32, 4, 1),
        },
        4: _FP32,
    },
    "sm80": {2: _SM80_KEYS, 4: _FP32},
    "sm86": {
        2: _SM80_KEYS | {256: Config(32, 32, 8, 1), CHUNKED: Config(16, 16, 4, 1)},
        4: _FP32_SM86,
    },
    "gfx9": {
        2: {
            64: Config(32, 64, 4, 1),
            128: Config(32, 64, 4, 1),
            256: Config(16, 32, 4, 1),
            CHUNKED: Config(16, 32, 4, 1),
        },
        4: _FP32_AMD,
    },
    "interpreter": _INTERPRETER,
}

# sm_100 lacks the registers for sm_90's row in one place.
_SM100_FORWARD = FORWARD["sm90"][2] | {64: Config(128, 64, 8, 2, tma=True)}
FORWARD["sm100"] = {2: _SM100_FORWARD, 4: _FP32}
for _table in (BACKWARD_ROWS, BACKWARD_KEYS):
    _table["sm100"] = _table["sm90"]


def device_of(x: torch.Tensor) -> Device:
    """The tables' name for x's device."""
    if x.is_cpu:
        return Device("interpreter", 1)
    properties = torch.cuda.get_device_properties(x.device)
    fp8 = False
    if torch.version.hip:
        name = "gfx9"
    else:  # by the shared memory a block may have, which fell from sm_80 to sm_86
        room = properties.shared_memory_per_block_optin
        name = "sm80" if room >= 160 << 10 else "sm86"
        if room >= 220 << 10:
            name = "sm90" if properties.major < 10 else "sm100"
        fp8 = (properties.major, properties.minor) >= (8, 9)
    return Device(name, properties.multi_processor_count, fp8)


def block_of(size: int) -> int:
    """The block of channels that holds a head dimension, or a chunk of it."""
    return max(16, triton.next_power_of_2(size)) if size <= MAX_BLOCK_D else CHUNK_D


def find(table, device: Device, itemsize: int, *dims: int) -> Config:
    """The row for these head dimensions: the first that is large enough for all."""
    rows = table[device.name]
    rows = rows.get(itemsize) or rows[4]
    return rows[min(size for size in rows if size >= max(dims))]

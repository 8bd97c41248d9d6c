"""Tile sizes, warps and stages of the attention kernels, from tables. Next: launch.py.

The GPU's generation, the bytes of an element and the head dimension select a Config. `make
gpu-audit` compiles every Config ahead of time, and fails where one spills or does not fit.
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
    """The properties of a GPU that select a table."""

    name: str  # a key of the tables
    processors: int
    fp8: bool = False  # whether it has float8_e4m3fn; without it kernels convert the bits


# Head dimensions above MAX_BLOCK_D are processed in chunks of CHUNK_D. Then q is loaded again for
# every tile of keys, and scores are computed again for every chunk of v.
MAX_BLOCK_D, CHUNK_D = 256, 128
CHUNKED = 1 << 16  # their key in the tables

# ---- tables: {device: {bytes of an element: {block of head dimensions: Config}}} ----------------
# Shared memory of a block: sm90 227 KiB (and tensor descriptors), sm80 163, sm86 99, gfx9 64. AMD
# loads go straight to registers, so there is one stage. 8 warps on sm90 are two warpgroups, each of
# which has 64 rows of the tile (64 keys in BACKWARD_KEYS).

_FP32 = {
    64: Config(64, 32, 4, 2),
    128: Config(32, 32, 4, 2),
    256: Config(32, 16, 4, 1),
    CHUNKED: Config(32, 32, 4, 1),
}
_FP32_SM86 = _FP32 | {256: Config(16, 16, 4, 1)}
_FP32_AMD = {size: config._replace(stages=1) for size, config in _FP32.items()}
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

# dk and dv stay in registers: with 64 rows instead of 32, head dimension 128 would spill and reload
# 50 registers a step on sm90.
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

# Forward mode: two tiles of results stay in registers, and a tile of keys loads four tensors. More
# than CHUNK_D channels of v are processed in chunks, since two tiles of 256 would spill.
_SM80_JVP = {
    64: Config(128, 32, 8, 2),
    128: Config(64, 32, 8, 2),
    256: Config(32, 32, 8, 1),
    CHUNKED: Config(32, 32, 8, 1),
}
_FP32_JVP = {
    64: Config(32, 16, 4, 2),
    128: Config(16, 16, 4, 2),
    256: Config(16, 16, 4, 1),
    CHUNKED: Config(16, 16, 4, 1),
}

JVP = {
    "sm90": {
        2: {
            64: Config(128, 64, 8, 2),
            128: Config(128, 32, 8, 2),
            256: Config(128, 32, 8, 1),
            CHUNKED: Config(32, 32, 8, 1),
        },
        4: _FP32_JVP,
    },
    "sm80": {2: _SM80_JVP, 4: _FP32_JVP},
    "sm86": {2: _SM80_JVP, 4: _FP32_JVP},
    "gfx9": {
        2: {
            64: Config(64, 32, 4, 1),
            128: Config(32, 32, 4, 1),
            256: Config(32, 16, 4, 1),
            CHUNKED: Config(32, 16, 4, 1),
        },
        4: {size: config._replace(stages=1) for size, config in _FP32_JVP.items()},
    },
    "interpreter": _INTERPRETER,
}

# sm_100 has too few registers for one of sm_90's Configs.
_SM100_FORWARD = FORWARD["sm90"][2] | {64: Config(128, 64, 8, 2, tma=True)}
FORWARD["sm100"] = {2: _SM100_FORWARD, 4: _FP32}
for _table in (BACKWARD_ROWS, BACKWARD_KEYS, JVP):
    _table["sm100"] = _table["sm90"]

# The forward with statistics has FORWARD's tiles, and with them the same bits of out, except where
# what it keeps beside would spill.
_SM100_STATISTICS = _SM100_FORWARD | {128: Config(128, 32, 8, 2, tma=True)}
_GFX9_STATISTICS = FORWARD["gfx9"][2] | {128: Config(64, 32, 4, 1)}
STATISTICS = FORWARD | {
    "sm100": {2: _SM100_STATISTICS, 4: _FP32},
    "gfx9": {2: _GFX9_STATISTICS, 4: _FP32_AMD},
}


def device_of(x: torch.Tensor) -> Device:
    """The tables' name for x's device."""
    if x.is_cpu:
        return Device("interpreter", 1)
    properties = torch.cuda.get_device_properties(x.device)
    fp8 = False
    if torch.version.hip:
        name = "gfx9"
    else:  # by the shared memory of a block, of which sm_86 has less than sm_80
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
    """The Config for these head dimensions: the smallest that is large enough for all of them."""
    configs = table[device.name]
    configs = configs.get(itemsize) or configs[4]
    return configs[min(size for size in configs if size >= max(dims))]

"""The CPU kernels compiled into a separate program (kernels_alone.cpp), and calls of it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastattn.core.spec import Operands, Spec

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # enum class Dtype's order
# Without optimisation a file compiles in 10 s, not 40: the tests are about the source.
FLAGS = ("-std=c++17", "-O0", "-ffp-contract=fast", "-Wno-psabi", f"-I{ROOT / 'csrc'}")


@dataclass(frozen=True)
class Program:
    """A compiled driver, and the emulator that runs it if this machine cannot."""

    command: tuple[str, ...]

    def run(self, what: str, data: bytes = b"") -> bytes:
        settings = {k: x for k, x in os.environ.items() if k != "FASTATTN_ISA"}
        done = subprocess.run([*self.command, what], input=data, capture_output=True, env=settings)
        assert done.returncode == 0, (what, done.returncode, done.stderr.decode())
        return done.stdout

    def facts(self) -> tuple[dict, str]:
        """What the library would report of the machine, and the instruction set that it would
        use."""
        told, isa = self.run("facts").decode().splitlines()
        return json.loads(told), isa

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spec: Spec, operands: Operands
    ) -> list[Tensor]:
        """[out, lse, dq, dk, dv] of q [1, heads, q_len, D] and so on, aligned to the end."""
        seed, offset = (0, 0) if operands.dropout_seed is None else operands.dropout_seed.tolist()
        whole = (
            *(DTYPES.index(q.dtype), q.shape[1], k.shape[1], q.shape[2], k.shape[2]),
            *(q.shape[3], v.shape[3], spec.left, spec.right),
            *(operands.bias is not None, operands.alibi_slopes is not None),
            *(spec.dropout_p > 0, seed, offset),
        )
        numbers = struct.pack("<14q3d", *whole, spec.scale, spec.softcap, spec.dropout_p)
        given = (q, k, v, dout, operands.bias, operands.alibi_slopes)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        like = [(dout, q.dtype), (dout[..., 0], wide), *((x, q.dtype) for x in (q, k, v))]
        return self._call("attention", numbers, given, [(x.shape, dtype) for x, dtype in like])

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Rows x [length, dim], rotated by the angles of cos and sin [length, dim / 2]."""
        numbers = struct.pack("<4q", DTYPES.index(x.dtype), *x.shape, interleaved)
        return self._call("rotate", numbers, (x, cos, sin), [(x.shape, x.dtype)])[0]

    def _call(self, what, numbers: bytes, given, results) -> list[Tensor]:
        data = numbers + b"".join(bytes_of(x) for x in given if x is not None)
        written, found = bytearray(self.run(what, data)), []
        for shape, dtype in results:
            size = shape.numel() * dtype.itemsize
            found.append(torch.frombuffer(written[:size], dtype=dtype).reshape(shape))
            written = written[size:]
        assert not written
        return found


def bytes_of(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def build(folder: Path, compiler: list[str], isa: str, *flags: str, emulator: str = "") -> Program:
    """The program with the kernels of isa_<isa>.cpp."""
    sources = [ROOT / "tests/support/kernels_alone.cpp", ROOT / "csrc/cpu/machine.cpp"]
    sources.append(ROOT / f"csrc/cpu/isa_{isa}.cpp")
    output = folder / f"alone_{isa}"
    command = [*compiler, *FLAGS, *flags, f"-DKERNELS={isa}_kernels", *sources, "-o", output]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Program((emulator, str(output)) if emulator else (str(output),))

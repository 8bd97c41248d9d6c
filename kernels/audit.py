"""Which launches of the attention kernels `make gpu-audit` compiles: what is fast, and one of each
kind. benchmarks/gpu_audit.py reads the machine code.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastattn.spec import Operands, Spec

from . import config, launch

# Triton's targets in the words of config.py, with the processors of a typical one.
DEVICES = {
    "sm_80": config.Device("sm80", 108),
    "sm_86": config.Device("sm86", 84),
    "sm_90": config.Device("sm90", 132),
    "sm_100": config.Device("sm90", 148),
    "gfx942": config.Device("gfx9", 304),
}


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _int32(*shape):
    return _empty(*shape, dtype=torch.int32)


def _call(arch, backward, dtype=torch.bfloat16, dims=(128, 128), lengths=(4096, 4096), heads=(16, 16),
          batch=2, spec=(), **operands):  # fmt: skip
    """A function that launches what one call would."""
    (q_len, kv_len), (heads, kv_heads) = lengths, heads
    q = _empty(batch, heads, q_len, dims[0], dtype=dtype)
    pages = operands.pop("pages", batch)
    k, v = (_empty(pages, kv_heads, kv_len, dim, dtype=dtype) for dim in dims)
    spec = Spec(dims[0] ** -0.5, *spec)
    numbers = tuple(getattr(spec, name) for name in Spec.__slots__)
    x = Operands(**operands)
    device = DEVICES[arch.name]

    def run():
        if not backward:
            return launch.forward(q, k, v, *x.tensors(), *numbers, 0, device=device)
        out, lse = _empty(*q.shape[:3], dims[1], dtype=dtype), _empty(*q.shape[:3]).float()
        needs = (x.bias is not None, False)
        tensors = (out, None, out, lse, q, k, v)
        return launch.backward(*tensors, *x.tensors(), *numbers, *needs, device=device)

    return run


CAUSAL = (0.0, -1, 0)


def audit_subjects(arch):
    fast = [(d, name, spec) for d in (64, 128, 256) for name, spec in (("full", ()), ("causal", CAUSAL))]
    for dim, name, spec in fast:
        call = {"dims": (dim, dim), "spec": spec}
        name = f"bf16 {dim} {name}"
        yield from arch.launches(name, _call(arch, False, **call), hot=True, needs="matrix")
        yield from _backward(arch, name, dim <= 128, **call)
    if arch.name == "sm_86":  # what differs from sm_80 is how much fits
        return
    for name, dtype, dims in (
        ("fp16 128 causal", torch.float16, (128, 128)),
        ("fp32 64 causal", torch.float32, (64, 64)),
        ("bf16 192,128 causal", torch.bfloat16, (192, 128)),
        ("bf16 80 causal", torch.bfloat16, (80, 80)),
        ("bf16 512 causal", torch.bfloat16, (512, 512)),
    ):
        call = {"dims": dims, "dtype": dtype, "spec": CAUSAL}
        yield from arch.launches(name, _call(arch, False, **call))
        yield from _backward(arch, name, False, **call)
    for name, call in _variants():
        yield from arch.launches(name, _call(arch, False, **call))
        yield from _backward(arch, name, False, **call)
    paged = {
        "lengths": (1, 64),
        "heads": (32, 8),
        "batch": 8,
        "pages": 1000,
        "spec": CAUSAL,
        "kv_lens": _int32(8),
        "page_table": _int32(8, 128),
    }
    yield from arch.launches("bf16 128 paged decoding", _call(arch, False, **paged))


def _backward(arch, name, hot, **call):
    needs = "matrix" if hot else None
    for x in arch.launches(f"{name}, backward", _call(arch, True, **call), hot=hot, needs=needs):
        yield replace(x, needs=None) if "delta" in x.name else x


def _variants():
    """One launch for each operand, and one of them all."""
    seed, lens = _empty(2, dtype=torch.int64), _int32(2)
    slopes = _empty(16, dtype=torch.float32)
    mask = _empty(2, 1, 4096, 4096, dtype=torch.bool)
    bias = _empty(1, 16, 4096, 4096)
    yield "bf16 128 window", {"spec": (0.0, 1024, 0)}
    yield "bf16 128 mask", {"mask": mask}
    yield "bf16 128 bias", {"bias": bias}
    yield "bf16 64 bias", {"bias": bias, "dims": (64, 64)}
    yield "bf16 128 dropout", {"spec": (0.0, -1, 0, True, 0.1), "dropout_seed": seed}
    yield "bf16 128 softcap sinks", {"spec": (30.0, -1, 0), "sinks": _empty(16)}
    yield "bf16 128 grouped kv_lens", {"heads": (16, 4), "spec": CAUSAL, "kv_lens": lens}
    yield "bf16 128 documents", {"spec": CAUSAL, "document_ids": _int32(2, 4096)}
    cu = _int32(9)
    yield "bf16 128 packed", {"spec": CAUSAL, "batch": 1, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    yield (
        "bf16 64 everything",
        {
            "dims": (64, 64),
            "spec": (30.0, 1024, 0, True, 0.1),
            "mask": mask,
            "bias": bias,
            "alibi_slopes": slopes,
            "sinks": _empty(16),
            "kv_lens": lens,
            "dropout_seed": seed,
        },
    )

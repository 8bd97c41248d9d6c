"""The launches of the attention kernels that `make gpu-audit` compiles: the fast paths and one of
each kind. benchmarks/compile/triton.py reads their machine code.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ..core.call import Call
from ..core.spec import Operands, Spec, numbers_of
from . import combine, config, kv_append, launch, launch_jvp, launch_maps

# Triton's targets as config.py names them, each with the multiprocessors of a typical GPU.
DEVICES = {
    "sm_80": config.Device("sm80", 108),
    "sm_86": config.Device("sm86", 84),
    "sm_90": config.Device("sm90", 132, fp8=True),
    "sm_100": config.Device("sm100", 148, fp8=True),
    "gfx942": config.Device("gfx9", 304),
}


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _int32(*shape):
    return _empty(*shape, dtype=torch.int32)


def _call(arch, kernels, dtype=torch.bfloat16, dims=(128, 128), lengths=(4096, 4096),
          heads=(16, 16), batch=2, spec=(), kv_dtype=None, descales=(), **operands):  # fmt: skip
    """A function that launches what one call would; `kernels` is a key of KERNELS."""
    (q_len, kv_len), (heads, kv_heads) = lengths, heads
    q = _empty(batch, heads, q_len, dims[0], dtype=dtype)
    pages = operands.pop("pages", batch)
    k, v = (_empty(pages, kv_heads, kv_len, dim, dtype=kv_dtype or dtype) for dim in dims)
    call = Call(q, k, v, Spec(dims[0] ** -0.5, *spec), Operands(**operands))
    return partial(KERNELS[kernels], call, DEVICES[arch.name], descales)


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, *call.operands.tensors(), *numbers_of(call.spec)


def _forward(call, device, descales):
    launch.forward(*_arguments(call), 0, *descales, device=device)


def _statistics(call, device, _):
    launch.forward_stats(*_arguments(call), 0, True, True, device=device)


def _backward_of(call, device, _, with_entropy=False):
    shape, dtype = call.q.shape[:3], call.q.dtype
    out, lse = _empty(*shape, call.v.shape[3], dtype=dtype), _empty(*shape).float()
    needs = (call.operands.bias is not None, False, lse if with_entropy else None)
    launch.backward(out, None, out, lse, *_arguments(call), *needs, device=device)


def _jvp(call, device, _):
    tangents = (call.q, call.k, call.v, *call.operands.leaves())
    launch_jvp.jvp(*_arguments(call), *tangents, device=device)


def _column_mass(call, device, _):
    lse = _empty(*call.q.shape[:3]).float()
    launch_maps.column_mass(call, lse, device=device)


KERNELS = {
    "forward": _forward,
    "statistics": _statistics,
    "backward": _backward_of,
    "backward of entropy": partial(_backward_of, with_entropy=True),
    "jvp": _jvp,
    "column mass": _column_mass,
}
CAUSAL = (0.0, -1, 0)
FP8 = {"sm_90": "QGMMA", "sm_100": "UTCQMMA"}  # the instruction of fp8 products


def audit_subjects(arch):
    """On every architecture the fast paths and the largest kernels; on sm_90 one of each kind."""
    masks = (("full", ()), ("causal", CAUSAL))
    fast = [(dim, name, spec) for dim in (64, 128, 256) for name, spec in masks]
    for dim, name, spec in fast if arch.name == "sm_90" else fast[1::2]:
        call = {"dims": (dim, dim), "spec": spec}
        name = f"bf16 {dim} {name}"
        yield from arch.launches(name, _call(arch, "forward", **call), hot=True, needs="matrix")
        yield from _backward(arch, name, dim <= 128, **call)
    yield from _eight(arch)
    for name, call in _variants() if arch.name == "sm_90" else _largest():
        yield from arch.launches(name, _call(arch, "forward", **call))
        if "page_table" not in call:
            yield from _backward(arch, name, False, **call)
    yield from _derivatives_and_statistics(arch)


def _backward(arch, name, hot, **call):
    needs = "matrix" if hot else None
    run = _call(arch, "backward", **call)
    for x in arch.launches(f"{name}, backward", run, hot=hot, needs=needs):
        yield replace(x, needs=None) if "delta" in x.name else x


def _derivatives_and_statistics(arch):
    """Forward mode, statistics and the gradient of the entropy: the fast paths, and on sm_90 some
    of each kind. sm_86 has sm_80's instructions and nearly its tables."""
    if arch.name == "sm_86":
        return
    for kernels in ("jvp", "statistics", "backward of entropy", "column mass"):
        for dim in (64, 128):
            run = _call(arch, kernels, dims=(dim, dim), spec=CAUSAL)
            name = f"{kernels} bf16 {dim} causal"
            for x in arch.launches(name, run, hot=True, needs="matrix"):
                yield replace(x, needs=None) if "delta" in x.name else x
    everything, largest = "bf16 128 everything", dict(_largest())
    rest = {"jvp": ("bf16 256 causal", "bf16 512 causal", everything)}
    calls = largest | {"bf16 256 causal": {"dims": (256, 256), "spec": CAUSAL}}
    if arch.name == "sm_90":
        calls |= dict(_variants())
        rest["jvp"] += ("fp32 64 causal", "fp32 256 causal", "bf16 128 varlen")
        rest["statistics"] = ("bf16 128 grouped kv_lens", "bf16 128 paged decoding", everything)
        rest["column mass"] = ("bf16 128 varlen", "bf16 512 causal", everything)
    for kernels, names in rest.items():
        for name in names:
            run = _call(arch, kernels, **calls[name])
            yield from arch.launches(f"{kernels} {name}", run)


def _largest():
    """The kernels that need most registers and shared memory."""
    yield "fp32 256 causal", {"dims": (256, 256), "dtype": torch.float32, "spec": CAUSAL}
    yield "bf16 512 causal", {"dims": (512, 512), "spec": CAUSAL}
    yield (
        "bf16 128 everything",
        {
            "spec": (30.0, 1024, 0, True, 0.1),
            "mask": _empty(2, 1, 4096, 4096, dtype=torch.bool),
            "bias": _empty(1, 16, 4096, 4096),
            "alibi_slopes": _empty(16, dtype=torch.float32),
            "sinks": _empty(16),
            "kv_lens": _int32(2),
            "dropout_seed": _empty(4, dtype=torch.int64),
        },
    )


PAGED = {
    "lengths": (1, 64),
    "heads": (32, 8),
    "batch": 8,
    "pages": 1000,
    "spec": CAUSAL,
    "kv_lens": _int32(8),
    "page_table": _int32(8, 128),
}
E4M3 = torch.float8_e4m3fn


def _eight(arch):
    """8-bit tensors, which older GPUs read as bytes; appending to a cache; merging."""
    device, all_kinds = DEVICES[arch.name], arch.name == "sm_90"
    scale = _empty(16, dtype=torch.float32)
    call = {"dtype": E4M3, "spec": CAUSAL, "descales": (scale,) * 3}
    for dim in (64, 128, 256) if all_kinds else (128,):
        run = _call(arch, "forward", dims=(dim, dim), **call)
        needs = FP8.get(arch.name, "matrix")
        yield from arch.launches(f"fp8 {dim} causal", run, hot=device.fp8, needs=needs)
    scale = _empty(8, dtype=torch.float32)
    for name, dtype in (("fp8", E4M3), ("int8", torch.int8))[: 2 if all_kinds else 1]:
        run = _call(arch, "forward", **PAGED, kv_dtype=dtype, descales=(None, scale, scale))
        yield from arch.launches(f"{name} cache 128 paged decoding", run)
        yield from arch.launches(f"{name} cache", partial(_append, dtype, scale), hot=True)
    if all_kinds:
        yield from arch.launches("bf16 cache", partial(_append, torch.bfloat16, None), hot=True)
        out, lse = _empty(8, 32, 1, 128), _empty(8, 32, 1, dtype=torch.float32)
        yield from arch.launches("bf16", lambda: combine.merge(out, lse, out, lse), hot=True)


def _append(dtype, scale):
    new, pages = _empty(8, 8, 1, 128), _empty(1000, 8, 64, 128, dtype=dtype)
    angles = _empty(8192, 64, dtype=torch.float32)
    places = (_int32(8), _int32(8, 128))
    kv_append.append(new, new, pages, pages, *places, angles, angles, False, scale, scale)


def _variants():
    """One launch for each operand, dtype and kind of head dimension."""
    yield from _largest()
    yield "fp16 128 causal", {"dtype": torch.float16, "spec": CAUSAL}
    yield "fp32 64 causal", {"dims": (64, 64), "dtype": torch.float32, "spec": CAUSAL}
    yield "bf16 192,128 causal", {"dims": (192, 128), "spec": CAUSAL}
    yield "bf16 80 causal", {"dims": (80, 80), "spec": CAUSAL}
    yield "bf16 128 window", {"spec": (0.0, 1024, 0)}
    yield "bf16 128 mask", {"mask": _empty(2, 1, 4096, 4096, dtype=torch.bool)}
    bias = _empty(1, 16, 4096, 4096)
    yield "bf16 128 bias", {"bias": bias}
    yield "bf16 64 bias", {"bias": bias, "dims": (64, 64)}
    seed = _empty(2, dtype=torch.int64)
    yield "bf16 128 dropout", {"spec": (0.0, -1, 0, True, 0.1), "dropout_seed": seed}
    yield "bf16 128 softcap sinks", {"spec": (30.0, -1, 0), "sinks": _empty(16)}
    yield "bf16 128 grouped kv_lens", {"heads": (16, 4), "spec": CAUSAL, "kv_lens": _int32(2)}
    yield "bf16 128 documents", {"spec": CAUSAL, "document_ids": _int32(2, 4096)}
    ends = {"key_begin": _int32(2, 1, 4096, 1), "key_end": _int32(2, 1, 4096, 1)}
    yield "bf16 128 key ranges", {"spec": CAUSAL, **ends}
    cu = _int32(9)
    yield "bf16 128 varlen", {"spec": CAUSAL, "batch": 1, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    yield "bf16 128 paged decoding", PAGED

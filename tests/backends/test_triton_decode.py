"""8-bit caches and inputs, appending, merging: Triton's kernels, and the backends that convert
first, against float64. Without a GPU the kernels are interpreted, as in test_triton.py."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.core.quantization import E4M3, INT8, RANGES, quantize, widen
from fastattn.core.spec import OPERANDS, Spec

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
TRITON = pytest.param("triton", marks=needs_triton)
CPU = pytest.param("cpu", marks=pytest.mark.native)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EIGHT = [INT8, E4M3]
B, HQ, HKV, NEW, S_MAX, D, DV, PAGE = 3, 4, 2, 2, 21, 16, 24, 5
LENS = (7, 0, 19)
FLOAT64 = torch.float64
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def name_of(x):
    return str(x).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def close(got, want, dtype):
    error = (got.to(FLOAT64) - want).abs().max()
    assert error <= TOLERANCE[dtype] * want.abs().max(), f"{error} of {want.abs().max()}"


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def stored(x, descale, dtype):
    """x in a cache of dtype; unchanged unless that is an 8-bit dtype."""
    return quantize(x, descale, dtype) if dtype in EIGHT else x.to(dtype)


class Cached:
    """A decode call: tensors, arguments, and the position of each entry's slots in the cache."""

    def __init__(self, kind, place, dtype, rotary=None, own=False):
        self.kind, self.dtype = kind, dtype
        shape = (B, HKV) if own else (HKV,)
        self.descales = [torch.rand(shape, device=DEVICE) * 0.02 + 0.01 for _ in range(2)]
        rows, slots = (12, PAGE) if place == "pages" else (5 if place == "rows" else B, S_MAX)
        self.caches = [
            stored(
                torch.randn(rows, slots, HKV, d, device=DEVICE).transpose(1, 2),
                scale,
                kind or dtype,
            )
            for d, scale in zip((D, DV), self.descales)
        ]
        self.q = torch.randn(B, HQ, NEW, D, device=DEVICE).to(dtype)
        self.k = torch.randn(B, NEW, HKV, D, device=DEVICE).to(dtype).transpose(1, 2)
        self.v = torch.randn(B, HKV, NEW, DV, device=DEVICE).to(dtype)
        self.call = {"cache_lens": ints(*LENS), "k": self.k, "v": self.v, "causal": True}
        self.slots = [[(b, s) for s in range(S_MAX)] for b in range(B)]
        if kind:
            self.call |= dict(zip(("k_descale", "v_descale"), self.descales))
        if place == "pages":
            a, b, c, *rest = torch.randperm(12).tolist()
            self.table = ints(a, b, -1, -1, -1, c, -1, -1, -1, -1, *rest[:5]).view(B, 5)
            self.call["page_table"] = self.table
            self.slots = [[(p, s) for p in row for s in range(PAGE)] for row in self.table.tolist()]
        if place == "rows":
            self.call["cache_batch_idx"] = ints(4, 0, 2)
            self.slots = [[(row, s) for s in range(S_MAX)] for row in (4, 0, 2)]
        if rotary is not None:
            angles = torch.rand(S_MAX, D // 4, device=DEVICE) * 6
            self.call["rotary"] = (angles.cos(), angles.sin())
            self.call["rotary_interleaved"] = rotary

    def run(self, backend, **changes):
        """(out, lse, the caches afterwards); this object's caches do not change."""
        caches = [x.clone() for x in self.caches]
        results = fastattn.decode_attention(
            self.q, *caches, **{**self.call, **changes}, return_lse=True, backend=backend
        )
        return *results, caches

    def entry(self, caches, b):
        """[1, HKV, n, *] in float64: the keys and values that entry b has in these caches."""
        found = []
        for cache, scale in zip(caches, self.descales):
            scale = scale[b] if scale.dim() == 2 else scale
            slots = self.slots[b][: LENS[b] + NEW]
            x = torch.stack([cache.float()[row, :, slot] for row, slot in slots], 1)
            x = x.to(FLOAT64)
            found.append((x * scale[:, None, None].to(FLOAT64) if self.kind else x)[None])
        return found


def check(case, backend):
    out, lse, caches = case.run(backend)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    q = case.q
    if "rotary" in case.call:
        cos, sin = case.call["rotary"]
        at = ints(*LENS).long()[:, None] + torch.arange(NEW, device=DEVICE)
        from fastattn.fused.rope import rotate_reference

        rotary = (cos, sin, at, case.call["rotary_interleaved"])
        q = rotate_reference(q.float(), *rotary).to(case.dtype)
    for b in range(B):
        k, v = case.entry(caches, b)
        want, want_lse = fastattn.attention(
            q[b : b + 1].to(FLOAT64), k, v, causal=True, return_lse=True, backend="reference"
        )
        close(out[b : b + 1], want, case.dtype)
        close(lse[b : b + 1], want_lse, case.dtype)
    return caches


@pytest.mark.parametrize("rotary", [None, True, False], ids=["still", "interleaved", "halves"])
@pytest.mark.parametrize("place", ["rows", "pages", "dense"])
@pytest.mark.parametrize("kind", [INT8, E4M3, None], ids=name_of)
@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_decode(backend, kind, place, rotary):
    """Results against float64; appended values against the same in torch."""
    dtype = [torch.bfloat16, torch.float16, torch.float32][["rows", "pages", "dense"].index(place)]
    case = Cached(kind, place, dtype, rotary)
    caches = check(case, backend)
    _, _, wanted = case.run("reference")
    written = {case.slots[b][s] for b in range(B) for s in range(LENS[b], LENS[b] + NEW)}
    for n, (cache, want, before) in enumerate(zip(caches, wanted, case.caches)):
        changed = (cache.float() != before.float()).flatten(2).any(-1)  # [rows, HKV]
        assert {row for row, _ in changed.nonzero().tolist()} <= {row for row, _ in written}
        if rotary is None or n == 1:
            assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8))
        else:  # the rounding of a rotation may give a key's neighbouring number
            step = 1 if kind == INT8 else want.float().abs() * 2.0**-3 + 2.0**-9
            assert ((cache.float() - want.float()).abs() <= step).all()
            assert (cache.float() == want.float()).float().mean() > 0.98


@pytest.mark.parametrize("dtype", TOLERANCE, ids=name_of)
@pytest.mark.parametrize("kind", EIGHT, ids=name_of)
@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_scales_of_each_entry_and_every_dtype(backend, kind, dtype):
    check(Cached(kind, "dense", dtype, own=True), backend)


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("kind", EIGHT, ids=name_of)
def test_parts_of_the_keys(kind, num_splits):
    case = Cached(kind, "pages", torch.float32)
    want, want_lse, _ = case.run("reference")
    out, lse, _ = case.run("triton", num_splits=num_splits)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_mask_bias_window_and_padding_of_a_wider_cache(backend):
    """Operands as wide as the cache, of which only part is converted."""
    case = Cached(INT8, "pages", torch.float32)
    capacity = 5 * PAGE
    options = {
        "mask": torch.rand(B, 1, NEW, capacity, device=DEVICE) > 0.3,
        "bias": torch.randn(HQ, 1, capacity, device=DEVICE),
        "cache_leftpad": ints(2, 0, 5),
        "window": (9, 0),
    }
    out, lse, caches = case.run(backend, **options)
    keys = [torch.zeros(B, HKV, capacity, d, dtype=FLOAT64, device=DEVICE) for d in (D, DV)]
    for b in range(B):
        for x, entry in zip(keys, case.entry(caches, b)):
            x[b, :, : entry.shape[2]] = entry[0]
    options["kv_lens"] = ints(*LENS) + NEW
    hidden = torch.arange(capacity, device=DEVICE) >= options.pop("cache_leftpad")[:, None]
    options["mask"] = options["mask"] & hidden[:, None, None]
    want, want_lse = fastattn.attention(
        case.q.to(FLOAT64), *keys, causal=True, return_lse=True, backend="reference", **options
    )
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("kind", EIGHT, ids=name_of)
def test_every_rounding(kind):
    """Ties, subnormals, both ends of the range, numbers beyond, and (in float8) NaN: torch's
    bits."""
    low, high = RANGES[kind]
    ties = (
        torch.arange(-1200, 1200) / 2 if kind == INT8 else torch.arange(-(1 << 13), 1 << 13) / 2**13
    )
    others = [low, high, 1e30, -1e30, 0.0, -0.0, 2.0**-10, 3 * 2.0**-10]
    values = torch.cat([ties, torch.randn(4000) * 30, torch.tensor(others)])
    if kind == E4M3:
        values = torch.cat([values, torch.tensor([torch.nan, torch.inf, -torch.inf])])
    k = torch.nn.functional.pad(values, (0, -len(values) % 16)).view(1, 1, -1, 16).to(DEVICE)
    cache = torch.zeros(k.shape, dtype=kind, device=DEVICE)
    for scale in (1.0, 0.37):
        scale = torch.tensor([scale], device=DEVICE)
        torch.ops.fastattn.cache_append(
            k, k, cache, cache.clone(), ints(0), None, None, None, True, scale, scale
        )
        assert torch.equal(cache.view(torch.uint8), quantize(k, scale, kind).view(torch.uint8))


@needs_triton
def test_what_does_not_fit_is_not_written():
    """Lengths on a GPU are not checked; the kernel leaves memory outside of the cache alone."""
    k = torch.ones(4, 1, 3, 8, device=DEVICE)
    caches = [torch.zeros(4, 1, 10, 8, device=DEVICE) for _ in range(2)]
    arguments = (None, None, None, True, None, None)
    inner = [cache[:, :, 2:8] for cache in caches]  # 6 slots, others' memory around them
    torch.ops.fastattn.cache_append(k, k, *inner, ints(-2, 5, 1000, 2), *arguments)
    for cache in caches:
        filled = cache[:, 0, :, 0].nonzero().tolist()
        assert filled == [[0, 2], [1, 7], [3, 4], [3, 5], [3, 6]]


# ---- float8 attention ---------------------------------------------------------------------------


def float8(*shape):
    return torch.randn(shape, device=DEVICE).to(E4M3)


OPTIONS = [
    {}, {"causal": True}, {"window": (4, 1)}, {"softcap": 3.0, "causal": True, "align": "start"},
    {"kv_lens": (5, 0, 37)}, {"dropout_p": 0.3, "dropout_seed": (1, 2)},
]  # fmt: skip


def widened(x, scale, heads):
    """x times its scale, in float64."""
    if scale is None:
        return x.float().to(FLOAT64)
    scale = scale.to(FLOAT64).repeat_interleave(heads // scale.shape[-1], -1)
    return x.float().to(FLOAT64) * scale[..., None, None]


@pytest.mark.parametrize("scales", ["none", "heads", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_float8_attention(backend, options, scales):
    options = dict(options)
    if "kv_lens" in options:
        options["kv_lens"] = ints(*options["kv_lens"])
    q, k, v = float8(3, 4, 21, 16), float8(3, 2, 37, 16), float8(3, 2, 37, 24)
    one, each = torch.rand(2, device=DEVICE) + 0.2, torch.rand(3, 2, device=DEVICE) + 0.2
    given = {"none": (None,) * 3, "heads": (one, one * 2, one * 3), "mixed": (each, one, None)}
    descales = dict(zip(("q_descale", "k_descale", "v_descale"), given[scales]))
    out, lse = fastattn.attention(q, k, v, **descales, **options, return_lse=True, backend=backend)
    wide = (widened(x, scale, x.shape[1]) for x, scale in zip((q, k, v), given[scales]))
    want, want_lse = fastattn.attention(*wide, **options, return_lse=True, backend="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    close(out, want, torch.bfloat16)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("dim", [16, 40, 300])
@pytest.mark.parametrize("native", [False, True], ids=["bytes", "float8"])
def test_float8_by_bits_and_as_such(dim, native):
    """The two ways in which a kernel reads float8: in tiles, and in chunks of channels."""
    from fastattn.kernels import config, launch

    if DEVICE == "cuda" and native and not config.device_of(torch.empty(0, device=DEVICE)).fp8:
        pytest.skip("the GPU has no float8")
    device = config.Device("interpreter", 1, native) if DEVICE == "cpu" else None
    x = float8(1, 2, 20, dim)
    out, lse = launch.forward(
        x, x, x, *(None,) * 13, 0.1, 0.0, -1, 0, True, 0.0, 0, None, None, None, device=device
    )
    wide = x.float().to(FLOAT64)
    options = {"scale": 0.1, "causal": True, "return_lse": True, "backend": "reference"}
    want, want_lse = fastattn.attention(wide, wide, wide, **options)
    close(out, want, torch.bfloat16)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-4, atol=1e-4)


@needs_triton
def test_nan_stays_nan_in_float8():
    x = float8(1, 1, 4, 16)
    x.view(torch.uint8)[:, :, 2] = 0x7F
    y = float8(1, 1, 4, 16)
    out = fastattn.attention(y, x, y, causal=True, backend="triton")
    assert out.isnan().all(-1).flatten().tolist() == [False, False, True, True]


def test_masks_and_ranks_of_float8():
    q = float8(7, 16)
    mask, bias = torch.rand(7, 7, device=DEVICE) > 0.3, torch.randn(7, 7, device=DEVICE)
    mask.fill_diagonal_(True)
    out = fastattn.attention(q, q, q, mask=mask, bias=bias, backend="reference")
    wide = q.float().to(FLOAT64)
    want = fastattn.attention(wide, wide, wide, mask=mask, bias=bias, backend="reference")
    assert out.shape == (7, 16)
    close(out, want, torch.bfloat16)


# ---- the operators ------------------------------------------------------------------------------

NUMBERS = tuple(getattr(Spec(0.3), name) for name in Spec.__slots__)


@needs_triton
def test_operator_with_descales():
    operator = torch.ops.fastattn.flash_attn_fwd_triton.default
    names = [a.name for a in operator._schema.arguments]
    assert names[3:16] == list(OPERANDS)
    assert names[-3:] == ["q_descale", "k_descale", "v_descale"]
    q, k = torch.randn(2, 2, 5, 16, device=DEVICE), float8(2, 2, 9, 16)
    scale = torch.rand(2, device=DEVICE)
    arguments = (q, k, k, *(None,) * 13, *NUMBERS, 0)
    whole = k.float().to(INT8)  # the schema test does not know float8
    torch.library.opcheck(
        operator, (q, whole, whole, *arguments[3:], None, scale, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    out, _ = operator(*arguments, None, scale, scale)
    many, _ = torch.func.vmap(lambda q, s: operator(q, *arguments[1:], None, s, scale))(
        torch.stack([q, q]), torch.stack([scale, scale])
    )
    torch.testing.assert_close(many, torch.stack([out, out]))
    with FlopCounterMode(display=False) as mode:
        operator(*arguments, None, scale, scale)
    assert mode.get_total_flops() == 2 * 2 * 2 * 5 * 9 * (16 + 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        half, _ = operator(*arguments, None, scale, scale)
        whole, _ = operator(k, k, k, *arguments[3:])
    assert half.dtype == torch.bfloat16 and whole.dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="8-bit q, k and v have no gradient"):
        operator(q.requires_grad_(), *arguments[1:])
    meta = operator(*(x.to("meta") for x in (k, k, k)), *arguments[3:])
    assert meta[0].dtype == torch.bfloat16 and meta[1].dtype == torch.float32


@needs_triton
def test_append_operator():
    case = Cached(INT8, "pages", torch.float32, rotary=True)
    tensors = case.k, case.v, *case.caches, case.call["cache_lens"], case.table
    torch.library.opcheck(
        torch.ops.fastattn.cache_append.default,
        (*tensors, *case.call["rotary"], True, *case.descales),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", [CPU, TRITON])
def test_compiled_decoding(backend):
    case = Cached(INT8, "pages", torch.bfloat16, rotary=False)
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, **call):
        return fastattn.decode_attention(q, k_cache, v_cache, **call, backend=backend)

    want, _, wanted = case.run(backend)
    caches = [x.clone() for x in case.caches]
    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        out = compiled(case.q, *caches, **case.call)
    torch._dynamo.reset()
    close(out, want.to(FLOAT64), torch.bfloat16)
    for got, expected in zip(caches, wanted):
        assert (got.float() - expected.float()).abs().max() <= 1


@pytest.mark.native
def test_autocast_leaves_8_bits():
    case = Cached(INT8, "dense", torch.float32)
    want, *_ = case.run("cpu")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, *_ = case.run("cpu")
        eight = fastattn.attention(*(float8(1, 2, 5, 16),) * 3, backend="cpu")
    assert out.dtype == eight.dtype == torch.bfloat16
    close(out, want.to(FLOAT64), torch.bfloat16)


def test_explained():
    case = Cached(INT8, "pages", torch.bfloat16)
    told = fastattn.explain(case.q, *case.caches, **case.call, backend="reference")
    assert told.kv_dtype == INT8 and "descales" in told.operands and told.flops_backward is None
    assert "of int8" in str(told)
    seen = sum(LENS) + B * NEW
    rows = B * HQ * NEW
    assert told.bytes_forward == seen * HKV * (D + DV) + rows * ((D + DV) * 2 + 4)
    q = float8(1, 2, 5, 16)
    told = fastattn.explain(q, q, q, backend="reference", q_descale=torch.ones(2, device=DEVICE))
    assert told.dtype == E4M3 and "descales" in told.operands and told.flops_backward is None
    assert told.bytes_forward == 10 * (3 * 16 + 2 * 16 + 4)


# ---- merge_states -------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 5, 24), (70, 300), (1,)], ids=str)
def test_merging_by_the_kernel(shape, dtype):
    from fastattn.kernels.combine import merge

    out_a, out_b = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:-1], device=DEVICE) * 9 for _ in range(2))
    if len(shape) > 1:
        lse_a[0], lse_b[1] = -math.inf, -math.inf
        lse_a[2] = lse_b[2] = -math.inf
        out_a[0], out_a[2] = torch.nan, torch.nan
    host = (x.cpu() for x in (out_a, lse_a, out_b, lse_b))
    want, want_lse = fastattn.merge_states(*host)
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out.cpu(), want.to(FLOAT64), dtype)
    torch.testing.assert_close(lse.cpu(), want_lse)


# ---- refusals -----------------------------------------------------------------------------------


def refused(kind, sentence, function, *tensors, **call):
    with pytest.raises(kind, match=sentence):
        function(*tensors, **call)


def test_refused_caches():
    case = Cached(INT8, "dense", torch.float32)
    k, v = case.caches
    scales = {name: case.call.pop(name) for name in ("k_descale", "v_descale")}
    scale = scales["k_descale"]
    paged = {"page_table": ints(0, 1, 2).view(B, 1)}
    own = scale.expand(B, HKV)
    for error, sentence, caches, changes in (
        (ValueError, "k_descale is None and the caches are torch.int8", (k, v), {}),
        (ValueError, "v_descale is None", (k, v), {"k_descale": scale}),
        (TypeError, "k_cache is torch.int8 and v_cache torch.float32", (k, v.float()), scales),
        (TypeError, "k_cache is torch.float32 and v_cache torch.float32; accepted with k_descale",
         (k.float(), v.float()), scales),
        (TypeError, "k_cache is torch.int8 and v_cache torch.float8_e4m3fn",
         (k, v.float().to(E4M3)), scales),
        (TypeError, "k_descale is torch.float16; accepted is torch.float32", (k, v),
         scales | {"k_descale": scale.half()}),
        (ValueError, r"v_descale has shape \[4\]; accepted: \[kv_heads\] = \[2\] and \[B, kv_hea",
         (k, v), scales | {"v_descale": torch.ones(4, device=DEVICE)}),
        (ValueError, r"k_descale has shape \[3, 2\]; accepted: \[kv_heads\] = \[2\]$", (k, v),
         scales | paged | {"k_descale": own}),
        (TypeError, "q is torch.int8", (k, v), scales | {"q": case.q.to(INT8)}),
    ):  # fmt: skip
        call = {"q": case.q, **case.call, **changes}
        before = [x.clone() for x in caches]
        refused(error, sentence, fastattn.decode_attention, call.pop("q"), *caches, **call)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(before, caches))
    wide = {name: case.call[name].double() for name in ("k", "v")}
    refused(TypeError, "q is torch.float64 and the caches are 8-bit", fastattn.decode_attention,
            case.q.double(), k, v, **{**case.call, **wide, **scales})  # fmt: skip
    refused(NotImplementedError, "requires grad", fastattn.decode_attention,
            case.q.requires_grad_(), k, v, **case.call, **scales)  # fmt: skip


def test_refused_float8():
    q, scale = float8(1, 2, 5, 16), torch.ones(2, device=DEVICE)
    for error, sentence, tensors, call in (
        (TypeError, "k is torch.bfloat16 and q is torch.float8_e4m3fn", (q, q.bfloat16(), q), {}),
        (TypeError, "q is torch.float32; accepted with q_descale, k_descale or v_descale is float8",
         (q.float(),) * 3, {"k_descale": scale}),
        (TypeError, "v_descale is torch.float64", (q, q, q), {"v_descale": scale.double()}),
        (ValueError, r"q_descale has shape \[5\]", (q, q, q), {"q_descale": scale.new_ones(5)}),
        (TypeError, "q_descale is of type float", (q, q, q), {"q_descale": 2.0}),
        (NotImplementedError, "float8_e4m3fn came with an input that requires grad", (q, q, q),
         {"bias": torch.zeros(5, 5, device=DEVICE, requires_grad=True)}),
        (TypeError, "q is torch.float8_e5m2", (q.float().to(torch.float8_e5m2),) * 3, {}),
        (NotImplementedError, "backend='cuda' cannot run", (q, q, q), {"backend": "cuda"}),
    ):  # fmt: skip
        refused(error, sentence, fastattn.attention, *tensors, **call)


def test_quantize_and_widen_are_inverse_on_what_is_stored():
    for kind in EIGHT:
        x = torch.arange(256, dtype=torch.uint8).view(kind).view(1, 2, 8, 16)
        x = x.float().nan_to_num().to(kind)
        scale = torch.tensor([[0.5, 4.0]])
        assert torch.equal(quantize(widen(x, scale, torch.float32), scale, kind).float(), x.float())

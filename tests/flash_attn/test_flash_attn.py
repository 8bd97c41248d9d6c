"""fastattn.flash_attn's seven functions against a plain float64 reference of FlashAttention 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flash_calls import (
    BATCH,
    DIM,
    HEADS,
    assert_all_close,
    gradients,
    pairs,
    plain,
    plain_batch,
    slopes_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastattn.core.philox import keep_mask
from fastattn.core.tolerance import allowed_error
from fastattn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

PAIRS = dict(pairs())
F64 = torch.float64
LENGTHS = ((5, 7), (6, 2), (0, 3), (4, 0), (1, 1))  # rows and keys of packed sequences


def randn(*shape, dtype=F64, grad=True):
    return torch.randn(*shape, dtype=F64).to(dtype).requires_grad_(grad)


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def dense_inputs(rows, keys, kv_heads=HEADS, dtype=F64, v_dim=DIM):
    shapes = ((rows, HEADS, DIM), (keys, kv_heads, DIM), (keys, kv_heads, v_dim))
    return [randn(BATCH, *shape, dtype=dtype) for shape in shapes]


def attend(function, *args, dropout_p=0.0, **options):
    """(out, lse, dropout's kept probs or None), after a check of S_dmask's shape."""
    out, lse, s_dmask = function(*args, dropout_p, return_attn_probs=True, **options)
    assert out.is_contiguous() and not s_dmask.requires_grad and s_dmask.dtype == out.dtype
    if not dropout_p:
        assert s_dmask.shape == (0,)
        return out, lse, None
    assert s_dmask.shape[-2] % 128 == s_dmask.shape[-1] % 128 == 0
    return out, lse, s_dmask


# ---- options and their pairs ---------------------------------------------------------------------


@pytest.mark.parametrize("rows, keys", [(6, 6), (4, 9), (9, 4), (1, 7)])
def test_dense_options_and_their_pairs(rows, keys):
    """out, lse, S_dmask and the gradients of q, k and v, through out and lse."""
    for name, options in PAIRS.items():
        options = dict(options)
        inputs = dense_inputs(rows, keys, options.pop("kv_heads", HEADS))
        out, lse, s_dmask = attend(flash_attn_func, *inputs, **options)
        kept = None if s_dmask is None else s_dmask[:, :, :rows, :keys] >= 0
        want = plain_batch(*inputs, kept=kept, **options)
        assert_all_close((out, lse), want[:2], msg=lambda text, name=name: f"{name}: {text}")
        if s_dmask is not None:
            torch.testing.assert_close(s_dmask[:, :, :rows, :keys].abs(), want.weights)
            assert not s_dmask[:, :, rows:].any() and not s_dmask[..., keys:].any()
        factors = torch.randn_like(out), torch.randn_like(lse)
        got = gradients((out, lse), factors, inputs)
        assert_all_close(got, gradients(want[:2], factors, inputs))


def test_varlen_options_and_their_pairs():
    """The same over packed sequences, including empty ones and ones with more rows than keys."""
    cu_q, cu_k = (ends(x) for x in zip(*LENGTHS))
    total_q, total_k, sequences = int(cu_q[-1]), int(cu_k[-1]), len(LENGTHS)
    for name, options in PAIRS.items():
        options = dict(options)
        kv_heads = options.pop("kv_heads", HEADS)
        if "entries" in name:
            options["alibi_slopes"] = torch.rand(sequences, HEADS)
        inputs = [randn(n, h, DIM) for n, h in ((total_q, HEADS), *[(total_k, kv_heads)] * 2)]
        out, lse, s_dmask = attend(flash_attn_varlen_func, *inputs, cu_q, cu_k, 6, 7, **options)
        outs, lses = [], []
        for n, (rows, keys) in enumerate(LENGTHS):
            q = inputs[0][cu_q[n] : cu_q[n + 1]]
            k, v = (x[cu_k[n] : cu_k[n + 1]] for x in inputs[1:])
            signed = None if s_dmask is None else s_dmask[n, :, :rows, :keys]
            kept = None if signed is None else signed >= 0
            mine = options | {"alibi_slopes": slopes_of(options.get("alibi_slopes"), n)}
            one = plain(q, k, v, kept=kept, **mine)
            outs, lses = [*outs, one.out], [*lses, one.lse]
            if signed is not None:
                torch.testing.assert_close(signed.abs(), one.weights)
                assert not s_dmask[n, :, rows:].any() and not s_dmask[n, :, :, keys:].any()
        want = torch.cat(outs), torch.cat(lses, dim=1)
        assert_all_close((out, lse), want, msg=lambda text, name=name: f"{name}: {text}")
        factors = torch.randn_like(out), torch.randn_like(lse)
        got = gradients((out, lse), factors, inputs)
        assert_all_close(got, gradients(want, factors, inputs))


@pytest.mark.parametrize("name", ["causal", "window, softcap", "alibi, dropout"])
def test_varlen_in_blocks(name):
    """block_table: keys scattered over pages of 4, one of them shared, with invalid spare entries
    in the table and NaN in unused slots. The result equals that of the packed keys, S_dmask
    included."""
    options = {"dropout_p": 0.0} | PAIRS[name]
    lengths = (6, 4, 0, 9)
    table = torch.tensor([[5, 2, 99], [5, -1, 99], [-1, -1, 99], [0, 7, 3]], dtype=torch.int32)
    blocks = torch.full((2, 9, 4, 2, DIM), torch.nan, dtype=F64)
    for block, used in ((5, 4), (2, 2), (0, 4), (7, 4), (3, 1)):
        blocks[:, block, :used] = torch.randn(2, used, 2, DIM, dtype=F64)
    k, v = (
        torch.cat([x[row[: -(-n // 4)]].flatten(0, 1)[:n] for row, n in zip(table.long(), lengths)])
        for x in blocks
    )
    q, cu_q, cu_k = torch.randn(8, HEADS, DIM, dtype=F64), ends((2, 1, 2, 3)), ends(lengths)
    results = []
    for keys, values, more in ((*blocks, {"block_table": table}), (k, v, {})):
        torch.manual_seed(1)
        call = flash_attn_varlen_func(
            q, keys, values, cu_q, cu_k, 3, 9, return_attn_probs=True, **options, **more
        )
        results.append(call)
    assert_all_close(*results)
    assert results[0][2].signbit().any() == (options["dropout_p"] > 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_block_table_of_inputs_that_require_grad(compiled):
    """The forward runs; asking for its gradient raises."""
    function = torch.compile(flash_attn_varlen_func) if compiled else flash_attn_varlen_func
    blocks, table = torch.randn(3, 4, 2, DIM), torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    q, cu = torch.randn(5, HEADS, DIM, requires_grad=True), ends((2, 3))
    for inputs in ((q, blocks, blocks), (q.detach(), blocks, blocks.clone().requires_grad_())):

        def call(inputs, **more):
            return function(*inputs, cu, cu, 3, 3, causal=True, block_table=table, **more)

        want = call([x.detach() for x in inputs])
        out, lse, _ = call(inputs, return_attn_probs=True)
        assert torch.equal(out, want) and out.requires_grad and lse.requires_grad
        for x in (out, lse, call(inputs)):
            with pytest.raises(NotImplementedError, match="block_table has no gradient") as caught:
                x.sum().backward()
            assert "\n" not in str(caught.value)
        with torch.no_grad():
            assert not call(inputs).requires_grad


@pytest.mark.parametrize(
    "window",
    [
        [2, 1], torch.tensor([2, 1]), torch.tensor([2, 1], dtype=torch.int32), torch.Size([2, 1]),
        np.array([2, 1]), (torch.tensor(2), np.int64(1)),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_windows_in_any_form(window):
    """Programs also pass the pair as a tensor or an array; FlashAttention accepts what unpacks."""
    x, cu = torch.randn(2, 9, HEADS, DIM), ends((9, 9))
    want = flash_attn_func(x, x, x, window_size=(2, 1))
    assert torch.equal(flash_attn_func(x, x, x, window_size=window), want)
    assert torch.equal(flash_attn_with_kvcache(x, x, x, window_size=window), want)
    packed = x.flatten(0, 1)
    out = flash_attn_varlen_func(packed, packed, packed, cu, cu, 9, 9, window_size=window)
    torch.testing.assert_close(out, want.flatten(0, 1))


def test_examples_of_the_documentation():
    """Bottom-right causal: 11110/11111 for 2 x 5, and three rows of zeros for 5 x 2."""
    for rows, keys, seen in ((2, 5, [4, 5]), (5, 2, [0, 0, 0, 1, 2])):
        q, k = torch.zeros(1, rows, 1, DIM), torch.zeros(1, keys, 1, DIM)
        v = torch.eye(keys, DIM).view(1, keys, 1, DIM)
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        counts = torch.tensor(seen)
        assert torch.equal((out[0, :, 0] > 0).sum(-1), counts)
        want = torch.where(counts == 0, torch.inf, counts.log())
        torch.testing.assert_close(lse[0, 0], want)


# ---- packed tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal, dropout", "window, softcap", "alibi of entries"])
def test_packed_tensors_equal_separate_ones(name):
    """Bit for bit, gradients packed."""
    options = dict(PAIRS[name])
    dropout_p = options.pop("dropout_p", 0.0)
    cu = ends((5, 4, 9)) if "entries" not in name else ends((5, 13))
    q = randn(BATCH, 9, HEADS, DIM)
    for parts, heads in ((3, HEADS), (2, HEADS), (2, 1)):
        packed = randn(BATCH, 9, parts, heads, DIM)
        flat = packed.detach().flatten(0, 1).requires_grad_()
        flat_q = q.detach().flatten(0, 1).requires_grad_()
        lengths = (cu, cu, 13, 13)
        if parts == 3:
            calls = [
                (flash_attn_qkvpacked_func, (packed,), flash_attn_func, (), packed),
                (flash_attn_varlen_qkvpacked_func, (flat, cu, 13), flash_attn_varlen_func,
                 lengths, flat),
            ]  # fmt: skip
        else:
            calls = [
                (flash_attn_kvpacked_func, (q, packed), flash_attn_func, (), packed),
                (flash_attn_varlen_kvpacked_func, (flat_q, flat, *lengths), flash_attn_varlen_func,
                 lengths, flat),
            ]  # fmt: skip
        for function, arguments, separate, rest, x in calls:
            tensors = [*x.unbind(-3)] if parts == 3 else [arguments[0], *x.unbind(-3)]
            torch.manual_seed(1)
            got = attend(function, *arguments, dropout_p=dropout_p, **options)
            torch.manual_seed(1)
            want = attend(separate, *tensors, *rest, dropout_p=dropout_p, **options)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want))
            factor = torch.randn_like(got[0])
            (grad,) = torch.autograd.grad((got[0] * factor).sum(), x)
            (want_grad,) = torch.autograd.grad((want[0] * factor).sum(), x)
            assert grad.is_contiguous() and torch.equal(grad, want_grad)


class Copies(TorchDispatchMode):
    """Names of the operators that make a tensor, views and the kernels left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = torch.Tag.inplace_view in func.tags or func.is_view
        if not views and func.namespace != "fastattn" and "detach" not in func.name():
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.native
def test_layouts_are_views():
    """Nothing is copied on input; a packed q costs a copy of out and one of the gradient."""
    q, k, v = (torch.randn(BATCH, 9, HEADS, DIM, requires_grad=True) for _ in range(3))
    qkv = torch.randn(BATCH, 9, 3, HEADS, DIM, requires_grad=True)
    cu = ends((5, 4, 9))
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    for call, forward, backward in (
        (lambda: flash_attn_func(q, k, v, causal=True), [], []),
        (lambda: flash_attn_varlen_func(*flat, cu, cu, 9, 9, causal=True), [], []),
        (lambda: flash_attn_qkvpacked_func(qkv, causal=True), ["clone"], ["stack"]),
    ):
        with Copies() as copies:
            out = call()
        assert copies.names == forward
        grad = torch.ones_like(out)
        with Copies() as copies:
            out.backward(grad)
        assert copies.names == backward


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_is_fastattns_own():
    """Keyed by torch's generator: the mask is Philox's, with and without S_dmask."""
    inputs = dense_inputs(6, 9)
    torch.manual_seed(3)
    key = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)
    torch.manual_seed(3)
    out, _, s_dmask = flash_attn_func(*inputs, 0.25, return_attn_probs=True)
    kept = keep_mask(key, BATCH * HEADS, 6, 9, 0.25).view(BATCH, HEADS, 6, 9)
    assert torch.equal(s_dmask[:, :, :6, :9] >= 0, kept) and not kept.all()
    torch.manual_seed(3)
    assert torch.equal(out, flash_attn_func(*inputs, 0.25))
    assert not torch.equal(out, flash_attn_func(*inputs, 0.25))


def test_masked_weights_are_not_said_to_be_dropped():
    inputs = dense_inputs(6, 6)
    _, _, s_dmask = flash_attn_func(*inputs, 0.5, causal=True, return_attn_probs=True)
    hidden = torch.ones(128, 128, dtype=torch.bool).triu(1)
    assert not s_dmask[:, :, hidden].signbit().any() and s_dmask.signbit().any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same(reentrant):
    def step(x):
        return flash_attn_qkvpacked_func(x, 0.4, causal=True).square().sum()

    grads = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=reentrant)):
        qkv = torch.randn(BATCH, 9, 3, HEADS, DIM, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(5)
        run(qkv.requires_grad_()).backward()
        grads.append(qkv.grad)
    assert torch.equal(*grads)


# ---- dtypes, sizes and transforms ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """At most twice the error of torch's attention in that dtype, plus a rounding."""
    wide = dense_inputs(33, 65, kv_heads=2)
    inputs = [x.detach().to(dtype).requires_grad_() for x in wide]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    options = {"causal": True, "window_size": (20, -1), "softmax_scale": 0.3}
    out, lse, s_dmask = flash_attn_func(*inputs, **options, return_attn_probs=True)
    assert (out.dtype, lse.dtype, s_dmask.dtype) == (dtype, torch.float32, dtype)
    want = plain_batch(*exact_inputs, **options)
    torchs = plain_batch(*inputs, **options)
    factor = torch.randn_like(want.out)
    got_grads = gradients([out], [factor.to(dtype)], inputs)
    torch_grads = gradients([torchs.out], [factor.to(dtype)], inputs)
    grads = gradients([want.out], [factor.to(dtype).double()], exact_inputs)
    eps = torch.finfo(dtype).eps
    for got, same, exact in zip((out, *got_grads), (torchs.out, *torch_grads), (want.out, *grads)):
        error, torch_error = ((x.double() - exact).abs().max() for x in (got, same))
        assert error <= allowed_error("result", torch_error, eps * exact.abs().max())


@pytest.mark.parametrize("rows, keys", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(rows, keys, dropout_p):
    inputs = dense_inputs(rows, keys)
    out, lse, s_dmask = attend(flash_attn_func, *inputs, dropout_p=dropout_p, causal=True)
    assert out.shape == (BATCH, rows, HEADS, DIM) and not out.any()
    assert lse.shape == (BATCH, HEADS, rows) and (lse == torch.inf).all()
    assert s_dmask is None or s_dmask.shape[2:] == (128 * (rows > 0), 128 * (keys > 0))
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), inputs))


def test_no_sequences_and_rows_of_none():
    q, k, v = (randn(7, HEADS, DIM) for _ in range(3))
    for lengths in ((), (3, 2)):
        cu, total = ends(lengths), sum(lengths)
        out, lse, s_dmask = attend(flash_attn_varlen_func, q, k, v, cu, cu, 3, 3, dropout_p=0.5)
        assert not out[total:].any() and (lse[:, total:] == torch.inf).all()
        assert s_dmask.shape[0] == len(lengths) and out[:total].any() == (total > 0)


def test_values_of_another_size_and_other_strides():
    q, k, v = dense_inputs(5, 6, kv_heads=2, v_dim=3)
    assert_all_close(flash_attn_func(q, k, v, return_attn_probs=True)[:2], plain_batch(q, k, v)[:2])
    strided = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    torch.testing.assert_close(flash_attn_func(*strided), flash_attn_func(q, k, v))


def test_torch_func_and_second_derivatives():
    q, k, v = (x.detach() for x in dense_inputs(3, 4))
    each = torch.stack([flash_attn_func(x, k, v, causal=True) for x in (q, 2 * q)])
    mapped = torch.vmap(lambda x: flash_attn_func(x, k, v, causal=True))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(mapped, each)
    qkv = torch.randn(1, 3, 3, 1, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: flash_attn_qkvpacked_func(x, causal=True), qkv)


def test_autocast():
    inputs = [torch.randn(BATCH, 6, HEADS, DIM) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, s_dmask = flash_attn_func(*inputs, 0.3, return_attn_probs=True)
    assert out.dtype == s_dmask.dtype == torch.bfloat16


@pytest.mark.native
def test_compiles_whole():
    """Without a graph break, S_dmask included; the compiler then draws dropout's key."""
    qkv, q, kv = randn(2, 6, 3, 4, 8), randn(2, 6, 4, 8), randn(2, 9, 2, 2, 8)
    cu = ends((4, 2, 6))

    def step(qkv, q, kv, cu):
        a = flash_attn_qkvpacked_func(qkv, causal=True, alibi_slopes=torch.rand(4))
        b = flash_attn_kvpacked_func(q, kv, softcap=2.0, window_size=(3, 0))
        c, lse, _ = flash_attn_varlen_qkvpacked_func(
            qkv.flatten(0, 1), cu, 6, causal=True, return_attn_probs=True
        )
        dropped = flash_attn_varlen_kvpacked_func(
            q.flatten(0, 1), qkv[:, :, 1:].flatten(0, 1), cu, cu, 6, 6, 0.3, return_attn_probs=True
        )
        return (a, b, c, lse, *dropped)

    results = torch.compile(step, fullgraph=True, backend="aot_eager")(qkv, q, kv, cu)
    torch.manual_seed(0)
    want = step(qkv, q, kv, cu)
    assert_all_close(results[1:4], want[1:4])
    out, _, s_dmask = results[4:]
    for n in range(3):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        size = rows.stop - rows.start
        k, v = qkv.flatten(0, 1)[rows, 1], qkv.flatten(0, 1)[rows, 2]
        kept = s_dmask[n, :, :size, :size] >= 0
        one = plain(q.flatten(0, 1)[rows], k, v, dropout_p=0.3, kept=kept)
        torch.testing.assert_close(out[rows], one.out)
    factors = [torch.randn_like(x) for x in results[1:4]]
    inputs = (qkv, q, kv)
    assert_all_close(
        gradients(results[1:4], factors, inputs), gradients(want[1:4], factors, inputs)
    )

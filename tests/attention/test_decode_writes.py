"""What decode_attention() writes: everything correctly, or nothing. All checks come before the
first write, tensors that share memory give the same as separate ones, and calls that cannot be
correct are refused."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch

import fastattn
from fastattn.core import memory
from fastattn.flash_attn import flash_attn_with_kvcache
from fastattn.nn import Attention, KVCache

B, HQ, HKV, SLOTS, D, DV, NEW = 3, 4, 2, 13, 8, 6, 2
REFUSALS = (TypeError, ValueError, NotImplementedError)
FORMS = ("dense", "paged", "rows", "int8", "float8")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def good(form="dense") -> dict:
    """A call's arguments, every operand given."""
    rows = {"paged": 6, "rows": 5}.get(form, B)
    size = 7 if form == "paged" else SLOTS
    call = {
        "q": torch.randn(B, HQ, NEW, D),
        "k_cache": torch.randn(rows, HKV, size, D),
        "v_cache": torch.randn(rows, HKV, size, DV),
        "cache_lens": ints(5, 8, 0),
        "k": torch.randn(B, HKV, NEW, D),
        "v": torch.randn(B, HKV, NEW, DV),
        "cache_leftpad": ints(1, 0, 0),
        "rotary": (torch.randn(SLOTS + 1, D // 2), torch.randn(SLOTS + 1, D // 2)),
        "mask": torch.ones(NEW, 1, dtype=torch.bool),
        "bias": torch.randn(HQ, NEW, 1),
        "alibi_slopes": torch.rand(HQ),
        "sinks": torch.randn(HQ),
        "causal": True,
        "dropout_p": 0.2,
        "dropout_seed": torch.tensor([3, 4]),
    }
    if form == "paged":
        call["page_table"] = torch.randperm(6).int().view(3, 2)
    if form == "rows":
        call["cache_batch_idx"] = ints(4, 0, 2)
    if form in ("int8", "float8"):
        dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn}[form]
        for name in ("k_cache", "v_cache"):
            call[name] = (call[name] * 20).to(dtype)
        call |= {"k_descale": torch.rand(HKV) + 0.1, "v_descale": torch.rand(HKV) + 0.1}
    return call


def hostile(x) -> list:
    """Values that at least one argument must refuse; x is a valid one."""
    values = ["some", 2.5, -3, 10**30, True, object(), (1, 2), [], torch.tensor(3), torch.zeros(0)]
    values += [torch.randn(2, 3, dtype=torch.complex64), torch.eye(4).to_sparse(),
               torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)])]  # fmt: skip
    for t in x if isinstance(x, tuple) else (x,):
        if isinstance(t, torch.Tensor):
            changed = [t.to("meta"), t[:-1], t[..., :-1], t.unsqueeze(0), torch.cat([t, t]),
                       t.bool(),
                       t.double(), t.long(), t.half(), t.numpy(force=True) if
                       t.dtype != torch.float8_e4m3fn else None]  # fmt: skip
            if t.dtype not in (torch.int8, torch.float8_e4m3fn):
                changed.append(t.to_sparse())
            if t.is_floating_point():
                changed.append(t.detach().clone().requires_grad_())
            if t.dtype == torch.int32:
                changed += [t - 100, t + 100, t * 0, t * 0 + 12]
            values += changed if not isinstance(x, tuple) else [(c, x[1]) for c in changed]
    return values


ARGUMENTS = [n for n in inspect.signature(fastattn.decode_attention).parameters if n != "backend"]


def bits(x):
    return x.detach().view(torch.uint8).clone()


@pytest.fixture(autouse=True)
def _no_prototype_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(nested|Sparse).*")
        yield


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_refusal_writes_nothing(name):
    """Gives each argument each kind of wrong value: the call raises a documented error with one
    sentence, and the caches are unchanged, bit for bit."""
    refused = 0
    for form in FORMS:
        call = good(form)
        caches = [call["k_cache"], call["v_cache"]]
        before = [bits(x) for x in caches]
        for value in hostile(call.get(name)):
            try:
                fastattn.decode_attention(**call | {name: value})
            except REFUSALS as error:
                refused += 1
                text = str(error)
                named = set(re.findall(r"\w+", text)) & {*ARGUMENTS, "cache", "dtype"}
                assert named, text
                assert "\n" not in text.strip(), text
                for x, old in zip(caches, before):
                    assert torch.equal(bits(x), old), (form, value, text)
            else:  # the value was valid: start again with the caches as they are now
                before = [bits(x) for x in caches]
    assert refused >= 20


CACHED = ("mask", "bias", "sinks", "alibi_slopes", "q", "k", "v", "scale", "softcap", "window",
          "num_splits", "backend", "new_lens")  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_a_refusal_leaves_a_kv_cache(name):
    call = {n: x for n, x in good().items() if n not in ("k_cache", "v_cache", "cache_lens",
                                                         "rotary", "cache_leftpad")}  # fmt: skip
    cache = KVCache(B, HKV, SLOTS, D, v_dim=DV)
    cache.attend(**call)
    before = [bits(x) for x in (cache.k, cache.v, cache.lens)]
    refused = 0
    for value in hostile(call.get(name)):
        try:
            cache.attend(**call | {name: value})
        except REFUSALS:
            refused += 1
            for x, old in zip((cache.k, cache.v, cache.lens), before):
                assert torch.equal(bits(x), old), (name, value)
        else:
            cache.truncate(NEW)
            before = [bits(x) for x in (cache.k, cache.v, cache.lens)]
    assert refused >= 8


@pytest.mark.parametrize("wrong", [{"mask": torch.ones(B, 1, 9, 9, dtype=torch.bool)},
                                   {"bias": torch.ones(B, 1, 9, 9)}], ids=str)  # fmt: skip
def test_a_cross_attention_that_refuses_has_cached_nothing(wrong):
    """If the context has lengths, its first call fills the cache separately."""
    m = Attention(16, 4, context_dim=16)
    cache = m.make_cache(B, 11)
    x, context = torch.randn(B, 2, 16), torch.randn(B, 5, 16)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError, match="has shape"):
                m(x, context, kv_lens=ints(5, 2, 3), cache=cache, **wrong)
            assert not cache.filled and not cache.k.any() and not cache.lens.any()
        m(x, context, kv_lens=ints(5, 2, 3), cache=cache)
        assert cache.lens.tolist() == [5, 2, 3]


def test_truncating_to_a_negative_length():
    cache = KVCache(B, HKV, SLOTS, D)
    for wrong, kind in ((-1, ValueError), (True, TypeError), (ints(0, -1, 0), ValueError)):
        with pytest.raises(kind, match="lens"):
            cache.truncate(wrong)


# ---- places --------------------------------------------------------------------------------------


def refused(sentence, call, kind=ValueError, function=fastattn.decode_attention):
    caches = [call["k_cache"], call["v_cache"]]
    before = [bits(x.contiguous()) for x in caches]
    with pytest.raises(kind, match=sentence):
        function(**call)
    for x, old in zip(caches, before):
        assert torch.equal(bits(x.contiguous()), old)


@pytest.mark.parametrize("table", [((0, 1), (0, 2), (3, 4)), ((5, 5), (0, 1), (2, 3))], ids=str)
def test_two_new_keys_of_one_place_are_refused(table):
    """Of two entries, and of one entry that writes into a page that it already uses."""
    call = good("paged")
    call["page_table"] = ints(*sum(table, ())).view(3, 2)
    call["cache_lens"] = ints(3, 3, 0) if table[0][0] == 0 else ints(5, 3, 0)
    if table[0][0] == 5:  # its last slot of the first page and its first of the second
        call["cache_lens"] = ints(6, 1, 0)
        call["k_cache"], call["v_cache"] = (call[n][:, :, :7] for n in ("k_cache", "v_cache"))
        call["k"], call["v"] = (torch.cat([call[n]] * 4, 2)[:, :, :8] for n in ("k", "v"))
        call["q"], call["mask"] = torch.randn(B, HQ, 8, D), None
        call["bias"] = None
    refused("page_table puts new keys of batch entries 0 and [01] into the same slot,", call)


def test_pages_may_be_shared_where_nothing_is_written():
    """A common prefix: pages that several entries share."""
    call = good("paged")
    call["page_table"] = ints(0, 1, 0, 2, 0, 3).view(3, 2)
    call["cache_lens"] = ints(7, 9, 8)
    fastattn.decode_attention(**call)


@pytest.mark.parametrize("lens", [(5, 8, 0), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_whose_elements_share_memory_is_refused(name, lens):
    call = good() | {"cache_lens": ints(*lens)}
    own = call[name]
    for shared in (own[:1].expand(B, -1, -1, -1), own[:, :1].expand(-1, HKV, -1, -1),
                   own.as_strided(own.shape, (8, 4, 2, 1))):  # fmt: skip
        refused(f"{name} has shape .* share memory", call | {name: shared})
        fastattn.decode_attention(**call | {name: shared, "k": None, "v": None})  # reads only


def test_caches_of_one_memory_are_refused_and_interleaved_ones_are_not():
    call = good()
    both = torch.randn(B, HKV, SLOTS, D)
    refused("v_cache shares memory with k_cache",
            call | {"k_cache": both, "v_cache": both[..., :DV]})  # fmt: skip
    fastattn.decode_attention(
        **call | {"k_cache": both, "v_cache": both[..., :DV], "k": None, "v": None}
    )
    joined = torch.randn(B, HKV, SLOTS, D + DV)
    separate = joined[..., :D].clone(), joined[..., D:].clone()
    interleaved = joined[..., :D], joined[..., D:]
    outs = [
        fastattn.decode_attention(**call | {"k_cache": a, "v_cache": b})
        for a, b in (separate, interleaved)
    ]
    assert torch.equal(*outs)
    for a, b in zip(separate, interleaved):
        assert torch.equal(a, b)


def test_what_shares_elements():
    x = torch.randn(2, 3, 8)
    assert not memory.share_memory(x[:, ::2], x[:, 1::2])
    assert not memory.share_memory(x[..., :4], x[..., 4:])
    assert memory.share_memory(x[..., :5], x[..., 4:])
    assert not memory.share_memory(x[:0], x)


SHARED = ("q", "k", "v", "bias", "sinks", "alibi_slopes")


@pytest.mark.parametrize("lens", [(5, 8, 0), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_operands_in_the_caches_memory_are_read_as_they_were(name, lens):
    """New keys that are slices of the cache, shifted by one position, are the hardest case."""
    call = good() | {"cache_lens": ints(*lens), "rotary": None}
    call["v_cache"] = torch.rand(B, HKV, SLOTS, DV)
    if name in ("k", "v"):
        cache = call[f"{name}_cache"]
        first = max(0, lens[0] - 1)
        alias = cache[:, :, first : first + NEW]
    elif name == "q":
        alias = call["k_cache"].view(B, -1, D)[:, : HQ * NEW].view(B, HQ, NEW, D)
    elif name == "bias":
        alias = call["v_cache"][0, 0].flatten()[:SLOTS].expand(HQ, NEW, SLOTS)
    else:
        alias = call["v_cache"][0, 0, 4:].flatten()[:HQ]
    own = {n: call[n].clone() for n in ("k_cache", "v_cache")} | {name: alias.clone()}
    want = fastattn.decode_attention(**call | own)
    assert torch.equal(fastattn.decode_attention(**call | {name: alias}), want)
    for n in ("k_cache", "v_cache"):
        assert torch.equal(call[n], own[n])


# ---- numbers -------------------------------------------------------------------------------------


def test_a_nan_cannot_go_into_int8():
    call = good("int8")
    for name in ("k", "v"):
        wrong = call[name].clone()
        wrong[1, 0, 1, 3] = torch.nan
        refused(f"{name} holds NaN .*int8 has no NaN", call | {name: wrong})
    scale = torch.tensor([0.0, 1.0])
    zero = call["v"].clone()
    zero[0, 0, 0, 0] = 0.0  # 0 / 0
    refused("v holds NaN once divided by v_descale", call | {"v": zero, "v_descale": scale})
    cos = torch.full((SLOTS + 1, D // 2), torch.nan)
    refused("k holds NaN", call | {"rotary": (cos, cos)})


def test_a_nan_stays_one_in_float8():
    call = good("float8")
    call["k"][1, 0, 1, 3] = torch.nan
    call["rotary"] = None
    fastattn.decode_attention(**call)
    assert call["k_cache"].float().isnan().sum() == 1 and call["k_cache"][1, 0, 9, 3].isnan()


def test_a_cache_made_in_inference_mode():
    with torch.inference_mode():
        call = good()
        fastattn.decode_attention(**call)
    mixed = good() | {"v_cache": call["v_cache"]}
    refused("v_cache was made in torch.inference_mode", mixed)


def test_the_drop_in_refuses_by_its_own_names():
    call = {n: x.transpose(1, 2) for n, x in good("paged").items()
            if n in ("q", "k_cache", "v_cache", "k", "v")}  # fmt: skip
    call |= {"cache_seqlens": ints(3, 3, 0), "block_table": ints(0, 1, 0, 2, 3, 4).view(3, 2)}
    refused(
        "block_table puts new keys of batch entries 0 and 1", call, function=flash_attn_with_kvcache
    )

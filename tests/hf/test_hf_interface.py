"""fastattn.hf's attention function by itself, output_attentions, enable(), and bad input."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_models import FAMILIES, Counter, build, inputs_of
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastattn.hf
from fastattn.core.philox import keep_mask, keep_probability
from fastattn.hf import CompactMask, attention_forward, interface

CAUSAL, FULL = SimpleNamespace(is_causal=True), SimpleNamespace(is_causal=False)
T5_CROSS = SimpleNamespace(is_causal=False, is_decoder=True, has_relative_attention_bias=False)


@pytest.fixture(scope="module")
def models():
    return functools.cache(build)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def qkv(batch=2, heads=4, q_len=5, kv_len=7, dim=8, kv_heads=2, **kind):
    q = torch.randn(batch, q_len, heads, dim, **kind).transpose(1, 2)  # as models pass them
    k, v = (torch.randn(batch, kv_heads, kv_len, dim, **kind) for _ in range(2))
    return q, k, v


def sdpa(module, q, k, v, mask, **options):
    groups = q.shape[1] // k.shape[1]
    module = SimpleNamespace(**vars(module), num_key_value_groups=groups)
    return sdpa_attention_forward(module, q, k, v, mask, **options)[0]


# ---- forms of the mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (1, 7), (7, 5)])
@pytest.mark.parametrize("module", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_no_mask(lengths, module, is_causal):
    """Causal attention over more keys than rows starts at the first key, as in sdpa."""
    q, k, v = qkv(q_len=lengths[0], kv_len=lengths[1])
    got, weights = attention_forward(module, q, k, v, None, is_causal=is_causal)
    assert weights is None and got.is_contiguous()
    torch.testing.assert_close(got, sdpa(module, q, k, v, None, is_causal=is_causal))


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_the_users_own(shape, kind):
    q, k, v = qkv()
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    if kind == "float":
        mask = torch.where(mask, torch.randn(shape), torch.finfo(torch.float32).min)
    got, _ = attention_forward(CAUSAL, q, k, v, mask)
    torch.testing.assert_close(got, sdpa(CAUSAL, q, k, v, mask.expand(-1, -1, 5, 7)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("width", [7, 6])
def test_padding_masks(dtype, width):
    """[B, S] with the module's causality; keys beyond S belong to a static cache and are not yet
    written."""
    q, k, v = qkv()
    mask = torch.ones(2, width, dtype=torch.bool)
    mask[1, :2] = False
    got, _ = attention_forward(CAUSAL, q, k, v, mask.to(dtype))
    full = mask[:, None, None] & torch.ones(5, width, dtype=torch.bool).tril(width - 5)
    torch.testing.assert_close(got, sdpa(CAUSAL, q, k[:, :, :width], v[:, :, :width], full))
    got, _ = attention_forward(FULL, q, k, v, mask.to(dtype), sliding_window=2)
    distance = (torch.arange(5).unsqueeze(1) + width - 5 - torch.arange(width)).abs()
    full = (mask[:, None, None] & (distance < 2)).expand(2, 1, 5, width)
    want = sdpa(FULL, q, k[:, :, :width], v[:, :, :width], full)
    torch.testing.assert_close(got, want)


def test_window_without_mask():
    q, k, v = qkv(kv_len=5)
    got, _ = attention_forward(CAUSAL, q, k, v, None, sliding_window=2)
    full = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    torch.testing.assert_close(got, sdpa(CAUSAL, q, k, v, full))


def test_learned_queries_come_once_for_a_batch():
    q, k, v = qkv()
    query = q[:1].clone().requires_grad_()
    got, _ = attention_forward(FULL, query, k, v, None)
    want = sdpa(FULL, query.expand(2, -1, -1, -1), k, v, None)
    torch.testing.assert_close(got, want)
    got = torch.autograd.grad(got.square().sum(), query)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), query))


# ---- T5's bias -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_position_bias_and_its_gradient(mask):
    q, k, v = qkv(kv_heads=4, kv_len=5)
    table = torch.randn(5, 5, 4, requires_grad=True)  # [q, k, heads]: last stride is not 1
    bias = table.permute(2, 0, 1).unsqueeze(0)
    assert bias.stride(-1) != 1
    own = torch.rand(2, 1, 5, 5) > 0.3
    own[..., 0] = True
    own = {"none": None, "bool": own, "float": torch.where(own, 0.5, -1e30)}[mask]
    got, _ = attention_forward(CAUSAL, q, k, v, own, position_bias=bias, scaling=1.0)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)  # causal, unless a mask says otherwise
    scores = q @ k.mT + bias + (own if mask == "float" else 0)
    hidden = {"none": hidden, "bool": ~own if mask == "bool" else None}.get(mask)
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    want = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(x.square().sum(), table) for x in (got, want))
    torch.testing.assert_close(got, want)


def test_cross_attentions_zeros_are_skipped(counter):
    q, k, v = qkv()
    attention_forward(T5_CROSS, q, k, v, None, position_bias=torch.zeros(1, 4, 5, 7))
    assert "bias" not in counter.options[0]
    decoder = SimpleNamespace(**vars(T5_CROSS) | {"is_causal": True})
    attention_forward(decoder, q, k, v, None, position_bias=torch.zeros(1, 4, 5, 7))
    assert "bias" in counter.options[1]


# ---- output_attentions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_output_attentions_equal_eager(name, models, counter):
    model = models(name)
    padding = "right" if "right" in FAMILIES[name].paddings else "none"
    inputs = inputs_of(name, padding)
    found = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        out = model(**inputs, output_attentions=True)
        found.append({key: out[key] for key in out if "attentions" in key})
    assert counter.take() == FAMILIES[name].calls
    want, got = found
    assert got.keys() == want.keys() and sum(map(len, got.values())) == FAMILIES[name].calls
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)


def test_weights_in_a_static_cache_have_its_length():
    q, k, v = qkv(kv_len=9)
    _, weights = attention_forward(CAUSAL, q, k, v, None, output_attentions=True)
    assert weights.shape == (2, 4, 5, 9) and not weights[..., 5:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("form", ["none", "compact", "bool", "float", "documents", "more rows"])
def test_weights_times_values_are_the_output(form):
    """With dropout, sinks and softcap; both have the same gradients."""
    kv_len = 3 if form == "more rows" else 5
    q, k, v = (x.requires_grad_() for x in qkv(kv_len=kv_len, dtype=torch.float64))
    mask = {
        "compact": CompactMask((2, 1, 5, 5), 2, 0, 0, torch.rand(2, 5) > 0.3, None, q.device),
        "documents": CompactMask(
            (2, 1, 5, 5), -1, 0, 0, None, torch.tensor([[0, 0, 1, 1, 2]]), q.device
        ),
        "bool": torch.rand(2, 1, 5, 5) > 0.5,
        "float": torch.randn(2, 4, 5, 5).double(),
    }.get(form)
    out, weights = attention_forward(
        CAUSAL, q, k, v, mask, dropout=0.4, softcap=2.0, output_attentions=True,
        s_aux=torch.randn(4),
    )  # fmt: skip
    assert (weights == 0).any()
    product = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(product, out)
    cotangent = torch.randn_like(out)
    for x, y in zip(
        torch.autograd.grad(product, (q, k, v), cotangent, retain_graph=True),
        torch.autograd.grad(out, (q, k, v), cotangent),
    ):
        torch.testing.assert_close(x, y)


def test_weights_are_dropped_by_fastattns_rule():
    q, k, v = qkv()
    torch.manual_seed(3)
    _, weights = attention_forward(FULL, q, k, v, None, dropout=0.5, output_attentions=True)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (2,))
    kept = keep_mask(seed, 8, 5, 7, 0.5).view(2, 4, 5, 7)
    whole = attention_forward(FULL, q, k, v, None, output_attentions=True)[1]
    torch.testing.assert_close(weights, whole * kept / keep_probability(0.5))


# ---- enable() ------------------------------------------------------------------------------------


def test_both_names_are_registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in (fastattn.hf.NAME, fastattn.hf.FLASH_NAME):
        assert name in ALL_ATTENTION_FUNCTIONS
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is fastattn.hf.attention_mask


@pytest.mark.parametrize(
    "missing, sentence",
    [
        ("transformers", "because .*transformers"),
        ("old", "because transformers>=99 is required"),
    ],
)
def test_import_says_what_it_needs(missing, sentence):
    """Without transformers, or with a version older than the supported ones."""
    code = "import sys; sys.modules['transformers'] = None; import fastattn.hf"
    if missing == "old":
        code = (
            "import transformers.utils.versions as v\nknown = v.require_version\n"
            "v.require_version = lambda text: known(text.replace('5.4', '99'))\nimport fastattn.hf"
        )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()
    assert re.search(f'fastattn.hf: pip install "fastattn.hf." first, {sentence}', run.stderr), last


def test_registration_is_checked(monkeypatch):
    monkeypatch.setattr(fastattn.hf.AttentionMaskInterface, "register", lambda name, function: None)
    monkeypatch.delitem(fastattn.hf.AttentionMaskInterface._global_mapping, "fastattn")
    with pytest.raises(RuntimeError, match="transformers did not take 'fastattn'"):
        fastattn.hf.register()


def test_enable_returns_the_model_and_switches_what_is_inside():
    model = build("bart")
    assert fastattn.hf.enable(model) is model
    inside = [x for x in model.modules() if isinstance(x, transformers.PreTrainedModel)]
    assert {x.config._attn_implementation for x in inside} == {"fastattn"} and len(inside) > 2
    text, vision = ({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 16} for _ in range(2))  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = fastattn.hf.enable(transformers.CLIPModel(config))
    for part in (model.config, model.config.text_config, model.config.vision_config):
        assert part._attn_implementation == "fastattn"


@pytest.mark.parametrize(
    "model, name",
    [("FalconForCausalLM", "FalconConfig"), ("BloomForCausalLM", "BloomConfig")],
)
def test_models_outside_the_interface_are_refused(model, name):
    config = getattr(transformers, name)(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, n_layer=1, n_head=2,
        vocab_size=20,
    )  # fmt: skip
    model = getattr(transformers, model)(config)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"{type(model).__name__} does not go through"):
        fastattn.hf.enable(model)
    assert model.config._attn_implementation == before


def test_models_that_swap_flash_for_their_own_are_refused():
    """gpt-oss replaces all but a few flash-named implementations, which may not happen silently."""
    model = build("gpt_oss", num_hidden_layers=2)
    model._compatible_flash_implementations = ["eager"]
    with pytest.raises(NotImplementedError, match="takes 'eager' instead of 'fastattn/flash"):
        fastattn.hf.enable(model, fastattn.hf.FLASH_NAME)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "arguments, error, sentence",
    [
        (
            (torch.nn.Linear(2, 2),),
            TypeError,
            "model is of type Linear; accepted is a",
        ),
        (("bert",), TypeError, "model is of type str"),
        ((None, "flash"), ValueError, "implementation is 'flash'; accepted are 'fastattn' and"),
    ],
)
def test_enable_with_bad_input(arguments, error, sentence, models):
    arguments = tuple(models("vit") if x is None else x for x in arguments)
    with pytest.raises(error, match=sentence):
        fastattn.hf.enable(*arguments)


def test_saved_models_are_enabled_again(tmp_path, models, counter):
    model, inputs = fastattn.hf.enable(models("llama")), inputs_of("llama", "left")
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    counter.take()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    fastattn.hf.enable(loaded)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    for again in (loaded, named):
        assert torch.equal(again(**inputs).logits, want)
    assert counter.take() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt_oss", "gemma2"])
def test_half_precision_is_as_near_as_eager(name, dtype):
    """Against float32, at most twice eager's error."""
    model, inputs = build(name), inputs_of(name)
    truth = model(**inputs).logits
    model = model.to(dtype)
    eager = (model(**inputs).logits - truth).abs().max()
    got = (fastattn.hf.enable(model)(**inputs).logits - truth).abs().max()
    assert got <= 2 * eager + 1e-2


def test_autocast_and_mixed_heads():
    model, inputs = fastattn.hf.enable(build("llama")), inputs_of("llama", "left")
    want = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**inputs).logits
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.2)


def test_heads_may_be_removed_afterwards(counter):
    """The function takes the number of heads from the tensors, not from a configuration."""
    model, inputs = fastattn.hf.enable(build("bert")), inputs_of("bert", "right")
    for layer in model.bert.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output
        for name in ("query", "key", "value"):
            linear = getattr(attention, name)
            linear.weight = torch.nn.Parameter(linear.weight[8:].detach())  # all but head 0
            linear.bias = torch.nn.Parameter(linear.bias[8:].detach())
        output.dense.weight = torch.nn.Parameter(output.dense.weight[:, 8:].detach())
        attention.num_attention_heads, attention.all_head_size = 3, 24
    got = model(**inputs).logits
    assert counter.take() == 2
    model.set_attn_implementation("eager")
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[mask], model(**inputs).logits[mask], rtol=1e-4, atol=1e-4)


# ---- bad input -----------------------------------------------------------------------------------

LENGTHS = {
    "cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 7], dtype=torch.int32),
    "max_length_q": 5, "max_length_k": 7,
}  # fmt: skip
SHORT = {name: x for name, x in LENGTHS.items() if name != "max_length_k"}
COMPACT = CompactMask((2, 1, 4, 7), -1, 0, 3, None, None, torch.device("cpu"))
WRONG = {
    "unknown keyword": (TypeError, "the model passes indices .of type int. to its attention",
                        {"indices": 3}),
    "unknown tensor": (TypeError, r"passes block_indices \(of type Tensor\)",
                       {"block_indices": torch.zeros(1)}),
    "3-D mask": (ValueError, r"attention_mask has shape \[2, 5, 7\]; accepted is one that "
                             r"broadcasts to \[2, 4, 5, 7\] \(batch, heads, queries, keys\)",
                 {"attention_mask": torch.ones(2, 5, 7, dtype=torch.bool)}),
    "mask too long": (ValueError, r"attention_mask has shape \[2, 1, 5, 8\]",
                      {"attention_mask": torch.ones(2, 1, 5, 8, dtype=torch.bool)}),
    "padding too long": (ValueError, r"attention_mask has shape \[2, 8\]; accepted is \[B, S\] = "
                                     r"\[2, at most 7\]", {"attention_mask": torch.ones(2, 8)}),
    "padding of another batch": (ValueError, r"attention_mask has shape \[3, 7\]",
                                 {"attention_mask": torch.ones(3, 7)}),
    "compact mask of another call": (ValueError, r"attention_mask has shape \[2, 1, 4, 7\] and the "
                                                 "call batch size 2, 5 queries and 7 keys",
                                     {"attention_mask": COMPACT}),
    "int mask": (TypeError, r"attention_mask is torch.int64 with shape \[2, 1, 5, 7\]; accepted",
                 {"attention_mask": torch.ones(2, 1, 5, 7, dtype=torch.long)}),
    "not a tensor": (TypeError, "attention_mask is of type list; accepted is a torch.Tensor",
                     {"attention_mask": [1]}),
    "bias": (ValueError, r"position_bias has shape \[1, 4, 5, 6\]; accepted is one that",
             {"position_bias": torch.zeros(1, 4, 5, 6)}),
    "sinks per row": (ValueError, r"sinks has shape \[2, 4, 5, 1\]; accepted is \[heads\] = \[4\]",
                      {"sinks": torch.zeros(2, 4, 5, 1)}),
    "two sinks": (ValueError, "s_aux and sinks came together",
                  {"sinks": torch.zeros(4), "s_aux": torch.zeros(4)}),
    "a length missing": (ValueError, "max_length_k is missing; packed sequences need cu_seq_lens_q",
                         SHORT),
    "packed and a mask": (ValueError, "attention_mask came with cu_seq_lens_q",
                          LENGTHS | {"attention_mask": torch.ones(2, 7)}),
    "packed and a bias": (NotImplementedError, "position_bias came with cu_seq_lens_q",
                          LENGTHS | {"position_bias": torch.zeros(1, 4, 5, 7)}),
    "packed and weights": (NotImplementedError, "output_attentions=True came with cu_seq_lens_q",
                           LENGTHS | {"output_attentions": True}),
    "dropout": (ValueError, "dropout_p is 1.5; accepted is a number in", {"dropout": 1.5}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    error, sentence, options = WRONG[case]
    options = {"attention_mask": None} | options
    with pytest.raises(error, match=sentence) as caught:
        attention_forward(FULL, *qkv(), **options)
    assert "\n" not in str(caught.value)


def test_harmless_keywords_change_nothing():
    q, k, v = qkv()
    want, _ = attention_forward(FULL, q, k, v, None)
    options = dict.fromkeys(interface.HARMLESS, 1) | {"deterministic": True, "something": None}
    assert torch.equal(attention_forward(FULL, q, k, v, None, **options)[0], want)

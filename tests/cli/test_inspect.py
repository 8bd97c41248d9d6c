"""python -m fastattn inspect, its page in a browser, and a recording's pictures."""

from __future__ import annotations

import base64
import builtins
import importlib.util
import json
import re
import struct
import zlib

import pytest
import torch
from browser import Browser
from demo_data import Reader

import fastattn
from fastattn import pictures
from fastattn.cli import inspect_model, inspect_page

STATS = ("entropy", "max", "max_logit", "sink_mass", "col_mass", "pooled:4")


def recorded(sinks: bool = False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(fastattn.nn.Attention(16, 2, causal=True, sinks=sinks) for _ in range(3))
    )
    with torch.no_grad(), fastattn.capture(stats=STATS, inputs=True) as rec:
        model(torch.randn(2, 8, 16))
    return rec


# ---- pictures ------------------------------------------------------------------------------------


def pixels(element: str) -> torch.Tensor:
    """The opacities of an image() element, decoded from its PNG."""
    data = base64.b64decode(
        re.search(r"mask-image:url\(data:image/png;base64,([^)]+)\)", element)[1]
    )
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks[kind] = data[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + chunks[kind])
        at += 12 + size
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).view(rows, 1 + 2 * columns)
    return lines[:, 2::2]


def test_a_map_is_a_picture_of_its_values():
    x = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.5, 0.0]])
    assert pixels(pictures.image(x)).tolist() == [[0, 128, 255], [180, 180, 0]]
    assert not pixels(pictures.image(torch.zeros(2, 2))).any()


def test_depth_is_the_mean_of_heads():
    rec = recorded()
    found = pictures.by_depth(rec)
    assert list(found) == ["entropy", "max", "max_logit", "first_mass"]  # no sinks
    for n, record in enumerate(rec):
        assert torch.allclose(found["entropy"][1][n], record.entropy.mean((0, 2)))
        assert torch.allclose(found["first_mass"][1][n], record.col_mass[..., 0].mean(0) / 8)
    assert "sink_mass" in pictures.by_depth(recorded(sinks=True))


def test_a_notebook_shows_plots_maps_and_calls():
    html = recorded()._repr_html_()
    reader = Reader(html)
    assert reader.tags.count("svg") == 4 and html.count("mask-image:url(data:") == 2 * 3 * 2
    assert "3 attention calls" in html and not reader.links
    with fastattn.capture(stats=("entropy",)) as rec:
        fastattn.attention(*torch.randn(3, 1, 1, 4, 8))
    assert "mask-image:url" not in rec._repr_html_() and "(model)" in rec._repr_html_()


def test_plot_draws_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rec = recorded()
    figure = rec.plot(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes()[:4] == b"\x89PNG"
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Entropy, nats" in titles and "layer 2" in titles and len(titles) == 4 + 3 * 2
    with fastattn.capture(stats=("argmax",)) as rec:
        fastattn.attention(*torch.randn(3, 1, 1, 4, 8))
    with pytest.raises(ValueError, match="nothing was recorded that can be drawn"):
        rec.plot()
    theirs = builtins.__import__

    def missing(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return theirs(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'fastattn\[plot\]'"):
        recorded().plot()


# ---- the page ------------------------------------------------------------------------------------

TOKENS = ["[CLS]", "the", "</script>", "cat", "sat", "&", "down", "[SEP]"]


@pytest.fixture(scope="module")
def page() -> str:
    rec = recorded()
    for record in rec:
        record.call = record.call.but(q=record.call.q[:1], k=record.call.k[:1], v=record.call.v[:1])
    weights = inspect_model.weights_of(rec)
    return inspect_page.page("a <model>", "some text", TOKENS, rec, weights)


def test_page_stands_alone_and_holds_the_exact_weights(page):
    reader = Reader(page)
    assert not reader.links and "http" not in page and "a &lt;model&gt;" in page
    held = json.loads(re.search(r"id='data'>(.*?)</script>", page, re.DOTALL)[1])
    assert held["tokens"] == TOKENS and held["shape"] == [3, 2, 8]
    weights = torch.tensor(list(base64.b64decode(held["weights"]))).view(3, 2, 8, 8) / 255
    rec = recorded()
    for n, record in enumerate(rec):
        scores = (record.call.q[0] @ record.call.k[0].mT) * 8**-0.5
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
        assert torch.allclose(weights[n], scores.softmax(-1), atol=0.5 / 255 + 1e-5)
    longer = inspect_page.page("m", "t" * 1000, TOKENS, rec, [])
    assert "<script" not in longer and "t" * 601 not in longer


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_answers(page, scheme, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser = Browser(tmp_path)
    try:
        browser.show(path, 390, scheme)
        assert browser.ask("document.documentElement.scrollWidth") == 390
        said = "document.getElementById('top').textContent"
        assert browser.ask(said).startswith("the attends to ")
        browser.ask("document.querySelectorAll('#tokens button')[0].click()")
        assert browser.ask(said).startswith("[CLS] attends to [CLS] 100 %")
        browser.ask(
            "head.value = 1; layer.value = 2; head.dispatchEvent(new Event('change'));"
            "document.querySelectorAll('#tokens button')[3].click()"
        )
        assert browser.ask(said).startswith("cat attends to ")
        paper = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 31)")
        drawn = "[...picture.getImageData(0, 0, size, size).data].some(x => x > 0)"
        assert browser.ask(drawn)
    finally:
        browser.close()


# ---- the command ---------------------------------------------------------------------------------


def test_it_inspects_the_built_in_model(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip(inspect_model.BUILT_IN)
    out = tmp_path / "a" / "page.html"
    assert inspect_model.main(["--text", "The cat sat down.", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "encoder.layer.5.attention.self" in said and f"wrote {out}" in said
    html = out.read_text()
    assert "What all-MiniLM-L6-v2 attends to" in html and html.count("mask-image:url") == 2 * 72
    assert json.loads(re.search(r"id='data'>(.*?)</script>", html)[1])["tokens"][1] == "the"


def test_it_says_what_is_missing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    out = str(tmp_path / "page.html")
    assert inspect_model.main(["--model", str(tmp_path), "--out", out]) == 2
    assert "cannot be used: " in capsys.readouterr().err
    find = importlib.util.find_spec
    lost = inspect_model.BUILT_IN
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == lost else find(n))
    assert inspect_model.main(["--out", out]) == 2
    assert "pip install 'fastattn[demo]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inspect_model.main(["--max-tokens", "0"])
    assert "--max-tokens: got 0, needs at least 1" in capsys.readouterr().err

"""The benchmark's page and figures: whole, alone, drawn by a browser where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from bench_data import example

matplotlib = pytest.importorskip("matplotlib", reason="the report's figures need matplotlib")

from fastattn.benchmarks import entries, figures, page  # noqa: E402
from fastattn.benchmarks.history import Change  # noqa: E402
from test_demo import Reader  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def runs(data: dict) -> list:
    return [("0001_aaaaaaaaaa", data), ("0002_bbbbbbbbbb", data)]


@pytest.fixture(scope="module")
def html() -> str:
    changes = [Change("row <2>", "base", 1.2, 1.1, 1.3), Change("row", "base", 0.8, 0.7, 0.9)]
    data = example(skipped=["a row with no time"], interrupted=True)
    return page.page(data, changes, runs(data))


def test_the_page_stands_alone(html):
    reader = Reader(html)
    names = figures.drawn(example(), runs(example()))
    assert set(names) >= {"heat-map", "roofline", "memory", "error", "history"}
    assert sum(name.startswith("speed-") for name in names) == 2
    assert reader.tags.count("svg") == len(names)
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(link.startswith("#") for link in reader.links)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags) and "@import" not in html
    assert 'name="viewport"' in html


def test_what_is_wrong_or_slower_is_at_the_top(html):
    order = ["RED", "against sdpa", "Changed", "Ratios by kind", "Every row"]
    places = [html.index(word) for word in order]
    assert places == sorted(places)
    assert html.index("25.0% more time") < html.index("row &lt;2&gt;: faster")
    table = html[html.index("Every row") :]
    (slow, _, _), (red,) = entries.slower(example())[0], entries.reds(example())
    first = min(table.index(f"<summary>{name}</summary>") for name in (slow["name"], red["name"]))
    others = [e["name"] for e in example()["rows"] if e["name"] not in (slow["name"], red["name"])]
    assert all(table.index(f"<summary>{name}</summary>") > first for name in others)
    assert "Some CPU &lt;1&gt;" in html and "flex has &lt;no&gt; such thing &amp; more" in html
    assert "THROTTLED: it got hot" in html and "noise floor" in html
    assert "1 rows did not fit the time" in html and "The run was stopped" in html


def test_wrong_rows_have_no_number_on_the_page():
    data = example()
    for entry in data["rows"]:
        entry["red"], entry["versus"] = "wrong", {}
        for side in entry["sides"].values():
            for key in ("ms", "tflops", "gbytes", "percent_of_peak"):
                side.pop(key, None)
    html = page.page(data)
    assert "<svg" not in html and "FLOP/s</td>" not in html and html.count("RED") >= 8


def test_the_same_data_gives_the_same_page(html):
    data = example(skipped=["a row with no time"], interrupted=True)
    changes = [Change("row <2>", "base", 1.2, 1.1, 1.3), Change("row", "base", 0.8, 0.7, 0.9)]
    assert page.page(data, changes, runs(data)) == html


def test_figures_are_written_as_png(tmp_path):
    paths = figures.write_pngs(example(), runs(example()), tmp_path / "new")
    assert {path.stem for path in paths} == set(figures.drawn(example(), runs(example())))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_heat_map_says_no_difference_and_numbers():
    axes = figures.heat_map(example()).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("=") == 3 and texts.count("2.0") == 3 and "0.5" in texts


@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_draws_the_page(html, width, tmp_path):
    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine ({', '.join(BROWSERS)})")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-sandbox"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]
    shot = tmp_path / "page.png"
    page_url = (tmp_path / "page.html").as_uri()
    run = subprocess.run(
        [*command, f"--screenshot={shot}", page_url], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert shot.exists(), run.stderr
    pixels = matplotlib.image.imread(shot)[..., :3]  # [2400, width, 3], 0 to 1
    dark = (pixels.mean(-1) < 0.5).mean(1)  # of each line
    assert (dark > 0).mean() > 0.2, "most of the page is empty"
    green = (pixels[..., 1] - pixels[..., 0] > 0.2).sum()
    assert green > 500, "no figure is drawn"
    margin = pixels[:, -3:].mean()
    assert margin > 0.97, "the page is wider than the window"

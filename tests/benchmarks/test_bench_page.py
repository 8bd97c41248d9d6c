"""The benchmark's page and figures: well-formed, self-contained, and laid out by a browser if there
is one."""

from __future__ import annotations

import re

import pytest
from bench_data import example
from browser import Browser

matplotlib = pytest.importorskip("matplotlib", reason="the report's figures need matplotlib")

from demo_data import Reader  # noqa: E402
from demo_data import example as demo_example  # noqa: E402
from fastattn.benchmarks.demo import report  # noqa: E402
from fastattn.benchmarks.report import figures, page, record  # noqa: E402
from fastattn.benchmarks.report.history import Change  # noqa: E402


def runs(data: dict) -> list:
    return [("0001_aaaaaaaaaa", data), ("0002_bbbbbbbbbb", data)]


@pytest.fixture(scope="module")
def html() -> str:
    changes = [Change("case <2>", "base", 1.2, 1.1, 1.3), Change("case", "base", 0.8, 0.7, 0.9)]
    data = example(skipped=["a skipped case"], interrupted=True)
    return page.page(data, changes, runs(data))


def test_the_page_stands_alone(html):
    reader = Reader(html)
    names = figures.drawn(example(), runs(example()))
    assert set(names) >= {"heat-map", "roofline", "memory", "error", "history"}
    assert sum(name.startswith("speed-") for name in names) == 2
    assert reader.tags.count("svg") == len(names) - 1  # the page has the heat map as a table
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(link.startswith("#") for link in reader.links)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags) and "@import" not in html
    assert 'name="viewport"' in html


def test_what_is_wrong_or_slower_is_at_the_top(html):
    order = ["RED", "against sdpa", "Changed", "Ratios by variant", "All cases"]
    places = [html.index(word) for word in order]
    assert places == sorted(places)
    assert html.index("25.0% more time") < html.index("case &lt;2&gt;: faster")
    table = html[html.index("All cases") :]
    (slow, _, _), (red,) = record.slower(example())[0], record.reds(example())
    first = min(table.index(f"<summary>{name}</summary>") for name in (slow["name"], red["name"]))
    others = [e["name"] for e in example()["rows"] if e["name"] not in (slow["name"], red["name"])]
    assert all(table.index(f"<summary>{name}</summary>") > first for name in others)
    assert "Some CPU &lt;1&gt;" in html and "flex has &lt;no&gt; such thing &amp; more" in html
    assert "THROTTLED: it got hot" in html and "noise floor" in html
    assert "1 cases did not fit into the time" in html and "The run was interrupted" in html


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
    data = example(skipped=["a skipped case"], interrupted=True)
    changes = [Change("case <2>", "base", 1.2, 1.1, 1.3), Change("case", "base", 0.8, 0.7, 0.9)]
    assert page.page(data, changes, runs(data)) == html


def test_figures_are_written_as_png(tmp_path):
    paths = figures.write_pngs(example(), runs(example()), tmp_path / "new")
    assert {path.stem for path in paths} == set(figures.drawn(example(), runs(example())))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_heat_map_says_no_difference_and_numbers():
    axes = figures.heat_map(example()).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("=") == 3 and texts.count("2.0") == 3 and "0.5" in texts


def test_the_heat_table_says_what_the_heat_map_does(html):
    table = re.search(r'<table class="heat">.*?</table>', html, re.DOTALL)[0]
    cells = re.findall(
        r'data-label="(\d+)" style="color: (#\w+); background: (#\w+)">(.+?)<', table
    )
    texts = [text.get_text() for text in figures.heat_map(example()).axes[0].texts]
    assert [text for *_, text in cells] == texts
    assert {n for n, *_ in cells} == {"24", "64", "128", "256"}
    assert len({behind for *_, behind, _ in cells}) == 3  # slower, no difference, faster


# ---- drawn by a browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(html, tmp_path_factory):
    """(the browser, the folder with both pages)."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "bench.html").write_text(html, encoding="utf-8")
    (folder / "demo.html").write_text(report.page(demo_example()), encoding="utf-8")
    browser = Browser(folder)
    yield browser, folder
    browser.close()


LOOKS = [(name, width, scheme) for name in ("bench", "demo") for width in (390, 1280)
         for scheme in ("light", "dark")]  # fmt: skip
# Every visible piece of text: [its contrast with its background, its height, the text].
TEXTS = """(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number)
  const light = colour => numbers(colour).slice(0, 3).map(x => x / 255)
    .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, n) => sum + x * [.2126, .7152, .0722][n], 0)
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor)
      if (colour.length < 4 || colour[3] > 0) return getComputedStyle(element).backgroundColor
    }
    return 'rgb(255, 255, 255)'
  }
  return [...document.body.querySelectorAll('*')].flatMap(element => {
    const text = [...element.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join('')
    const box = element.getBoundingClientRect()
    if (!text.trim() || element.closest('style, defs') || !box.width) return []
    const style = getComputedStyle(element), svg = element.closest('svg')
    const pair = [light(svg ? style.fill : style.color), light(behind(element))]
    const contrast = (Math.max(...pair) + .05) / (Math.min(...pair) + .05)
    return [[contrast, box.height, text.trim().slice(0, 40)]]
  })
})()"""


@pytest.mark.parametrize("name, width, scheme", LOOKS)
def test_a_browser_draws_the_page(drawn, name, width, scheme):
    """Nothing is wider than a phone's screen, and all text is legible, in light and dark
    schemes."""
    browser, folder = drawn
    browser.show(folder / f"{name}.html", width, scheme)
    assert browser.ask("innerWidth") == width == browser.ask("document.body.parentNode.scrollWidth")
    wide = "[...document.querySelectorAll('.wide')].map(x => x.scrollWidth - x.clientWidth)"
    assert max(browser.ask(wide)) <= 0, "a table is cut"
    texts = browser.ask(TEXTS)
    assert len(texts) > 60
    assert [text for text in texts if text[0] < 4.5] == []
    assert [text for text in texts if text[1] < 9] == [], "too small to read"
    pixels = matplotlib.image.imread(browser.screenshot(folder / "shot.png"))[..., :3]
    assert pixels.shape[1] == width and pixels.shape[0] > 1000
    assert (pixels[5, 5].mean() > 0.9) == (scheme == "light")
    green = (pixels[..., 1] - pixels[..., 0] > 0.2).sum()
    assert green > 500, "no figure is drawn"

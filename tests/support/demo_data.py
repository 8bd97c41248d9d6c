"""A run of the demo as data, and a reader of its page."""

from __future__ import annotations

from html.parser import HTMLParser


def example(right: bool = True) -> dict:
    """The data of a report, without a run."""

    def timed(what, tokens, value, low, high, verdict):
        ratio = {"value": value, "low": low, "high": high, "coverage": 0.96, "verdict": verdict}
        ms = {"torch": 3.0 * tokens, "fastattn": 2.0 * tokens}
        return {"what": what, "shape": f"8 x {tokens}", "tokens": tokens, "ms": ms, "ratio": ratio}

    sides = {"torch": 1e-7, "fastattn": 2e-7}
    hit = {"name": "zipfile.Path", "summary": "A <b>path</b> & more", "score": 0.5}
    facts = {
        "cpu": "Some CPU <1>",
        "threads": 2,
        "cores": 2,
        "isa": "avx2",
        "torch": "2",
        "date": "",
    }
    return {
        "machine": facts | {"fastattn": "0", "python": "3"},
        "attention": {
            "torch": {"inference": "flash", "training": "math"},
            "fastattn": {"inference": "cpu", "training": "cpu"},
        },
        "agreement": {
            **{"texts": 3, "tokens": 30, "padding": 0.25, "checked_texts": 2, "error": sides},
            **{"largest_difference": 3e-7, "smallest_cosine": 0.9999999},
            **{"difference_by_text": [1e-7, 2e-7, 3e-7], "right": right},
        },
        "search": [{"query": "Where & why?", "nearest": [hit], "same": True}],
        "timings": [
            timed("encode", 16, 1.02, 0.97, 1.05, "no difference"),
            timed("attention", 16, 1.5, 1.4, 1.6, "faster"),
            timed("attention, training", 16, 0.5, 0.4, 0.6, "slower"),
            timed("fine-tuning step", 16, 2.0, 1.9, 2.1, "faster"),
        ],
        "training": {
            **{"loss": sides | {"float64": 1.0}, "gradient_error": sides, "right": True},
            **{"losses": {"torch": [1.0, 0.5], "fastattn": [1.0, 0.4]}},
        },
        "right": right,
    }


class Reader(HTMLParser):
    """Open tags, ids and links of a page; complains about tags that are closed out of order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

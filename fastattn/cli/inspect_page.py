"""The page of `python -m fastattn inspect`: one file, without network, for phones too."""

from __future__ import annotations

import base64
import json
from html import escape

import torch
from torch import Tensor

from .. import pictures
from ..records import Recording

CSS = """
body { margin: 0 } main { margin: 2.5rem auto; max-width: 62rem; padding: 0 1.25rem;
       overflow-wrap: break-word }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
p { max-width: 46rem }
select { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--grid);
         border-radius: .3rem; padding: .2rem .4rem; margin-right: .8rem }
#tokens { line-height: 2.3; margin: .8rem 0 }
#tokens button { font: inherit; color: var(--ink); border: 1px solid var(--grid);
                 border-radius: .3rem; padding: .05rem .35rem; margin: 0 .25rem 0 0;
                 cursor: pointer; background: none; position: relative; isolation: isolate }
#tokens button::before { content: ""; position: absolute; inset: 0; z-index: -1;
                         background: var(--teal); opacity: var(--weight, 0);
                         border-radius: .25rem }
#tokens button[aria-pressed=true] { outline: 2px solid var(--ink) }
#top { font-variant-numeric: tabular-nums } .pick { display: inline-block; margin: .2rem 0 }
.matrix { width: min(100%, 24rem) } .tokens { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.tokens > * { flex: 1 1 18rem; min-width: 0 }
@media (max-width: 40rem) { main { margin: 1rem auto; padding: 0 .8rem } }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = Uint8Array.from(atob(data.weights), c => c.charCodeAt(0));
const [layers, heads, size] = data.shape, square = size * size;
const at = id => document.getElementById(id), layer = at("layer"), head = at("head");
const buttons = [...at("tokens").children], picture = at("matrix").getContext("2d");
let row = Math.min(1, size - 1);
function weights(l, h) {           // of a head, or of their mean, [size * size]
  const from = h < 0 ? [...Array(heads).keys()] : [h], out = new Float32Array(square);
  for (const n of from) for (let i = 0; i < square; i++)
    out[i] += bytes[(l * heads + n) * square + i] / 255 / from.length;
  return out;
}
function draw() {
  const all = weights(+layer.value, +head.value);
  const own = [...all.slice(row * size, (row + 1) * size)];
  const largest = Math.max(...own, 1e-9);
  buttons.forEach((button, j) => {
    button.style.setProperty("--weight", (0.75 * Math.sqrt(own[j] / largest)).toFixed(3));
    button.setAttribute("aria-pressed", j === row);
    button.title = (100 * own[j]).toFixed(1) + " %";
  });
  const top = own.map((w, j) => [w, j]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  at("top").textContent = data.tokens[row] + " attends to " +
    top.map(([w, j]) => data.tokens[j] + " " + (100 * w).toFixed(0) + " %").join(", ");
  const canvas = picture.canvas, pixels = picture.createImageData(size, size);
  const rgb = getComputedStyle(canvas).color.match(/[0-9.]+/g).map(Number);
  const most = Math.max(...all, 1e-9);
  for (let i = 0; i < square; i++)
    pixels.data.set([rgb[0], rgb[1], rgb[2], 255 * Math.sqrt(all[i] / most)], 4 * i);
  picture.putImageData(pixels, 0, 0);
}
buttons.forEach((button, i) => button.addEventListener("click", () => { row = i; draw(); }));
for (const box of [layer, head]) box.addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
at("matrix").addEventListener("click", event => {
  const box = event.target.getBoundingClientRect();
  row = Math.min(size - 1, Math.floor((event.clientY - box.top) / box.height * size)); draw();
});
draw();
"""


def page(
    title: str, text: str, tokens: list[str], recording: Recording, weights: list[Tensor]
) -> str:
    """The page as text. weights: [heads, rows, keys] of each call; none: the text is too long."""
    maps = pictures.maps(recording)
    side = next(iter(x.shape[-1] for x in map(pictures.maps_of, recording) if x is not None), 0)
    shown = text if len(text) <= 600 else f"{text[:600]} ..."
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<title>{escape(title)}: attention</title><style>{pictures.CSS}{CSS}</style></head>
<body class="fastattn"><main>
<h1>What {escape(title)} attends to</h1>
<p class="muted">{len(tokens)} tokens, {len(recording)} attention calls. The statistics
are computed without a matrix of all pairs.</p>
<p>{escape(shown)}</p>
{_token_view(tokens, recording, weights)}
<h2>By depth</h2>
<p class="muted">A grey dot is a head, the line their mean. Low entropy: a row attends to few
tokens. Much mass on the first token: the head rests there when it has nothing to do.</p>
{pictures.plots(recording)}
<h2>Every layer and head</h2>
<p class="muted">Rows are queries from top to bottom, columns keys from left to right, pooled to
{side} x {side}; the stronger the colour, the more probability (its square root, over each map's
largest).</p>
{maps}
</main>{_script(tokens, weights)}</body>
</html>
"""


def _token_view(tokens: list[str], recording: Recording, weights: list[Tensor]) -> str:
    if not _comparable(weights):
        return ""
    layers = "".join(
        f"<option value='{n}'>{n if one.layer is None else one.layer}</option>"
        for n, one in enumerate(recording)
    )
    heads = "".join(f"<option value='{n}'>head {n}</option>" for n in range(len(weights[0])))
    buttons = "".join(f"<button type='button'>{escape(token)}</button>" for token in tokens)
    size = len(tokens)
    return f"""<h2>Token to token</h2>
<p class="muted">Exact weights. Choose a token, or a row of the matrix, to see where it looks.</p>
<div><label class="pick">Layer <select id="layer">{layers}</select></label>
<label class="pick">Head <select id="head"><option value="-1">mean</option>{heads}</select></label>
</div>
<div class="tokens"><div><div id="tokens">{buttons}</div><p id="top"></p></div>
<div><canvas id="matrix" class="matrix map" width="{size}" height="{size}"
style="color: var(--teal); image-rendering: pixelated"></canvas></div></div>
<noscript>The view of tokens needs JavaScript; the rest of the page does not.</noscript>"""


def _comparable(weights: list[Tensor]) -> bool:
    """Have all calls the same heads and tokens, so that one view serves them?"""
    return bool(weights) and len({tuple(x.shape) for x in weights}) == 1


def _script(tokens: list[str], weights: list[Tensor]) -> str:
    if not _comparable(weights):
        return ""
    stacked = (torch.stack(weights).clamp(0, 1) * 255).round().byte()  # [calls, heads, rows, keys]
    data = {
        "tokens": tokens,
        "shape": list(stacked.shape[:3]),
        "weights": base64.b64encode(bytes(stacked.flatten().tolist())).decode(),
    }
    held = json.dumps(data).replace("<", "\\u003c")  # no tag can end the element
    return f"<script type='application/json' id='data'>{held}</script><script>{SCRIPT}</script>"

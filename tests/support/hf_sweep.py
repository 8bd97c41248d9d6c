"""The sweep over every type of transformers: is it equal to eager under fastattn, or refused in
one sentence? `python tests/support/hf_sweep.py` prints the table that docs/huggingface.md has."""

from __future__ import annotations

import contextlib
import dis
import functools
import os
import signal
import textwrap
from dataclasses import dataclass, field

import torch
import transformers
from hf_tiny import UNBUILT, build, cases

import fastattn.hf

LENGTH, BATCH, NEW_TOKENS = 9, 2, 4

# Patches of bytes mix rows of padding, which see no key, into the others. Such a row gives 0 under
# sdpa and fastattn, and the mean of all values under eager.
REFERENCE = {"blt": "sdpa"}


# ---- probes --------------------------------------------------------------------------------------


def inputs_of(name: str, model, padding: str = "none") -> dict:
    """Inputs of a forward; `padding` says at which end row 1 is padded."""
    kind = cases()[name][2]
    generator = torch.Generator().manual_seed(1)
    main = model.main_input_name

    def tokens(length=LENGTH):
        return torch.randint(3, 90, (BATCH, length), generator=generator)

    if main == "pixel_values":
        inner = getattr(model.config, "vision_config", model.config)
        size = getattr(inner, "image_size", 32)
        if not hasattr(inner, "num_attention_heads"):
            size = 64  # convolutions, which halve it many times
        size = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(BATCH, channels, *size, generator=generator)}
    if main == "input_ids":
        inputs = {"input_ids": tokens()}
    elif main == "input_values":
        inputs = {"input_values": torch.randn(BATCH, 800, generator=generator)}
    else:
        bins = getattr(model.config, "num_mel_bins", None) or 8
        shape = {"whisper": (BATCH, bins, 128)}.get(name, (BATCH, 64, bins))
        inputs = {main: torch.randn(shape, generator=generator)}
    if name == "blt":
        inputs["use_cache"] = False
    if padding != "none":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, slice(-3, None) if padding == "right" else slice(0, 3)] = 0
        inputs["attention_mask"] = mask
    if kind == "seq2seq" and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(7)
    return inputs


def main_output(out) -> torch.Tensor:
    """The logits, or the output in place of logits."""
    for key in ("logits", "prediction_logits", "last_hidden_state", "spectrogram"):
        if isinstance(getattr(out, key, None), torch.Tensor):
            return getattr(out, key)
    return next(x for x in out.to_tuple() if isinstance(x, torch.Tensor) and x.dim() > 1)


def forward(model, inputs, gradients=False):
    """The output rows that are no padding, and every parameter's gradient."""
    out = main_output(model(**inputs))
    mask = inputs.get("attention_mask")
    if mask is not None and "decoder_input_ids" not in inputs and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    found = {"output": out.detach()}
    if gradients:
        model.zero_grad()
        finite = torch.where(out.isfinite(), out, 0)  # some mask logits with -inf
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (finite * weights).sum().backward()
        found |= {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found


def last_token_changed(model, inputs):
    """How the output's earlier rows depend on the last token: not at all if the model is causal."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    other = inputs | {key: inputs[key].clone()}
    other[key][:, -1] = 91
    with torch.no_grad():
        a, b = (main_output(model(**x)) for x in (inputs, other))
    return {"difference of earlier rows": (a - b)[:, :-1]}


def generated(model, inputs):
    inputs = {key: x for key, x in inputs.items() if key != "decoder_input_ids"}
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return {"sequences": out["sequences"], "logits of each step": torch.stack(out["logits"])}


def probes(name: str, model) -> dict:
    """{name: function of the model that returns tensors}."""
    kind, main = cases()[name][2], model.main_input_name
    text = main == "input_ids"
    plain = inputs_of(name, model)
    found = {"gradients": lambda model: forward(model, plain, gradients=True)}
    for side in ("right", "left") if text else ():
        padded = inputs_of(name, model, side)
        found[f"padded {side}"] = functools.partial(forward, inputs=padded, gradients=True)
    if text or "decoder_input_ids" in plain:
        found["last token"] = lambda model: last_token_changed(model, plain)
    if kind in ("decoder", "seq2seq") and model.can_generate():
        found["generation"] = lambda model: generated(model, plain)
        if text:
            left = inputs_of(name, model, "left")
            found["generation, padded left"] = lambda model: generated(model, left)
    return found


# ---- verdicts ------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """The verdict on a type. Wrong and crude are faults."""

    name: str
    word: str = "equal"  # or refused, wrong, crude, unbuilt
    why: str = ""
    calls: int = 0  # that reached fastattn
    left_out: list = field(default_factory=list)  # probes that fail under eager as well


class TooLong(Exception):
    pass


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise TooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_a_refusal(error: Exception) -> bool:
    """One sentence from an exception that fastattn itself raised, not from an accidental error."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (
        code.co_filename.startswith(os.path.dirname(fastattn.__file__) + os.sep)
        and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        and isinstance(error, (NotImplementedError, TypeError, ValueError))
        and "\n" not in str(error)
    )


def differences(got: dict, want: dict) -> str | None:
    """The first tensor that is not equal up to rounding."""
    if got.keys() != want.keys():
        return f"{sorted(got.keys() ^ want.keys())[0]} is there only once"
    gradients = {key for key in want if key not in OUTPUTS}
    largest = max((want[k].abs().max().item() for k in gradients if want[k].numel()), default=0.0)
    for key, x in want.items():
        y = got[key]
        if x.shape != y.shape:
            return f"{key} has shape {list(y.shape)} instead of {list(x.shape)}"
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return f"{key} differ"
            continue
        same = (x == y) | (x.isnan() & y.isnan())
        error = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=float("inf"))
        error = error.max().item() if error.numel() else 0.0
        finite = x[x.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        allowed = TOLERANCE * (largest if key in gradients else max(scale, 1.0))
        if error > allowed:
            return f"{key}: off by {error:.2g}, the largest is {max(scale, largest):.2g}"
    return None


OUTPUTS = ("output", "difference of earlier rows", "sequences", "logits of each step")
TOLERANCE = 1e-3


WAYS = {  # how a model is given fastattn; each starts from eager's weights
    "construction": lambda case: build(case, "fastattn"),
    "enable()": lambda case: fastattn.hf.enable(build(case)),
    "swap()": lambda case: _swapped(build(case)),
}


def _swapped(model):
    """swap() reports what the others raise."""
    report = fastattn.swap(model)
    if model.config._attn_implementation == "fastattn":
        return model
    refused = next(why for name, _, why in report.left if name == "(model)")
    prefix = "fastattn.hf.enable() refused: "
    assert refused.startswith(prefix), refused
    raise Refused(model, refused.removeprefix(prefix))


class Refused(Exception):
    """The model, parts of which swap() may have served, and the sentence."""


def judge(case: str, counter, ways=tuple(WAYS), seconds: int = 120) -> Verdict:
    """Builds the case, and compares it under fastattn with eager, probe by probe."""
    if cases()[case][0] in UNBUILT:
        return Verdict(case, "unbuilt", UNBUILT[cases()[case][0]])
    with time_limit(seconds):
        verdict = Verdict(case)
        wanted = _eagers(case, verdict)
        sentences = {way: _one_way(case, WAYS[way], wanted, verdict, counter) for way in ways}
    if not wanted and verdict.word == "equal":
        return Verdict(case, "unbuilt", verdict.left_out[0])
    if verdict.word == "refused" and len(set(sentences.values())) > 1:
        verdict.word, verdict.why = "wrong", f"refused by one and not by the other: {sentences}"
    return verdict


def _eagers(case, verdict) -> dict:
    """The result of each probe under eager."""
    model, wanted = build(case, REFERENCE.get(case, "eager")), {}
    for key, probe in probes(case, model).items():
        try:
            torch.manual_seed(0)
            wanted[key] = probe(model)
        except TooLong:
            raise
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".replace("\n", " ")
            verdict.left_out.append(f"{key} ({sentence[:150]})")
    return wanted


def _one_way(case, way, wanted, verdict, counter) -> str | None:
    """Fills in the verdict; returns the sentence that refused the model."""
    counter.take()
    try:
        model = way(case)
        for key, want in wanted.items():
            torch.manual_seed(0)
            wrong = differences(probes(case, model)[key](model), want)
            if wrong and verdict.word != "crude":
                verdict.word, verdict.why = "wrong", f"{key}: {wrong}"
        verdict.calls = counter.take()
        return None
    except TooLong:
        raise
    except Refused as error:
        model, sentence = error.args
        for key, want in wanted.items():
            torch.manual_seed(0)
            wrong = differences(probes(case, model)[key](model), want)
            if wrong:
                verdict.word, verdict.why = "wrong", f"refused by swap(), but {key}: {wrong}"
    except Exception as error:
        sentence = str(error)
        if not is_a_refusal(error):
            sentence = f"{type(error).__name__}: {error}".replace("\n", " ")
            verdict.word, verdict.why = "crude", sentence
    if verdict.word == "equal":
        verdict.word, verdict.why = "refused", sentence
    return sentence


# ---- the table -----------------------------------------------------------------------------------

TITLES = {
    "equal": "Equal to eager",
    "refused": "Refused",
    "unbuilt": "Not tried",
    "wrong": "Wrong",
    "crude": "Without a sentence of their own",
}


def table(verdicts: list[Verdict]) -> str:
    """Markdown: types by verdict and reason."""
    lines = [f"Made with transformers {transformers.__version__}.", ""]
    for word, title in TITLES.items():
        rows = [x for x in verdicts if x.word == word]
        if not rows:
            continue
        lines += [f"**{title}** ({len(rows)}).", ""]
        for reason in sorted({_reason(x) for x in rows}):
            names = ", ".join(sorted(x.name for x in rows if _reason(x) == reason))
            lines += textwrap.wrap(
                f"- {reason}: {names}.", 105, subsequent_indent="  ", break_on_hyphens=False
            )
        lines += [""]
    return "\n".join(lines)


def _reason(verdict: Verdict) -> str:
    """The sentence in a few words, without the class's name."""
    if verdict.word == "equal":
        return "through fastattn" if verdict.calls else "no attention of transformers' interface"
    why = verdict.why
    for short in ("does not go through transformers' attention interface", "passes masks"):
        if short in why:
            rest = why[why.index(short) :].partition(", so fastattn")[0]
            return rest
    return why.partition(";")[0].partition(" (")[0]


def main() -> None:
    """Prints the table; with names, one verdict a line."""
    import sys
    import warnings

    import pytest
    from hf_models import Counter

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counter, verdicts = Counter(pytest.MonkeyPatch()), []
    for case in sys.argv[1:] or cases():
        try:
            verdict = judge(case, counter)
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".replace("\n", " ")
            verdict = Verdict(case, "unbuilt", sentence[:150])
        verdicts.append(verdict)
        print(verdict, file=sys.stderr, flush=True)
    print(table(verdicts))


if __name__ == "__main__":
    main()

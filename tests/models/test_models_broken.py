"""Broken or shared folders: every fault is a CheckpointError, and no save changes files that are
not its own."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from model_cases import MODELS, gpt
from safetensors.torch import load_file, save_file

from fastattn.core import files as whole_files
from fastattn.models import GPT, CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

WEIGHTS, CONFIG = "model.safetensors", "config.json"


# ---- saving -------------------------------------------------------------------------------------


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Under the name that was used earlier, and under the first that is tried today."""
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    folder = tmp_path / "model"
    folder.mkdir()
    names = iter(["guessed", "other"] * 2)
    monkeypatch.setattr(whole_files.secrets, "token_hex", lambda n: next(names))
    for name in (WEIGHTS, CONFIG):
        for middle in (os.getpid(), "guessed"):
            (folder / f".{name}.{middle}.tmp").symlink_to(victim)
    gpt().save_pretrained(folder)
    assert victim.read_text() == "keep me"
    assert all((folder / name).is_file() for name in (WEIGHTS, CONFIG))
    assert not any((folder / name).is_symlink() for name in (WEIGHTS, CONFIG))
    GPT.from_pretrained(folder)


def test_threads_that_save_into_one_folder(tmp_path):
    """Each process writes its own files; the folder holds one of the models, complete."""
    models = [gpt() for _ in range(4)]
    for n, model in enumerate(models):
        torch.nn.init.constant_(model.embed.weight, n)
    errors = []

    def save(model):
        try:
            for _ in range(8):
                model.save_pretrained(tmp_path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    found = GPT.from_pretrained(tmp_path).embed.weight.unique()
    assert found.tolist() in [[0.0], [1.0], [2.0], [3.0]]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_is_honoured(mask, tmp_path):
    before = os.umask(mask)
    try:
        gpt().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in (WEIGHTS, CONFIG)]
    assert modes == [0o666 & ~mask] * 2


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        whole_files.replace_file(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# ---- loading ------------------------------------------------------------------------------------


def loads(folder, model) -> bool:
    """False if a sentence refuses it. If it loads, it must be the model that was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a config.json that differs is reported
        try:
            twin = type(model).from_pretrained(folder)
        except CheckpointError as error:
            assert len(str(error)) > 20
            return False
    assert twin.config == model.config
    for x, y in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    return True


def spoil(content: bytes, first: int, chance: random.Random) -> bytes:
    """Changes the bytes before `first`, or the file's length, in one of five ways."""
    data, place = bytearray(content), chance.randrange(first)
    match chance.randrange(5):
        case 0:
            del data[chance.randrange(len(data)) :]
        case 1:
            for _ in range(3):
                data[chance.randrange(first)] = chance.randrange(256)
        case 2:
            data[chance.randrange(min(8, first))] = chance.randrange(256)
        case 3:
            del data[place : place + chance.randrange(1, 9)]
        case 4:
            data[place:place] = chance.randbytes(3)
    return bytes(data)


def test_no_broken_bytes_get_through(tmp_path):
    """The header of the weights and config.json, corrupted at random: 180 files."""
    model, chance = gpt(), random.Random(1)
    model.save_pretrained(tmp_path)
    weights, config = ((tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG))
    header = 8 + int.from_bytes(weights[:8], "little")
    refused = 0
    for _ in range(120):
        (tmp_path / WEIGHTS).write_bytes(spoil(weights, header, chance))
        refused += not loads(tmp_path, model)
    assert refused > 110
    (tmp_path / WEIGHTS).write_bytes(weights)
    for _ in range(60):  # the copy in the weights' file takes precedence
        (tmp_path / CONFIG).write_bytes(spoil(config, len(config), chance))
        assert loads(tmp_path, model)


HOSTILE = [
    *(None, "x", -1, 0, 1.5, True, [], {}, [1], float("nan"), 1e308),
    *(2**40, 2**63, 10**30),
]


@pytest.mark.parametrize("name", MODELS)
def test_no_broken_configuration_gets_through(name, tmp_path):
    """Each field of a config.json that the weights depend on, missing or with wrong values. A valid
    description of another model (such as another dropout) may load."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # without configuration
    kind, refused = type(model), 0
    cases = [{**config, field: value} for field in (*config, "surplus") for value in HOSTILE]
    cases += [{n: x for n, x in config.items() if n != field} for field in config]
    for case in cases:
        (tmp_path / CONFIG).write_text(json.dumps(case))
        try:
            twin = kind.from_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        for n, x in model.state_dict().items():
            assert torch.equal(twin.state_dict()[n], x)
    assert refused > 0.8 * len(cases)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe{", b"[" * 10**5, b"NaN", b"{1: 2}"]
)
def test_a_configuration_that_is_no_object(text, tmp_path):
    model = gpt()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes(text)
    assert loads(tmp_path, model)  # the weights' own takes precedence
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"configuration in .*config\.json is (not JSON|a )"):
        GPT.from_pretrained(tmp_path)
    if text.isascii():
        save_file(state, tmp_path / WEIGHTS, {"config": text.decode()})
        with pytest.raises(CheckpointError, match=r"configuration in .*safetensors is"):
            GPT.from_pretrained(tmp_path)


def test_a_flipped_bit_of_the_configuration_is_seen(tmp_path):
    """Still valid JSON that fits the weights, but another model: 4 heads or 2."""
    model = gpt()
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    changed = content.replace(rb"\"heads\": 4", rb"\"heads\": 2")
    assert len(changed) == len(content) and changed != content
    (tmp_path / WEIGHTS).write_bytes(changed)
    with pytest.raises(CheckpointError, match="bytes do not match its checksum"):
        GPT.from_pretrained(tmp_path)


def test_folders_in_the_place_of_files(tmp_path):
    model = gpt()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / CONFIG).unlink()
    (tmp_path / "a" / CONFIG).mkdir()
    assert loads(tmp_path / "a", model)
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GPT.from_pretrained(tmp_path / "a")
    (tmp_path / "b" / WEIGHTS).mkdir(parents=True)
    for folder in (tmp_path / "b", tmp_path / "a" / WEIGHTS, "no\0name", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError):
            GPT.from_pretrained(folder)


def test_wrong_changes_are_the_callers_own(tmp_path):
    """A wrong request is not reported as a fault of the folder."""
    gpt().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no option 'width'"):
        GPT.from_pretrained(tmp_path, width=3)
    with pytest.raises(ValueError, match="layers is 0; accepted") as error:
        GPT.from_pretrained(tmp_path, layers=0)
    assert not isinstance(error.value, CheckpointError)
    with pytest.raises(CheckpointError, match="lacks"):
        GPT.from_pretrained(tmp_path, layers=3)


# ---- checkpoints of the examples ----------------------------------------------------------------


def checkpoints(folder):
    pytest.importorskip("tokenizers")
    import files

    return files.Checkpoints(folder, {"lr": 1.0})


GOOD = {"model": {"w": torch.zeros(3)}, "optimizer": {"state": {}, "param_groups": []}}


def test_a_checkpoint_that_is_none(tmp_path):
    """Not a dict, missing parts or wrong types, another step's file, corrupted bytes, a folder."""
    saved = checkpoints(tmp_path)
    saved.save(3, GOOD)
    path = tmp_path / "step-00000003.pt"
    content, path_says = path.read_bytes(), []
    whole = torch.load(path)
    assert saved.latest(path_says.append)[0]["step"] == 3 and not path_says
    for wrong in (
        *(3, None, [], {}, {**whole, "step": "3"}, {**whole, "step": 4}, {**whole, "step": True}),
        *({n: x for n, x in whole.items() if n != name} for name in whole),
        *({**whole, name: 3} for name in whole if name != "step"),
    ):
        torch.save(wrong, path)
        with pytest.raises(CheckpointError, match="can be read"):
            saved.latest(path_says.append)
    chance = random.Random(2)
    for _ in range(100):
        path.write_bytes(spoil(content, len(content), chance))
        try:
            assert saved.latest(path_says.append)[0]["step"] == 3
        except CheckpointError:
            continue
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="can be read"):
        saved.latest(path_says.append)
    saved.clear()
    for step in (4, 5, 6):
        saved.save(step, GOOD)
    assert saved.latest(path_says.append)[0]["step"] == 6 and path.is_dir()


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"{\n", b"3\n", b"null\n", b"{}\n", b'{"step": "x"}\n', b'{"step": []}\n']
)
def test_a_log_that_is_none(line, tmp_path):
    pytest.importorskip("tokenizers")
    import files

    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"log\.jsonl is no log of a run"):
        files.Log(path, 1)
    assert path.read_bytes() == before
    assert files.Log(path, 0).losses() == []  # a run that starts over


def test_the_state_of_another_optimizer(tmp_path):
    pytest.importorskip("tokenizers")
    import common

    task = common.Task(GPT(vocab_size=9, dim=8, heads=2, layers=1, max_len=8), batch=lambda n: {})
    stepper = common.Stepper(task, common.Options(out="unused"))
    state = stepper.state()
    stepper.load(state, "step-1.pt")
    wrong = {**state["optimizer"], "state": dict.fromkeys(state["optimizer"]["state"], 3)}
    with pytest.raises(CheckpointError, match="no state of this optimizer"):
        stepper.load({**state, "optimizer": wrong}, "step-1.pt")
    group = state["optimizer"]["param_groups"]
    name = group[0]["params"][0]
    held = {n: x for n, x in state["optimizer"]["state"].items() if n != name}
    for wrong in (
        *({}, {"state": 3, "param_groups": 4}, {"param_groups": []}, {"state": {}}),
        {"state": held, "param_groups": group},
    ):
        with pytest.raises(CheckpointError, match="no state of this model's optimizer"):
            stepper.load({**state, "optimizer": wrong}, "step-1.pt")
    with pytest.raises(CheckpointError, match="lacks"):
        stepper.load({**state, "model": {**state["model"], "embed.weight": 3}}, "step-1.pt")

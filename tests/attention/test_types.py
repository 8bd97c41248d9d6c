"""What type checkers and consoles see: a user's program under pyright and mypy in strict mode,
overloads that agree with the signatures, and the public names."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from fresh_python import python

import fastattn
from fastattn import flash_attn, models, options
from fastattn.backends import registry

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parents[1] / "support/typed_program.py"
CALLS = {  # each call: its options, and the additional ones of its overloads
    fastattn.attention: (options.DenseOptions, {"return_lse", "return_stats"}),
    fastattn.varlen_attention: (options.PackedOptions, {"return_lse", "return_stats"}),
    fastattn.decode_attention: (
        options.CacheOptions,
        {"return_lse", "return_stats", "cache_lens"},
    ),
}


# ---- a user's program ---------------------------------------------------------------------------


def checker(*names: str) -> str:
    """The first of these programs in this environment or on PATH; if there is none, skips the
    test."""
    places = (f"{Path(sys.executable).parent}", None)
    found = (shutil.which(name, path=place) for name in names for place in places)
    command = next((path for path in found if path), None)
    return command or pytest.skip(f"not installed: {' or '.join(names)}")


@pytest.fixture
def program(tmp_path) -> Path:
    """The program next to only the package, as in an environment where it is installed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/fastattn").symlink_to(ROOT / "fastattn")
    return Path(shutil.copy(PROGRAM, tmp_path))


def test_the_program_runs_and_uses_every_public_name(tmp_path):
    text = PROGRAM.read_text()
    names = {*fastattn.__all__, *flash_attn.__all__, *fastattn.nn.__all__, *models.__all__}
    assert [name for name in sorted(names - {"Config", "Model"}) if name not in text] == []
    run = python(str(PROGRAM), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr


def test_pyright(program):
    """The program in strict mode, and the package itself in basic mode, where pyproject.toml says
    so: one run for both, since each would read torch again, which is most of its time."""
    command = checker("pyright", "basedpyright")
    pattern, project = r"^\[tool\.pyright\].*?^include = (\[.*?\])", ROOT / "pyproject.toml"
    own = re.search(pattern, project.read_text(), re.MULTILINE | re.DOTALL)[1]
    folders = [ROOT / path for path in ast.literal_eval(own)]
    files = [file for path in folders for file in (path.rglob("*.py") if path.is_dir() else [path])]
    settings = {
        "typeCheckingMode": "basic",
        "strict": [program.name],
        "include": [program.name, *(f"site/{path.relative_to(ROOT)}" for path in folders)],
        "extraPaths": ["site"],
    }
    program.with_name("pyrightconfig.json").write_text(json.dumps(settings))
    run = subprocess.run(
        [command, "--pythonpath", sys.executable, "--outputjson"],
        cwd=program.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    told = json.loads(run.stdout)
    problems = [
        f"{x['file']}:{x['range']['start']['line'] + 1}: {x['message']}"
        for x in told["generalDiagnostics"]
    ]
    assert problems == []
    assert told["summary"]["filesAnalyzed"] == 1 + len(files)


def test_mypy_strict(program):
    """transformers' own sources are excluded: checking them takes minutes and gigabytes."""
    command = checker("mypy")
    settings = "[mypy]\nstrict = True\nfollow_imports = silent\nmypy_path = site\n"
    settings += "[mypy-transformers.*]\nfollow_imports = skip\n"
    program.with_name("mypy.ini").write_text(settings)
    run = subprocess.run(
        [command, "--python-executable", sys.executable, program.name],
        cwd=program.parent, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_editable_install_is_visible_to_checkers(tmp_path):
    """Type checkers run no import hooks, so a plain path must lead to the package and to nothing
    else."""
    tree, skip = tmp_path / "tree", shutil.ignore_patterns("__pycache__", "*.so", "results")
    for folder in ("fastattn", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for name in ("setup.py", "build_tools.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = ("setup.py", "-q", "editable_wheel", "--dist-dir", str(tmp_path))
    run = python(*command, cwd=tree, FASTATTN_BUILD="none", PYTHONPATH="")
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(next(tmp_path.glob("fastattn-*.whl"))) as archive:
        place = Path(archive.read("fastattn.pth").decode().removesuffix("\n"))
    assert [path.name for path in place.iterdir()] == ["fastattn"]
    assert (place / "fastattn").resolve() == tree / "fastattn"


# ---- one signature ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_overloads_options_are_the_signatures(call):
    table, named = CALLS[call]
    hints, parameters = get_type_hints(call), inspect.signature(call).parameters.values()
    own = {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert named <= set(own)
    assert get_type_hints(table) == {n: hint for n, hint in own.items() if n not in named}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is newer")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_overloads_begin_as_the_calls_do(call):
    from typing import get_overloads

    def first(function) -> list[tuple]:
        parameters = inspect.signature(function).parameters.values()
        ordered = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return [(p.name, p.annotation, p.default) for p in ordered]

    found = get_overloads(call)
    assert len(found) == 5 and all(first(overload) == first(call) for overload in found)


def test_the_backends_are_named_in_the_signatures():
    assert get_args(options.BackendName) == registry.NAMES
    assert all(f'"{name}"' in inspect.getdoc(fastattn.attention) for name in registry.NAMES)


def test_explain_takes_what_the_calls_take():
    parameters = inspect.signature(fastattn.explain).parameters
    assert list(parameters)[:4] == ["q", "keys", "values", "cu_seqlens_q"]
    others = dict(list(parameters.items())[3:])
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others.values())
    taken = set()
    for call in CALLS:
        for name, own in list(inspect.signature(call).parameters.items())[3:]:
            taken.add(name)
            assert own.kind == others[name].kind
            default = None if own.default is own.empty else own.default
            assert default == others[name].default
            assert others[name].annotation.removesuffix(" | None") in own.annotation
    assert set(others) == taken


# ---- public names -------------------------------------------------------------------------------


def test_dir_lists_the_public_names():
    later = {"distillation", "flash_attn", "hf", "models", "pruning", "signals"}
    assert set(dir(fastattn)) == {*fastattn.__all__, *later, "__version__"}
    with pytest.raises(AttributeError, match="'fastattn' has no attribute 'atention'"):
        _ = fastattn.atention


def test_modules_are_imported_when_first_used():
    code = (
        "import sys, fastattn\n"
        "print([n for n in ('transformers', 'fastattn.models') if n in sys.modules])\n"
        "print(fastattn.models.GPT.__name__, fastattn.flash_attn.flash_attn_func.__name__)\n"
        "sys.modules['transformers'] = None\n"
        "print(hasattr(fastattn, 'hf'))\n"
        "try: fastattn.hf\n"
        "except AttributeError as error: print(error)\n"
        "from fastattn import hf\n"
    )
    run = python("-c", code)
    assert run.stdout.splitlines()[:3] == ["[]", "GPT flash_attn_func", "False"]
    assert 'pip install "fastattn[hf]"' in run.stdout.splitlines()[3]
    assert run.stderr.splitlines()[-1].startswith('ImportError: fastattn.hf: pip install "fast')

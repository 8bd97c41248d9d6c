"""README's code runs, the command line works, the package builds, and budgets and rules hold."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from fresh_python import ROOT, python

import fastattn

README = ROOT / "README.md"
TREE = (
    "setup.py", "build_backend.py", "build_tools.py", "pyproject.toml", "MANIFEST.in", "Makefile",
    "README.md", "LICENSE",
)  # fmt: skip
FOLDERS = (
    "fastattn",
    "kernels",
    "benchmarks",
    "csrc",
    "tests",
    "docs",
    "examples",
    ".ci",
    ".github",
)


# ---- README -----------------------------------------------------------------------------------


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda p: p.stem)
def test_the_pages_code_runs(page):
    """Runs every python block of a page in order, in one namespace, with our warnings as errors."""
    blocks = code_of(page)
    run = python("-W", "error::UserWarning:fastattn", "-c", "\n".join(blocks), OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip(), "there is something to see"


@pytest.mark.native
def test_readme_tables_are_generated():
    from fastattn.benchmarks.report import readme_table

    for page, names in readme_table.PAGES.items():
        text = page.read_text()
        updated = readme_table.generated(text, names) == text
        assert updated, f"{page.name}: run python -m fastattn.benchmarks.report.readme_table"


def test_readme_is_short_and_its_picture_up_to_date():
    from fastattn.benchmarks.report import readme_plot, readme_table

    assert len(README.read_bytes()) < 10_000
    data = readme_table.plotted(readme_table.stored_reports())
    assert min(map(len, data.values())) > 20
    assert readme_plot.is_of(readme_table.PLOT.read_text(), data)
    assert not readme_plot.is_of(readme_table.PLOT.read_text(), {"avx2": {"dense": [1.0, 2.0]}})


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_files_that_exist():
    text = "".join(page.read_text() for page in PAGES)
    paths = re.findall(
        r"`((?:fastattn|csrc|tests|benchmarks|kernels|docs|examples)/[\w/.]+\.\w+)`", text
    )
    assert len(paths) > 8
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_support_is_what_the_backends_say(monkeypatch):
    """The table depends on the call alone, and not on the machine that makes it."""
    from fastattn.backends import backend, registry
    from fastattn.cli import info

    def halves_only(call):
        return "it takes halves only" if call.q.dtype.itemsize != 2 else None

    def nothing(*call):
        raise AssertionError("asked about this machine")

    row = backend.Backend("picky", "a test", nothing, nothing, nothing, halves_only)
    monkeypatch.setattr(registry, "BACKENDS", [row])
    head, _, first, *others = info.support_markdown().splitlines()
    assert head == "| | picky |" and first == "| fp32 | no |"
    table, last = others[: len(info.SUPPORT) - 1], others[-1]
    assert [line for line in table if line.endswith("| no |")] == ["| fp64 | no |"]
    assert last == "picky: a test."


def test_speed_table_says_red_and_no_difference():
    from bench_data import SMALL, example, result
    from fastattn.benchmarks.report import record
    from fastattn.benchmarks.report.readme_table import replace, speed_markdown

    data = example()
    table = speed_markdown([data])
    assert "RED" in table and "no difference" in table and "| flash |" in table
    assert "**Some CPU <1>, 2 threads" in table and "2026-01-02" in table
    red = next(entry for entry in data["rows"] if entry["red"])
    assert f"| {red['name']} | flash | | | RED | | |" in table
    group = [line for line in table.splitlines() if line.startswith("| tiny | bf16")]
    assert group == ["| tiny | bf16 | forward | 0.50 | flash |"]
    assert record.said({"verdict": "faster", "value": 1.234}) == "1.23"
    assert result(SMALL, red="wrong", fastattn=1.0).comparison is None
    with pytest.raises(ValueError, match="speed:begin"):
        replace("no markers", "speed", table)


def test_a_broken_result_is_a_sentence(tmp_path, monkeypatch, capsys):
    from fastattn.benchmarks.report import readme_table

    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_table.stored_reports, "__defaults__", (tmp_path,))
    (tmp_path / "other.json").write_text('{"rows": [], "kind": "of something else"}')
    assert readme_table.stored_reports() == []
    (tmp_path / "broken.json").write_text('{"schema": 2, "rows": [')
    assert readme_table.main(["--check"]) == 2
    assert "broken.json cannot be read as a run" in capsys.readouterr().err


# ---- the command line -------------------------------------------------------------------------


def test_info_is_readable():
    run = python("-m", "fastattn", "info")
    assert run.returncode == 0, run.stderr
    for word in ("torch", "backends", "cpu", "triton", "reference", "FASTATTN_ISA", "build"):
        assert word in run.stdout


def test_info_json():
    run = python("-m", "fastattn", "info", "--json", FASTATTN_LOG="0")
    facts = json.loads(run.stdout)
    registry = {row["name"]: row["why_not"] for row in facts["backends"]}
    assert list(registry) == ["cuda", "triton", "cpu", "reference"]
    assert registry["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in registry.values())
    assert facts["environment"]["FASTATTN_LOG"] == "0"
    assert facts["versions"]["fastattn"] == fastattn.__version__


@pytest.mark.native
def test_info_says_why_not_the_better_instruction_sets():
    facts = json.loads(python("-m", "fastattn", "info", "--json", FASTATTN_ISA="portable").stdout)
    states = {row["name"]: row["state"] for row in facts["isas"]}
    assert states["portable"] == "chosen"
    for row in facts["isas"]:
        if not row["supported"]:
            assert "this CPU lacks" in row["state"]
    bad = json.loads(python("-m", "fastattn", "info", "--json", FASTATTN_ISA="sse9").stdout)
    assert all("FASTATTN_ISA=sse9" in row["state"] for row in bad["isas"])


def test_help_and_version():
    run = python("-m", "fastattn", "--help")
    assert run.returncode == 0
    for command in ("info", "verify", "demo", "bench"):
        assert command in run.stdout
    assert (
        python("-m", "fastattn", "--version").stdout.strip() == f"fastattn {fastattn.__version__}"
    )


@pytest.mark.parametrize("command", ["info", "verify", "demo", "bench"])
def test_each_command_has_help(command):
    run = python("-m", "fastattn", command, "--help")
    assert run.returncode == 0, run.stderr
    assert f"python -m fastattn {command}" in run.stdout


@pytest.mark.parametrize(
    "arguments, word",
    [((), "usage"), (("dance",), "dance"), (("info", "--jsn"), "--jsn"), (("--nope",), "--nope")],
)
def test_bad_command_lines_exit_with_2(arguments, word):
    run = python("-m", "fastattn", *arguments)
    assert run.returncode == 2
    assert word in run.stderr
    assert "Traceback" not in run.stderr


# ---- building and installing ------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A pure-Python wheel, built from a copy of the tree as on a machine with no compiler."""
    folder = tmp_path_factory.mktemp("house")
    tree = folder / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "results")
    for name in FOLDERS[:4]:
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in TREE:
        shutil.copy(ROOT / name, tree / name)
    pip = ("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    run = python(*pip, "-w", str(folder), ".", cwd=tree, CXX="no-such-compiler", PYTHONPATH="")
    assert run.returncode == 0, run.stderr
    return next(folder.glob("fastattn-*.whl"))


@pytest.fixture(scope="module")
def pure(wheel, tmp_path_factory) -> Path:
    """The pure-Python wheel, unpacked into its own folder."""
    target = tmp_path_factory.mktemp("target")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_has_what_it_must(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    modules = set()
    for folder, package in (
        ("fastattn", ""),
        ("kernels", "kernels/"),
        ("benchmarks", "benchmarks/"),
    ):
        found = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
        modules |= {f"fastattn/{package}{path}" for path in found if path.parts[0] != "ladder"}
    tests = {name for name in modules if name.split("/")[-1].startswith(("test_", "conftest"))}
    assert modules - tests <= names and len(tests) == 2 and not tests & names
    assert {"fastattn/py.typed", "fastattn/_build.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert top == {"fastattn", f"fastattn-{fastattn.__version__}.dist-info"}
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata and "Author: " in metadata
    assert "](docs/" not in metadata and "docs/huggingface.md" in metadata  # no link to nowhere


# An editable install of the tree would supply its own _C to the wheel under test.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"


def test_no_compiler_installs_and_says_so(pure):
    """The package imports, computes with the reference and a warning, and info gives the reason."""
    code = ALONE + (
        "import torch, warnings, fastattn\n"
        "q = torch.randn(1, 2, 5, 8, requires_grad=True)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    fastattn.attention(q, q, q, causal=True).sum().backward()\n"
        "assert q.grad.isfinite().all()\n"
        "print(fastattn.__file__)\n"
        "print([str(w.message) for w in caught if issubclass(w.category, UserWarning)])\n"
    )
    run = python("-c", code, cwd=pure, PYTHONPATH=str(pure))
    assert run.returncode == 0, run.stderr
    where, warned = run.stdout.strip().split("\n")
    assert Path(where).parent == pure / "fastattn"
    assert "reference" in warned and "no-such-compiler" in warned
    code = ALONE + "from fastattn.__main__ import main; sys.exit(main(['info', '--json']))"
    info = python("-c", code, cwd=pure, PYTHONPATH=str(pure))
    facts = json.loads(info.stdout)
    assert "no-such-compiler" in facts["build"]["missing"]["_cpu"]
    assert "no-such-compiler" in next(
        row["why_not"] for row in facts["backends"] if row["name"] == "cpu"
    )
    assert facts["isas"] == [] and facts["machine"]["features"] is None


def test_build_mode_is_checked(tmp_path):
    run = python("setup.py", "--version", FASTATTN_BUILD="fast")
    assert run.returncode != 0 and "FASTATTN_BUILD is 'fast'" in run.stderr
    for mode in ("cpu", "cuda", "wheel"):
        nothing = {"FASTATTN_BUILD": mode, "CXX": "no-such-compiler"}
        run = python("setup.py", "build_py", "--build-lib", str(tmp_path), **nothing)
        assert run.returncode != 0 and "no-such-compiler" in run.stderr
        assert python("setup.py", "--version", **nothing).returncode == 0  # compiles nothing


# ---- rules of the house -----------------------------------------------------------------------


def test_line_budgets():
    from fastattn.benchmarks.size import over_budget

    assert over_budget() == []


def test_line_budgets_are_enforced(tmp_path):
    from fastattn.benchmarks.size import over_budget

    (tmp_path / "setup.py").write_text("x = 1\n" * 501)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/wide.h").write_text("//" + "x" * 99)
    problems = over_budget(tmp_path)
    assert problems == [
        "csrc/wide.h:1 is wider than 100 columns",
        "setup.py has 501 lines, the budget is 500",
    ]


def test_ruff():
    for command in (("check", "."), ("format", "--check", ".")):
        run = python("-m", "ruff", *command)
        assert run.returncode == 0, run.stdout + run.stderr


def test_license_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_versions_agree():
    """fastattn.__version__ is the only source; setuptools reads it from there."""
    run = python("setup.py", "--version", FASTATTN_BUILD="none")
    assert run.stdout.split()[-1] == fastattn.__version__, run.stderr
    assert f"Unreleased ({fastattn.__version__})" in (ROOT / "CHANGELOG.md").read_text()


def test_no_path_of_a_machine_in_the_tree():
    """No absolute path of a checkout, a home or a build folder."""
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|workspace)/\w")
    found = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if not path.is_file() or path.suffix in (".so", ".pyc") or path.name == "_build.json":
                continue
            if pattern.search(path.read_text(errors="ignore")):
                found.append(str(path.relative_to(ROOT)))
    found += [name for name in TREE if pattern.search((ROOT / name).read_text())]
    assert found == []


def test_every_public_name_is_documented():
    """Every name in fastattn.__all__ has its own docstring, and so has every module."""
    for name in fastattn.__all__:
        thing = getattr(fastattn, name)
        if not isinstance(thing, (str, int, float)):
            assert (inspect.getdoc(thing) or "").strip(), f"fastattn.{name} has no docstring"
    for folder in ("fastattn", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name != "ladder":
                assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"

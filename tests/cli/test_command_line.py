"""python -m fastattn: its output into a pipe, and its exit status."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fresh_python import ROOT, python
from rich.console import Console

from fastattn import __main__ as command_line
from fastattn.cli import info


def test_info_in_a_pipe_has_whole_lines():
    run = python("-m", "fastattn", "info", COLUMNS="40")
    lines = run.stdout.split("\n")
    assert run.returncode == 0 and lines[0] == "machine" and lines[-1] == "" != lines[-2]
    assert [line for line in lines if line != line.rstrip()] == []
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert set(info.ENVIRONMENT) <= set(names), "every line begins with a name"
    assert "\n\nbackends, best first\n" in run.stdout and "\n\n\n" not in run.stdout


def test_info_on_a_terminal_breaks_between_words():
    out = io.StringIO()
    facts = info.facts()
    info.show(facts, Console(file=out, force_terminal=True, width=60, color_system=None))
    lines = out.getvalue().split("\n")
    assert max(map(len, lines)) <= 60 and [x for x in lines if x != x.rstrip()] == []
    words = " ".join(out.getvalue().split())
    assert all(remark in words for remark in info.ENVIRONMENT.values())


@pytest.mark.parametrize("arguments", [(), ("dance",)])
def test_no_command_or_a_wrong_one_is_answered_by_the_usage(arguments):
    run = python("-m", "fastattn", *arguments)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("usage: python -m fastattn") and "Traceback" not in run.stderr
    assert all(name in run.stderr for name in command_line.COMMANDS)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_exit_codes_have_a_line_each(command):
    lines = python("-m", "fastattn", command, "--help", COLUMNS="80").stdout.splitlines()
    codes = [line.split()[0] for line in lines[lines.index("exit codes:") + 1 :]]
    assert codes[:3] == ["0", "1", "2"]


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.importlib, "import_module",
                        lambda name: SimpleNamespace(main=stopped))  # fmt: skip
    assert command_line.main(["info"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments, code", [(("--help",), 0), (("info",), 141), (("info", "--json"), 141)]
)
def test_a_reader_that_leaves_is_no_fault(arguments, code):
    """Like `| head`: the reading end of the pipe is closed before anything is written."""
    back, out = os.pipe()
    os.close(back)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "fastattn", *arguments], stdout=out, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=300,
        )  # fmt: skip
    finally:
        os.close(out)
    assert run.returncode == code and run.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("output", [">/dev/full", ">&-"])
def test_output_that_cannot_be_written_is_a_sentence(output):
    command = f'exec "$0" -m fastattn --version {output}'
    run = subprocess.run(
        ["sh", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr
    if output == ">/dev/full":
        assert run.returncode == 1
        assert run.stderr == "the output cannot be written: No space left on device\n"
    else:
        assert run.returncode == 0

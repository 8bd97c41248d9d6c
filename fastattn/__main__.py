"""The command line: python -m fastattn info | verify | inspect | demo | bench.

Each command is a function `main(argv) -> int` in its own module; it parses its own options.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys

COMMANDS = {  # name: (module, what it does)
    "info": ("fastattn.cli.info", "what this machine can run, and why not the rest"),
    "verify": ("fastattn.cli.verify", "every backend against float64 on this machine"),
    "inspect": (
        "fastattn.cli.inspect_model",
        "what a transformers model attends to in a text, as an HTML page",
    ),
    "demo": (
        "fastattn.benchmarks.demo.main",
        "swap fastattn into a pretrained encoder: compare, time, report",
    ),
    "bench": (
        "fastattn.benchmarks.cli",
        "fastattn beside torch and others, each row checked first",
    ),
}
EXTRAS = {"demo": "demo", "bench": "bench"}  # the optional dependencies that a command may need


def parser() -> argparse.ArgumentParser:
    """The parser of the options before the command; each command parses those after it."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="python -m fastattn",
        description=f"One attention call for PyTorch.\n\ncommands:\n{listed}",
        epilog="python -m fastattn COMMAND --help lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    top.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND")
    top.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Ctrl-C and a closed pipe end it without a
    traceback."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # closed by the shell's >&-
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        _discard_output()
        return 1


def _discard_output() -> None:
    """Redirects stdout to /dev/null, because the interpreter flushes its buffer at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str] | None) -> int:
    top = parser()
    chosen = top.parse_args(argv)
    if chosen.version:
        import fastattn

        print(f"fastattn {fastattn.__version__}")
        return 0
    if chosen.command is None:
        top.print_help(sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[chosen.command][0])
        return module.main(chosen.options) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastattn":
            raise  # a broken installation, not a missing extra
        extra = EXTRAS.get(chosen.command)
        hint = f"pip install 'fastattn[{extra}]'" if extra else f"pip install {error.name}"
        print(f"{chosen.command} needs the package {error.name}: {hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

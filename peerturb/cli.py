"""The `peerturb` command: finds the named command, runs it and turns its errors into a line and an exit code.

It knows the commands only as rows of a table. A command's module, and with it torch, grpc or transformers, is imported
when that command is asked for, so `peerturb --help` answers at once, on an installation without torch too.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from peerturb import __version__
from peerturb.errors import PeerturbError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count it."""
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read our output has gone; there is nobody to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One row of the table of commands."""

    target: str
    """`module:attribute` of a Typer app, or of a function that becomes a Typer command."""
    summary: str
    """One line for `peerturb --help`."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        target="peerturb_node.cli.demo:app",
        summary="Watch four nodes on this computer fine-tune a model together; needs no network.",
    ),
    "init": Command(
        target="peerturb_node.cli.init:app",
        summary="Write a commented RUN.toml from a few questions or flags; needs no torch.",
    ),
    "coordinator": Command(
        target="peerturb_coordinator.cli.coordinator:app",
        summary="Serve a run to peers (serve), make its certificate and join command (keys).",
    ),
    "node": Command(
        target="peerturb_node.cli.node:app",
        summary="Join a run with this computer's model replica and data (run).",
    ),
    "log": Command(
        target="peerturb_node.cli.log:app",
        summary="Read a run log: show, verify, replay, export.",
    ),
    "status": Command(
        target="peerturb_coordinator.cli.status:app",
        summary="Ask a coordinator how its run goes.",
    ),
    "doctor": Command(
        target="peerturb_node.cli.doctor:app",
        summary="Say what would keep this computer from joining a run, before it tries.",
    ),
    "model": Command(
        target="peerturb_node.cli.model:app",
        summary="Print a base model's digest and tensors, and a RUN.toml to start from.",
    ),
    "tune": Command(
        target="peerturb_node.cli.tune:app",
        summary="Find a learning rate and epsilon by a short sweep on your model and data.",
    ),
    "sim": Command(
        target="peerturb_sim.cli:app",
        summary="Simulate thousands of peers from one seed (run), report, compare logs, plan a run.",
    ),
    "bench": Command(
        target="peerturb_bench.cli:app",
        summary="Measure the project's claims on this computer.",
    ),
}

EXTRAS = {
    "torch": "node",
    "transformers": "node",
    "safetensors": "node",
    "tokenizers": "node",
    "huggingface_hub": "node",
    "matplotlib": "node",
    "psutil": "node",
    "ray": "sim",
}
"""Packages that the bare install lacks, and the extra that brings each."""

USAGE = """\
usage: peerturb [--debug] COMMAND [ARGUMENTS]
       peerturb --help | --version
"""


def main() -> None:
    """Run the command line of this process and end the process with its exit code."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
        # Python flushes once more while it shuts down and would complain: give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line, without the program's name, and return the exit code. Raises nothing."""
    rest = list(arguments)
    # gRPC writes lines of its own to standard error, several for every stranger whose handshake fails.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    is_debug = os.environ.get("PEERTURB_DEBUG", "") not in ("", "0")
    while rest and rest[0] == "--debug":
        is_debug = True
        rest = rest[1:]
    if not rest or rest[0] in ("--help", "-h", "help"):
        return _write(_help())
    if rest[0] in ("--version", "-V"):
        return _write(f"peerturb {__version__}\n")
    name, *rest = rest
    if name not in COMMANDS:
        _complain(_unknown(name))
        return EXIT_USAGE
    return _guarded(name, rest, is_debug=is_debug)


def _guarded(name: str, arguments: list[str], *, is_debug: bool) -> int:
    """Run the command; every way in which it can end becomes an exit code."""
    try:
        _load(COMMANDS[name]).main(args=arguments, prog_name=f"peerturb {name}")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == EXIT_INTERRUPTED:
            _say("interrupted")
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except PeerturbError as error:
        if is_debug:
            traceback.print_exc()
        _complain(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if is_debug or package not in EXTRAS:
            traceback.print_exc()
        if package not in EXTRAS:
            return 1
        _complain(
            f"`peerturb {name}` needs the package {package}, which is not installed; "
            f'install it with: pip install "peerturb[{EXTRAS[package]}]"'
        )
        return 1
    except Exception:
        # Not an error anyone foresaw: the traceback is what a report needs, and debug adds nothing to it.
        traceback.print_exc()
        _complain("this is a bug in peerturb; please report it with the lines above")
        return 1
    return 0


def _load(command: Command) -> Any:
    """Import the command's module and return its click command object."""
    module_name, _, attribute = command.target.partition(":")
    found = getattr(importlib.import_module(module_name), attribute)
    typer = importlib.import_module("typer")
    if hasattr(found, "main"):
        return found
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(found)
        found = app
    return typer.main.get_command(found)


def _help() -> str:
    """Return the text of `peerturb --help`."""
    width = max(map(len, COMMANDS))
    rows = "".join(f"  {name:<{width}}  {command.summary}\n" for name, command in COMMANDS.items())
    return (
        "peerturb: fine-tune one language model on many unreliable computers, one byte per gradient.\n\n"
        f"{USAGE}\ncommands:\n{rows}\n"
        "`peerturb COMMAND --help` explains one command. --debug or PEERTURB_DEBUG=1 shows an error's traceback.\n"
    )


def _unknown(name: str) -> str:
    """Say that there is no such command, and which one may have been meant."""
    if name.startswith("-"):
        return f"there is no option {name}; `peerturb --help` lists options and commands"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `peerturb {near[0]}`?" if near else "`peerturb --help` lists the commands"
    return f"there is no command {name!r}; {hint}"


def _write(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    return 0


def _complain(message: str) -> None:
    """Print `error: ...` on standard error; red where that is a terminal."""
    _print_styled("error:", message, sys.stderr)


def _say(message: str) -> None:
    try:
        sys.stderr.write(f"{message}\n")
    except BrokenPipeError:
        return


def _print_styled(label: str, message: str, stream: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    try:
        # soft_wrap: a path or address must survive copying, and a pipe gets one line.
        Console(file=stream).print(Text.assemble((label, "bold red"), " ", message), soft_wrap=True)
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()

"""The umbrella command: what it lists, how it finds a command, and what every ending becomes."""

import signal
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import typer

from peerturb import __version__, cli
from peerturb.errors import DataError, RefusedError, RejectCode, SpecError, UnreachableError


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Return a function that makes an object the command `demo`."""

    def install_one(app: object) -> None:
        module = types.ModuleType("commands_of_the_test")
        module.app = app  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        command = cli.Command(target=f"{module.__name__}:app", summary="Stands in for a command.")
        monkeypatch.setitem(cli.COMMANDS, "demo", command)

    return install_one


def _raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERTURB_DEBUG", raising=False)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["--debug", "--help"]])
def test_help_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"peerturb {__version__}\n"


@pytest.mark.parametrize(
    ("typo", "meant"), [("demmo", "demo"), ("nodes", "node"), ("coordinate", "coordinator"), ("stat", "status")]
)
def test_a_typo_names_the_nearest_command(typo: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([typo]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: there is no command '{typo}'; did you mean `peerturb {meant}`?\n"
    assert printed.out == ""


@pytest.mark.parametrize("word", ["zzzzzz", "--colour"])
def test_an_unknown_word_points_to_the_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([word]) == 2
    assert "`peerturb --help` lists" in capsys.readouterr().err


def test_arguments_reach_a_function(install: Callable[[object], None], capsys: pytest.CaptureFixture[str]) -> None:
    def double(number: int, loud: bool = False) -> None:
        """Print twice the number."""
        print(2 * number, loud)

    install(double)
    assert cli.run(["demo", "21", "--loud"]) == 0
    assert capsys.readouterr().out == "42 True\n"


def test_subcommands_of_an_app_are_reached(
    install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()
    app.command("first")(lambda: print("one"))
    app.command("second")(lambda: print("two"))
    install(app)
    assert cli.run(["demo", "second"]) == 0
    assert capsys.readouterr().out == "two\n"
    assert cli.run(["demo", "secnd"]) == 2
    assert "second" in capsys.readouterr().err


def test_a_wrong_argument_is_a_usage_error(
    install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(_raising(AssertionError("never reached")))
    assert cli.run(["demo", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpecError("run.toml: no model"), 2),
        (DataError("x.jsonl:3: not JSON"), 2),
        (RefusedError(RejectCode.RUN_FULL, "the run has no free slot"), 4),
        (UnreachableError("nobody answers at 10.0.0.1:7700"), 5),
    ],
)
def test_foreseen_errors_are_one_line_and_a_code(
    error: Exception, code: int, install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(_raising(error))
    assert cli.run(["demo"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_long_message_with_brackets_stays_as_it_is(
    install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"cannot read /a/{'very/' * 40}long/path [bold]not markup[/bold]"
    install(_raising(DataError(message)))
    cli.run(["demo"])
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("by_flag", [True, False])
def test_debug_shows_the_traceback(
    by_flag: bool,
    install: Callable[[object], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(_raising(SpecError("no model")))
    if not by_flag:
        monkeypatch.setenv("PEERTURB_DEBUG", "1")
    assert cli.run(["--debug", "demo"] if by_flag else ["demo"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("error: no model\n")


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(_raising(ZeroDivisionError("oops")))
    assert cli.run(["demo"]) == 1
    text = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in text
    assert "bug in peerturb" in text


@pytest.mark.parametrize(("package", "extra"), [("torch", "node"), ("transformers.models", "node"), ("ray", "sim")])
def test_a_missing_extra_is_named(
    package: str, extra: str, install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(_raising(ModuleNotFoundError(f"No module named {package!r}", name=package)))
    assert cli.run(["demo"]) == 1
    text = capsys.readouterr().err
    assert f'pip install "peerturb[{extra}]"' in text
    assert "Traceback" not in text


def test_another_missing_module_is_a_bug(install: Callable[[object], None], capsys: pytest.CaptureFixture[str]) -> None:
    install(_raising(ModuleNotFoundError("No module named 'peerturb_nodes'", name="peerturb_nodes")))
    assert cli.run(["demo"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "pip install" not in text


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), typer.Exit(130)])
def test_ctrl_c_is_a_short_line(
    ending: BaseException, install: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(_raising(ending))
    assert cli.run(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_exit_code_is_passed_on(install: Callable[[object], None]) -> None:
    install(_raising(typer.Exit(3)))
    assert cli.run(["demo"]) == 3


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "import sys; from peerturb import cli; sys.argv = ['peerturb', '--help']; input(); cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    # The pipe has no reader before the program prints its first byte.
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE

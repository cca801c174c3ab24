"""`peerturb demo`: a network of real processes on this computer, from nothing to a fine-tuned model."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

if TYPE_CHECKING:
    from peerturb_node.demo.events import Story
    from peerturb_node.demo.orchestrator import Options

_COLUMNS_MAX = 100
"""The closing page is for reading: wider lines are not easier."""

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for model, log, report and summary.")] = Path("demo-out"),
    nodes: Annotated[int, typer.Option(min=4, max=16, help="Nodes at the start.")] = 4,
    seconds: Annotated[float, typer.Option(min=5, max=3600, help="Longest training.")] = 125.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line; the last one is the summary.")
    ] = False,
    no_chaos: Annotated[bool, typer.Option("--no-chaos", help="Kill nothing in mid-run.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the state folders of all processes.")] = False,
) -> None:
    """Watch four nodes on this computer fine-tune a model together; needs no network.

    In mid-run one node is killed, a new one joins by replaying the log, and the coordinator is killed and restarted.
    """
    from peerturb_node.demo.events import Story
    from peerturb_node.demo.orchestrator import Options

    options = Options(out=out, nodes=nodes, seconds=seconds, has_chaos=not no_chaos, keeps_all=keep)
    raise typer.Exit(play(options, Story(), sys.stdout, as_json=as_json))


def play(options: "Options", story: "Story", stream: TextIO, *, as_json: bool) -> int:
    """Run the demo with the view that fits the stream; return the exit code: 1 if the result is not sound."""
    from rich.console import Console

    from peerturb_node.demo.orchestrator import Demo
    from peerturb_node.demo.signals import run_until_signal
    from peerturb_node.demo.summary import closing_page, is_good, next_lines
    from peerturb_node.demo.view import JsonView, LiveView, PlainView

    console = Console(file=stream)
    view: LiveView | PlainView | JsonView
    if as_json:
        view = JsonView(story, stream)
    elif console.is_terminal:
        view = LiveView(story, console)
    else:
        view = PlainView(story, stream)
    try:
        result = run_until_signal(Demo(options, story, view).run())
    finally:
        # The terminal itself may be what has gone.
        with contextlib.suppress(OSError):
            view.close()
    if as_json:
        stream.write(json.dumps({"event": "summary", **asdict(result.summary)}) + "\n")
    else:
        columns = min(console.width, _COLUMNS_MAX)
        console.print(closing_page(result.summary, result.examples, columns=columns))
        for line in next_lines(result.commands):
            console.print(line, soft_wrap=True)
    return 0 if is_good(result.summary) else 1

"""`peerturb init`: a commented RUN.toml from a few questions, or from flags where there is no terminal."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peerturb.spec import RunSpec
    from peerturb_node.starting.asking import Asker
    from peerturb_node.starting.columns import Columns
    from peerturb_node.starting.talk import Weigh

app = typer.Typer(add_completion=False)


@app.command()
def init(
    model: Annotated[str | None, typer.Option(help="Base model: folder, or name on the hub.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Training data to look at, for its columns; - for none.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="text, completion, labels or classes.", show_default="what fits the data"),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Text or prompt, with the data's columns in braces.", show_default="a column")
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="What follows the prompt and is learned (completion).", show_default="a column")
    ] = None,
    label_field: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Where the label stands (labels, classes).", show_default="a column"),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="VALUE=WORDS", help="Words that stand for a label (labels); once for each."),
    ] = None,
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="VALUE", help="A class, in the head's order (classes); once for each."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N", help="Trained parameters, such as 22.7M.", show_default="the model's")
    ] = None,
    family: Annotated[str | None, typer.Option(help="rank1 or dense.", show_default="rank1")] = None,
    rounds: Annotated[str | None, typer.Option(metavar="N", help="0: until stopped.", show_default="400")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="float32")] = None,
    digest: Annotated[
        str | None, typer.Option(metavar="HEX", help="Of the base weights; the model is not loaded then.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="the model's")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Makes equal runs different.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write.", show_default="RUN.toml")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what suggests itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Ask nothing; print one JSON object.")] = False,
) -> None:
    """Write a commented RUN.toml, what all peers of a run agree on.

    In a terminal it asks what the flags do not say, and suggests answers from the model's configuration and the data's
    columns. Elsewhere the suggestions are taken. The data are looked at, never sent anywhere.
    """
    from peerturb_node.starting.asking import Silent, Terminal, given_or
    from peerturb_node.starting.talk import Given, talk

    is_asking = not (yes or as_json) and sys.stdin.isatty() and sys.stdout.isatty()
    asker: Asker = Terminal() if is_asking else Silent("nobody is asked" if yes or as_json else "there is no terminal")
    given = Given(
        model=model, data=data, objective=objective, template=template, completion=completion, label_field=label_field,
        labels=label or (), classes=class_ or (), size=size, family=family, rounds=rounds, dtype=dtype, digest=digest,
        name=name, seed=seed,
    )  # fmt: skip
    named = None if out is None else _checked(str(out), force=force)  # told before the questions
    answers, source, columns = talk(given, asker, _weigh())
    target = named or given_or(
        asker, None, "File to write", "--out", "RUN.toml", lambda text: _checked(text, force=force)
    )  # fmt: skip

    from peerturb_node.starting.answers import run_text

    text = run_text(answers)
    spec = _proved(text, columns)
    _write(target, text, force=force)
    _report(target, spec, model=source, columns=columns, as_json=as_json)


def _weigh() -> "Weigh | None":
    """Return what loads models; None on the bare install."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        return None

    def weigh(*asked: object) -> tuple[str, int, int | None]:
        from peerturb_node.starting.weighing import weigh as loaded

        return loaded(*asked)  # type: ignore[arg-type]

    return weigh


def _checked(text: str, *, force: bool) -> Path:
    """Return where to write, if that is possible; see `check_new`."""
    from peerturb_node.cli.output import check_new

    path = Path(text.strip())
    if force and path.expanduser().is_file():
        return path.expanduser()
    return check_new(path, remedy="--force writes over it, --out names another")


def _proved(text: str, columns: "Columns | None") -> "RunSpec":
    """Read the text as the coordinator will, and the data by it as a node will.

    Raises:
        DataError: lines that the objective cannot use; each is named.
    """
    import tomllib

    from peerturb.spec import RunSpec
    from peerturb.zo.data import read_examples

    spec = RunSpec.from_document(tomllib.loads(text), source="RUN.toml")
    if columns is not None:
        read_examples(columns.path.expanduser(), spec.objective)
    return spec


def _write(target: Path, text: str, *, force: bool) -> None:
    from peerturb.zo.files import write_file
    from peerturb_node.cli.output import write_new

    def fill(draft: Path) -> None:
        draft.write_text(text + "\n", encoding="utf-8")

    if force:
        write_file(target, fill)
    else:
        write_new(target, text)


def _report(target: Path, spec: "RunSpec", *, model: str, columns: "Columns | None", as_json: bool) -> None:
    """Say what was written and what comes next."""
    import shlex

    serve = f"peerturb coordinator serve {shlex.quote(str(target))}"
    data = "FILE" if columns is None else shlex.quote(str(columns.path))
    join = f"peerturb node run --coordinator 127.0.0.1:7470 --model {shlex.quote(model)} --data {data}"
    tune = f"peerturb tune {shlex.quote(str(target))} --model {shlex.quote(model)} --data {data}"
    if as_json:
        rows = {"file": str(target), "run": spec.name, "run_digest": spec.digest.hex(), "serve": serve, "join": join}
        typer.echo(json.dumps({**rows, "tune": tune}, indent=2))
        return
    typer.echo(
        f"RunSpec written to {target}: {spec.objective.kind} on {spec.model.name}, {spec.perturbation.family}, "
        f"{spec.round.count or 'endless'} rounds, learning rate {spec.step.learning_rate:g}\n\n"
        f"Try it on this computer, in two terminals:\n\n  {serve}\n  {join}\n\n"
        f"A better learning rate, from a sweep of two minutes:\n\n  {tune}"
    )

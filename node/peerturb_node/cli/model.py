"""`peerturb model`: a base model's digest and tensors, and a RUN.toml to start from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peerturb.manifest import Manifest
    from peerturb.spec import ModelSpec

app = typer.Typer(add_completion=False, no_args_is_help=True)

_TENSORS_SHOWN = 40


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_FOLDER", help="Hub name or local folder.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: type of the weights in every replica.")] = "float32",
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Names that stay frozen (*, ?); may be repeated.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="KIND", help="Train an adapter: lora or vera.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Linear layers that get the adapter (default: all); may be repeated."),
    ] = None,
    quantise: Annotated[
        str | None, typer.Option(metavar="KIND", help="Hold the frozen base in few bits: nf4, fp4 or int8.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name to write into RUN.toml.", show_default="the argument")] = None,
    classes: Annotated[
        int, typer.Option(min=0, help='Classes of a classification head (objective.kind = "classes"); 0: none.')
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The RunSpec's seed: a head or adapter follows from it.")] = 0,
    objective: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="What RUN.toml begins with: text, completion or labels."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write RUN.toml here; never over a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's digest, its trainable tensors, and a whole RUN.toml with values that suit its size."""
    from peerturb.errors import SpecError
    from peerturb.manifest import manifest_digest
    from peerturb.presets import KINDS, model_toml, run_toml
    from peerturb.spec import AdapterSpec, ModelSpec
    from peerturb.zo.adapters import attach_adapter
    from peerturb.zo.kinds import Task
    from peerturb.zo.model import base_digest, build_manifest, load_model
    from peerturb.zo.quantised import quantise_base

    if dtype not in ("float32", "bfloat16"):
        raise SpecError(f"--dtype {dtype!r} is neither float32 nor bfloat16")
    if classes == 1:
        raise SpecError("--classes 1: a classification head needs at least two")
    if adapter not in (None, "lora", "vera"):
        raise SpecError(f"--adapter {adapter!r} is neither lora nor vera")
    if quantise not in (None, "nf4", "fp4", "int8"):
        raise SpecError(f"--quantise {quantise!r} is none of nf4, fp4 and int8")
    if quantise is not None and adapter is None:
        raise SpecError("--quantise needs --adapter: quantised weights cannot be trained")
    kind = objective or ("classes" if classes else "text")
    if kind not in KINDS:
        raise SpecError(f"--objective {kind!r} is none of {', '.join(KINDS)}")
    if (kind == "classes") != bool(classes):
        raise SpecError("--objective classes and --classes N belong together: the head has as many outputs")
    if out is not None and out.expanduser().exists():
        raise SpecError(f"{out} exists; give --out another name, or remove it")
    loaded, _ = load_model(name, dtype, task=Task(classes=classes, seed=seed))  # type: ignore[arg-type]
    quantise_base(loaded, quantise)  # type: ignore[arg-type]
    digest = base_digest(loaded, dtype)  # type: ignore[arg-type]
    shown_name = label or (Path(name).name if Path(name).expanduser().is_dir() else name)
    given = None if adapter is None else AdapterSpec(kind=adapter, rank=rank, targets=tuple(target or ("*",)))
    spec = ModelSpec(
        name=shown_name, digest=digest, dtype=dtype, exclude=tuple(exclude or ()), adapter=given, quantise=quantise
    )
    attach_adapter(loaded, spec, seed=seed)
    manifest = build_manifest(loaded, spec)
    total = sum(entry.elements for entry in manifest)
    section = model_toml(spec)
    whole = run_toml(spec, name=Path(shown_name).name, parameters=total, kind=kind, seed=seed, classes=classes)
    if out is not None:
        _write(out.expanduser(), whole)
    if as_json:
        document = _document(spec, manifest, manifest_digest(manifest), type(loaded).__name__)
        typer.echo(json.dumps({**document, "toml": section, "run_toml": whole}, indent=2))
        return
    _show(spec, manifest, type(loaded).__name__)
    if classes:
        typer.echo(f'\nThe digest holds for objective.kind = "classes" with {classes} classes and seed = {seed}')
    typer.echo(f"\n{whole}" if out is None else f"\nRunSpec written to {out}: look at its [objective]")


def _write(path: Path, text: str) -> None:
    from peerturb.errors import SpecError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror or error}") from error


def _document(spec: "ModelSpec", manifest: "Manifest", digest: bytes, kind: str) -> dict[str, Any]:
    return {
        "name": spec.name,
        "class": kind,
        "dtype": spec.dtype,
        "digest": spec.digest,
        "manifest_digest": digest.hex(),
        "parameters": sum(entry.elements for entry in manifest),
        "tensors": [
            {"index": entry.index, "name": entry.name, "shape": list(entry.shape), "kind": entry.kind}
            for entry in manifest
        ],
    }


def _show(spec: "ModelSpec", manifest: "Manifest", kind: str) -> None:
    total = sum(entry.elements for entry in manifest)
    typer.echo(f"{kind}: {total:,} trainable parameters in {len(manifest)} tensors, {spec.dtype}")
    rows = [("#", "tensor", "shape", "kind", "elements")]
    for entry in manifest[:_TENSORS_SHOWN]:
        shape = " x ".join(map(str, entry.shape)) or "scalar"
        rows.append((str(entry.index), entry.name, shape, entry.kind, f"{entry.elements:,}"))
    # Plain lines: a name cut to fit the terminal could not be copied into --exclude, nor the section into RUN.toml.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, name, shape, form, elements in rows:
        typer.echo(
            f"{index:>{widths[0]}}  {name:<{widths[1]}}  {shape:<{widths[2]}}  {form:<{widths[3]}}  "
            f"{elements:>{widths[4]}}"
        )
    if len(manifest) > _TENSORS_SHOWN:
        typer.echo(f"... and {len(manifest) - _TENSORS_SHOWN} more (--json lists all)")

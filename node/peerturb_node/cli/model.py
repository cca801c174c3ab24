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
    label: Annotated[str | None, typer.Option(help="Name to write into RUN.toml.", show_default="the argument")] = None,
    objective: Annotated[
        str, typer.Option(metavar="KIND", help="What RUN.toml begins with: text, completion or labels.")
    ] = "text",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write RUN.toml here; never over a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's digest, its trainable tensors, and a whole RUN.toml with values that suit its size."""
    from peerturb.errors import SpecError
    from peerturb.manifest import manifest_digest
    from peerturb.presets import KINDS, model_toml, run_toml
    from peerturb.spec import ModelSpec
    from peerturb.zo.model import base_digest, build_manifest, load_model

    if dtype not in ("float32", "bfloat16"):
        raise SpecError(f"--dtype {dtype!r} is neither float32 nor bfloat16")
    if objective not in KINDS:
        raise SpecError(f"--objective {objective!r} is none of {', '.join(KINDS)}")
    if out is not None and out.expanduser().exists():
        raise SpecError(f"{out} exists; give --out another name, or remove it")
    loaded, _ = load_model(name, dtype)  # type: ignore[arg-type]
    digest = base_digest(loaded, dtype)  # type: ignore[arg-type]
    shown_name = label or (Path(name).name if Path(name).expanduser().is_dir() else name)
    spec = ModelSpec(name=shown_name, digest=digest, dtype=dtype, exclude=tuple(exclude or ()))
    manifest = build_manifest(loaded, spec)
    total = sum(entry.elements for entry in manifest)
    section = model_toml(spec)
    whole = run_toml(section, name=Path(shown_name).name, parameters=total, kind=objective, dtype=spec.dtype)
    if out is not None:
        _write(out.expanduser(), whole)
    if as_json:
        document = _document(spec, manifest, manifest_digest(manifest), type(loaded).__name__)
        typer.echo(json.dumps({**document, "toml": section, "run_toml": whole}, indent=2))
        return
    _show(spec, manifest, type(loaded).__name__)
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

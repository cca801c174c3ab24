"""`peerturb model`: a base model's digest and tensors, and a RUN.toml to start from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peerturb import limits

if TYPE_CHECKING:
    from peerturb.manifest import Manifest
    from peerturb.noise import Estimator
    from peerturb.spec import ModelSpec
    from peerturb.zo.quantised import Packing

app = typer.Typer(add_completion=False, no_args_is_help=True)

_TENSORS_SHOWN = 40

_ESTIMATORS: "dict[str, tuple[Estimator, ...]]" = {"spsa": ("spsa",), "exact": ("exact",), "both": ("spsa", "exact")}

_SEED_MAX = 2**63 - 1
"""A RunSpec's largest."""


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
        int,
        typer.Option(
            min=0,
            max=limits.CLASSES_MAX,
            help='Classes of a classification head (objective.kind = "classes"); 0: none.',
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option(min=0, max=_SEED_MAX, help="The RunSpec's seed: a head or adapter follows from it.")
    ] = 0,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What RUN.toml begins with: text, completion or labels.",
            show_default="text; completion for an encoder-decoder",
        ),
    ] = None,
    estimators: Annotated[
        str,
        typer.Option(
            metavar="spsa|exact|both", help="What RUN.toml allows: pairs of forward passes, backward passes, or both."
        ),
    ] = "spsa",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write RUN.toml here; never over a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's digest, its trainable tensors, and a whole RUN.toml with values that suit its size."""
    from peerturb_node.cli.output import check_new, write_new

    if estimators not in _ESTIMATORS:
        raise typer.BadParameter(f"{estimators!r} is none of spsa, exact, both", param_hint="--estimators")
    _check(dtype, adapter, target, quantise, objective, classes)
    target_file = None if out is None else check_new(out)
    chosen = {"kind": adapter, "rank": rank, "targets": target or ["*"]} if adapter is not None else None
    allowed = _ESTIMATORS[estimators]
    asked = {"dtype": dtype, "exclude": exclude or [], "adapter": chosen, "quantise": quantise}
    found = _examine(name, label, asked, classes=classes, seed=seed, objective=objective, estimators=allowed)
    if target_file is not None:
        write_new(target_file, found.run_toml)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=2))
        return
    _show(found.spec, found.manifest, found.kind)
    if found.packing is not None:
        typer.echo(f"\n{found.packing.text}")
    if classes:
        typer.echo(f'\nThe digest holds for objective.kind = "classes" with {classes} classes and seed = {seed}')
    typer.echo(f"\n{found.run_toml}" if out is None else f"\nRunSpec written to {out}: look at its [objective]")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is known of a model once it has been loaded."""

    spec: "ModelSpec"
    manifest: "Manifest"
    packing: "Packing | None"
    kind: str
    """Its class."""
    run_toml: str

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        from peerturb.manifest import manifest_digest
        from peerturb.presets import model_toml

        document = _document(self.spec, self.manifest, manifest_digest(self.manifest), self.kind)
        packing = None if self.packing is None else asdict(self.packing)
        return {**document, "quantised": packing, "toml": model_toml(self.spec), "run_toml": self.run_toml}


def _examine(
    name: str,
    label: str | None,
    asked: dict[str, Any],
    *,
    classes: int,
    seed: int,
    objective: str | None,
    estimators: "tuple[Estimator, ...]",
) -> _Found:
    """Load a model and write a RunSpec for it.

    Args:
        name: hub name or folder.
        label: its name in the RunSpec, if another.
        asked: the rest of the section `[model]`, but for the digest.
        classes: of a head; 0 for none.
        seed: the RunSpec's.
        objective: its kind; None: what suits the model.
        estimators: that RUN.toml allows.
    """
    from peerturb.errors import SpecError
    from peerturb.presets import run_toml
    from peerturb.zo.adapters import attach_adapter
    from peerturb.zo.kinds import Task, kind_of, positions_max
    from peerturb.zo.model import base_digest, build_manifest, load_model
    from peerturb.zo.quantised import Packing, quantise_base

    folder = Path(name).expanduser()
    shown_name = label or (folder.resolve().name if folder.is_dir() else name)
    planned, title = {"name": shown_name, **asked}, Path(shown_name).name[: limits.NAME_CHARS_MAX]
    # What no RunSpec accepts is told before the model is loaded.
    dtype = _read(title, seed, {**planned, "digest": "0" * 64}).dtype
    loaded, _ = load_model(name, dtype, task=Task(classes=classes, seed=seed))
    is_written = kind_of(loaded) == "seq2seq"
    if is_written and objective == "text":
        raise SpecError("--objective text: an encoder-decoder is scored on what it writes; use completion or labels")
    kind = objective or ("classes" if classes else "completion" if is_written else "text")
    quantise_base(loaded, asked["quantise"])
    spec = _read(title, seed, {**planned, "digest": base_digest(loaded, dtype)})
    attach_adapter(loaded, spec, seed=seed)
    manifest = build_manifest(loaded, spec)
    whole = run_toml(
        spec, name=title, parameters=sum(entry.elements for entry in manifest), kind=kind, seed=seed, classes=classes,
        estimators=estimators, positions_max=positions_max(loaded),
    )  # fmt: skip
    packing = Packing.of(loaded, {entry.name for entry in manifest})
    return _Found(spec=spec, manifest=manifest, packing=packing, kind=type(loaded).__name__, run_toml=whole)


def _check(
    dtype: str, adapter: str | None, target: list[str] | None, quantise: str | None, objective: str | None, classes: int
) -> None:
    """Refuse options that no model makes right."""
    from peerturb.errors import SpecError
    from peerturb.presets import KINDS

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
    if target and adapter is None:
        raise SpecError("--target needs --adapter: it names the layers that get one")
    if objective is not None and objective not in KINDS:
        raise SpecError(f"--objective {objective!r} is none of {', '.join(KINDS)}")
    if objective is not None and (objective == "classes") != bool(classes):
        raise SpecError("--objective classes and --classes N belong together: the head has as many outputs")


def _read(name: str, seed: int, model: dict[str, Any]) -> "ModelSpec":
    """Return the section `[model]`, or say what of the command line no RunSpec accepts."""
    from peerturb.spec import RunSpec

    return RunSpec.from_document({"name": name, "seed": seed, "model": model}, source="this command line").model


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

"""One file that holds a run's weights and where in the run they stand: safetensors with metadata, written atomically.

The run digest of the weights stands in the metadata and is computed again on loading: a damaged file is noticed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peerturb.errors import LogError, ModelError
from peerturb.manifest import Manifest
from peerturb.zo.digest import run_digest
from peerturb.zo.files import write_file

METADATA_KEY = "peerturb"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """Where the weights of a checkpoint stand. Digests are hexadecimal."""

    spec_digest: str
    """Identity of the run."""
    base_digest: str
    """Weights the run began with."""
    round: int
    """Rounds applied."""
    position: int
    """Length of the local log when it was written: at least the records these weights are made of."""
    chain: str
    """Chain hash of the log at `position`."""
    weights_digest: str = ""
    """Run digest of the weights; filled in on saving."""
    format: int = FORMAT


def save_checkpoint(path: Path, manifest: Manifest, weights: Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Write the trained tensors and `info`; the old file stays until the new one is whole and on disk.

    Raises:
        ModelError: the file cannot be written.
    """
    ordered = [weights[entry.name] for entry in manifest]
    document = asdict(info) | {"weights_digest": run_digest(manifest, ordered).hex(), "format": FORMAT}
    tensors = {entry.name: weight.detach().cpu().contiguous() for entry, weight in zip(manifest, ordered, strict=True)}
    metadata = {METADATA_KEY: json.dumps(document, sort_keys=True)}

    def write(draft: Path) -> None:
        try:
            save_file(tensors, draft, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_file(path, write)


FROM_THE_LOG = "delete it to start from the log"
"""What to do about a checkpoint of a node that cannot be used: what it holds can be replayed."""


def read_info(path: Path, *, remedy: str = FROM_THE_LOG) -> CheckpointInfo:
    """Return where a checkpoint stands, without its weights; `remedy` ends errors.

    Raises:
        ModelError: unreadable, or not a checkpoint of this program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the checkpoint {path}: {error}; {remedy}") from error
    if text is None:
        raise ModelError(f"{path} is not a peerturb checkpoint; {remedy}")
    try:
        document: dict[str, Any] = json.loads(text)
        if document.get("format") != FORMAT:
            text = f"{path} has checkpoint format {document.get('format')}, this program reads {FORMAT}; {remedy}"
            raise ModelError(text)
        return CheckpointInfo(**document)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the metadata of the checkpoint {path} is damaged: {error}; {remedy}") from error


def load_checkpoint(
    path: Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    *,
    spec_digest: str,
    base_digest: str,
    remedy: str = FROM_THE_LOG,
) -> CheckpointInfo:
    """Copy a checkpoint's tensors into `weights`, after every check that can be made before; `remedy` ends errors.

    Raises:
        LogError: it belongs to another run or other base weights. `weights` is as it was.
        ModelError: unreadable, other tensors, or its digest does not fit. In the last case `weights` may be anything.
    """
    info = read_info(path, remedy=remedy)
    if info.spec_digest != spec_digest:
        text = f"the checkpoint {path} belongs to run {info.spec_digest[:12]}, this is {spec_digest[:12]}; {remedy}"
        raise LogError(text)
    if info.base_digest != base_digest:
        raise LogError(
            f"the checkpoint {path} started from base weights {info.base_digest[:12]}, this run from "
            f"{base_digest[:12]}; {remedy}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            _check_tensors(path, file, manifest, weights)
            with torch.no_grad():
                for entry in manifest:
                    weights[entry.name].copy_(file.get_tensor(entry.name))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the checkpoint {path}: {error}; {remedy}") from error
    found = run_digest(manifest, [weights[entry.name] for entry in manifest]).hex()
    if found != info.weights_digest:
        raise ModelError(
            f"the checkpoint {path} is damaged: its weights have digest {found[:12]}, its metadata says "
            f"{info.weights_digest[:12]}; {remedy}"
        )
    return info


def _check_tensors(path: Path, file: Any, manifest: Manifest, weights: Mapping[str, Tensor]) -> None:
    stored = set(file.keys())
    for entry in manifest:
        weight = weights[entry.name]
        if entry.name not in stored:
            raise ModelError(f"the checkpoint {path} lacks the tensor {entry.name}")
        shape = tuple(file.get_slice(entry.name).get_shape())
        dtype = file.get_tensor(entry.name).dtype
        if shape != entry.shape or dtype != weight.dtype:
            raise ModelError(
                f"the tensor {entry.name} of the checkpoint {path} is {dtype} {shape}, the model's is "
                f"{weight.dtype} {entry.shape}"
            )

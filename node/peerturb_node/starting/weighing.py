"""Loads a base model for what only its weights tell: digest, trained parameters, longest sequence. Needs torch."""

from peerturb.manifest import DType
from peerturb.spec import ModelSpec
from peerturb.zo.kinds import Task, positions_max
from peerturb.zo.model import base_digest, build_manifest, load_model
from peerturb_node.starting.base import Base


def weigh(base: Base, dtype: DType, classes: int, seed: int) -> tuple[str, int, int | None]:
    """Load a model and measure it.

    Args:
        base: where it lies.
        dtype: of the weights in the run.
        classes: outputs of a classification head; 0: none.
        seed: of the run, from which a head follows that the files lack.

    Returns:
        The base weights' digest in hexadecimal, how many parameters are trained, the longest sequence it was made for.

    Raises:
        ModelError: it cannot be loaded.
    """
    model, _ = load_model(base.source, dtype, task=Task(classes=classes, seed=seed))
    digest = base_digest(model, dtype)
    manifest = build_manifest(model, ModelSpec(name=base.name, digest=digest, dtype=dtype))
    return digest, sum(entry.elements for entry in manifest), positions_max(model)

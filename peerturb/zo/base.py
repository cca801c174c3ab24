"""The base model of a run as every replica starts from it: loaded, quantised, compared with the RunSpec, adapted.

It puts the steps in their one order; each is another module's subject.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peerturb.errors import RefusedError, RejectCode
from peerturb.spec import RunSpec
from peerturb.zo.adapters import attach_adapter
from peerturb.zo.kinds import Task
from peerturb.zo.model import base_digest, load_model
from peerturb.zo.quantised import quantise_base


def load_base(
    source: str | Path, spec: RunSpec, *, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load and quantise as the RunSpec says; return model, tokenizer and the base digest found, hexadecimal.

    Raises:
        ModelError: the model cannot be loaded or quantised.
    """
    model, tokenizer = load_model(source, spec.model.dtype, task=Task.of(spec), device=device)
    quantise_base(model, spec.model.quantise)
    return model, tokenizer, base_digest(model, spec.model.dtype)


def open_base(
    source: str | Path, spec: RunSpec, *, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the run's base model and attach its adapter, if it has one: the weights before round 0.

    Args:
        source: folder or hub name, which need not be the RunSpec's.
        spec: the run's.

    Raises:
        ModelError: see `load_base`; besides, the adapter does not fit.
        RefusedError: the base weights are not the run's; the message has both digests.
    """
    model, tokenizer, digest = load_base(source, spec, device=device)
    check_base(spec, digest, holder=repr(str(source)), remedy="get the same model, or name its folder with --model")
    attach_adapter(model, spec.model, seed=spec.seed)
    return model, tokenizer


def check_base(spec: RunSpec, digest: str, *, holder: str, remedy: str) -> None:
    """Refuse base weights that are not the run's.

    Args:
        spec: the run's.
        digest: of the base weights found, hexadecimal.
        holder, remedy: who has them, and what to do about it, for the message.

    Raises:
        RefusedError: they differ; the message has both digests.
    """
    if digest != spec.model.digest:
        raise RefusedError(
            RejectCode.MODEL_MISMATCH,
            f"the base weights differ: the run wants {spec.model.name!r} with digest {spec.model.digest} "
            f"({spec.model.dtype}), {holder} has {digest}; {remedy}",
        )

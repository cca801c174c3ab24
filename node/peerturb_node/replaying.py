"""Base model + log = fine-tuned model, offline: what `peerturb log replay` and `export` do."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from peerturb.errors import LogError, RefusedError, RejectCode, SpecError
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import LogEnd, read_entries
from peerturb.zo.export import export_model
from peerturb.zo.kinds import Task
from peerturb.zo.model import base_digest, build_manifest, load_model, trainable_weights
from peerturb.zo.replay import replay
from peerturb_node.compute.torch_compute import choose_device, mismatch
from peerturb_node.logsource import warn_of_torn_tail


def replay_log(
    path: Path, *, model: str | None, until: int | None, out: Path | None, device: str, show_progress: bool
) -> dict[str, Any]:
    """Replay a log file onto its base model; return rounds, digest and where the model was written.

    Raises:
        LogError: the log is damaged, illegal, or does not fit the weights.
        SpecError: the log ends before `until`.
        ModelError: the model cannot be loaded or written.
        RefusedError: the base weights are not the run's.
    """
    ledger = Ledger()
    sealed: list[RoundSealed] = []
    end = LogEnd()
    for _, record in read_entries(path, end):
        ledger.apply(record)
        if isinstance(record, RoundSealed):
            sealed.append(record)
    warn_of_torn_tail(path, end)
    spec = ledger.spec
    if spec is None:
        raise LogError(f"{path}: the log is empty: it has no whole record")
    if until is not None and until > len(sealed):
        raise SpecError(f"--until {until}: the log has only {len(sealed)} sealed rounds")
    source = model or spec.model.name
    loaded, tokenizer = load_model(source, spec.model.dtype, task=Task.of(spec), device=choose_device(device))
    digest = base_digest(loaded, spec.model.dtype)
    if digest != spec.model.digest:
        raise RefusedError(RejectCode.MODEL_MISMATCH, mismatch(spec, source, digest))
    manifest = build_manifest(loaded, spec.model)
    weights = list(trainable_weights(loaded, manifest).values())
    total = len(sealed) if until is None else min(until, len(sealed))
    console = Console(file=sys.stderr)
    shown = Progress(console=console, transient=True) if show_progress and console.is_terminal else nullcontext()
    with shown as bar:
        task = None if bar is None else bar.add_task("replaying", total=total)

        def advance(rounds: int) -> None:
            if bar is not None and task is not None:
                bar.update(task, completed=rounds)

        final = replay(sealed, weights, manifest, spec, until_round=until, progress=advance, doubt=_warn)
    if out is not None:
        export_model(loaded, tokenizer, out.expanduser())
    return {"rounds": total, "digest": final.hex(), "out": None if out is None else str(out)}


def _warn(why: str) -> None:
    print(f"peerturb: {why}; `--until` stops before a round", file=sys.stderr)

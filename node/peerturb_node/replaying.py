"""Base model + log = fine-tuned model, offline: what `peerturb log replay` and `export` do."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from peerturb.errors import LogError, SpecError
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import LogEnd, read_entries
from peerturb.zo.adapter_files import export_adapter, merge_adapter
from peerturb.zo.base import open_base
from peerturb.zo.export import export_model
from peerturb.zo.model import build_manifest, trainable_weights
from peerturb.zo.replay import replay
from peerturb_node.compute.prepared import choose_device
from peerturb_node.logsource import warn_of_torn_tail


def replay_log(
    path: Path,
    *,
    model: str | None,
    until: int | None,
    out: Path | None,
    merge: bool = False,
    device: str,
    show_progress: bool,
) -> dict[str, Any]:
    """Replay a log file onto its base model; return rounds, digest and where the model was written.

    Args:
        path: the log file.
        model: folder or hub name of the base model, if not the RunSpec's.
        until: stop after so many rounds.
        out: folder for the model, or for the adapter of a run that trains one.
        merge: put the adapter into the base weights and write the whole model.
        device: where to replay.
        show_progress: draw a bar where standard error is a terminal.

    Raises:
        LogError: the log is damaged, illegal, or does not fit the weights.
        SpecError: the log ends before `until`, or there is no adapter to merge.
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
    if merge and spec.model.adapter is None:
        raise SpecError(f"--merge: the run {spec.name} trains the model itself, there is no adapter to merge")
    source = model or spec.model.name
    loaded, tokenizer = open_base(source, spec, device=choose_device(device))
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
    if out is not None and spec.model.adapter is not None and not merge:
        export_adapter(loaded, spec, out.expanduser())
    elif out is not None:
        if merge:
            merge_adapter(loaded)
        export_model(loaded, tokenizer, out.expanduser())
    return {"rounds": total, "digest": final.hex(), "out": None if out is None else str(out)}


def _warn(why: str) -> None:
    print(f"peerturb: {why}; `--until` stops before a round", file=sys.stderr)

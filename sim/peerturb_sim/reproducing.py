"""What `peerturb sim reproduce` does: reads log and trace, gives each peer its data, makes the log again, compares."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peerturb.errors import DataError, SpecError
from peerturb.ids import PeerKey
from peerturb.protocol.ledger import Ledger, Member
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.writer import LogWriter
from peerturb.spec import RunSpec
from peerturb_coordinator.trace_format import ContributionLine, EvaluationLine, HelloLine, Start
from peerturb_sim.assigning import assign
from peerturb_sim.compare import Comparison, compare_logs, lines, log_records
from peerturb_sim.reproduction import Reproduction
from peerturb_sim.running import Display
from peerturb_sim.scenario import RealSpec
from peerturb_sim.simulation import LOG_NAME
from peerturb_sim.trace import Trace, TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """What the nodes of a run had besides its RunSpec."""

    model: str | None
    """Folder or hub name of the base model; None: the RunSpec's."""
    data: Sequence[str]
    """FILE, or PEER=FILE; see `assign`."""
    eval: Path | None
    """Held-out data of those that evaluated."""
    threads: int
    """0: torch decides."""
    rows: int
    """0: the engine decides."""
    compute_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A recorded log, as far as it is needed before its records are made again."""

    spec: RunSpec
    members: list[Member]
    """By slot, as at the log's end."""
    rounds: int

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        """Fold it.

        Raises:
            LogError: it cannot be read, or is damaged.
        """
        ledger = Ledger.fold(record for _, record in log_records(path))
        assert ledger.spec is not None
        return cls(spec=ledger.spec, members=ledger.members, rounds=ledger.sealed_rounds)


def reproduce(log: Path, trace_file: Path, local: Local, *, out: Path, as_json: bool) -> int:
    """Make a recorded run's log again and say whether it is the same; return the exit code, 0 if it is.

    Raises:
        TraceError: the trace cannot be used, or ends before the log does.
        LogError: the recorded log is damaged.
        SpecError: `out` cannot be used.
        DataError: a peer has no data, or names do not fit.
        ModelError, RefusedError: the model cannot be loaded, or is not the run's.
    """
    recorded = Recorded.read(log)
    trace = Trace(trace_file, recorded.spec)
    section = _section(recorded, trace, local)
    from peerturb_sim.torch_compute import TorchCompute  # torch: seconds, not before all that needs none is checked

    target = _target(out, log)
    began_s = time.monotonic()
    made = Reproduction(recorded.spec, TorchCompute(section, recorded.spec), trace).records()
    _write(target, log, made, recorded.rounds)
    found = compare_logs(log, target)
    if found.outcome == "first goes on":
        raise TraceError(
            trace.path,
            trace.lines,
            f"the trace ends after record {found.equal_records - 1} of the log ({found.equal_rounds} sealed rounds, "
            f"all equal so far), {log} goes on with {found.extra_records} records: the coordinator ended the trace "
            "earlier (it warned of it), or this is not the whole file",
        )
    report = _report(found, log, target, trace, seconds=time.monotonic() - began_s)
    _say(report if as_json else None, found, (str(log), str(target)))
    return found.exit_code


def _section(recorded: Recorded, trace: Trace, local: Local) -> RealSpec:
    """Read the trace once, for its faults and for who gave what; return what to compute with."""
    givers, line = _givers(trace)
    if trace.torn_bytes:
        sys.stderr.write(
            f"{trace.path}: the last {trace.torn_bytes} bytes are a line that was not written whole; it is left out\n"
        )
    if line is not None and local.eval is None:
        raise DataError(f"{trace.path}:{line}: a peer evaluated: name its held-out file with --eval")
    files = assign(local.data, recorded.members, givers)
    threads = local.threads
    if not threads:
        import torch

        threads = torch.get_num_threads()
    document = {
        "kind": "torch", "model": local.model or recorded.spec.model.name, "data": tuple(map(str, files)),
        "eval": "" if local.eval is None else str(local.eval), "threads": threads, "rows": local.rows,
        "compute_dtype": local.compute_dtype,
    }  # fmt: skip
    try:
        return RealSpec.model_validate(document)
    except ValidationError as error:
        (row, *_) = error.errors(include_url=False)
        flag = str(row["loc"][0]).replace("_", "-")
        raise SpecError(f"--{flag}: {row['msg']} (given: {row['input']!r})") from error


def _givers(trace: Trace) -> tuple[set[PeerKey], int | None]:
    """Return the identities that contributed, and the line of the first evaluation."""
    keys: dict[int, PeerKey] = {}
    givers: set[PeerKey] = set()
    evaluated: int | None = None
    for row in trace.rows():
        match row.input:
            case Start():
                keys.clear()
            case HelloLine(session=session, key=key):
                keys[session] = PeerKey(bytes.fromhex(key))
            case ContributionLine(session=session) if session in keys:
                givers.add(keys[session])
            case EvaluationLine() if evaluated is None:
                evaluated = row.line
    return givers, evaluated


def _target(out: Path, log: Path) -> Path:
    """Return the file for the log to be made; one that is there is replaced, unless it is the recorded one."""
    target = out / LOG_NAME
    recorded = log / LOG_NAME if log.is_dir() else log
    try:
        out.mkdir(parents=True, exist_ok=True)
        if target.exists() and recorded.exists() and target.samefile(recorded):
            raise SpecError(f"--out {out}: it holds the recorded log, which would be replaced; name another folder")
        target.unlink(missing_ok=True)
    except OSError as error:
        raise SpecError(f"--out {out}: {error.strerror}; name a folder that can be written to") from error
    return target


def _write(target: Path, log: Path, made: Iterator[tuple[bytes, Record]], rounds: int) -> None:
    """Write records until the recorded log ends or differs; nothing after a difference could be equal."""
    with LogWriter.open(target) as writer, Display() as display:
        # The recorded log first: where it ends nothing more is asked for.
        for (wanted, _), (payload, record) in zip(log_records(log), made, strict=False):
            writer.append_payload(payload)
            if isinstance(record, RoundSealed):
                display.show(f"round {record.round + 1}/{rounds}, loss {record.loss:.4g}")
            if payload != wanted:
                break


def _report(found: Comparison, log: Path, target: Path, trace: Trace, *, seconds: float) -> dict[str, Any]:
    return found.document() | {
        "recorded": str(log),
        "reproduced": str(target),
        "bytes": target.stat().st_size,
        "trace_lines": trace.lines,
        "seconds": round(seconds, 3),
    }


def _say(report: dict[str, Any] | None, found: Comparison, names: tuple[str, str]) -> None:
    if report is not None:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    for line in lines(found, names):
        sys.stdout.write(f"{line}\n")

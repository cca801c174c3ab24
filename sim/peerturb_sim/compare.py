"""`peerturb sim compare`: where two run logs part. Byte by byte, so two logs that are equal here have equal chains."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from peerturb.errors import LogError, PeerturbError
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.fold import describe
from peerturb.wire.errors import WireError
from peerturb.wire.records import RecordDecoder
from peerturb_node.folder import log_path
from peerturb_node.logsource import DATABASE_FILE, Source
from peerturb_sim.differences import Difference, difference
from peerturb_sim.simulation import LOG_NAME

Outcome = Literal["equal", "different", "first goes on", "second goes on"]

EXIT_EQUAL, EXIT_DIFFERENT, EXIT_UNUSABLE = 0, 1, 2
"""As `cmp` and `diff` end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two logs have in common, and where they part."""

    outcome: Outcome
    """One that goes on where the other ends, all before equal, is the same run seen for longer."""
    equal_records: int
    equal_rounds: int
    """Sealed rounds among the equal records."""
    difference: Difference | None = None
    """Of record number `equal_records`, if the outcome is "different"."""
    records: tuple[str, str] | None = None
    """That record in both logs, a line each."""
    extra_records: int = 0
    extra_rounds: int = 0
    """What the longer log has beyond the other's end."""

    @property
    def exit_code(self) -> int:
        """0 if the logs are equal, 1 otherwise."""
        return EXIT_EQUAL if self.outcome == "equal" else EXIT_DIFFERENT

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def compare_logs(first: Path, second: Path) -> Comparison:
    """Compare two logs: files, coordinators' data folders, or folders that a node or simulation left its log in.

    Raises:
        LogError: one cannot be read, is damaged before the first difference, or holds no record. Its exit code is 2.
    """
    try:
        return compare(log_records(first), log_records(second))
    except PeerturbError as error:
        error.exit_code = EXIT_UNUSABLE
        raise


def compare(first: Iterable[tuple[bytes, Record]], second: Iterable[tuple[bytes, Record]]) -> Comparison:
    """Compare two logs record by record, up to the first difference; only of a longer one is the rest read.

    Args:
        first, second: (bytes, record) in log order.
    """
    records = rounds = 0
    ours, theirs = iter(first), iter(second)
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None:
            longer: Outcome = "second goes on" if one is None else "first goes on"
            rest = [one or other, *ours, *theirs]
            return Comparison(
                outcome=longer,
                equal_records=records,
                equal_rounds=rounds,
                extra_records=len(rest),
                extra_rounds=sum(row is not None and isinstance(row[1], RoundSealed) for row in rest),
            )
        if one[0] != other[0]:
            return Comparison(
                outcome="different",
                equal_records=records,
                equal_rounds=rounds,
                difference=difference(one[1], other[1]),
                records=(describe(one[1]), describe(other[1])),
            )
        records += 1
        rounds += isinstance(one[1], RoundSealed)
    return Comparison(outcome="equal", equal_records=records, equal_rounds=rounds)


def log_records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield the records of a log, as their bytes and decoded; `path` as in `compare_logs`.

    Raises:
        LogError: it cannot be read, is damaged, or holds no record.
    """
    inside = [file for file in (path / LOG_NAME, log_path(path)) if file.is_file()]
    if path.is_dir() and not inside and not (path / DATABASE_FILE).is_file():
        raise LogError(
            f"the folder {path} holds no log: neither {LOG_NAME} (of `peerturb sim run`), {log_path(path).name} (of a "
            f"node's run) nor {DATABASE_FILE} (a coordinator's data folder); name the folder of a run, or a log file"
        )
    source = Source.of(
        inside[0] if inside else path, coordinator=None, token_file=None, fingerprint="", is_insecure=False
    )
    decoder, position = RecordDecoder(), -1
    for position, payload in enumerate(source.payloads()):
        try:
            yield payload, decoder.decode(payload)
        except WireError as error:
            raise LogError(f"{path}: record {position}: {error.why}") from error
    if position < 0:
        raise LogError(f"{path} holds no whole record: there is nothing in it")


def lines(found: Comparison, names: tuple[str, str]) -> Iterator[str]:
    """Say it for people; `names` are those of the two logs."""
    same = f"{found.equal_records} records, {found.equal_rounds} sealed rounds"
    if found.outcome == "equal":
        yield f"equal: {same}"
        return
    if found.difference is None:
        longer, shorter = names if found.outcome == "first goes on" else names[::-1]
        yield (
            f"{shorter} is the beginning of {longer}: {same} are equal, then {longer} goes on with "
            f"{found.extra_records} records, {found.extra_rounds} of them sealed rounds"
        )
        return
    row, records = found.difference, found.records
    assert records is not None
    where = "" if row.round is None else f", round {row.round}"
    yield f"different from record {found.equal_records} on{where}; before it {same} are equal"
    width = max(map(len, names))
    for name, value, text in zip(names, (row.first, row.second), records, strict=True):
        yield f"  {name:<{width}}  {row.place}: {_text(value)}"
        yield f"  {'':<{width}}  in: {text if len(text) <= 300 else text[:297] + '...'}"
    if row.others:
        yield f"  also different: {', '.join(row.others)}"
    yield f"  {row.meaning}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    # Nine digits tell all f32 values apart.
    return f"{value:.9g}" if isinstance(value, float) else str(value)

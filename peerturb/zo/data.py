"""Read a node's private examples: JSON Lines (also gzipped) or one plain text, and draw each round's share of them.

Every fault in a file is found here, before training, with file and line number. Knows nothing of tokens or models.
"""

import gzip
import json
import string
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec, template_fields

Item = TypeVar("Item")

FAULTS_SHOWN_MAX = 10
"""Bad lines listed in one error."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
"""Files read as one text instead of one JSON object a line."""

DRAW_KEY = 0x7065657274757262
"""Keeps the draw's Philox key apart from the perturbations' ("peerturb" in ASCII)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of data, its templates filled in."""

    prompt: str
    """The text itself (`text`), or what comes before the part that is scored."""
    completion: str = ""
    """Scored continuation (`completion` only)."""
    label: str = ""
    """Label value as text (`labels` and `classes` only)."""
    where: str
    """File and line, for messages."""


def read_examples(path: Path, objective: ObjectiveSpec) -> list[Example]:
    """Read a data file and fill the objective's templates.

    Raises:
        DataError: no such file, bad lines (the first ten are listed), fields missing, labels unknown, nothing in it.
    """
    _check_templates(objective)
    if path.suffix.lower() in TEXT_SUFFIXES:
        return [_plain_text(path, objective)]
    examples: list[Example] = []
    faults: list[str] = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            examples.append(_fill(_parse(line), objective, f"{path}:{number}"))
        except DataError as error:
            faults.append(f"{path}:{number}: {error}")
    if faults:
        raise DataError(faults_message(path, faults))
    if not examples:
        raise DataError(f"{path} has no examples; one JSON object a line is expected")
    return examples


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a data file's JSON objects as they are, before any template.

    Raises:
        DataError: no such file, bad lines (the first ten are listed), nothing in it.
    """
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, line in _lines(path):
        if line.strip():
            try:
                rows.append(_parse(line))
            except DataError as error:
                faults.append(f"{path}:{number}: {error}")
    if faults:
        raise DataError(faults_message(path, faults))
    if not rows:
        raise DataError(f"{path} has no examples; one JSON object a line is expected")
    return rows


def faults_message(path: Path | str, faults: list[str]) -> str:
    """List the first faults of a file, one a line."""
    shown = "\n  ".join(faults[:FAULTS_SHOWN_MAX])
    rest = len(faults) - FAULTS_SHOWN_MAX
    more = f"\n  and {rest} more" if rest > 0 else ""
    return f"{path} has {len(faults)} bad line{'s' if len(faults) > 1 else ''}:\n  {shown}{more}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of a plain or gzipped file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = f" after line {number}" if number else ""
        raise DataError(f"cannot read {path}{where}: {reason}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"a JSON object is expected, not {type(value).__name__}")
    return value


def _fill(fields: dict[str, Any], objective: ObjectiveSpec, where: str) -> Example:
    prompt = render(objective.template, fields)
    if objective.kind == "completion":
        completion = render(objective.completion, fields)
        if not completion:
            raise DataError("the completion is empty")
        return Example(prompt=prompt, completion=completion, where=where)
    if objective.kind in ("labels", "classes"):
        label = text_of(fields, objective.label_field)
        known = objective.labels if objective.kind == "labels" else objective.classes
        if label not in known:
            raise DataError(f"label {label!r} is not one of {', '.join(map(repr, known))}")
        return Example(prompt=prompt, label=label, where=where)
    if not prompt.strip():
        raise DataError("the text is empty")
    return Example(prompt=prompt, where=where)


def _fields(template: str) -> list[str]:
    """Return the fields a template names.

    Raises:
        DataError: unbalanced braces, or anything but a plain name between them.
    """
    try:
        return template_fields(template)
    except ValueError as error:
        raise DataError(f"the template {template!r} is wrong: {error}") from error


def render(template: str, fields: dict[str, Any]) -> str:
    """Fill a checked template.

    Raises:
        DataError: a field is missing or is neither text nor a number.
    """
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field is not None:
            parts.append(text_of(fields, field))
    return "".join(parts)


def text_of(fields: dict[str, Any], name: str) -> str:
    """Return a field as templates and labels read it.

    Raises:
        DataError: it is missing, or neither text nor a number.
    """
    if name not in fields:
        raise DataError(f"the field {name!r} is missing; the line has {', '.join(map(repr, fields)) or 'none'}")
    value = fields[name]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    raise DataError(f"the field {name!r} must be text or a number, not {type(value).__name__}")


def _check_templates(objective: ObjectiveSpec) -> None:
    fields = _fields(objective.template)
    if objective.kind == "completion":
        fields += _fields(objective.completion)
    if not fields:
        raise DataError(f"the template {objective.template!r} names no field; write for instance {{text}}")


def _plain_text(path: Path, objective: ObjectiveSpec) -> Example:
    if objective.kind != "text":
        raise DataError(f'{path}: a plain text serves objective.kind = "text" only; give a .jsonl file')
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start + 1} of the file)") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return Example(prompt=text, where=str(path))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most so many items, spread over all of them: the first ones of a sorted file stand for one label."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


class Draw:
    """Which examples each probe of each round sees: a fresh permutation every epoch, the same on every machine.

    The order is a function of (run key, slot, epoch): Philox words, sorted. A probe's examples are always distinct.

    Args:
        total: number of sequences to draw from.
        per_probe: sequences each probe is measured on.
        probes_max: most probes of a round with examples of their own; fixes where the next round goes on.

    Raises:
        DataError: fewer sequences than one probe needs.
    """

    def __init__(self, *, run_key: int, slot: int, total: int, per_probe: int, probes_max: int) -> None:
        if total < per_probe:
            raise DataError(f"the data has {total} sequences, a probe needs {per_probe} (objective.examples_per_probe)")
        self._key = run_key | slot << 32
        self._total = total
        self._per_probe = per_probe
        self._probes_max = probes_max
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def indices(self, round_number: int, sample: int) -> NDArray[np.int64]:
        """Return the sequence numbers of one probe: [per_probe], distinct."""
        groups = self._total // self._per_probe
        epoch, group = divmod(round_number * self._probes_max + sample, groups)
        if epoch != self._epoch:
            words = np.random.Philox(key=[self._key, DRAW_KEY], counter=[0, 0, 0, epoch]).random_raw(self._total)
            self._order = np.argsort(words, kind="stable")
            self._epoch = epoch
        return self._order[group * self._per_probe : (group + 1) * self._per_probe]

"""Looks at a data file's columns and proposes an objective for them: templates, label column, label values.

Guesses only what a person would see at once, and says nothing where it cannot tell. Knows no model.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerturb import limits
from peerturb.errors import DataError
from peerturb.spec import template_fields
from peerturb_node.starting.base import near_name

TEXT_NAMES = ("text", "sentence", "content", "body", "review", "document", "prompt", "question", "instruction", "input")
ANSWER_NAMES = ("completion", "answer", "response", "output", "summary", "translation", "target")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "stars", "intent", "topic")
"""Names that columns have in many data sets, the likelier first."""

VALUES_MAX = 64
"""Different values above which a column names no labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What one field of the lines looks like."""

    name: str
    is_text: bool
    """Every line has text there."""
    chars: float
    """Mean length as text."""
    values: tuple[str, ...]
    """Its different values as text, in order, numbers by size; none if there are more than VALUES_MAX."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A data file as far as the objective cares."""

    path: Path
    lines: int
    """0 for a plain text."""
    columns: tuple[Column, ...]
    """The fields that every line has."""

    @property
    def names(self) -> list[str]:
        """The columns' names, in the order of the file's first line."""
        return [column.name for column in self.columns]

    def column(self, name: str) -> Column:
        """Return a column.

        Raises:
            DataError: there is none of that name; a similar one is suggested.
        """
        for column in self.columns:
            if column.name == name:
                return column
        near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{self.path} has no column {name!r} in every line; it has {_listed(self.names)}{hint}")

    def check(self, template: str) -> None:
        """Refuse a template that the file cannot fill.

        Raises:
            DataError: it names no column, or one that is not there.
        """
        try:
            fields = template_fields(template)
        except ValueError as error:
            raise DataError(f"the template {template!r} is wrong: {error}") from error
        if not fields:
            raise DataError(f"the template {template!r} names no column; put one in braces: {_listed(self.names)}")
        for field in fields if self.lines else ():
            self.column(field)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An objective that seems to fit."""

    kind: str
    template: str
    completion: str = " {answer}"
    label_field: str = "label"


def look_at_data(path: Path) -> Columns:
    """Read a data file once and describe its columns; a plain text has none.

    Raises:
        DataError: no such file (a similar name is suggested), or bad lines.
    """
    from peerturb.zo.data import TEXT_SUFFIXES, read_rows

    whole = path.expanduser()
    if not whole.is_file():
        raise DataError(f"there is no data file {str(path)!r}{near_name(whole)}")
    if whole.suffix.lower() in TEXT_SUFFIXES:
        return Columns(path=path, lines=0, columns=())
    rows = read_rows(whole)
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return Columns(path=path, lines=len(rows), columns=tuple(_column(name, rows) for name in shared))


def propose(data: Columns, *, suits: str, kind: str | None = None) -> Proposal:
    """Return an objective for the columns.

    Args:
        data: what `look_at_data` found.
        suits: what the model can be trained for: `decoder`, `encoder` or `seq2seq`.
        kind: the objective's, if it is settled.
    """
    label, answer = _label(data), _named(data, ANSWER_NAMES)
    if kind is None:
        kind = _kind(suits, has_label=label is not None, has_answer=answer is not None)
    apart = {"labels": label, "classes": label, "completion": answer}.get(kind)
    text = _text_template(data, apart)
    if kind == "labels":
        text += "\nAnswer:"
    return Proposal(
        kind=kind,
        template=text,
        completion=f" {{{answer or 'answer'}}}",
        label_field=label or "label",
    )


def _kind(suits: str, *, has_label: bool, has_answer: bool) -> str:
    if suits == "encoder":
        return "classes"
    if has_label:
        return "labels"
    return "completion" if has_answer or suits == "seq2seq" else "text"


def _label(data: Columns) -> str | None:
    """Name the column of labels: by its name, or because only a few short values stand in it."""
    few = [column for column in data.columns if 2 <= len(column.values) <= min(VALUES_MAX, limits.CLASSES_MAX)]
    named = [column.name for wanted in LABEL_NAMES for column in few if column.name.lower() == wanted]
    rare = [column.name for column in few if column.chars <= 32 and data.lines >= 5 * len(column.values)]
    return next(iter([*named, *rare]), None)


def _text_template(data: Columns, apart: str | None) -> str:
    texts = [column for column in data.columns if column.is_text and column.name != apart]
    named = [column.name for wanted in TEXT_NAMES for column in texts if column.name.lower() == wanted]
    longest = [column.name for column in sorted(texts, key=lambda column: -column.chars)]
    chosen = next(iter([*named, *longest]), "text")
    return f"{{{chosen}}}"


def _named(data: Columns, names: Sequence[str]) -> str | None:
    return next((column.name for wanted in names for column in data.columns if column.name.lower() == wanted), None)


def _column(name: str, rows: Sequence[dict[str, Any]]) -> Column:
    from peerturb.zo.data import text_of

    values: set[str] = set()
    chars = 0
    for row in rows:
        try:
            text = text_of(row, name)
        except DataError:  # a list or an object: no template can use it, so it is no candidate either
            return Column(name=name, is_text=False, chars=0.0, values=())
        chars += len(text)
        if len(values) <= VALUES_MAX:
            values.add(text)
    found = sorted(values, key=_by_size) if len(values) <= VALUES_MAX else []
    is_text = all(isinstance(row[name], str) for row in rows)
    return Column(name=name, is_text=is_text, chars=chars / len(rows), values=tuple(found))


def _by_size(value: str) -> tuple[float, str]:
    """Sort numbers as numbers, before all else: a head's classes are in this order."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"

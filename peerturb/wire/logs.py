"""The form that coordinator and node give their log: JSON for machines, colour for people, the same names in both.

A line has `time` (UTC, ISO 8601), `level`, `event` and what is bound: `run`, and `round` and `slot` where known.
"""

import logging
import math
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog

FIRST = ("time", "level", "event", "run", "round", "slot")
"""Keys that stand first in a line, in this order."""

LEVELS = ("debug", "info", "warning", "error")

Line = MutableMapping[str, Any]


def open_log(stream: TextIO, *, as_json: bool, level: str) -> Any:
    """Return a structlog logger that writes to one stream.

    Args:
        stream: where lines go.
        as_json: one JSON object a line; otherwise a line for people, in colour on a terminal.
        level: least level that is written, one of `LEVELS`.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer(separators=(",", ":"), allow_nan=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=24, timestamp_key="time")
    )
    return structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            _stamp,
            structlog.processors.format_exc_info,
            _presentable,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )


def is_written(level: str, least: str) -> bool:
    """Return whether a line of one level is written where another is the least."""
    return LEVELS.index(level) >= LEVELS.index(least)


def iso_time(at_s: float) -> str:
    """Write seconds since 1970 as UTC with milliseconds: equally long, so that text sorts as time does."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _stamp(_logger: Any, _method: str, line: Line) -> Line:
    """Add the time, unless the line has that of its event."""
    line.setdefault("time", iso_time(datetime.now(UTC).timestamp()))
    return line


def _presentable(_logger: Any, _method: str, line: Line) -> Line:
    """Put what every line has first, and null for numbers that JSON cannot carry."""
    ordered = {key: line[key] for key in FIRST if key in line} | dict(line)
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in ordered.items()
    }

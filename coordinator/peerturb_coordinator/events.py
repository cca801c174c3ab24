"""What the coordinator tells its operator: one stream of events, as JSON for machines or as lines for people.

It formats; it decides nothing. A terminal that goes away never stops a run.
"""

import contextlib
import logging
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

Fields = MutableMapping[str, Any]


class Events:
    """Writes events to one text stream."""

    def __init__(self, stream: TextIO, *, as_json: bool, level: str = "info") -> None:
        """Choose the form.

        Args:
            stream: where events go.
            as_json: one JSON object per line; otherwise a line for people, in colour on a terminal.
            level: least level that is written: debug, info, warning, error.
        """
        renderer: Any = (
            structlog.processors.JSONRenderer(sort_keys=False)
            if as_json
            else structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=24)
        )
        self._log = structlog.wrap_logger(
            structlog.PrintLogger(stream),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                renderer,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
            cache_logger_on_first_use=True,
        )

    def debug(self, event: str, **fields: object) -> None:
        """Write what only a developer wants."""
        self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Write what an operator wants to have seen."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write what an operator should look at."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Write what an operator must act on."""
        self._write("error", event, fields)

    def _write(self, method: str, event: str, fields: dict[str, object]) -> None:
        # The reader of our lines may be gone (closed pipe, full disk); the run matters more than its description.
        with contextlib.suppress(OSError, ValueError):
            getattr(self._log, method)(event, **fields)

"""What the coordinator tells its operator: one stream of events, as JSON for machines or as lines for people.

It formats (`peerturb.wire.logs`); it decides nothing. A terminal that goes away never stops a run.
"""

import contextlib
from typing import TextIO

from peerturb.wire.logs import open_log


class Events:
    """Writes events to one text stream, each with what is bound."""

    def __init__(self, stream: TextIO, *, as_json: bool, level: str = "info", run: str = "") -> None:
        """Choose the form.

        Args:
            stream: where events go.
            as_json: one JSON object per line; otherwise a line for people, in colour on a terminal.
            level: least level that is written: debug, info, warning, error.
            run: name of the run, bound to every line.
        """
        self._log = open_log(stream, as_json=as_json, level=level)
        self._bound: dict[str, object] = {"run": run}

    def bind(self, **fields: object) -> None:
        """Give every line from now on these fields, unless it brings its own."""
        self._bound |= fields

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
            getattr(self._log, method)(event, **self._bound | fields)

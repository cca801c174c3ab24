"""Runs a coroutine so that Ctrl-C, SIGTERM and SIGHUP all end it the same way: cancelled, cleaned up, then reported."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end and return what it returns. A second signal is ignored: cleaning up takes a second.

    Raises:
        SystemExit: a signal came; 128 + its number, as shells count it.
    """
    caught: list[signal.Signals] = []

    async def main() -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()

        def on_signal(number: signal.Signals) -> None:
            if not caught:
                caught.append(number)
                task.cancel()

        for number in _SIGNALS:
            loop.add_signal_handler(number, on_signal, number)
        return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if not caught:
            raise
        raise SystemExit(128 + caught[0]) from None

"""Headless Chromium for tests of pages: where it or its driver is missing, whoever asks for it is skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peerturb_bench import browser
from peerturb_bench.browser import Browser as Browser
from peerturb_bench.browser import NoBrowserError


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Do what `peerturb_bench.browser.open_browser` does, or skip the test."""
    try:
        opened = browser.open_browser(folder)
        found = opened.__enter__()
    except NoBrowserError as error:
        pytest.skip(str(error))
    try:
        yield found
    finally:
        opened.__exit__(None, None, None)

"""Golden traces: what the machines decide for given commands is exactly what is written down."""

from pathlib import Path

import pytest

from tests.golden.trace_runner import TRACES, run_trace


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.txt")), ids=lambda path: path.stem)
def test_trace(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert run_trace(text) == text, "rewrite with: python -m tests.golden.trace_runner --rewrite"

"""The examples of docs/custom.md are programs that do what the page says."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.zo_models import one_thread

__all__ = ["one_thread"]

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "custom.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(source: str, names: dict[str, object]) -> None:
    exec(compile(source, "docs/custom.md", "exec"), names)


def test_modules_and_metrics() -> None:
    names: dict[str, object] = {}
    assert len(BLOCKS) == 3
    for block in BLOCKS[:2]:
        run(block, names)


def test_rewards(shared: Path) -> None:
    names: dict[str, object] = {"MODEL_FOLDER": shared / "models" / "stories260k"}
    for block in BLOCKS[:2]:  # what the page has imported so far
        run("\n".join(re.findall(r"^(?:from|import) .*$", block, re.MULTILINE)), names)
    run(BLOCKS[2], names)

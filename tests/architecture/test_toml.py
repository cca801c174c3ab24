"""Every TOML file we ship is valid: a RunSpec, a node's or a coordinator's settings, a scenario, a table of cards."""

from pathlib import Path

import pytest

from peerturb.errors import SpecError
from peerturb.spec import RunSpec, load_toml
from tests.conftest import REPOSITORY

FOLDERS = ("examples", "deploy", "docs", "node", "coordinator", "benchmarks", "peerturb", "sim")
FILES = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.toml"))]


def _parse(path: Path) -> None:
    """A file whose name starts with node or coordinator holds settings, one among scenarios a scenario, `cards.toml`
    cards, every other one a RunSpec."""
    if path.parent.name == "scenarios":
        from peerturb_sim.scenario import Scenario

        Scenario.load(path)
    elif path.name == "cards.toml":
        from peerturb_sim.cards import read_cards

        read_cards(path)
    elif path.stem.startswith("node"):
        from peerturb_node.settings import NodeSettings

        NodeSettings(**load_toml(path))
    elif path.stem.startswith("coordinator"):
        from peerturb_coordinator.settings import CoordinatorSettings

        CoordinatorSettings(**load_toml(path))
    else:
        RunSpec.from_document(load_toml(path), source=str(path))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPOSITORY)) for path in FILES])
def test_shipped_toml_is_valid(path: Path) -> None:
    _parse(path)


def test_examples_are_shipped() -> None:
    examples = [path for path in FILES if path.is_relative_to(REPOSITORY / "examples")]
    assert examples, "examples/ holds no RunSpec to start from"


def test_a_wrong_key_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "run.toml"
    wrong.write_text('name = "x"\nlearning_rat = 1\n[model]\nname = "m"\ndigest = "' + "0" * 64 + '"\n')
    with pytest.raises(SpecError, match="learning_rat"):
        _parse(wrong)

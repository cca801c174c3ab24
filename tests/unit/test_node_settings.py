"""Where a node's settings come from, and what is said about wrong ones."""

import json
from pathlib import Path

import pytest

from peerturb.errors import SpecError
from peerturb_node.settings import NodeSettings, load


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NodeSettings.model_fields:
        monkeypatch.delenv(f"PEERTURB_NODE_{name.upper()}", raising=False)


def test_the_strongest_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "node.toml"
    config.write_text('coordinator = "a:1"\nrows = 5\nthreads = 3\nprobes = 7\n')
    monkeypatch.setenv("PEERTURB_NODE_ROWS", "6")
    monkeypatch.setenv("PEERTURB_NODE_THREADS", "4")
    settings = load({"threads": 9, "name": None}, config=config)
    assert (settings.probes, settings.rows, settings.threads) == (7, 6, 9)
    assert settings.coordinator == "a:1"
    assert settings.checkpoint_rounds == 200


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "--coordinator"),
        ({"coordinator": "nowhere"}, "HOST:PORT"),
        ({"coordinator": "h:70000"}, "HOST:PORT"),
        ({"coordinator": "h:1", "device": "tpu"}, "device"),
        ({"coordinator": "h:1", "fingerprint": "zz"}, "fingerprint"),
        ({"coordinator": "h:1", "fields": "text"}, "field=column"),
        ({"coordinator": "h:1", "name": "a\nb"}, "printed"),
        ({"coordinator": "h:1", "token": "x", "token_file": "y"}, "token_file"),
        ({"coordinator": "h:1", "rows": -1}, "rows"),
        ({"coordinator": "h:1", "bogus": 1}, "bogus: unknown setting"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, object], named: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(flags)
    assert named in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        load({"coordinator": "h:1", "rows": -1, "threads": -1})
    assert "rows" in str(caught.value)
    assert "threads" in str(caught.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text("coordinator = ")
    with pytest.raises(SpecError, match=r"node\.toml"):
        load({}, config=config)


def test_fields_come_as_text_table_or_json(tmp_path: Path) -> None:
    expected = {"text": "sentence", "label": "stars"}
    assert load({"coordinator": "h:1", "fields": "text=sentence, label=stars"}).fields == expected
    assert load({"coordinator": "h:1", "fields": json.dumps(expected)}).fields == expected
    config = tmp_path / "node.toml"
    config.write_text('coordinator = "h:1"\nfields = {text = "sentence", label = "stars"}\n')
    assert load({}, config=config).fields == expected


def test_the_token_is_read_from_its_file_and_never_shown(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("sesame-open\n")
    assert load({"coordinator": "h:1", "token_file": secret}).join_token() == "sesame-open"
    settings = load({"coordinator": "h:1", "token": "sesame-open"})
    assert settings.join_token() == "sesame-open"
    assert "sesame" not in json.dumps(settings.shown())
    assert "sesame" not in repr(settings)
    secret.write_text("\n")
    with pytest.raises(SpecError, match="0 characters"):
        load({"coordinator": "h:1", "token_file": secret}).join_token()
    with pytest.raises(SpecError, match="cannot read"):
        load({"coordinator": "h:1", "token_file": tmp_path / "none"}).join_token()


def test_only_load_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation makes settings of its own; a volunteer's variables must not reach into it."""
    monkeypatch.setenv("PEERTURB_NODE_TEMPLATE", "{other}")
    assert load({"coordinator": "host:1"}).template == "{other}"
    assert NodeSettings(coordinator="host:1").template is None

"""Sources, their order and the bounds of the coordinator's settings."""

from pathlib import Path

import pytest

from peerturb.errors import SpecError
from peerturb_coordinator.settings import CoordinatorSettings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CoordinatorSettings.model_fields:
        monkeypatch.delenv(f"PEERTURB_COORDINATOR_{name.upper()}", raising=False)


def test_sources_rank_default_file_environment_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text('sessions_max = 10\nretry_ms = 10\nstall_timeout_ms = 10\ndata_dir = "from-file"\n')
    monkeypatch.setenv("PEERTURB_COORDINATOR_RETRY_MS", "20")
    monkeypatch.setenv("PEERTURB_COORDINATOR_STALL_TIMEOUT_MS", "20")
    settings = CoordinatorSettings.load(file=file, flags={"stall_timeout_ms": 30, "listen": None})
    assert settings.listen == "127.0.0.1:7470"
    assert settings.sessions_max == 10
    assert settings.data_dir == Path("from-file")
    assert settings.retry_ms == 20
    assert settings.stall_timeout_ms == 30


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text("sesions_max = 10\n")
    with pytest.raises(SpecError, match="sesions_max"):
        CoordinatorSettings.load(file=file, flags={})


@pytest.mark.parametrize("listen", ["0.0.0.0:7470", "192.0.2.7:7470", "[::]:7470", "example.org:1"])
def test_plaintext_beyond_loopback_needs_a_word(listen: str) -> None:
    with pytest.raises(SpecError, match=r"needs TLS.*--insecure"):
        CoordinatorSettings.load(file=None, flags={"listen": listen})
    assert CoordinatorSettings.load(file=None, flags={"listen": listen, "insecure": True}).insecure
    assert CoordinatorSettings.load(file=None, flags={"listen": listen, "tls_dir": Path("keys")}).tls_dir == Path(
        "keys"
    )


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:7470", "127.0.0.9:7470"])
def test_plaintext_on_loopback_is_the_default(listen: str) -> None:
    settings = CoordinatorSettings.load(file=None, flags={"listen": listen})
    assert settings.tls_dir is None


@pytest.mark.parametrize(
    "flags",
    [
        {"listen": "7470"},
        {"listen": "localhost:70000"},
        {"sessions_max": 0},
        {"retry_ms": 0},
        {"log_level": "loud"},
        {"insecure": True, "tls_dir": Path("keys")},
    ],
)
def test_bad_values_are_refused(flags: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="settings are not valid"):
        CoordinatorSettings.load(file=None, flags=flags)


def test_the_token_is_never_shown() -> None:
    settings = CoordinatorSettings.load(file=None, flags={"token": "open-sesame"})
    assert settings.token_text == "open-sesame"
    assert "open-sesame" not in str(settings.shown())
    assert "open-sesame" not in repr(settings)

"""The coordinator's local settings: addresses, folders, timeouts. Nothing here is part of the run; that is the RunSpec.

Defaults < TOML file < environment (PEERTURB_COORDINATOR_...) < flags.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from peerturb import limits
from peerturb.errors import SpecError
from peerturb.spec import load_toml
from peerturb.wire.channel import is_loopback, split_address

ENVIRONMENT_PREFIX = "PEERTURB_COORDINATOR_"

Milliseconds = Annotated[int, Field(ge=1, le=3_600_000)]


class CoordinatorSettings(BaseSettings):
    """Local settings of one coordinator process."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True, env_ignore_empty=True
    )

    listen: str = "127.0.0.1:7470"
    """HOST:PORT to bind; port 0 takes a free one. 0.0.0.0 or [::] binds every interface."""
    advertise: str = ""
    """Host name or address that peers use, for the printed join command; empty: the one of `listen`."""
    data_dir: Path = Path("peerturb-coordinator")
    """Folder of the run log. One run per folder."""
    http: str = ""
    """HOST:PORT of the live page, health and metrics; port 0 takes a free one; empty: none. Whoever reaches it sees the
    run, read-only. Plaintext: behind a reverse proxy where it shall be public."""
    trace: Path | None = None
    """File for the membership trace, with which `peerturb sim reproduce` repeats the run; None: none is written."""
    tls_dir: Path | None = None
    """Folder that `peerturb coordinator keys` filled; None: plaintext, on loopback or with `insecure` only."""
    insecure: bool = False
    """Plaintext beyond loopback: anybody on the way can read and change what peers send."""
    token: SecretStr = SecretStr("")
    """Join token; empty: whoever reaches the port may join."""
    sessions_max: int = Field(default=limits.SESSIONS_MAX, ge=1, le=limits.SESSIONS_MAX)
    """Admitted peers at once. Half-open handshakes have places of their own (`limits.HALF_OPEN_MAX`)."""
    handshake_timeout_ms: Milliseconds = 10_000
    """A stream that is not a member by then is closed."""
    stall_timeout_ms: Milliseconds = 60_000
    """A peer that takes no bytes for so long is dropped; it may come back and continue from its position."""
    retry_ms: Milliseconds = 3_000
    """Pause between attempts to write the log while the disk refuses."""
    stop_grace_ms: Milliseconds = 3_000
    """Time for open streams to end on their own when the coordinator stops."""
    progress_every_ms: Milliseconds = 10_000
    """Time between two progress lines."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("listen", "http")
    @classmethod
    def _is_an_address(cls, value: str, info: ValidationInfo) -> str:
        try:
            if value or info.field_name != "http":
                split_address(value)
        except SpecError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _plaintext_stays_at_home(self) -> Self:
        if self.insecure and self.tls_dir is not None:
            raise ValueError("tls_dir and insecure exclude each other; drop one of them")
        if not self.insecure and self.tls_dir is None and not is_loopback(self.listen):
            raise ValueError(
                f"{self.listen} can be reached from other computers, so it needs TLS: pass --keys FOLDER, "
                "which makes a certificate and a join token there (or --tls-dir, a folder that `peerturb coordinator "
                "keys` filled), or pass --insecure if the network between the peers is trusted"
            )
        return self

    @property
    def token_text(self) -> str:
        """The join token itself."""
        return self.token.get_secret_value()

    def shown(self) -> dict[str, Any]:
        """Return the settings as JSON values; the token is masked."""
        return self.model_dump(mode="json")

    @classmethod
    def load(cls, *, file: Path | None, flags: dict[str, Any]) -> "CoordinatorSettings":
        """Read all sources.

        Args:
            file: TOML file, or None.
            flags: settings given on the command line; None values count as not given.

        Raises:
            SpecError: a source cannot be read, a key is unknown or a value out of bounds; the message names each.
        """
        document = load_toml(file) if file is not None else {}
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return _ranked(document)(**given)
        except ValidationError as error:
            raise SpecError(f"the coordinator's settings are not valid: {_explain(error)}") from None


def _ranked(document: dict[str, Any]) -> type[CoordinatorSettings]:
    """Return the settings class whose sources are flags, then the environment, then `document`."""

    class Ranked(CoordinatorSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            """Rank the sources; unknown keys of the document stay in and are errors."""
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=document)

    return Ranked


def _explain(error: ValidationError) -> str:
    """One clause per wrong setting."""
    rows = []
    for item in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        rows.append(f"{name}: {message}" if name else message)
    return "; ".join(rows)

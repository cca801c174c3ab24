"""Local settings of a node: where things are and how much of the machine to use. Nothing here is part of the protocol.

Sources, weakest first: defaults < TOML file (`--config`) < environment (`PEERTURB_NODE_*`) < flags.
"""

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from peerturb import limits
from peerturb.errors import SpecError
from peerturb.spec import load_toml

ENV_PREFIX = "PEERTURB_NODE_"


def _default_name() -> str:
    return re.sub(r"[^\x20-\x7e]", "?", socket.gethostname())[: limits.NAME_CHARS_MAX] or "node"


class NodeSettings(BaseSettings):
    """Everything a node needs to know that other peers need not."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False, env_nested_delimiter=None
    )

    is_layered: ClassVar[bool] = False
    """Whether environment and file are sources, too."""

    coordinator: str
    """HOST:PORT of the run's coordinator."""
    data: Path | None = None
    """This node's private training data: JSON Lines (`.gz` too) or plain text."""
    eval: Path | None = None
    """Held-out data, evaluated every `objective.eval_every` rounds and reported; none: no evaluation."""
    model: str | None = None
    """Local folder or hub name of the base model; none: the RunSpec's `model.name`."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    """`auto` takes the first CUDA device if there is one."""
    state: Path = Path("~/.peerturb/node")
    """Folder of the identity key, and of a sub-folder per run with local log and checkpoint."""
    name: str = Field(default_factory=_default_name, min_length=1, max_length=limits.NAME_CHARS_MAX)
    """Display name; it ends up in the run log."""
    token: SecretStr = SecretStr("")
    """Join token."""
    token_file: Path | None = None
    """File that holds the join token; better than a flag, which other users of the machine can see."""
    fingerprint: str = Field(default="", pattern=r"^(sha256:)?([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}$|^$")
    """SHA-256 of the coordinator's certificate (`peerturb coordinator keys` prints it); empty: trust the system's
    certificate authorities."""
    authority_file: Path | None = None
    """PEM file of certificate authorities to trust in place of the system's."""
    insecure: bool = False
    """Allow plaintext beyond loopback."""
    http: str = ""
    """HOST:PORT of health and metrics; port 0 takes a free one; empty: none."""
    threads: int = Field(default=0, ge=0, le=1_024)
    """CPU threads for the numerics; 0: torch decides."""
    rows: int = Field(default=0, ge=0, le=65_536)
    """Most sequences in one forward pass; fewer need less memory. 0: the engine decides."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which losses are computed; the weights keep the run's. Another type than theirs needs a copy of them in
    memory, cast again after each update. `auto`: the weights' type, float16 on a GPU without bfloat16."""
    estimator: Literal["auto", "spsa", "exact"] = "auto"
    """How projected gradients are found, within what the run allows: `exact` by backward passes, `spsa` by pairs of
    forward passes. `auto`: exact where the run allows it, the loss can be differentiated and memory suffices."""
    activations: Literal["auto", "keep", "recompute"] = "auto"
    """Whether a backward pass keeps the activations inside a model's blocks or computes them again; `auto`: again where
    memory holds no row otherwise."""
    carry: float = Field(default=0.0, ge=0, lt=1)
    """What is left of an exact contribution's gradient in the next round's; needs memory for a second set of gradients.
    0: nothing, so that codes depend on the round alone and can be computed again by whoever has the data."""
    probes: int = Field(default=0, ge=0, le=limits.PROBES_PER_CONTRIBUTION_MAX)
    """Most codes to send in a round; 0: as many as the RunSpec allows."""
    checkpoint_rounds: int = Field(default=200, ge=0, le=limits.ROUNDS_MAX)
    """Rounds between checkpoints; 0: only when leaving. A lost checkpoint costs a longer replay, nothing else."""
    checkpoint_s: float = Field(default=300.0, ge=0, le=7 * 86_400)
    """A checkpoint is also due after this many seconds; 0: count rounds only."""
    fields: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict)
    """The template's field -> this data's field, for instance `fields = {text = "sentence"}`."""
    template: str | None = Field(default=None, max_length=16_384)
    """Template that replaces the RunSpec's for this node's data."""
    export: Path | None = None
    """At the end, write the model here as a Hugging Face folder."""
    idle: bool = False
    """Give way to other work: pause while other processes use the card (the CPU, for a node without one) or the
    computer runs on battery."""
    idle_pause_percent: float = Field(default=20.0, gt=0, le=100)
    """Use by others, of the card or of all cores, from which on the node pauses."""
    idle_resume_percent: float = Field(default=10.0, ge=0, lt=100)
    """Use by others up to which a paused node goes on."""
    idle_pause_s: float = Field(default=10.0, gt=0, le=86_400)
    """Seconds over which the first of them is averaged."""
    idle_resume_s: float = Field(default=60.0, gt=0, le=86_400)
    """Seconds over which the second is averaged; also how long mains power must last."""
    compute: Literal["torch", "toy", "stub"] = "torch"
    """`toy` and `stub` stand in for a model in tests and protocol benchmarks."""
    wait_s: float = Field(default=30.0, ge=0, le=86_400)
    """How long to try to reach the coordinator at start before giving up."""

    @field_validator("fields", mode="before")
    @classmethod
    def _fields_may_be_text(cls, value: object) -> object:
        """`text=sentence,label=stars` (flag, environment) or a JSON object."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            return json.loads(value)
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if any(not mark or not left.strip() or not right.strip() for left, mark, right in pairs):
            raise ValueError(f"{value!r} is not of the form field=column,field=column")
        return {left.strip(): right.strip() for left, _, right in pairs}

    @field_validator("http")
    @classmethod
    def _http_has_a_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and port.isascii() and port.isdigit() and int(port) < 65_536):
            raise ValueError(f"{value!r} is not of the form HOST:PORT")
        return value

    @field_validator("coordinator")
    @classmethod
    def _address_has_a_port(cls, value: str) -> str:
        host, mark, port = value.rpartition(":")
        if not mark or not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ValueError(f"{value!r} is not of the form HOST:PORT")
        return value

    @field_validator("name")
    @classmethod
    def _name_is_printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError(f"{value!r} holds characters that cannot be printed")
        return value

    @model_validator(mode="after")
    def _token_has_one_source(self) -> Self:
        if self.token_file and self.token.get_secret_value():
            raise ValueError("give either token or token_file, not both")
        return self

    @model_validator(mode="after")
    def _idle_thresholds_are_apart(self) -> Self:
        if self.idle_resume_percent >= self.idle_pause_percent:
            raise ValueError(
                f"idle_resume_percent ({self.idle_resume_percent:g}) is not below idle_pause_percent "
                f"({self.idle_pause_percent:g}): the node would pause and go on in turns"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file that `load` names; without `load` what is given alone."""
        if not cls.is_layered:
            return (init_settings,)
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def join_token(self) -> str:
        """Return the token from where the settings say.

        Raises:
            SpecError: the token file cannot be read or holds too much.
        """
        if self.token_file is None:
            return self.token.get_secret_value()
        try:
            token = self.token_file.expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"cannot read the token file {self.token_file}: {error}") from error
        if not token or len(token) > limits.TOKEN_CHARS_MAX:
            raise SpecError(
                f"the token file {self.token_file} holds {len(token)} characters; "
                f"1 to {limits.TOKEN_CHARS_MAX} are expected"
            )
        return token

    def shown(self) -> dict[str, Any]:
        """Return the settings as plain values, the token masked."""
        return self.model_dump(mode="json")


def load(flags: Mapping[str, Any], *, config: Path | None = None) -> NodeSettings:
    """Merge all sources; a flag that is None was not given.

    Raises:
        SpecError: the file or a value is wrong; every wrong key is named.
    """
    if config is not None:
        load_toml(config)  # for its error messages

    class Layered(NodeSettings):
        model_config = SettingsConfigDict(toml_file=config)
        is_layered = True

    try:
        return Layered(**{key: value for key, value in flags.items() if value is not None})
    except (ValidationError, ValueError) as error:
        raise SpecError(f"the node's settings are wrong: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """One clause per wrong key, naming flag and variable."""
    if not isinstance(error, ValidationError):
        return str(error)
    rows = []
    for item in error.errors(include_url=False, include_input=False):
        key = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            flag = key.replace("_", "-")
            message = f"missing; give --{flag}, {ENV_PREFIX}{key.upper()} or `{key}` in the --config file"
        elif item["type"] == "extra_forbidden":
            message = "unknown setting"
        rows.append(f"{key}: {message}" if key else message)
    return "; ".join(rows)

"""The error tree and the refusal codes.

PeerturbError                 a person can act on it; the CLI prints it without a traceback
|-- SpecError                 a RunSpec or settings file is wrong            (exit 2)
|-- DataError                 a data file, template or label is wrong       (exit 2)
|-- ModelError                a model cannot be loaded or perturbed         (exit 2)
|   `-- UnfollowedError       ... with all rows of a batch at once
|-- ObjectiveError            a user's own loss or reward cannot be used    (exit 2)
|-- LogError                  a run log is damaged or does not fit          (exit 3)
|-- RefusedError              the other side said no; carries a RejectCode  (exit 4)
`-- UnreachableError          the other side does not answer                (exit 5)

Expected refusals on the wire are values with a `RejectCode`, not exceptions.
"""

from enum import IntEnum


class RejectCode(IntEnum):
    """Why a message was refused. The number goes on the wire, the lower-case name is a metric label."""

    PROTOCOL_VERSION = 1
    """The two sides speak different versions of the protocol."""
    SPEC_MISMATCH = 2
    """The peer prepared for another RunSpec."""
    MODEL_MISMATCH = 3
    """Base weights differ."""
    MANIFEST_MISMATCH = 4
    """Names, shapes or dtypes of the trainable tensors differ."""
    BAD_TOKEN = 5
    """The join token is missing or wrong."""
    BAD_SIGNATURE = 6
    """The identity key's proof does not verify."""
    RUN_FULL = 7
    """No slot or session is free."""
    LOG_DIVERGED = 8
    """The peer's log position does not lie on this run's chain."""
    NOT_JOINED = 9
    """A message came before the handshake was complete."""
    STALE_ROUND = 10
    """The contribution's round is already sealed. Harmless: the session lives on."""
    FUTURE_ROUND = 11
    """The contribution's round has not been opened."""
    TOO_MANY_CODES = 12
    """More codes than the RunSpec allows in a contribution."""
    EMPTY_CONTRIBUTION = 13
    """A contribution without codes."""
    DIGEST_MISMATCH = 14
    """The peer's weights differ from the canonical ones: rebuild from the log."""
    OVERSIZED = 15
    """The message exceeds a limit."""
    MALFORMED = 16
    """The bytes do not decode to a known message."""
    SUPERSEDED = 17
    """The same identity opened another session."""
    SHUTTING_DOWN = 18
    """The coordinator stops; come back later."""
    RUN_FINISHED = 19
    """All rounds of the run are sealed."""
    WRONG_SLOT = 20
    """The message names a slot that is not the session's."""


class PeerturbError(Exception):
    """Base of all errors a person can act on. The message says what, where and what to do."""

    exit_code = 1


class SpecError(PeerturbError):
    """A RunSpec or a settings file cannot be used."""

    exit_code = 2


class DataError(PeerturbError):
    """A data file, template or label cannot be used."""

    exit_code = 2


class ModelError(PeerturbError):
    """A model cannot be loaded, or has a parameter the engine cannot perturb."""

    exit_code = 2


class UnfollowedError(ModelError):
    """A parameter is used in a way that cannot be perturbed for every row of a batch at once."""

    def __init__(self, parameter: str, why: str) -> None:
        super().__init__(
            f"the parameter {parameter} cannot be perturbed: the model {why}. "
            f'Keep it frozen: add "{parameter}" (or a pattern that covers it) to model.exclude'
        )
        self.parameter = parameter
        self.why = why


class ObjectiveError(PeerturbError):
    """A user's own loss, forward or reward function returns what cannot be used."""

    exit_code = 2


class LogError(PeerturbError):
    """A run log is damaged, truncated before its end, or does not fit the given weights."""

    exit_code = 3


class RefusedError(PeerturbError):
    """The other side refused; `code` is the rule, the message both sides' values."""

    exit_code = 4

    def __init__(self, code: RejectCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class UnreachableError(PeerturbError):
    """The other side does not answer, or its certificate is not the expected one."""

    exit_code = 5

"""The RunSpec: everything all peers of a run must agree on. Frozen, hashed, record 0 of the log.

It knows nothing of addresses, devices or folders; those are local settings of each program.
"""

import hashlib
import json
import string
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from peerturb import limits
from peerturb.errors import SpecError
from peerturb.ids import RunKey
from peerturb.manifest import DType
from peerturb.noise import PerturbationSpec
from peerturb.section import Section

__all__ = ["PROTOCOL_VERSION", "PerturbationSpec", "RunSpec", "Section"]

PROTOCOL_VERSION = 1


class AdapterSpec(Section):
    """Small tensors that are trained instead of the base model's; they begin as the RunSpec's seed says."""

    kind: Literal["lora", "vera"] = "lora"
    """`lora`: two factors for each adapted layer; `vera`: two vectors for each, between two random matrices that all
    layers share and that stay as they are."""
    rank: int = Field(default=8, ge=1, le=4_096)
    """Width between the two factors."""
    alpha: float = Field(default=16.0, gt=0, le=1e6)
    """The adapter's output is multiplied by alpha / rank (`lora` only)."""
    targets: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Shell-style patterns (`fnmatch`) of the linear layers that get an adapter, such as "*.q_proj"; the output head
    never does."""


Quantise = Literal["nf4", "fp4", "int8"]
"""How a frozen base model is quantised."""


class ModelSpec(Section):
    """The base model."""

    name: str = Field(min_length=1, max_length=512)
    """Hub name, or a label; a node may load the same weights from a local folder instead."""
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the base weights in `dtype` (`peerturb model` prints it): a peer with others is refused."""
    dtype: DType = "float32"
    """Type of the weights in every replica."""
    exclude: tuple[str, ...] = ()
    """Shell-style patterns (`fnmatch`) of parameter names that stay frozen."""
    adapter: AdapterSpec | None = None
    """If given, the whole base model is frozen and only the adapter's tensors are trained."""
    quantise: Quantise | None = None
    """Hold the frozen base's linear layers in 4 or 8 bits; for runs with an adapter."""
    exponents: dict[str, Annotated[int, Field(ge=-16, le=16)]] = Field(default_factory=dict)
    """Scale exponent k by name pattern, the first match in sorted pattern order holds; 0 otherwise."""

    @model_validator(mode="after")
    def _quantised_bases_have_an_adapter(self) -> Self:
        if self.quantise is not None and self.adapter is None:
            raise ValueError(
                "quantised weights cannot be trained; add a section [model.adapter], or leave out quantise"
            )
        return self


class PlateauSpec(Section):
    """When a loss that no longer falls cuts the learning rate (`peerturb.plateau`)."""

    window: int = Field(default=20, ge=1, le=limits.ROUNDS_MAX)
    """Rounds whose losses are averaged: one round's loss is too noisy to compare."""
    patience: int = Field(default=2, ge=1, le=limits.ROUNDS_MAX)
    """Windows in a row that are no better than the best one, before a cut."""
    factor: float = Field(default=0.5, gt=0, lt=1)
    """What a cut multiplies the rate by; it never falls below `final_fraction` of `learning_rate`."""
    threshold: float = Field(default=1e-3, ge=0, lt=1)
    """Part of the best mean by which a window must be better to count as better."""


class StepSpec(Section):
    """How codes become a step."""

    rule: Literal["normalized", "sgd"] = "normalized"
    """`normalized`: lr / (n rms(c)), blind to the loss's scale; `sgd`: lr s / n."""
    learning_rate: float = Field(default=1.5e-2, gt=0, le=1e3)
    """Size of a step, before the schedule; `peerturb tune` looks for it."""
    half_codes: int = Field(default=0, ge=0, le=2**30, exclude_if=lambda value: value == 0)
    """h: with n codes in a round the step is n / (n + h) of its full size, half of it at h. Few codes point badly, so
    they may move the weights only a little; this lets one rate serve rounds of 100 and of 10 000 codes
    (docs/numerics.md). 0: every round makes its full step. Left out of the canonical form while 0."""
    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    """Course of the learning rate, from `learning_rate` to `final_fraction` of it: over `round.count` rounds, or
    (`plateau`) cut whenever the sealed losses stop falling."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Part of `learning_rate` at which the schedule ends."""
    warmup_rounds: int = Field(default=0, ge=0, le=limits.ROUNDS_MAX)
    """Rounds over which the rate rises linearly from zero before the schedule begins."""
    plateau: PlateauSpec | None = None
    """Settings of the `plateau` schedule, and only there."""

    @model_validator(mode="before")
    @classmethod
    def _plateau_has_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("schedule") == "plateau" and data.get("plateau") is None:
            return {**data, "plateau": {}}
        return data

    @model_validator(mode="after")
    def _plateau_fits_the_schedule(self) -> Self:
        if self.plateau is not None and self.schedule != "plateau":
            raise ValueError(
                f'`plateau` is given, but schedule is "{self.schedule}": write schedule = "plateau" or leave it out'
            )
        return self


class RoundSpec(Section):
    """Who is waited for, and how long."""

    count: int = Field(default=0, ge=0, le=limits.ROUNDS_MAX)
    """Rounds in the run; 0 goes on until stopped."""
    probes_max: int = Field(default=128, ge=1, le=limits.PROBES_PER_CONTRIBUTION_MAX)
    """Most codes in one contribution."""
    budget_ms: int = Field(default=0, ge=0, le=3_600_000)
    """Time a peer should spend on a round's probes; it sends as many as fit. 0: always `probes_max`."""
    min_peers: int = Field(default=1, ge=1, le=limits.SESSIONS_MAX)
    """Contributions without which no round is sealed."""
    deadline_ms_min: int = Field(default=1_000, ge=10, le=86_400_000)
    """A round waits at least this long for awaited peers."""
    deadline_ms_max: int = Field(default=120_000, ge=10, le=86_400_000)
    """The deadline is four times the longest recent round, inside these bounds; the first round gets the maximum."""
    lease_ms: int = Field(default=60_000, ge=100, le=7 * 86_400_000)
    """How long a disconnected peer stays a member before `PeerLeft` is logged."""

    @model_validator(mode="after")
    def _deadlines_are_ordered(self) -> Self:
        if self.deadline_ms_min > self.deadline_ms_max:
            raise ValueError(
                f"deadline_ms_min ({self.deadline_ms_min}) is larger than deadline_ms_max ({self.deadline_ms_max})"
            )
        return self


def template_fields(template: str) -> list[str]:
    """Return the fields that a template names; a node's own templates are read by the same rule (`peerturb.zo.data`).

    Raises:
        ValueError: unbalanced braces, or anything but a plain name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
    fields = [(field, form, conversion) for _, field, form, conversion in parts if field is not None]
    for field, form, conversion in fields:
        if not field or form or conversion or any(mark in field for mark in ".[]"):
            raise ValueError("only plain names such as {text} may stand in braces")
    return [field for field, _, _ in fields]


class ObjectiveSpec(Section):
    """What is minimised, over what pieces of each peer's data."""

    kind: Literal["text", "completion", "labels", "classes"] = "text"
    """`text`: loss on every token; `completion`: on the completion only; `labels`: classification by label words;
    `classes`: by a classification head."""
    template: str = Field(default="{text}", min_length=1, max_length=16_384)
    """Text (or prompt) with `{field}` for a field of the JSON object, at least one; `{{` and `}}` are braces."""
    completion: str = Field(default="", max_length=16_384)
    """Template of the completion, with at least one field (`completion` only)."""
    label_field: str = Field(default="label", min_length=1)
    """Field that holds the label (`labels` and `classes` only)."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Label value as text -> the words that continue the prompt, leading space included (`labels` only). Not empty, and
    different for every label."""
    classes: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        default=(), max_length=limits.CLASSES_MAX, exclude_if=lambda value: not value
    )
    """Label values as text, in the order of the head's classes (`classes` only). Left out of the canonical form while
    empty, so that runs without classes keep the digest they had before there were any."""
    tokens_max: int = Field(default=64, ge=2, le=limits.SEQUENCE_TOKENS_MAX)
    """Longest sequence; longer prompts lose their beginning, longer texts are cut into pieces."""
    examples_per_probe: int = Field(default=1, ge=1, le=4_096)
    """Different sequences each probe is measured on."""
    eval_every: int = Field(default=10, ge=0, le=limits.ROUNDS_MAX)
    """Rounds between held-out evaluations; 0: never."""

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Self:
        if self.kind == "completion" and not self.completion:
            raise ValueError('kind = "completion" needs `completion`, for instance completion = " {answer}"')
        if self.kind == "labels" and len(self.labels) < 2:
            example = 'labels = {0 = " bad", 1 = " good"}'
            raise ValueError(f'kind = "labels" needs at least two `labels`, for instance {example}')
        if (self.kind == "classes") != bool(self.classes):
            raise ValueError('kind = "classes" and `classes` belong together, for instance classes = ["0", "1"]')
        if self.kind == "classes" and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError("`classes` needs at least two values, all different")
        return self

    @model_validator(mode="after")
    def _templates_name_fields(self) -> Self:
        """Without a field every example is the same text, and nothing can be learned from it."""
        templates = {"template": self.template}
        if self.kind == "completion":
            templates["completion"] = self.completion
        for name, template in templates.items():
            try:
                fields = template_fields(template)
            except ValueError as error:
                raise ValueError(f"`{name}` {template!r:.80} is wrong: {error}") from None
            if not fields:
                raise ValueError(
                    f"`{name}` {template!r:.80} names no field of the data; "
                    "put one in braces where its text belongs, for instance {text}"
                )
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        seen: dict[str, str] = {}
        for value, words in self.labels.items() if self.kind == "labels" else ():
            bare = words.strip()
            if not bare:
                raise ValueError(
                    f"the words of label {value!r} are empty; write what continues the prompt, for instance "
                    f'{value} = " good"'
                )
            if bare in seen:
                raise ValueError(
                    f"labels {seen[bare]!r} and {value!r} have the same words {bare!r}, space around them not counted; "
                    "every label needs words of its own"
                )
            seen[bare] = value
        return self


class RunSpec(Section):
    """One fine-tuning job."""

    protocol: Literal[1] = 1
    """Version of the protocol that all peers speak."""
    name: str = Field(min_length=1, max_length=limits.NAME_CHARS_MAX)
    """What people call the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Makes two otherwise equal runs different: it changes the digest, hence the run key. An adapter's first values
    follow from it alone."""
    model: ModelSpec
    perturbation: PerturbationSpec = PerturbationSpec()
    step: StepSpec = StepSpec()
    round: RoundSpec = RoundSpec()
    objective: ObjectiveSpec = ObjectiveSpec()

    @model_validator(mode="after")
    def _schedules_have_an_end(self) -> Self:
        if self.step.schedule in ("linear", "cosine") and self.round.count == 0:
            raise ValueError(f'step.schedule = "{self.step.schedule}" needs round.count, the number of rounds')
        return self

    @model_validator(mode="after")
    def _mixed_rounds_have_a_measure(self) -> Self:
        if self.perturbation.is_mixed and not self.step.half_codes:
            raise ValueError(
                "rounds of both estimators differ a hundredfold in codes, so a step needs step.half_codes, the number "
                "of codes at which it is half of learning_rate; write for instance half_codes = 8192"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_seed(self) -> Self:
        if self.model.adapter is not None and "seed" not in self.model_fields_set:
            raise ValueError(
                "the adapter's first values follow from the seed, and none is given; write for instance seed = 1 above "
                "the first section"
            )
        return self

    @cached_property
    def canonical(self) -> bytes:
        """Canonical JSON: sorted keys, no white space, defaults written out; what came with later releases is left out
        while empty (`perturbation.sides` while `two`, `estimators` while `spsa` alone), so that runs without it keep
        their digest."""
        document = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: the run's identity."""
        return hashlib.sha256(self.canonical).digest()

    @property
    def run_key(self) -> RunKey:
        """First word of every Philox key of the run (design, numerics v1)."""
        return RunKey(int.from_bytes(self.digest[:4], "little"))

    @property
    def first_digest(self) -> int | None:
        """Short digest (u32) of the trained tensors before round 0, if it follows from the base weights' digest.

        None where some parameters are frozen (as with an adapter all of the base): the base digest covers them too.
        """
        if self.model.exclude or self.model.adapter is not None:
            return None
        return int.from_bytes(bytes.fromhex(self.model.digest)[:4], "little")

    @classmethod
    def from_canonical(cls, data: bytes) -> Self:
        """Read a spec received or logged.

        Raises:
            SpecError: oversized, not JSON, invalid, or not in canonical form.
        """
        if len(data) > limits.SPEC_BYTES_MAX:
            raise SpecError(f"the RunSpec has {len(data)} bytes, more than the {limits.SPEC_BYTES_MAX} allowed")
        try:
            spec = cls.model_validate(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the RunSpec is not valid: {_explain(error)}") from error
        if spec.canonical != data:
            raise SpecError("the RunSpec is not in canonical form; the sides run different versions of peerturb")
        return spec

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read RUN.toml.

        Raises:
            SpecError: unreadable, not TOML, or invalid; the message names the file and every wrong key.
        """
        return cls.from_document(load_toml(path), source=str(path))

    @classmethod
    def from_document(cls, document: dict[str, Any], *, source: str) -> Self:
        """Validate a parsed document; `source` is named in errors."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise SpecError(f"{source} is not a valid RunSpec: {_explain(error)}") from error


def load_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        SpecError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not TOML: {error}") from error


def _explain(error: Exception) -> str:
    """One line per wrong key instead of pydantic's paragraph."""
    if not isinstance(error, ValidationError):
        return str(error)
    rows = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "spec"
        message = item["msg"].removeprefix("Value error, ")
        given = item.get("input")
        shown = "" if isinstance(given, (dict, BaseModel)) else f" (given: {given!r:.60})"
        rows.append(f"{where}: {message}{shown}")
    return "; ".join(rows)

"""The questions of `peerturb init` in their order, each with a suggestion from the model and the data.

Every answer is checked when it is given. It writes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from peerturb import limits
from peerturb.errors import DataError, SpecError
from peerturb.manifest import DType
from peerturb.presets import KINDS, preset
from peerturb.spec import PerturbationSpec
from peerturb_node.starting.answers import Answers
from peerturb_node.starting.asking import Asker, given_or, one_of
from peerturb_node.starting.base import Base, look_at_model, read_size
from peerturb_node.starting.columns import Columns, Proposal, look_at_data, propose

Weigh = Callable[[Base, DType, int, int], tuple[str, int, int | None]]
"""Loads a model (source, dtype, classes, seed); returns digest, trained parameters, longest sequence."""

_FAMILIES = get_args(PerturbationSpec.model_fields["family"].annotation)
_DTYPES = get_args(DType)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The command line; None for what it does not say."""

    model: str | None = None
    data: str | None = None
    objective: str | None = None
    template: str | None = None
    completion: str | None = None
    label_field: str | None = None
    labels: Sequence[str] = ()
    """VALUE=WORDS each."""
    classes: Sequence[str] = ()
    size: str | None = None
    family: str | None = None
    rounds: str | None = None
    dtype: str | None = None
    digest: str | None = None
    name: str | None = None
    seed: int = 0


def talk(given: Given, asker: Asker, weigh: Weigh | None) -> tuple[Answers, str, Columns | None]:
    """Ask what is not given; return the answers, where the model lies (folder or hub name), and what the data show.

    Args:
        given: the command line.
        asker: who answers the rest.
        weigh: loads the model for its digest and size; None where torch is not installed.

    Raises:
        PeerturbError: a flag or file is wrong, or an answer is missing; the message says which and what to do.
    """
    base = given_or(asker, given.model, "Base model (folder, or name on the hub)", "--model", None, look_at_model)
    data = given_or(asker, given.data, "Training data, for its columns (JSON Lines or text; - for none)", "--data",
                    "-", _read_data)  # fmt: skip
    kind = given_or(asker, given.objective, f"Objective ({', '.join(KINDS)})", "--objective",
                    propose(_or_none(data), suits=base.suits).kind, one_of(KINDS, "--objective"))  # fmt: skip
    if data is not None and not data.lines and kind != "text":
        raise DataError(f"{data.path}: a plain text serves --objective text only, not {kind}; give a .jsonl file")
    answers = _objective(given, asker, kind, data, propose(_or_none(data), suits=base.suits, kind=kind))
    dtype = given_or(asker, given.dtype or "float32", "", "--dtype", None, one_of(_DTYPES, "--dtype"))
    answers = replace(answers, model=base.name, name=(given.name or Path(base.name).name)[: limits.NAME_CHARS_MAX],
                      dtype=cast(DType, dtype), seed=given.seed)  # fmt: skip
    family = given_or(asker, given.family, f"Perturbations ({', '.join(_FAMILIES)})", "--family", _FAMILIES[0],
                      one_of(_FAMILIES, "--family"))  # fmt: skip
    rounds = given_or(asker, given.rounds, "Rounds (0: until stopped)", "--rounds", str(preset(1).rounds), _read_rounds)
    answers = replace(answers, family=family, rounds=rounds)
    return _weighed(given, asker, weigh, base, answers), base.source, data


def _objective(given: Given, asker: Asker, kind: str, data: Columns | None, proposal: Proposal) -> Answers:
    """Ask what the kind of objective needs."""
    known = _or_none(data)

    def template(text: str) -> str:
        known.check(text)
        return text

    def column(name: str) -> str:
        return known.column(name.strip()).name if known.lines else name.strip()

    names = f" of {', '.join(known.names)}" if known.names else ""
    what = "Text" if kind in ("text", "classes") else "Prompt"
    answers = Answers(
        name="-", model="-", digest="-", parameters=1, kind=kind,
        template=given_or(asker, given.template, f"{what} template (columns{names} in braces)", "--template",
                          proposal.template, template),
    )  # fmt: skip
    if kind == "completion":
        completion = given_or(asker, given.completion, "Template of the completion, which is learned", "--completion",
                              proposal.completion, template)  # fmt: skip
        return replace(answers, completion=completion)
    if kind == "text":
        return answers
    field = given_or(asker, given.label_field, "Column of the label", "--label-field", proposal.label_field, column)
    values = known.column(field).values if known.lines else ()
    if known.lines and len(values) < 2:
        raise DataError(
            f"{known.path}: the column {field!r} has {'one value' if values else 'too many different values'}, "
            "labels need at least two; --label-field names another column"
        )
    if kind == "classes":
        return replace(answers, label_field=field, classes=_classes(given, asker, values))
    return replace(answers, label_field=field, labels=_labels(given, asker, values))


def _labels(given: Given, asker: Asker, values: Sequence[str]) -> dict[str, str]:
    """Return label value -> words: from the flags, else asked for each value of the data."""
    pairs = [text.partition("=") for text in given.labels]
    if wrong := [value + mark + words for value, mark, words in pairs if not mark or not words.strip() or not value]:
        raise SpecError(f"--label {wrong[0]!r} is not of the form VALUE=WORDS, for instance --label '1= great'")
    said = {value: words for value, _, words in pairs}
    if unknown := [value for value in said if values and value not in values]:
        raise DataError(f"--label {unknown[0]!r}: the data has no such label; it has {', '.join(map(repr, values))}")
    for value in values or [value for value in ("0", "1") if not said]:
        if value not in said:
            suggestion = f" {value}" if value.strip() and not _is_number(value) else None
            said[value] = asker.ask(f"Words that stand for label {value!r}", f"--label '{value}=WORDS'", suggestion,
                                    _read_words)  # fmt: skip
    return said


def _classes(given: Given, asker: Asker, values: Sequence[str]) -> tuple[str, ...]:
    def read(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(",") if part.strip())
        if missing := [value for value in values if value not in found]:
            raise DataError(f"the classes {', '.join(found)} lack {missing[0]!r}, which stands in the data")
        if len(found) < 2 or len(set(found)) < len(found):
            raise SpecError(f"the classes {text!r} are not at least two different values, with commas between")
        return found

    return given_or(asker, ",".join(given.classes) or None, "Classes in the order of the head", "--class VALUE",
                    ",".join(values) or None, read)  # fmt: skip


def _weighed(given: Given, asker: Asker, weigh: Weigh | None, base: Base, answers: Answers) -> Answers:
    """Add the base weights' digest and the model's size: by loading the model, unless both are known."""
    size = None if given.size is None else read_size(given.size)
    positions = base.positions_max
    if given.digest is None and weigh is not None:
        digest, parameters, positions = weigh(base, answers.dtype, len(answers.classes), answers.seed)
    else:
        parameters = base.parameters or 0
        question = "Digest of the base weights (`peerturb model` prints it where torch is installed)"
        digest = given_or(asker, given.digest, question, "--digest", None, _read_digest)
        if not parameters and size is None:
            size = asker.ask("Trained parameters, for instance 22.7M or 7B", "--size", None, read_size)
    return replace(answers, digest=digest, parameters=size or parameters, positions_max=positions)


def _read_data(text: str) -> Columns | None:
    return None if text.strip() in ("", "-") else look_at_data(Path(text.strip()))


def _read_rounds(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > limits.ROUNDS_MAX:
        raise SpecError(f"--rounds {text!r} is no number from 0 to {limits.ROUNDS_MAX:,}")
    return int(text)


def _read_words(text: str) -> str:
    """Most tokenizers put the blank into the word: a person who leaves it out means it all the same."""
    if not text.strip():
        raise SpecError("the words are empty; write what continues the prompt, for instance great")
    return f" {text}" if text[0].isascii() and text[0].isalnum() else text


def _read_digest(text: str) -> str:
    digest = text.strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise SpecError(f"--digest {text!r:.80} is not 64 hexadecimal digits; `peerturb model` prints them")
    return digest


def _or_none(data: Columns | None) -> Columns:
    """Stand in for data that nobody named: any template fits."""
    return data or Columns(path=Path("the data"), lines=0, columns=())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

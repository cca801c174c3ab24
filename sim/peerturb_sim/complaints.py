"""What is wrong with a scenario, a line for each key: where it stands, what it is, and what to do."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from peerturb_sim.places import locate

RANGE_LENGTH = 2
"""Of the lists that say a lowest and a highest number."""
_ALTERNATIVES = ("model_type", "string_type", "dict_type", "model_attributes_type")
"""Complaints whose path ends with the name of a type that would have done."""


class MisplacedError(ValueError):
    """A validator's complaint about one key of its table.

    Args:
        key: path of the key, from the table that is validated.
        text: what is wrong with it, and the remedy.
    """

    def __init__(self, key: Sequence[str | int], text: str) -> None:
        super().__init__(text)
        self.key = tuple(key)


def explain(error: ValidationError, text: str, model: type[BaseModel]) -> str:
    """Return one sentence per wrong key, with its line in the text.

    Args:
        error: what pydantic found.
        text: the TOML.
        model: what the whole of it should be.
    """
    items = error.errors(include_url=False)
    return "; ".join(_sentence(item, text, model) for item in items if not _is_echo(item, items))


def _is_echo(item: Any, items: Sequence[Any]) -> bool:
    """Whether another complaint says it better.

    pydantic calls a list empty whose every row is wrong, and what is neither table nor string both.
    """
    where = item["loc"]
    if where[-1:] == ("str",):  # the other alternative of a table
        return any(other["loc"][: len(where) - 1] == where[:-1] for other in items if other != item)
    return item["type"] == "too_short" and any(other["loc"][: len(where)] == where for other in items if other != item)


def _sentence(item: Any, text: str, model: type[BaseModel]) -> str:
    cause = item.get("ctx", {}).get("error")
    location = (*item["loc"], *cause.key) if isinstance(cause, MisplacedError) else item["loc"]
    message = _message(item, location, model)
    given: Any = item.get("input")
    shown = f" (given: {given!r:.60})" if isinstance(given, str | int | float | bool) else ""
    found, line = locate(text, location)
    # Of what the text does not have, names of pydantic's alternatives say nothing to who wrote it.
    is_there = found[-1:] == location[-1:] or item["type"] in _ALTERNATIVES
    missing = () if is_there else location[-1:]
    where = ".".join(map(str, (*found, *missing))) or "scenario"
    return f"{where}{'' if line is None else f' (line {line})'}: {message}{shown}"


def _message(item: Any, location: Sequence[str | int], model: type[BaseModel]) -> str:
    """Say what is wrong with a value in TOML's words, and the remedy; pydantic's are Python's."""
    match item["type"]:
        case "extra_forbidden":
            return "there is no such key: " + _correction(location, model)
        case "union_tag_not_found":
            return "say of which kind: kind = 'toy', or 'torch' or 'ray' for a real model"
        case "tuple_type" if isinstance(item["input"], dict):
            return f"it is a list of tables: write its header in double brackets, [[{location[-1]}]]"
        case "tuple_type":
            return "write a list, in brackets"
        case "too_long" if item["ctx"]["max_length"] == RANGE_LENGTH:
            return "write two numbers, [low, high]"
        case "missing" if isinstance(location[-1], int):
            return "a number is missing: write two, [low, high]"
        case "model_type" | "model_attributes_type" | "dict_type":
            is_alternative = location[-1:] == ("LineSpec",)
            return "write a table, or the name of a line" if is_alternative else "write a table, { key = value, ... }"
        case _:
            return str(item["msg"]).removeprefix("Value error, ")


def _correction(location: Sequence[str | int], model: type[BaseModel]) -> str:
    """Say what a wrong key may have been meant to be, or what keys there are."""
    models = [model]
    for part in location[:-1]:
        fields = [one.model_fields[part] for one in models if isinstance(part, str) and part in one.model_fields]
        models = [inner for field in fields for inner in _models(field.annotation)] or models
    known = sorted({name for one in models for name in one.model_fields})
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"leave it out, or take one of {', '.join(known)}"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)

"""The table of cards, and the words by which a user names some of them."""

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from peerturb.errors import SpecError
from peerturb.spec import Section, load_toml

THIS = "this"
"""Name of the card that is not looked up but measured."""
COUNT_MAX = 1_000_000
_TABLE = Path(__file__).parent / "cards.toml"
_Positive = Annotated[float, Field(gt=0, le=1e9)]


class Card(Section):
    """What a card can do at most, by its maker. `cards.toml` gives units and sources."""

    title: str = Field(min_length=1, max_length=80)
    kind: Literal["gpu", "cpu"]
    tflops_single: _Positive
    tflops_half: _Positive
    bandwidth: _Positive
    memory_gib: _Positive
    watts: _Positive
    cores: Annotated[int, Field(ge=1, le=65_536)] = 1
    source: str = Field(default="", max_length=400)
    """Where the figures stand."""


class _Table(Section):
    cards: dict[str, Card]


@cache
def known_cards() -> dict[str, Card]:
    """Return the table that comes with peerturb, by name."""
    return _Table.model_validate(load_toml(_TABLE)).cards


def read_cards(path: Path) -> dict[str, Card]:
    """Read a user's own table; its cards stand beside the known ones, or instead of those with their names.

    Raises:
        SpecError: unreadable, not TOML, or not such a table.
    """
    try:
        own = _Table.model_validate(load_toml(path)).cards
    except ValidationError as error:
        rows = [f"{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in error.errors(include_url=False)]
        raise SpecError(f"{path} is not a table of cards: {'; '.join(rows)}") from error
    if THIS in own:
        raise SpecError(f"{path}: a card cannot be called {THIS!r}: that one is this machine, and is measured")
    return {**known_cards(), **own}


def parse_cards(text: str, table: dict[str, Card]) -> dict[str, int]:
    """Read "3:rtx4090,10:laptop-cpu" into {name: how many}; a name without a number is one card.

    Raises:
        SpecError: not of that form, no peers, a card that is not in the table, or one named twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(-?\d{1,9})\s*[:x]\s*)?([\w.-]+)\s*", part)
        if match is None:
            raise SpecError(f"--cards {text!r}: {part.strip()!r} is not of the form COUNT:CARD, for instance 3:rtx4090")
        count, name = int(match[1] or 1), match[2]
        if name != THIS and name not in table:
            raise SpecError(f"--cards: there is no card {name!r}; {_hint(name, table)}")
        if name in found:
            raise SpecError(f"--cards names {name} twice; add the numbers up")
        if not 1 <= count <= COUNT_MAX:
            raise SpecError(f"--cards: {count}:{name} is no number of peers; give at least 1, or leave the card out")
        found[name] = count
    return found


def _hint(name: str, table: dict[str, Card]) -> str:
    names = [*table, THIS]
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    listed = ", ".join(sorted(table))
    return (f"did you mean {near[0]!r}? There" if near else "there") + f" are {listed}, and {THIS!r} for this machine"

"""Write a scenario's document as TOML again, so that whoever has a result can simulate it without the first file."""

import json
from collections.abc import Iterator
from typing import Any


def scenario_toml(document: dict[str, Any]) -> str:
    """Return TOML that reads as the same document; what is None is left out, as TOML has no such value."""
    return "\n".join(_lines(document, ())).strip() + "\n"


def _lines(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Yield a table's values, then its tables, then its lists of tables."""
    present = {key: value for key, value in table.items() if value is not None}
    tables = {key: value for key, value in present.items() if isinstance(value, dict)}
    lists = {key: value for key, value in present.items() if _is_tables(value)}
    for key, value in present.items():
        if key not in tables and key not in lists:
            yield f"{_key(key)} = {_value(value)}"
    for key, inner in tables.items():
        yield from ("", f"[{'.'.join(map(_key, (*path, key)))}]")
        yield from _lines(inner, (*path, key))
    for key, rows in lists.items():
        for row in rows:
            yield from ("", f"[[{'.'.join(map(_key, (*path, key)))}]]")
            yield from _lines(row, (*path, key))


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, dict) for row in value)


def _key(name: str) -> str:
    is_bare = name and all(char.isascii() and (char.isalnum() or char in "_-") for char in name)
    return name if is_bare else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's strings, numbers and booleans are TOML's; TOML wants a digit and a point or exponent in a float, as here.
    return json.dumps(value)

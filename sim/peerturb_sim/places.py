"""In which line of a TOML text a key stands, so that an error can name it. Python's reader does not keep that.

It follows headers and keys line by line; what stands within an inline table or a list has the line of its key.
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

_HEADER = re.compile(r"\s*(\[\[|\[)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")

Path = tuple[str | int, ...]


def locate(text: str, path: Sequence[str | int]) -> tuple[Path, int | None]:
    """Return as much of a path as the text has, and its line, from 1: of a key, or what it belongs to.

    Args:
        text: TOML that can be read.
        path: keys and, in lists of tables, numbers from 0; parts that the text does not have are passed over, as
            pydantic's names of alternatives.
    """
    lines = dict(_places(text))
    found: Path = ()
    for part in path:
        if (*found, part) in lines:
            found = (*found, part)
    return found, lines.get(found)


def _places(text: str) -> Iterator[tuple[Path, int]]:
    """Yield (path, line) of every header and key, the first line of each."""
    seen: set[Path] = set()
    counts: dict[Path, int] = {}
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        paths: list[Path] = []
        if header := _HEADER.match(line):
            table = _open(_parts(header[2]), counts, is_list=header[1] == "[[")
            paths = [table[:length] for length in range(1, len(table) + 1)]
        elif key := _KEY.match(line):
            parts = _parts(key[1])
            paths = [(*table, *parts[:length]) for length in range(1, len(parts) + 1)]
            paths += _within((*table, *parts), line[key.end() :])
        for path in paths:
            if path not in seen:
                seen.add(path)
                yield path, number


def _within(path: Path, value: str) -> Iterator[Path]:
    """Yield the paths of the keys of an inline table that begins and ends in a line, and of a list of such tables."""
    try:
        yield from _keys(path, tomllib.loads(f"value = {value}")["value"])
    except tomllib.TOMLDecodeError:  # a value of several lines
        return


def _keys(path: Path, value: Any) -> Iterator[Path]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        if isinstance(value, dict) or isinstance(one, dict):
            yield (*path, key)
            yield from _keys((*path, key), one)


def _open(parts: Sequence[str], counts: dict[Path, int], *, is_list: bool) -> Path:
    """Return the path of the table that a header opens: in the newest of each list on its way."""
    path: Path = ()
    for part in parts[:-1]:
        path = (*path, part)
        if path in counts:
            path = (*path, counts[path] - 1)
    path = (*path, parts[-1])
    if is_list:
        counts[path] = counts.get(path, 0) + 1
        path = (*path, counts[path] - 1)
    return path


def _parts(key: str) -> list[str]:
    return [part.strip("\"'") for part in _PART.findall(key)]

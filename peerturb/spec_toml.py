"""Writes a RunSpec as a commented RUN.toml: every key with the first sentence of its description in `peerturb.spec`.

Pure; it knows the sections and fields only as the spec's classes list them, so a new field needs nothing here.
"""

import json
import re
from collections.abc import Iterator, Mapping

from peerturb.presets import number
from peerturb.spec import RunSpec, Section

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SENTENCE_END = re.compile(r"(?<=[.])\s+(?=[A-Z0-9`])")


def spec_toml(spec: RunSpec, *, why: Mapping[str, str] | None = None) -> str:
    """Return RUN.toml, without a line's end after the last line; `RunSpec.from_toml` reads the same RunSpec from it.

    Defaults are written out. What is not set (no adapter, no label words) is left out.

    Args:
        spec: what to write.
        why: reasons for values, to stand beside them, by dotted name such as `step.learning_rate`.
    """
    head = [
        "# What all peers of the run agree on: a RunSpec, written by `peerturb init`. Change it before the run begins;"
    ]
    head.append("# a change afterwards makes it another run. `peerturb coordinator serve` reads it.")
    return "\n".join([*head, *_section(spec, "", why or {})])


def description(section: type[Section], field: str) -> str:
    """Return the first sentence of a field's description on one line; empty if it has none."""
    text = " ".join((section.model_fields[field].description or "").split())
    return _SENTENCE_END.split(text)[0]


def toml_value(value: object) -> str:
    """Write text, number, list or table of these as TOML on one line."""
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON lets through.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        short = number(value)
        return short if float(short) == value else repr(value)
    if isinstance(value, Mapping):
        rows = ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {rows} }}" if rows else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    raise AssertionError(f"no RunSpec holds a {type(value).__name__}")


def _section(section: Section, path: str, why: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a section and those below it; its own keys come first, as TOML wants."""
    below: list[tuple[str, Section]] = []
    yield ""
    if path:
        yield f"[{path}]"
    for name in type(section).model_fields:
        value = getattr(section, name)
        dotted = f"{path}.{name}" if path else name
        if isinstance(value, Section):
            below.append((dotted, value))
        elif value is not None and value not in ("", (), {}):
            yield f"# {description(type(section), name)}"
            yield f"{name} = {toml_value(value)}" + (f"  # {why[dotted]}" if dotted in why else "")
    for dotted, value in below:
        yield from _section(value, dotted, why)


def _key(key: object) -> str:
    text = str(key)
    return text if _BARE_KEY.fullmatch(text) else toml_value(text)

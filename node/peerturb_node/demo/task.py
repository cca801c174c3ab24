"""The demo's data: pieces of English documentation and of source code, cut from the running Python itself.

Both kinds are cut alike: a topic's prose and a file's code (docstrings and comments removed) become streams of words
joined by single blanks, and each stream is cut into pieces whose lengths come from one distribution. So neither length
nor layout tells the classes apart. Every topic and file belongs to one part only, and a paragraph that several topics
share is used once: what a node holds, no other node has, and the held-out part is new to all of them.

It knows nothing of models, tokens or the network.
"""

import ast
import importlib.util
import io
import itertools
import json
import os
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peerturb.errors import DataError

TASK_PACKAGES = ("asyncio", "email", "http", "json", "logging", "multiprocessing", "unittest", "urllib", "xmlrpc")
"""Standard-library packages whose code is the task's `code` class; the base model never saw them."""

PIECE_CHARS_MIN = 80
PIECE_CHARS_MAX = 150
"""A piece's length is drawn evenly between the two, then cut back to the end of a word."""

TRAIN_EXAMPLES = 400
"""Examples in a node's part, half of each label, where there is enough text."""

DEALT_SHARE = 0.55
"""Most of the scarcer label's pieces that a default size may ask for: whole topics cannot be dealt out evenly."""

_ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2026": "...",
        "\u2013": "-",
        "\u2014": "-",
        "\u2192": "->",
        "\u00a0": " ",
    }
)
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3")
) | frozenset(("pydoc_data", "site-packages", "test", "tests", "turtledemo"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of a data file."""

    text: str
    label: str
    """`doc` or `code`."""
    source: str
    """The topic, or the file's path below the standard library's folder, that it was cut from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskParts:
    """Disjoint parts of the task."""

    train: tuple[tuple[Example, ...], ...]
    """One private part per node."""
    heldout: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles:
    """Where the parts were written."""

    train: tuple[Path, ...]
    heldout: Path


def write_task(
    folder: Path, *, nodes: int = 4, train_examples: int | None = None, heldout_examples: int = 300, seed: int = 0
) -> TaskFiles:
    """Write `train-0.jsonl` ... and `heldout.jsonl` (fields `text`, `label`) into `folder`, made if missing.

    Args:
        folder: where the files go; files of the same names are replaced.
        nodes: number of private training parts.
        train_examples: examples in each, half of each label; by default `TRAIN_EXAMPLES`, fewer where many nodes share
            the text.
        heldout_examples: examples in the held-out part, half of each label.
        seed: equal seeds on the same Python give equal files.

    Raises:
        DataError: this Python lacks the documentation or the sources, or holds too little of them.
    """
    parts = make_task(nodes=nodes, train_examples=train_examples, heldout_examples=heldout_examples, seed=seed)
    files = TaskFiles(
        train=tuple(folder / f"train-{node}.jsonl" for node in range(nodes)), heldout=folder / "heldout.jsonl"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, part in zip((*files.train, files.heldout), (*parts.train, parts.heldout), strict=True):
            lines = (json.dumps({"text": e.text, "label": e.label}) + "\n" for e in part)
            path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the demo's data to {folder}: {error.strerror or error}") from error
    return files


def make_task(
    *, nodes: int = 4, train_examples: int | None = None, heldout_examples: int = 300, seed: int = 0
) -> TaskParts:
    """Return the parts that `write_task` writes; see there."""
    if nodes < 1 or (train_examples is not None and train_examples < 2) or heldout_examples < 2:
        raise DataError(
            "the demo's task needs at least one node and two examples in each part, "
            f"not nodes={nodes}, train_examples={train_examples}, heldout_examples={heldout_examples}"
        )
    rng = random.Random(seed)
    doc_pieces = _pieces_by_source(documentation_streams(), rng)
    code_pieces = _pieces_by_source(code_streams(), rng)
    if train_examples is None:
        scarcer = min(sum(map(len, pieces.values())) for pieces in (doc_pieces, code_pieces))
        fair = (int(DEALT_SHARE * scarcer) - heldout_examples // 2) // nodes
        train_examples = 2 * max(1, min(TRAIN_EXAMPLES // 2, fair))
    needs = [heldout_examples, *([train_examples] * nodes)]
    doc = _deal(doc_pieces, [(n + 1) // 2 for n in needs], "doc", rng)
    code = _deal(code_pieces, [n // 2 for n in needs], "code", rng)
    parts = []
    for half, other in zip(doc, code, strict=True):
        part = [*half, *other]
        rng.shuffle(part)
        parts.append(tuple(part))
    return TaskParts(train=tuple(parts[1:]), heldout=parts[0])


def standard_library_files() -> list[tuple[str, Path]]:
    """Return (path below the standard library's folder, file) of its Python sources, sorted; tests and tables left out.

    Raises:
        DataError: the standard library's sources are not plain files on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found.extend((path.relative_to(root).as_posix(), path) for path in paths)
    if not found:
        raise DataError(f"no standard-library sources (*.py) in {root}: the demo needs a Python that carries them")
    return sorted(found)


def documentation_streams() -> dict[str, str]:
    """Return the prose of each topic of `pydoc_data.topics` on one line, paragraphs that occur twice used once.

    Raises:
        DataError: this Python does not carry `pydoc_data`.
    """
    seen: set[str] = set()
    streams = {}
    for topic, text in sorted(_topics().items()):
        prose = []
        for block in re.split(r"\n\s*\n", text.translate(_ASCII)):
            paragraph = " ".join(block.split())
            if paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                prose.append(paragraph)
        if prose:
            streams[topic] = " ".join(prose)
    return streams


def code_streams() -> dict[str, str]:
    """Return the code of each file of `TASK_PACKAGES` on one line, without docstrings and comments."""
    streams = {}
    for name, path in standard_library_files():
        if name.split("/")[0] in TASK_PACKAGES:
            code = " ".join(code_only(path.read_text(encoding="utf-8")).split())
            if code.isascii():
                streams[name] = code
    return streams


def code_only(source: str) -> str:
    """Return Python source without comments, docstrings and other bare strings; empty if it does not parse."""
    try:
        tree = ast.parse(source)
        comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    except (SyntaxError, tokenize.TokenError):
        return ""
    lines = source.splitlines()
    for comment in comments:
        row, column = comment.start
        lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(lines)


def _topics() -> Mapping[str, str]:
    if importlib.util.find_spec("pydoc_data") is None or importlib.util.find_spec("pydoc_data.topics") is None:
        raise DataError(
            "this Python carries no documentation topics (module pydoc_data.topics), which the demo's task is made of: "
            "install the full standard library (Debian: libpython3-stdlib) or use another Python"
        )
    from pydoc_data.topics import topics

    return topics


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences: no grammar, no session, no table, nearly all letters."""
    if len(paragraph.split()) < 8 or not paragraph.isascii():
        return False
    if any(mark in paragraph for mark in ("::=", ">>>", "***", "---", "===", "+--", "...  ")):
        return False
    letters = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    return letters >= 0.9 * len(paragraph)


def _pieces_by_source(streams: Mapping[str, str], rng: random.Random) -> dict[str, list[str]]:
    """Cut every stream; a piece that occurred before is left out."""
    seen: set[str] = set()
    pieces: dict[str, list[str]] = {}
    for source, stream in streams.items():
        fresh = [piece for piece in _cut(stream, rng) if piece not in seen]
        seen.update(fresh)
        pieces[source] = fresh
    return pieces


def _cut(stream: str, rng: random.Random) -> Iterator[str]:
    """Yield pieces of whole words, each as long as fits a length drawn from the one distribution."""
    start = 0
    while True:
        chars = rng.randint(PIECE_CHARS_MIN, PIECE_CHARS_MAX)
        if start + chars >= len(stream):
            return
        end = stream.rfind(" ", start, start + chars + 1)
        if end - start >= PIECE_CHARS_MIN // 2:
            yield stream[start:end]
            start = end + 1
        else:  # one word longer than a piece: skip it
            start = stream.find(" ", start + chars) + 1
            if start == 0:
                return


def _deal(
    pieces: Mapping[str, Sequence[str]], needs: Sequence[int], label: str, rng: random.Random
) -> list[list[Example]]:
    """Give each source to one part, then fill every part evenly from the sources it has.

    Large sources are dealt first, each to the part that holds least for what it needs; taking pieces in turn keeps a
    part from being about a single subject.
    """
    order = sorted(sorted(pieces), key=lambda source: -len(pieces[source]) * rng.uniform(0.5, 1.5))
    dealt: list[list[str]] = [[] for _ in needs]
    held = [0] * len(needs)
    for source in order:
        index = min(range(len(needs)), key=lambda part: held[part] / needs[part])
        dealt[index].append(source)
        held[index] += len(pieces[source])
    parts = []
    for sources, count, need in zip(dealt, held, needs, strict=True):
        if count < need:
            raise DataError(
                f"this Python's standard library gives too few pieces of label {label!r} for the demo: {count} of "
                f"{need} in one part ({sum(map(len, pieces.values()))} pieces from {len(pieces)} sources); "
                "ask for fewer nodes or examples, or use a Python with the full standard library"
            )
        shuffled = [rng.sample(pieces[source], len(pieces[source])) for source in sources]
        in_turn = (
            Example(text=text, label=label, source=source)
            for row in itertools.zip_longest(*shuffled)
            for source, text in zip(sources, row, strict=True)
            if text is not None
        )
        parts.append(list(itertools.islice(in_turn, need)))
    return parts

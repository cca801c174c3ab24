"""Data files: templates, faults with file and line, and the seeded draw."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec
from peerturb.zo.data import Draw, evenly, read_examples

LABELS: dict[str, Any] = {"kind": "labels", "labels": {"0": " bad", "1": " good"}, "template": "{text} It was"}


def objective(**fields: Any) -> ObjectiveSpec:
    return ObjectiveSpec.model_validate(fields)


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_reads_json_lines_and_fills_templates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "1+1", "a": 2, "ok": True}, b"", {"q": "é", "a": 2.5, "ok": False})
    examples = read_examples(path, objective(kind="completion", template="Q: {q} {{x}}\nA:", completion=" {a} {ok}"))
    assert [(e.prompt, e.completion) for e in examples] == [
        ("Q: 1+1 {x}\nA:", " 2 true"),
        ("Q: é {x}\nA:", " 2.5 false"),
    ]
    assert examples[1].where == f"{path}:3"


def test_gzip_holds_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [e.prompt for e in read_examples(packed, objective())] == ["one", "two"]
    packed.write_bytes(packed.read_bytes()[:-6])
    with pytest.raises(DataError, match="cannot read"):
        read_examples(packed, objective())


def test_labels_may_be_numbers_or_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x", "label": 1}, {"text": "y", "label": "0"})
    assert [e.label for e in read_examples(path, objective(**LABELS))] == ["1", "0"]


def test_every_bad_line_is_listed_with_file_and_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        {"text": "fine", "label": 1},
        b"{",
        b'["text"]',
        {"txt": "no such field", "label": 1},
        {"text": None, "label": 1},
        {"text": "x", "label": 7},
        {"text": "x"},
        b'{"text": "\xff"}',
    )
    with pytest.raises(DataError) as caught:
        read_examples(path, objective(**LABELS))
    message = str(caught.value)
    for number, hint in [
        (2, "not JSON"),
        (3, "object is expected"),
        (4, "'text' is missing"),
        (5, "must be text or a number"),
        (6, "label '7' is not one of '0', '1'"),
        (7, "'label' is missing"),
        (8, "not UTF-8"),
    ]:
        line = next(line for line in message.splitlines() if f"{path}:{number}:" in line)
        assert hint in line
    assert f"{path}:1:" not in message
    assert "7 bad lines" in message


def test_only_the_first_ten_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *[b"{"] * 25)
    with pytest.raises(DataError, match="and 15 more") as caught:
        read_examples(path, objective())
    assert f"{path}:10:" in str(caught.value)
    assert f"{path}:11:" not in str(caught.value)


def test_deep_nesting_is_a_bad_line_not_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", b"[" * 200_000)
    with pytest.raises(DataError, match=":1: "):
        read_examples(path, objective())


@pytest.mark.parametrize("template", ["{text", "{}", "{0.a}", "{text!r}", "{text:>5}", "{a[b]}", "no field"])
def test_wrong_templates_are_named(tmp_path: Path, template: str) -> None:
    # A node's own template comes in this way, past the checks of the RunSpec.
    local = objective().model_copy(update={"template": template})
    with pytest.raises(DataError, match="template"):
        read_examples(write(tmp_path / "a.jsonl", {"text": "x"}), local)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_files_are_errors(tmp_path: Path, content: bytes) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"no examples|is empty"):
            read_examples(tmp_path / name, objective())
    with pytest.raises(DataError, match="cannot read"):
        read_examples(tmp_path / "missing.jsonl", objective())


def test_empty_texts_and_completions_are_bad_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text is empty"):
        read_examples(write(tmp_path / "a.jsonl", {"text": "  "}), objective())
    with pytest.raises(DataError, match="completion is empty"):
        read_examples(
            write(tmp_path / "a.jsonl", {"text": "x", "a": ""}), objective(kind="completion", completion="{a}")
        )


def test_plain_text_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be\nor not", encoding="utf-8")
    assert [e.prompt for e in read_examples(tmp_path / "a.txt", objective())] == ["to be\nor not"]
    with pytest.raises(DataError, match=r'objective\.kind = "text" only'):
        read_examples(tmp_path / "a.txt", objective(**LABELS))
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xff")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        read_examples(tmp_path / "a.txt", objective())


def draw(total: int, per_probe: int = 2, slot: int = 3, run_key: int = 11, probes_max: int = 5) -> Draw:
    return Draw(run_key=run_key, slot=slot, total=total, per_probe=per_probe, probes_max=probes_max)


def test_the_draw_is_pinned() -> None:
    """A run must be repeatable years later: these numbers may change only with a new protocol version."""
    assert [draw(10).indices(0, sample).tolist() for sample in range(5)] == [[1, 9], [0, 3], [6, 4], [2, 7], [5, 8]]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10_000), st.integers(0, 4))
def test_a_probe_sees_distinct_sequences(total: int, per_probe: int, round_number: int, sample: int) -> None:
    if total < per_probe:
        with pytest.raises(DataError, match="a probe needs"):
            draw(total, per_probe)
        return
    indices = draw(total, per_probe).indices(round_number, sample).tolist()
    assert len(set(indices)) == per_probe
    assert all(0 <= index < total for index in indices)
    assert indices == draw(total, per_probe).indices(round_number, sample).tolist()


def test_an_epoch_uses_everything_once_and_epochs_differ() -> None:
    drawn = draw(20, probes_max=5)
    epochs = [
        [
            index
            for round_number in (2 * epoch, 2 * epoch + 1)
            for s in range(5)
            for index in drawn.indices(round_number, s)
        ]
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_slots_and_runs_draw_differently() -> None:
    orders = {
        tuple(tuple(d.indices(0, s)) for s in range(5)) for d in (draw(20), draw(20, slot=4), draw(20, run_key=12))
    }
    assert len(orders) == 3


@given(st.integers(0, 300), st.integers(1, 300))
def test_a_sample_is_spread_over_everything(total: int, count: int) -> None:
    chosen = evenly(range(total), count)
    assert len(chosen) == min(total, count)
    edges = [-1, *chosen, total]
    steps = [later - earlier for earlier, later in pairwise(edges)]
    assert all(1 <= step <= total / count + 1 for step in steps) or count >= total
    assert chosen == sorted(set(chosen))

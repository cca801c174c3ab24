"""Whatever bytes stand in a log file: its records, or `LogError`. Appending never changes what is there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from peerturb.errors import LogError
from peerturb.runlog.format import HEADER
from peerturb.runlog.reader import LogReader, read_entries
from peerturb.runlog.verify import verify
from peerturb.runlog.writer import LogWriter

PAYLOADS = st.lists(st.binary(min_size=1, max_size=60), max_size=8)


@contextmanager
def log_file(data: bytes = b"") -> Iterator[Path]:
    """A file that Hypothesis may have many of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.log"
        if data:
            path.write_bytes(data)
        yield path


def frames(payloads: list[bytes]) -> bytes:
    """Bytes of a log with these payloads, whatever they mean."""
    with log_file() as path:
        with LogWriter.open(path) as writer:
            for payload in payloads:
                writer.append_payload(payload)
        return path.read_bytes()


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_log_or_a_log_error(data: bytes, has_header: bool) -> None:
    with log_file(HEADER + data if has_header else data + b"?") as path:
        with suppress(LogError):  # any other exception fails the test
            list(read_entries(path))
        with suppress(LogError):
            verify(path)
        with suppress(LogError), LogWriter.open(path):
            pass


@given(PAYLOADS, st.data())
def test_damage_never_gives_other_records(payloads: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(frames(payloads))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    read: list[bytes] = []
    with suppress(LogError):
        read.extend(entry.payload for entry in LogReader(BytesIO(whole), source="damaged"))
    assert read == payloads[: len(read)]


@given(PAYLOADS, PAYLOADS)
def test_the_chain_depends_on_every_payload(first: list[bytes], second: list[bytes]) -> None:
    assert (frames(first) == frames(second)) == (first == second)

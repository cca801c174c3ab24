"""Bytes of a log file: a header, then one frame per record. It knows no record's content.

Header, 16 bytes: "peerturb.log", version as u32 LE. Frame: payload length (u32 LE), CRC-32 of chain hash and payload
(u32 LE), chain hash after this record (32 bytes), payload.
"""

import struct
import zlib

from peerturb import limits
from peerturb.errors import LogError
from peerturb.runlog.chain import chain_after

VERSION = 1
MAGIC = b"peerturb.log"
HEADER = MAGIC + struct.pack("<I", VERSION)
_PREFIX = struct.Struct("<II32s")
PREFIX_BYTES = _PREFIX.size


def check_header(data: bytes) -> None:
    """Require the first 16 bytes of a log.

    Raises:
        LogError: another kind of file, or another version.
    """
    if not data.startswith(MAGIC):
        raise LogError("this is not a peerturb log: its first bytes differ")
    if data[: len(HEADER)] != HEADER:
        version = int.from_bytes(data[len(MAGIC) : len(HEADER)], "little")
        raise LogError(f"the log has format version {version}; this program reads version {VERSION}")


def frame(payload: bytes, chain: bytes) -> bytes:
    """Return the bytes that stand in the file for one record; `chain` covers it."""
    assert len(payload) <= limits.RECORD_BYTES_MAX
    return _PREFIX.pack(len(payload), zlib.crc32(payload, zlib.crc32(chain)), chain) + payload


def split_prefix(data: bytes) -> tuple[int, int, bytes]:
    """Return payload length, CRC and chain hash of a frame's first 40 bytes."""
    length, crc, chain = _PREFIX.unpack(data)
    return length, crc, chain


def objection(payload: bytes, *, crc: int, chain: bytes, previous: bytes) -> str | None:
    """Say what is wrong with a whole frame, None if nothing is."""
    if zlib.crc32(payload, zlib.crc32(chain)) != crc:
        return "the CRC does not match: the bytes are damaged"
    if chain_after(previous, payload) != chain:
        return "the hash chain does not match: a record before it was removed, inserted or changed"
    return None


def true_length(rest: bytes, *, crc: int, chain: bytes, previous: bytes) -> int | None:
    """Return the length at which the payload fits its CRC and chain hash, None if there is none.

    A length field damaged upwards looks like a torn tail. This tells them apart, so that whole records are never cut.
    """
    running = zlib.crc32(chain)
    for length in range(1, len(rest) + 1):
        running = zlib.crc32(rest[length - 1 : length], running)
        if running == crc and chain_after(previous, rest[:length]) == chain:
            return length
    return None

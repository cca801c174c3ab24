"""Which peer of a recorded run gets which file of data, from what the command line says. Knows no files' contents."""

from collections.abc import Sequence
from pathlib import Path

from peerturb.errors import DataError
from peerturb.ids import PeerKey
from peerturb.protocol.ledger import Member


def assign(data: Sequence[str], members: Sequence[Member], givers: set[PeerKey]) -> list[Path]:
    """Return the data file of every slot; of slots that gave nothing it may be any.

    Args:
        data: PEER=FILE, PEER a display name or the beginning of an identity; files without a peer go to the slots that
            are left, in order.
        members: the run's, by slot.
        givers: identities whose contributions the coordinator heard.

    Raises:
        DataError: a name fits no peer or several, a file is missing, or there are too many.
    """
    named: dict[int, Path] = {}
    plain: list[Path] = []
    for text in data:
        who, mark, file = text.partition("=")
        if not mark or Path(text).expanduser().exists():
            plain.append(Path(text).expanduser())
            continue
        member = _member(who, members)
        if member.slot in named:
            raise DataError(f"--data {text}: slot {member.slot} ({member.name}) has a file already")
        named[member.slot] = Path(file).expanduser()
    left = [member.slot for member in members if member.slot not in named]
    if len(plain) > len(left):
        raise DataError(
            f"--data: {len(plain)} files without a peer for {len(left)} slots; the peers are {_who(members)}"
        )
    files = named | dict(zip(left, plain, strict=False))
    for member in members:
        if member.slot not in files and member.key in givers:
            raise DataError(
                f"--data: no file for slot {member.slot}; give one file for each peer in the order of slots, or "
                f"--data PEER=FILE; the peers are {_who(members)}"
            )
    if not files:
        raise DataError("--data: no file; name the data of each peer")
    return [files.get(member.slot) or next(iter(files.values())) for member in members]


def _member(who: str, members: Sequence[Member]) -> Member:
    fitting = [member for member in members if member.name == who]
    fitting = fitting or [member for member in members if who and member.key.hex().startswith(who.lower())]
    if len(fitting) == 1:
        return fitting[0]
    why = "no peer has that name or identity" if not fitting else f"{len(fitting)} peers do: name it by its identity"
    raise DataError(f"--data {who}=...: {why}; the peers are {_who(members)}")


def _who(members: Sequence[Member]) -> str:
    shown = ", ".join(f"slot {member.slot}: {member.name} ({member.key.hex()[:16]})" for member in members[:16])
    return shown + (f" and {len(members) - 16} more" if len(members) > 16 else "")

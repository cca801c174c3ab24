"""Where two records at the same place of two logs differ, and what that says about the runs. It knows no files."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peerturb.ids import Slot, short_hex
from peerturb.protocol.records import (
    Evaluated,
    LeaveReason,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.stepping import VOID

FIELDS: dict[type[Record], tuple[str, ...]] = {
    RunStarted: ("spec",),
    PeerJoined: ("slot", "key", "name"),
    PeerLeft: ("slot", "reason"),
    RoundOpened: ("scale", "exact_scale", "deadline_ms"),
    # Weights decide codes, codes decide the step: the first of these that differs is the cause, the others follow.
    RoundSealed: ("digest", "slots", "exact", "counts", "codes", "alpha", "loss"),
    Evaluated: ("round", "slot", "loss", "accuracy", "examples"),
    RunFinished: ("rounds",),
}
"""Fields by record, causes before effects. A round's number is not written down: it is equal as long as all is."""

ROUNDED = 2
"""Largest distance of codes that rounding in float32 explains: it moves a loss by parts in a million, and by that over
2 epsilon the projected gradient, seldom more than a code. Losses in bfloat16 move codes by several: on stories3m they
correlate at 0.9989 with float32's (docs/LOG.md), at rms 32 a deviation of 32 sqrt(2 (1 - 0.9989)) = 1.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first field in which two records differ."""

    kinds: tuple[str, str]
    """Names of the two records; equal but where `field` is "kind"."""
    round: int | None
    """The round that the records belong to; None for those that belong to none."""
    field: str
    """Its name; of a RunSpec the dotted name of the key; "kind" where one log has another record there."""
    first: Any
    second: Any
    """Both values as JSON has them: keys and digests hexadecimal, a loss that is not finite null; of codes one code."""
    slot: int | None = None
    sample: int | None = None
    """Whose code, or count of codes, it is."""
    others: tuple[str, ...] = ()
    """Names of the record's other fields (keys) that differ."""
    meaning: str

    @property
    def place(self) -> str:
        """The field for people: "codes of slot 3, sample 17"."""
        where = "" if self.slot is None else f" of slot {self.slot}"
        return self.field + where + ("" if self.sample is None else f", sample {self.sample}")


def difference(first: Record, second: Record) -> Difference:
    """Return the first difference of two records whose bytes differ, and all records before them equal."""
    names = (type(first).__name__, type(second).__name__)
    round_ = getattr(first, "round", None)
    if names[0] != names[1]:
        return Difference(
            kinds=names, round=round_, field="kind", first=names[0], second=names[1], meaning=_other_kind(first, second)
        )
    if isinstance(first, RunStarted) and isinstance(second, RunStarted):
        return _other_spec(first, second)
    differing = [name for name in FIELDS[type(first)] if not _is_same(getattr(first, name), getattr(second, name))]
    field, *others = differing
    if isinstance(first, RoundSealed) and isinstance(second, RoundSealed) and field in ("counts", "codes"):
        slot, sample, values, meaning = (_other_counts if field == "counts" else _other_codes)(first, second)
    else:
        slot, sample = None, None
        values = (_shown(field, getattr(first, field)), _shown(field, getattr(second, field)))
        meaning = _meaning(first, second, field)
    return Difference(
        kinds=names, round=round_, field=field, first=values[0], second=values[1], slot=slot, sample=sample,
        others=tuple(others), meaning=meaning,
    )  # fmt: skip


def _is_same(first: Any, second: Any) -> bool:
    """Compare bits: NaN equals NaN, and 0 is not -0."""
    if isinstance(first, float) and isinstance(second, float):
        return struct.pack("<d", first) == struct.pack("<d", second)
    return bool(first == second)


def _shown(field: str, value: Any) -> Any:
    if field == "digest":
        return short_hex(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, LeaveReason):
        return value.name.lower()
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _other_kind(first: Record, second: Record) -> str:
    kinds = {type(first), type(second)}
    if kinds & {PeerJoined, PeerLeft}:
        return (
            "somebody joined or left at another moment: the same peers with other timing, or another list of members "
            "(`peerturb sim reproduce` takes the recorded run's)"
        )
    if Evaluated in kinds:
        return "a held-out evaluation came at another moment; weights do not depend on evaluations"
    return "rounds opened, were sealed or ended at another moment"


def _other_spec(first: RunStarted, second: RunStarted) -> Difference:
    before, after = (dict(_leaves(json.loads(record.spec.canonical))) for record in (first, second))
    found = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    keys = sorted(found, key=lambda key: (key.count("."), key))  # name and seed before what follows from them
    digests = [record.spec.digest.hex()[:16] for record in (first, second)]
    return Difference(
        kinds=("RunStarted", "RunStarted"),
        round=None,
        field=f"spec.{keys[0]}",
        first=before.get(keys[0]),
        second=after.get(keys[0]),
        others=tuple(f"spec.{key}" for key in keys[1:]),
        meaning=(
            f"not the same run: the RunSpecs have the digests {digests[0]} and {digests[1]}. Every direction follows "
            "from that digest, so any key, even the name, makes all codes different; nothing after it can be compared"
        ),
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names of a JSON object's values."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _other_counts(first: RoundSealed, second: RoundSealed) -> tuple[Slot, None, tuple[int, int], str]:
    slot, *counts = next(row for row in zip(first.slots, first.counts, second.counts, strict=True) if row[1] != row[2])
    meaning = (
        f"slot {slot} sent more codes in one run: another speed under round.budget_ms, or another --probes; the codes "
        "of the samples both have may be equal"
    )
    return slot, None, (counts[0], counts[1]), meaning


def _other_codes(first: RoundSealed, second: RoundSealed) -> tuple[Slot, int, tuple[int, int], str]:
    rows = [
        (slot, sample, _signed(one), _signed(other))
        for (slot, ones), (_, others) in zip(first.contributions(), second.contributions(), strict=True)
        for sample, (one, other) in enumerate(zip(ones, others, strict=True))
        if one != other
    ]
    slot, sample, one, other = rows[0]
    whose = sorted({row[0] for row in rows})
    sent = first.counts[first.slots.index(slot)]
    said = f"{sum(row[0] == slot for row in rows)} of {sent} codes of slot {slot} differ"
    if len(whose) > 1:
        said += f", and codes of {len(whose) - 1} other slots"
    distance = max(abs(row[2] - row[3]) for row in rows)
    if any(VOID in row[2:] for row in rows):
        cause = "a loss was finite in one run only: another compute type, or other data"
    elif distance <= ROUNDED:
        cause = (
            f"by at most {distance}: losses were rounded otherwise, on another device or with other --threads or "
            "--rows, maybe of the same data"
        )
    else:
        cause = (
            f"by up to {distance}: other data or another template, another compute type (--compute-dtype), or in half "
            "precision other rows (--rows)"
        )
    return slot, sample, (one, other), f"{said}, {cause}. From this round on the weights differ, and so all after it"


def _signed(code: int) -> int:
    return code - 256 if code > 127 else code


def _meaning(first: Record, second: Record, field: str) -> str:
    """Say what another value of a field means, all before it being equal."""
    match first:
        case RoundSealed():
            assert isinstance(second, RoundSealed)
            return _other_round(first, second, field)
        case RoundOpened() if field == "scale":
            return (
                "the scale follows from the RunSpec and the codes sealed before, and these are equal: one log was "
                "written by another version or changed by hand; `peerturb log verify` says which"
            )
        case RoundOpened():
            return "the deadline follows from how long rounds took: another pace, not other weights"
        case PeerJoined() if field == "name":
            return "the same identity under another display name; nothing is computed from it"
        case PeerJoined() if field == "key":
            return (
                "another identity took this slot: another node (or another state folder), or another order of joining"
            )
        case PeerJoined():
            return "another peer joined first; its slot decides its directions"
        case PeerLeft() if field == "reason":
            return "the same peer left in another way; weights do not depend on it"
        case PeerLeft():
            return "another peer left first"
        case Evaluated() if field in ("round", "slot"):
            return "another evaluation came first; weights do not depend on evaluations"
        case Evaluated():
            return (
                "the same weights were judged otherwise: other held-out data, compute type or device; weights do not "
                "depend on evaluations"
            )
        case _:
            return "the runs ended after different numbers of rounds"


def _other_round(first: RoundSealed, second: RoundSealed, field: str) -> str:
    if field == "digest" and first.round == 0:
        return "the runs began with other weights: another base model, another type, or other frozen parameters"
    if field == "digest":
        return (
            f"weights went apart: the codes of all {first.round} rounds before are equal, so one side applied them "
            "otherwise (damaged memory, other base weights, another version); `peerturb log replay` on both logs says "
            "which digest is right"
        )
    if field == "slots":
        mine, yours = (sorted(set(one) - set(other)) for one, other in
                       ((first.slots, second.slots), (second.slots, first.slots)))  # fmt: skip
        return (
            f"others were in time: only the first log has {_slots(mine)}, only the second {_slots(yours)}; another "
            "deadline, line or speed"
        )
    if field == "alpha":
        return (
            "the step size follows from the RunSpec, the codes and the losses before, and these are equal: one log was "
            "written by another version or changed by hand; `peerturb log verify` says which"
        )
    return (
        "the codes are equal, but their losses were rounded otherwise (another device, compute type or number of "
        'threads); only a "plateau" schedule looks at losses'
    )


def _slots(slots: list[Slot]) -> str:
    if not slots:
        return "none"
    shown = ", ".join(map(str, slots[:8])) + (f" and {len(slots) - 8} more" if len(slots) > 8 else "")
    return f"slot {shown}" if len(slots) == 1 else f"slots {shown}"

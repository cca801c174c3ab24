"""A log with both estimators is the bytes that an independent script made: `make_mixed_log_vectors.py`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.protocol.records import PeerJoined, Record, RoundOpened, RoundSealed, RunFinished, RunStarted
from peerturb.runlog.reader import read_entries
from peerturb.runlog.verify import verify
from peerturb.spec import ModelSpec, PerturbationSpec, RoundSpec, RunSpec, StepSpec
from peerturb.wire.records import encode_record

SPEC = RunSpec(
    name="golden",
    seed=7,
    model=ModelSpec(name="toy", digest="efbeadde" + "ab" * 28),
    perturbation=PerturbationSpec.model_validate(
        {"estimators": ["spsa", "exact"], "exact": {"examples": 16, "codes": 6}}
    ),
    step=StepSpec(half_codes=64),
    round=RoundSpec(count=2, probes_max=4),
)
VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("log_mixed.json").read_text(encoding="utf-8"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The script's log as a file."""
    file = tmp_path / "mixed.log"
    file.write_bytes(bytes.fromhex(VECTORS["file"]))
    return file


def read(path: Path) -> list[Record]:
    return [record for _, record in read_entries(path)]


def test_the_spec_has_the_scripts_digest() -> None:
    assert SPEC.digest.hex() == VECTORS["spec_sha256"]


def test_the_log_is_sound_and_says_what_was_written(path: Path) -> None:
    assert verify(path).chain.hex() == VECTORS["chain"]
    records = read(path)
    assert [encode_record(record).hex() for record in records] == VECTORS["records"]
    opened = [record for record in records if isinstance(record, RoundOpened)]
    assert [[one.scale, one.exact_scale] for one in opened] == VECTORS["scales"][:2]
    sealed = [record for record in records if isinstance(record, RoundSealed)]
    assert [one.alpha for one in sealed] == VECTORS["alphas"]
    assert all(one.slots == (0, 9) and one.exact == (9,) for one in sealed)
    assert sealed[0].by_estimator() == (b"\x05\x80\xfe\x40", b"\x1b\xe2\x28\x11\x30\xd0")
    assert isinstance(records[-1], RunFinished)


@pytest.mark.parametrize(
    ("number", "changes", "why"),
    [
        (12, {"exact": ()}, "outside 1..4 codes"),
        (14, {"exact": (Slot(0), Slot(9))}, "has step size"),
        (12, {"exact": (Slot(3),)}, "calls contributions exact"),
        (11, {"exact_scale": 0.25}, "has the exact scale"),
        (11, {"exact_scale": 0.0}, "has the exact scale"),
    ],
)
def test_what_the_estimators_say_is_checked(path: Path, number: int, changes: dict[str, Any], why: str) -> None:
    records = read(path)
    ledger = Ledger.fold(records[:number])
    with pytest.raises(IllegalRecordError, match=why):
        ledger.apply(replace(records[number], **changes))


@pytest.mark.parametrize(("estimators", "is_exact"), [(("spsa",), True), (("exact",), False)])
def test_an_estimator_that_is_not_allowed_is_not_sealed(estimators: tuple[str, ...], is_exact: bool) -> None:
    rules = PerturbationSpec.model_validate({"estimators": estimators})
    ledger = Ledger.fold(
        [
            # A run of one estimator has one scale.
            *started(SPEC.model_copy(update={"perturbation": rules})),
        ]
    )
    sealed = RoundSealed(
        round=RoundNumber(0), alpha=0.0, loss=1.0, digest=0xDEADBEEF, slots=(Slot(0),), counts=(1,), codes=b"\0",
        exact=(Slot(0),) if is_exact else (),
    )  # fmt: skip
    with pytest.raises(IllegalRecordError, match="which the RunSpec does not allow"):
        ledger.apply(sealed)
    ledger.apply(replace(sealed, exact=() if is_exact else (Slot(0),)))
    assert ledger.exact_scale == 0


def started(spec: RunSpec) -> list[Record]:

    return [
        RunStarted(spec=RunSpec.model_validate(spec.model_dump())),
        PeerJoined(slot=Slot(0), key=PeerKey(b"a" * 32), name="ann"),
        RoundOpened(round=RoundNumber(0), scale=0.5, deadline_ms=120_000),
    ]

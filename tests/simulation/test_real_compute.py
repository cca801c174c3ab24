"""Real models under virtual peers: the bytes of a run in one process, wherever and in whatever order they are asked."""

from pathlib import Path

import pytest

from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.zo.local import LocalRound, LocalRun
from peerturb_sim.compute import Request
from peerturb_sim.real import RealModel
from peerturb_sim.result import Result
from peerturb_sim.scenario import RealSpec, Scenario
from peerturb_sim.simulation import LOG_NAME, simulate
from peerturb_sim.states import State
from peerturb_sim.torch_compute import TorchCompute
from tests.simulation.real_small import real_section, real_spec_of, scenario_file

ROUNDS, SLOTS, COUNT = 4, 3, 5


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> RealSpec:
    return real_section(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def spec(section: RealSpec) -> RunSpec:
    return real_spec_of(section, count=COUNT, rounds=ROUNDS)


@pytest.fixture(scope="module")
def local(section: RealSpec, spec: RunSpec) -> list[LocalRound]:
    """What the same peers seal in one process."""
    model = RealModel(section, spec)
    runner = model.runner
    parts = [model._engine(slot % 2).items for slot in range(SLOTS)]
    run = LocalRun(runner, spec, parts)
    done = list(run.run(ROUNDS))
    assert len({one.digest for one in done}) == ROUNDS
    return done


@pytest.fixture(scope="module")
def rounds(local: list[LocalRound]) -> list[RoundSealed]:
    return [
        RoundSealed(
            round=RoundNumber(one.round), digest=one.digest, alpha=one.alpha, loss=one.loss,
            slots=tuple(map(Slot, one.slots)), counts=one.counts, codes=one.codes,
        )
        for one in local
    ]  # fmt: skip


@pytest.fixture(scope="module")
def scales(local: list[LocalRound]) -> list[float]:
    return [one.scale for one in local]


def codes_of(rounds: list[RoundSealed]) -> list[bytes]:
    return [sealed.codes for sealed in rounds]


def replayed(compute: TorchCompute, rounds: list[RoundSealed], scales: list[float]) -> list[bytes]:
    """Measure every round's contributions on states that the compute gives; return the codes, round after round."""
    weights, found = compute.base, []
    for sealed, scale in zip(rounds, scales, strict=False):
        assert weights.digest == sealed.digest
        requests = [
            Request(weights=weights, slot=Slot(slot), round=sealed.round, scale=scale, count=COUNT)
            for slot in range(SLOTS)
        ]
        for request in requests:
            compute.expect(request)
        found.append(b"".join(compute.measure(request).codes for request in requests))
        weights = compute.apply(weights, sealed)
        assert compute.apply(requests[0].weights, sealed) is weights
    return found


def test_shared_weights_give_the_codes_of_a_run_of_ones_own(
    section: RealSpec, spec: RunSpec, rounds: list[RoundSealed], scales: list[float]
) -> None:
    compute = TorchCompute(section, spec)
    assert compute.base.rounds == 0
    assert replayed(compute, rounds, scales) == codes_of(rounds)
    before, after = compute.evaluate(compute.base), compute.evaluate(last(compute, rounds))
    assert before.examples == after.examples > 0
    assert before.loss != after.loss
    assert compute.evaluate(compute.base) == before


def last(compute: TorchCompute, rounds: list[RoundSealed]) -> State:
    weights = compute.base
    for sealed in rounds:
        weights = compute.apply(weights, sealed)
    return weights


def test_peers_that_lag_measure_on_the_weights_they_have(
    section: RealSpec, spec: RunSpec, rounds: list[RoundSealed], scales: list[float]
) -> None:
    """Expected before the weights move on, asked long after; and begun only when they are far ahead."""
    compute = TorchCompute(section, spec)

    def ask(weights: State, number: int) -> Request:
        request = Request(weights=weights, slot=Slot(0), round=RoundNumber(number), scale=scales[number], count=COUNT)
        compute.expect(request)
        return request

    states = [compute.base]
    early = []
    for number, sealed in enumerate(rounds):
        early.append(ask(states[-1], number))
        states.append(compute.apply(states[-1], sealed))
    wanted = [sealed.codes[:COUNT] for sealed in rounds]
    assert [compute.measure(request).codes for request in reversed(early)] == wanted[::-1]
    for number in (0, 3, 1, 2, 0):
        assert compute.measure(ask(states[number], number)).codes == wanted[number]


def test_a_flipped_bit_is_another_state_and_harms_nobody_else(
    section: RealSpec, spec: RunSpec, rounds: list[RoundSealed], scales: list[float]
) -> None:
    compute = TorchCompute(section, spec)
    good = compute.apply(compute.base, rounds[0])
    bad = compute.corrupt(good, 0)
    assert bad.digest != good.digest
    assert bad.rounds == good.rounds
    assert compute.apply(bad, rounds[1]).digest != compute.apply(good, rounds[1]).digest
    assert replayed(compute, rounds, scales) == codes_of(rounds)


def test_what_is_given_up_is_not_measured(
    section: RealSpec, spec: RunSpec, rounds: list[RoundSealed], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = TorchCompute(section, spec)
    request = Request(weights=compute.base, slot=Slot(0), round=RoundNumber(0), scale=0.1, count=COUNT)
    compute.expect(request)
    compute.forget(request)
    compute.forget(request)
    monkeypatch.setattr(compute, "_measured", lambda request: pytest.fail("measured"))
    compute.apply(compute.base, rounds[0])


def test_paths_and_slots_are_read_strictly(section: RealSpec) -> None:
    with pytest.raises(ValueError, match="data"):
        RealSpec.model_validate({**section.model_dump(), "data": []})
    with pytest.raises(ValueError, match="worker"):
        RealSpec.model_validate({**section.model_dump(), "worker": 3})


def simulated(section: RealSpec, folder: Path) -> tuple[bytes, Result]:
    folder.mkdir()
    result = simulate(Scenario.load(scenario_file(folder, section)), folder=folder, out=folder)
    return (folder / LOG_NAME).read_bytes(), result


def test_a_real_model_is_simulated_twice_alike(section: RealSpec, tmp_path: Path) -> None:
    first, result = simulated(section, tmp_path / "first")
    again, _ = simulated(section, tmp_path / "again")
    assert first == again
    assert result.is_finished
    assert not result.broken
    assert result.rounds[-1].peers == 3
    assert {row.round for row in result.evaluations} >= {2}

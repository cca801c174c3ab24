"""Real models under virtual peers: the bytes of a run in one process, wherever and in whatever order they are asked."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.zo.local import LocalRound, LocalRun
from peerturb.zo.model import prepare
from peerturb_sim.compute import Request
from peerturb_sim.real import RealModel, real_spec
from peerturb_sim.result import Result
from peerturb_sim.scenario import RealSpec, Scenario
from peerturb_sim.simulation import LOG_NAME, simulate
from peerturb_sim.states import State
from peerturb_sim.torch_compute import TorchCompute
from tests.zo_models import byte_tokenizer, small_model

ROUNDS, SLOTS, COUNT = 4, 3, 5


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> RealSpec:
    """A small model and two files of data; slot 2 shares the first one with slot 0."""
    folder = tmp_path_factory.mktemp("real")
    model = prepare(small_model("llama-tied"), "float32")
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    files = []
    for number in range(2):
        path = folder / f"part{number}.jsonl"
        lines = [json.dumps({"text": f"{'ab'[number]} word {'xyz' * (k % 4)} {k}"}) for k in range(12)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files.append(str(path))
    return RealSpec.model_validate(
        {
            "kind": "torch", "model": str(folder / "model"), "data": files, "eval": files[0],
            "objective": {"kind": "text", "template": "{text}", "tokens_max": 16},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def spec(section: RealSpec) -> RunSpec:
    document: dict[str, Any] = {
        "name": "real",
        "model": {"name": "any", "digest": "0" * 64},
        "round": {"probes_max": COUNT, "count": ROUNDS},
        "step": {"learning_rate": 1e-2},
    }
    return real_spec(section, RunSpec.from_document(document, source="test"))


@pytest.fixture(scope="module")
def local(section: RealSpec, spec: RunSpec) -> list[LocalRound]:
    """What the same peers seal in one process."""
    model = RealModel(section, spec)
    runner = model._prepared.runner
    parts = [model._engines[slot % 2].items for slot in range(SLOTS)]
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
    bad = compute.corrupt(good)
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


@pytest.fixture
def ray_compute(section: RealSpec, spec: RunSpec) -> Iterator[Any]:
    from peerturb_sim.ray_compute import RayCompute

    made: list[RayCompute] = []

    def make(workers: int) -> RayCompute:
        made.append(RayCompute(section.model_copy(update={"kind": "ray", "workers": workers}), spec))
        return made[-1]

    yield make
    for compute in made:
        compute.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_bytes(
    workers: int, ray_compute: Any, rounds: list[RoundSealed], scales: list[float]
) -> None:
    compute = ray_compute(workers)
    assert replayed(compute, rounds, scales) == codes_of(rounds)
    assert compute.replaced == 0


@pytest.mark.slow
def test_a_lost_worker_loses_nothing(ray_compute: Any, rounds: list[RoundSealed], scales: list[float]) -> None:
    compute = ray_compute(2)
    assert replayed(compute, rounds[:2], scales) == codes_of(rounds)[:2]
    for crew in compute._crews:
        os.kill(compute._ray.get(crew.actor.process.remote()), signal.SIGKILL)
    assert replayed(compute, rounds, scales) == codes_of(rounds)
    assert compute.replaced == 2


def test_without_ray_or_its_cluster_the_error_says_what_to_do(
    section: RealSpec, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peerturb_sim import ray_compute

    away = section.model_copy(update={"kind": "ray", "address": "127.0.0.1:1"})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ray_compute.RayError, match=r"pip install 'peerturb\[sim\]'"):
        ray_compute.RayCompute(away, spec)


def test_paths_and_slots_are_read_strictly(section: RealSpec) -> None:
    with pytest.raises(ValueError, match="data"):
        RealSpec.model_validate({**section.model_dump(), "data": []})
    with pytest.raises(ValueError, match="worker"):
        RealSpec.model_validate({**section.model_dump(), "worker": 3})


SCENARIO = """
name = "real"
eval_every = 2

[round]
count = 3
probes_max = 4

[step]
learning_rate = 0.01

[[peers]]
name = "cards"
count = 3
evaluates = true

[compute]
kind = "{kind}"
model = "{model}"
data = {data}
eval = "{eval}"
workers = {workers}

[compute.objective]
template = "{{text}}"
tokens_max = 16
"""


def simulated(section: RealSpec, folder: Path, kind: str, workers: int = 0) -> tuple[bytes, Result]:
    folder.mkdir()
    text = SCENARIO.format(
        kind=kind, model=section.model, data=json.dumps(section.data), eval=section.eval, workers=workers
    )
    (folder / "scenario.toml").write_text(text, encoding="utf-8")
    result = simulate(Scenario.load(folder / "scenario.toml"), folder=folder, out=folder)
    return (folder / LOG_NAME).read_bytes(), result


def test_a_real_model_is_simulated_twice_alike(section: RealSpec, tmp_path: Path) -> None:
    first, result = simulated(section, tmp_path / "first", "torch")
    again, _ = simulated(section, tmp_path / "again", "torch")
    assert first == again
    assert result.is_finished
    assert not result.broken
    assert result.rounds[-1].peers == 3
    assert {row.round for row in result.evaluations} >= {2}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_the_same_log(workers: int, section: RealSpec, tmp_path: Path) -> None:
    here, _ = simulated(section, tmp_path / "torch", "torch")
    there, result = simulated(section, tmp_path / "ray", "ray", workers)
    assert here == there
    assert result.is_finished

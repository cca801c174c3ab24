"""What a scenario computes with: a toy objective, a real model in this process, or workers of a Ray cluster."""

from pathlib import Path

from peerturb.errors import SpecError
from peerturb.spec import ModelSpec, ObjectiveSpec, RunSpec
from peerturb_sim.compute import Compute
from peerturb_sim.scenario import RealSpec, Scenario, ToySpec
from peerturb_sim.toy import ToyCompute, base_digest


def compute_of(scenario: Scenario, *, folder: Path) -> tuple[RunSpec, Compute]:
    """Return the RunSpec of a scenario's run, record 0 of its log, and what computes it.

    Args:
        scenario: what shall happen.
        folder: what its relative paths are relative to.

    Raises:
        PeerturbError: a model, data or a cluster cannot be used.
    """
    if isinstance(scenario.compute, ToySpec):
        toy = scenario.compute
        spec = _spec(scenario, f"toy {toy.objective}", base_digest(scenario.seed).hex())
        return spec, ToyCompute(toy, spec, seed=scenario.seed)
    spec, section = specified(scenario, folder=folder)
    if section.kind == "torch":
        from peerturb_sim.torch_compute import TorchCompute

        return spec, TorchCompute(section, spec)
    from peerturb_sim.ray_compute import RayCompute

    return spec, RayCompute(section, spec)


def specified(scenario: Scenario, *, folder: Path) -> tuple[RunSpec, RealSpec]:
    """Return the RunSpec of a scenario with a real model, and what to compute it with, paths in place.

    Args:
        scenario: one whose `compute` is not the toy.
        folder: what its relative paths are relative to.

    Raises:
        PeerturbError: the model cannot be used, or what it needs is not installed.
    """
    section = scenario.compute
    assert isinstance(section, RealSpec)
    try:
        from peerturb_sim.real import real_spec
    except ImportError as error:
        raise SpecError(
            f"compute.kind {section.kind} needs {error.name}, which is not installed: pip install 'peerturb[node]'"
        ) from error
    section = _placed(section, folder)
    return real_spec(section, _spec(scenario, section.model, "0" * 64)), section


def _spec(scenario: Scenario, model: str, digest: str) -> RunSpec:
    return RunSpec(
        name=scenario.name,
        seed=scenario.seed,
        model=ModelSpec(name=model, digest=digest),
        perturbation=scenario.perturbation,
        step=scenario.step,
        round=scenario.round,
        objective=ObjectiveSpec(eval_every=scenario.eval_every),
    )


def _placed(section: RealSpec, folder: Path) -> RealSpec:
    """Return the section with its files' paths, and the model's if there is such a folder, from where it was read."""

    def place(name: str) -> str:
        return str(folder / Path(name).expanduser())

    model = place(section.model)
    return section.model_copy(
        update={
            "model": model if Path(model).is_dir() else section.model,
            "data": tuple(map(place, section.data)),
            "eval": place(section.eval) if section.eval else "",
        }
    )

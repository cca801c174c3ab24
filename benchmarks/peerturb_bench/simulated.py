"""Worlds for benchmarks of the simulator: equal peers on good lines, one real model, one text. It measures nothing."""

from pathlib import Path
from typing import Any, Literal

from peerturb.errors import DataError
from peerturb_bench.single import shared_folder
from peerturb_sim.scenario import RealSpec, Scenario

TOKENS = 64
"""In a piece of the text; a probe sees one."""
HELDOUT_CHARS = 16_000
"""At the end of the text: about a hundred pieces."""
FOREVER_S = 1e7
"""Virtual seconds; rounds end a run, not time."""


def text_files(folder: Path) -> tuple[Path, Path]:
    """Write tinyshakespeare into `folder`, its end apart; return the files of training and held-out text.

    Raises:
        DataError: there is no folder of test models.
    """
    shared = shared_folder()
    if shared is None:
        raise DataError("this benchmark needs the folder of test models: PEERTURB_SHARED names it")
    text = (shared / "corpora" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    train, heldout = folder / "train.txt", folder / "heldout.txt"
    train.write_text(text[:-HELDOUT_CHARS], encoding="utf-8")
    heldout.write_text(text[-HELDOUT_CHARS:], encoding="utf-8")
    return train, heldout


def model_folder(name: str) -> Path:
    """Return the folder of a test model.

    Raises:
        DataError: there is no folder of test models.
    """
    shared = shared_folder()
    if shared is None:
        raise DataError("this benchmark needs the folder of test models: PEERTURB_SHARED names it")
    return shared / "models" / name


def crowd(
    model: Path,
    files: tuple[Path, Path],
    *,
    peers: int,
    probes: int,
    rounds: int,
    rate: float,
    seed: int = 0,
    eval_every: int = 0,
    kind: Literal["torch", "ray"] = "torch",
    objective: dict[str, Any] | None = None,
) -> Scenario:
    """Return a scenario in which every peer contributes to every round; the first one evaluates.

    Args:
        model: folder of the base model.
        files: training and held-out data.
        peers: all equal.
        probes: of each peer in a round.
        rounds: after which the run ends.
        rate: learning rate, constant, of normalized steps.
        eval_every: rounds; 0: never.
        kind: where probes are measured.
        objective: of the RunSpec; by default the text in pieces of `TOKENS`.
    """
    card = {"line": "data-centre", "probes_per_s": [100.0, 100.0]}
    groups = [{"name": "first", "count": 1, "evaluates": eval_every > 0, **card}]
    if peers > 1:
        groups.append({"name": "others", "count": peers - 1, **card})
    return Scenario.model_validate(
        {
            "name": f"{peers} peers",
            "seed": seed,
            "until_s": FOREVER_S,
            "round": {
                "count": rounds, "probes_max": probes, "min_peers": peers, "deadline_ms_min": 60_000,
                "deadline_ms_max": 120_000,
            },
            "step": {"learning_rate": rate},
            "eval_every": eval_every,
            "peers": groups,
            "compute": RealSpec.model_validate(
                {
                    "kind": kind, "model": str(model), "data": [str(files[0])], "eval": str(files[1]),
                    "objective": objective or {"kind": "text", "tokens_max": TOKENS},
                }
            ),
        }
    )  # fmt: skip

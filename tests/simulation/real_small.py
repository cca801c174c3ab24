"""A small real model with two files of data, for simulations of real models."""

import json
from pathlib import Path
from typing import Any

from peerturb.spec import RunSpec
from peerturb.zo.model import prepare
from peerturb_sim.real import real_spec
from peerturb_sim.scenario import RealSpec
from tests.zo_models import byte_tokenizer, small_model

SCENARIO = """
name = "real"
eval_every = 2

[round]
count = {rounds}
probes_max = 4

[step]
learning_rate = 0.01

[[peers]]
name = "cards"
count = {peers}
evaluates = true

[compute]
kind = "torch"
model = "{model}"
data = {data}
eval = "{eval}"

[compute.objective]
template = "{{text}}"
tokens_max = 16
"""


def real_section(folder: Path) -> RealSpec:
    """Write model and data; slot 2 shares the first file with slot 0."""
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


def real_spec_of(section: RealSpec, *, count: int, rounds: int) -> RunSpec:
    """Return the RunSpec of a run with `count` probes a contribution."""
    document: dict[str, Any] = {
        "name": "real",
        "model": {"name": "any", "digest": "0" * 64},
        "round": {"probes_max": count, "count": rounds},
        "step": {"learning_rate": 1e-2},
    }
    return real_spec(section, RunSpec.from_document(document, source="test"))


def scenario_file(folder: Path, section: RealSpec, *, peers: int = 3, rounds: int = 3) -> Path:
    """Write a scenario of the section's model in this process; return its file."""
    text = SCENARIO.format(
        model=section.model, data=json.dumps(section.data), eval=section.eval, peers=peers, rounds=rounds
    )
    path = folder / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return path

"""Whole runs on a card: the same log gives the CPU's digest, and probes measure what they say."""

from typing import Any

import numpy as np
import pytest
import torch

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType, Manifest
from peerturb.protocol.ledger import step_size
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.stepping import VOID
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.replay import replay
from peerturb.zo.update import Family, apply_update
from tests.zo_models import byte_tokenizer, small_model, spec_of

pytestmark = pytest.mark.gpu
FAMILIES: tuple[Family, ...] = ("rank1", "dense")
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
TEXTS = ["hello there", "to be or not", "abc", "the quick brown", "fox", "jumps over", "a lazy dog"]
ROUND, SLOT = RoundNumber(4), Slot(2)


def run_of(family: Family, dtype: DType) -> RunSpec:
    spec = spec_of(family=family)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})


def weights_of(model: Any, manifest: Manifest) -> list[torch.Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return [named[parameter.name].detach() for parameter in manifest]


def sealed_rounds(spec: RunSpec, manifest: Manifest, weights: list[torch.Tensor], rounds: int) -> list[RoundSealed]:
    """Apply rounds of random codes, some void, from two peers to the weights, and write the log of it."""
    generator, log = np.random.default_rng(0), []
    for number in range(rounds):
        codes = generator.integers(-128, 128, 24).astype(np.int8).tobytes()
        sealed = RoundSealed(
            round=RoundNumber(number),
            alpha=step_size(spec, RoundNumber(number), 0.05, codes),
            loss=1.0,
            digest=short_digest(run_digest(manifest, weights)),
            slots=(Slot(0), Slot(9)),
            counts=(7, 17),
            codes=codes,
        )
        apply_update(
            weights, manifest, family=spec.perturbation.family, run_key=spec.run_key, round=number, slots=sealed.slots,
            counts=sealed.counts, codes=codes, alpha=sealed.alpha,
        )  # fmt: skip
        log.append(sealed)
    return log


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_same_log_gives_the_same_digest(name: str, family: Family, dtype: DType) -> None:
    spec = run_of(family, dtype)
    model = small_model(name, dtype=getattr(torch, dtype))
    manifest = build_manifest(model, spec.model)
    base = weights_of(model, manifest)
    trained = [weight.clone() for weight in base]
    log = sealed_rounds(spec, manifest, trained, 20)
    digest = run_digest(manifest, trained)
    on_card = [weight.cuda() for weight in base]
    assert replay(log, on_card, manifest, spec, check_every=1) == digest
    for parameter, one, other in zip(manifest, trained, on_card, strict=True):
        assert torch.equal(one, other.cpu()), parameter.name


def engine_on(device: str, family: Family, dtype: DType) -> ProbeEngine[TokenSequence]:
    spec = run_of(family, dtype)
    model = small_model("llama-tied", dtype=getattr(torch, dtype))
    manifest = build_manifest(model, spec.model)
    objective = Objective(spec.objective, byte_tokenizer())
    items = objective.encode([Example(prompt=text, label="", where="x") for text in TEXTS], source="x")
    return ProbeEngine(Runner(model.to(device), manifest, objective), spec, items)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_probes_run_and_leave_the_weights_alone(family: Family, dtype: DType) -> None:
    """Losses may differ a little between devices; that is why bytes, not losses, are shared."""
    on_cpu, on_card = engine_on("cpu", family, dtype), engine_on("cuda", family, dtype)
    before = [weight.clone() for _, weight in on_card.evaluator.parameters]
    expected, found = on_cpu.measure(ROUND, slot=SLOT), on_card.measure(ROUND, slot=SLOT)
    tolerance = 2e-5 if dtype == "float32" else 5e-2
    np.testing.assert_allclose(found.plus, expected.plus, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.reference, expected.reference, rtol=0, atol=tolerance)
    assert VOID not in on_card.contribute(ROUND, slot=SLOT, scale=0.05).codes
    for (entry, weight), kept in zip(on_card.evaluator.parameters, before, strict=True):
        assert torch.equal(weight.view(torch.uint8), kept.view(torch.uint8)), entry.name

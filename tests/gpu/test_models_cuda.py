"""Perturbed forwards on CUDA: every kind of model passes the coverage check, experts through the grouped product."""

import pytest
import torch

from peerturb.zo.coverage import check_coverage
from peerturb.zo.shadow import Shadow
from tests.zo_models import CLASSIFIERS, CONFIGS, EXCLUDE, SEQ2SEQ, manifest_of, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MODELS = [
    *(("causal", name) for name in sorted(CONFIGS)),
    *(("classes", name) for name in sorted(CLASSIFIERS)),
    *(("seq2seq", name) for name in sorted(SEQ2SEQ)),
]


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_models_pass_the_coverage_check(kind: str, name: str, dtype: torch.dtype, family: str) -> None:
    model = small_model(name, kind=kind)
    manifest = manifest_of(model, exclude=EXCLUDE.get(name, ()))
    check_coverage(Shadow(model.to("cuda"), dtype).model, manifest, family)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_on_cuda_give_the_logits_of_the_cpu(name: str) -> None:
    model = small_model(name)
    ids = torch.arange(24).view(3, 8) * 5 % 260
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        found = model.to("cuda")(input_ids=ids.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

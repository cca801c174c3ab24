"""Say when a run's epsilon is too small to be seen in the type a model is evaluated in."""

import torch

from peerturb.zo.coverage import Parameters

SHARE = 0.5
"""A warning is due if this share of the perturbed matrices' elements is concerned."""


@torch.inference_mode()
def epsilon_warning(parameters: Parameters, epsilon: float, dtype: torch.dtype) -> str | None:
    """Return a warning with the smallest epsilon that shows, or None if most matrices resolve the run's.

    A product's element has the size of rms(W) |x|, its perturbation that of epsilon 2**k |x|: below half of the last
    digit of the former the latter rounds away. Vectors are not judged: they are perturbed in f32.
    """
    digit = torch.finfo(dtype).eps / 2
    needs: list[tuple[float, int, str]] = []
    for entry, tensor in parameters:
        if entry.kind != "vector":
            rms = float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) / max(1, tensor.numel()) ** 0.5
            # What the type cannot tell from zero is lost whatever it is added to.
            least = max(digit * rms, torch.finfo(dtype).smallest_normal)
            needs.append((least / 2.0**entry.exponent, entry.elements, entry.name))
    lost = [need for need in needs if need[0] > epsilon]
    total = sum(count for _, count, _ in needs)
    if not lost or sum(count for _, count, _ in lost) < SHARE * total:
        return None
    least = max(least for least, _, _ in lost)
    return (
        f"perturbation.epsilon = {epsilon:g} is below the resolution of {str(dtype).removeprefix('torch.')}: in "
        f"{len(lost)} of {len(needs)} matrices (the first is {lost[0][2]}) most of the perturbation rounds away. It "
        f"shows in all of them from epsilon = {least:.1e} on"
    )

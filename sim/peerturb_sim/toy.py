"""An objective of 128 numbers: production signs, codes and update, numpy only; thousands of peers cost milliseconds.

128 elements are one Philox block a probe. All sums over them are of integers (gradients in fixed point), exact in any
order, so a measurement does not depend on what it was computed together with. Random draws call log and cos, `logistic`
exp too: their last bits may differ between C libraries and processors, never between two runs on one machine.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peerturb import codec, rng
from peerturb.floats import f32
from peerturb.manifest import Parameter, manifest_digest
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb_sim.compute import Evaluation, Measurement, Request
from peerturb_sim.events import stream
from peerturb_sim.scenario import ToySpec

F64 = NDArray[np.float64]

SIZE = rng.SIGNS_PER_BLOCK
"""Elements of the weights."""
MANIFEST = (Parameter(index=0, name="theta", shape=(SIZE,), dtype="float32"),)
EXAMPLES = 2_048
"""Training examples of `logistic`; half as many are held out."""
BATCH = 2
"""Examples a probe of `logistic` is measured on."""
_FIXED_BITS = 40
"""Bits of a gradient in fixed point: 128 of them add up below 2**53."""
_BYTE_SUM_SPREAD = math.sqrt(8 * (256**2 - 1) / 12)
"""Standard deviation of the sum of eight bytes: nearly Gaussian, and an integer."""


def digest_of(values: NDArray[np.float32]) -> bytes:
    """Return the 32-byte digest of weights; the first four bytes are the short one."""
    return hashlib.sha256(b"peerturb toy weights\0" + values.tobytes()).digest()


def base_digest(seed: int) -> bytes:
    """Return the digest of the weights that a seed begins with."""
    return digest_of(_base(seed))


def _base(seed: int) -> NDArray[np.float32]:
    draws = stream(seed, "toy base")
    return np.array([draws.gauss(0.0, 1.0) for _ in range(SIZE)], np.float32)


@dataclass(slots=True, eq=False)
class ToyWeights:
    """Weights that many replicas may share; knows what follows from them, so that it is computed once."""

    values: NDArray[np.float32]
    rounds: int
    digest: int
    after: list[tuple[RoundSealed, "ToyWeights"]] = field(default_factory=list)
    expected: list[Request] = field(default_factory=list)
    """Measurements begun on these weights and not yet computed."""


class ToyCompute:
    """Implements `Compute` for one run."""

    def __init__(self, toy: ToySpec, spec: RunSpec, *, seed: int) -> None:
        """Prepare the objective that follows from the seed."""
        self.base_digest = base_digest(seed)
        self.manifest_digest = manifest_digest(MANIFEST)
        self._spec = spec
        self._base = _weights(_base(seed), 0)
        epsilon = spec.perturbation.epsilon
        self._objective = (
            Quadratic(toy, seed, epsilon) if toy.objective == "quadratic" else Logistic(seed, epsilon, spec.run_key)
        )

    @property
    def base(self) -> ToyWeights:
        """Weights before round 0."""
        return self._base

    def apply(self, weights: ToyWeights, sealed: RoundSealed) -> ToyWeights:
        """Return the weights after a round, by numerics v1: U = sum of c z, then two separately rounded operations."""
        for known, after in weights.after:
            if known is sealed or known == sealed:
                return after
        slots = np.repeat(np.array(sealed.slots), sealed.counts)
        samples = np.concatenate([np.arange(count) for count in sealed.counts])
        factors = codec.decode(sealed.codes).astype(np.float64)
        total = factors @ self._signs(sealed.round, slots, samples)
        step = (sealed.alpha * total).astype(np.float32)
        after = _weights(weights.values - step, weights.rounds + 1)
        weights.after.append((sealed, after))
        return after

    def corrupt(self, weights: ToyWeights, which: int) -> ToyWeights:
        """Return the weights with the highest bit of a mantissa flipped: the lowest might be rounded away again."""
        values = weights.values.copy()
        values.view(np.uint32)[which % SIZE] ^= 1 << 22
        return _weights(values, weights.rounds)

    def expect(self, request: Request) -> None:
        """Note what to compute together."""
        request.weights.expected.append(request)

    def forget(self, request: Request) -> None:
        """Compute a request no more."""
        if request in request.weights.expected:
            request.weights.expected.remove(request)

    def measure(self, request: Request) -> Measurement:
        """Return the codes and the mean loss; everything expected on the same weights is computed with it."""
        if request.answer is None:
            by_round: defaultdict[tuple[int, float, bool], list[Request]] = defaultdict(list)
            for one in request.weights.expected:
                by_round[one.round, one.scale, one.is_exact].append(one)
            request.weights.expected.clear()
            for others in by_round.values():
                self._measure_all(others)
        assert request.answer is not None, "a measurement must be expected before it is taken"
        return request.answer

    def evaluate(self, weights: ToyWeights) -> Evaluation:
        """Evaluate without noise, or on the held-out half."""
        return self._objective.evaluate(weights.values.astype(np.float64))

    def close(self) -> None:
        """Nothing is held."""

    def _measure_all(self, requests: Sequence[Request]) -> None:
        first = requests[0]
        counts = [request.count for request in requests]
        slots = np.repeat(np.array([request.slot for request in requests]), counts)
        samples = np.concatenate([np.arange(count) for count in counts])
        noise = rng.philox(0, rng.BATCH_STREAM, samples, first.round, key=(self._spec.run_key, slots))
        signs = self._signs(first.round, slots, samples)
        values = first.weights.values.astype(np.float64)
        if first.is_exact:
            projected, losses = self._exact(requests, values, signs)
        else:
            projected, losses = self._objective.measure(values, signs, noise)
        rounding, luck = self._spec.perturbation.rounding, None
        if rounding == "stochastic":
            luck = rng.philox(0, rng.CODE_STREAM, samples, first.round, key=(self._spec.run_key, slots))[..., 0]
        codes = codec.encode(projected, first.scale, rounding=rounding, noise=luck)
        start = 0
        for request, count in zip(requests, counts, strict=True):
            end = start + count
            finite = losses[start:end][np.isfinite(losses[start:end])]
            loss = math.fsum(finite) / len(finite) if len(finite) else math.nan
            request.answer = Measurement(codes=codes[start:end].tobytes(), loss=f32(loss))
            start = end

    def _exact(self, requests: Sequence[Request], values: F64, signs: F64) -> tuple[F64, F64]:
        """Return the projections of each request's own gradient, and its loss for each of them: f64 [n] both."""
        examples, start = self._spec.perturbation.exact_rules.examples, 0
        projected, losses = np.zeros(len(signs)), np.zeros(len(signs))
        for one in requests:
            # As many words as examples or elements ask for: sample and block number them.
            blocks = np.arange(max(SIZE, examples))
            noise = rng.philox(blocks, rng.BATCH_STREAM, 0, one.round, key=(self._spec.run_key, one.slot))
            gradient, loss = self._objective.gradient(values, noise, examples)
            part = slice(start, start + one.count)
            projected[part], losses[part] = _project(signs[part], gradient), loss
            start += one.count
        return projected, losses

    def _signs(self, round_: int, slots: NDArray[np.int64], samples: NDArray[np.int64]) -> F64:
        signs = rng.linear_signs(
            rng.stream_of(0, rng.SIDE_LEFT), 0, SIZE,
            round=round_, run_key=self._spec.run_key, slots=slots, samples=samples,
        )  # fmt: skip
        return signs.astype(np.float64)


class Quadratic:
    """L(theta) = sum of curvature (theta - optimum)^2 / 2; every example pulls the optimum elsewhere."""

    def __init__(self, toy: ToySpec, seed: int, epsilon: float) -> None:
        draws = stream(seed, "toy optimum")
        self._optimum = np.array([draws.gauss(0.0, 1.0) for _ in range(SIZE)])
        self._curvature = np.array([toy.condition ** -(index / (SIZE - 1)) for index in range(SIZE)])
        self._epsilon = epsilon
        self._pull = toy.noise
        self._noise = toy.noise * math.sqrt(math.fsum(self._curvature**2))

    def measure(self, values: F64, signs: F64, noise: rng.U32) -> tuple[F64, F64]:
        """Return the projected gradient and the loss of each probe: f64 [n] both."""
        gradient = self._curvature * (values - self._optimum)
        sums = noise.view(np.uint8).reshape(-1, 2, 8).astype(np.int64).sum(axis=2) - 8 * 255 / 2
        pull, luck = sums.T / _BYTE_SUM_SPREAD * self._noise
        lift = self._epsilon**2 / 2 * math.fsum(self._curvature)
        steepness = math.sqrt(math.fsum(gradient**2) / SIZE)
        return _project(signs, gradient) + pull, self._loss(values) + lift + luck * steepness

    def gradient(self, values: F64, noise: rng.U32, examples: int) -> tuple[F64, float]:
        """Return the gradient over so many examples, f64 [SIZE], and their mean loss."""
        gradient = self._curvature * (values - self._optimum)
        sums = noise.view(np.uint8).reshape(-1, 2, 8)[:SIZE, 0].astype(np.int64).sum(axis=1) - 8 * 255 / 2
        pull = sums / _BYTE_SUM_SPREAD / math.sqrt(examples)
        return gradient + self._curvature * self._pull * pull, self._loss(values)

    def evaluate(self, values: F64) -> Evaluation:
        """Return the loss without noise."""
        return Evaluation(loss=self._loss(values), accuracy=None, examples=1)

    def _loss(self, values: F64) -> float:
        return math.fsum(self._curvature * (values - self._optimum) ** 2) / 2


class Logistic:
    """Classification of +-1 vectors by a hidden plane, a tenth of the labels wrong."""

    def __init__(self, seed: int, epsilon: float, run_key: int) -> None:
        count = EXAMPLES + EXAMPLES // 2
        draws = stream(seed, "toy examples")
        bits = np.frombuffer(draws.randbytes(count * SIZE), np.uint8).reshape(count, SIZE)
        features = 1.0 - 2.0 * (bits & 1).astype(np.float64)
        plane = np.array([draws.gauss(0.0, 1.0) for _ in range(SIZE)])
        labels = np.where(_project(features, plane) > 0, 1.0, -1.0)
        wrong = np.frombuffer(draws.randbytes(count), np.uint8) < 26
        self._rows: F64 = features * np.where(wrong, -labels, labels)[:, None]
        """Features times label: a positive product with the weights is a right answer."""
        self._epsilon = epsilon
        self._width = math.sqrt(SIZE)

    def measure(self, values: F64, signs: F64, noise: rng.U32) -> tuple[F64, F64]:
        """Return the projected gradient and the loss of each probe: f64 [n] both."""
        chosen = noise[:, :BATCH].astype(np.int64) % EXAMPLES
        margins = (_project(self._rows[:EXAMPLES], values) / self._width)[chosen]
        moved = np.einsum("nbi,ni->nb", self._rows[chosen], signs) * (self._epsilon / self._width)
        plus, minus = (np.logaddexp(0.0, -(margins + move)).mean(axis=1) for move in (moved, -moved))
        return (plus - minus) / (2 * self._epsilon), (plus + minus) / 2

    def gradient(self, values: F64, noise: rng.U32, examples: int) -> tuple[F64, float]:
        """Return the gradient over so many examples, f64 [SIZE], and their mean loss."""
        rows = self._rows[noise[:examples, 0].astype(np.int64) % EXAMPLES]
        margins = _project(rows, values) / self._width
        slopes = 1.0 / (1.0 + np.exp(margins)) / self._width
        return -(rows * slopes[:, None]).mean(axis=0), math.fsum(np.logaddexp(0.0, -margins)) / examples

    def evaluate(self, values: F64) -> Evaluation:
        """Return loss and accuracy on the held-out examples."""
        margins = _project(self._rows[EXAMPLES:], values) / self._width
        loss = math.fsum(np.logaddexp(0.0, -margins)) / len(margins)
        return Evaluation(loss=loss, accuracy=float((margins > 0).mean()), examples=len(margins))


def _project(signs: F64, vector: F64) -> F64:
    """Return signs @ vector, f64 [n]: the vector in fixed point, so that the sum is exact in any order."""
    largest = float(np.abs(vector).max())
    if not math.isfinite(largest):
        return np.full(len(signs), math.nan)
    shift = _FIXED_BITS - math.frexp(largest)[1]
    return np.ldexp(signs @ np.rint(np.ldexp(vector, shift)), -shift)


def _weights(values: NDArray[np.float32], rounds: int) -> ToyWeights:
    return ToyWeights(values, rounds, int.from_bytes(digest_of(values)[:4], "little"))

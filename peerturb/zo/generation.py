"""Rewards over generated text: every row writes its own text under its own perturbed weights, and a function judges it.

Greedy or sampled. Whatever is compared (both sides of a probe; with one side all probes and the clean weights) draws
with the same numbers, so that it differs by the weights alone; the numbers follow from seed, perturbation and example,
so a measurement can be repeated. Knows no rounds.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from peerturb import rng
from peerturb.errors import ObjectiveError
from peerturb.manifest import Manifest, Parameter
from peerturb.zo.batch import Size
from peerturb.zo.coverage import Trial, text_trial
from peerturb.zo.kinds import is_encoder, kind_of, positions_max
from peerturb.zo.need import cache_width
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.perturbed import PerturbedForward

Item = TypeVar("Item")

KEY_SIGNS = 256
"""Signs of a perturbation that tell it from every other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How texts are written."""

    tokens_max: int = 32
    """Most tokens of a text."""
    temperature: float = 0.0
    """0: always the most probable token; above, sampled from softmax(logits / temperature)."""
    seed: int = 0
    """Of the sampling."""


class GenerationEvaluator(Generic[Item]):
    """A causal language model and a reward for what it writes (`Evaluator` of the user's items).

    Args:
        model: as `peerturb.zo.model.load_model` returns it.
        tokenizer: its tokenizer.
        manifest: what is trained.
        reward: (item, text) -> a number, higher is better; the text is what follows the prompt, without special tokens.
        prompt: item -> prompt; by default the item is the prompt.
        writing: how texts are written.

    Raises:
        ObjectiveError: the model is no causal language model, or the settings are impossible for it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        manifest: Manifest,
        reward: Callable[[Item, str], float],
        *,
        prompt: Callable[[Item], str] = str,
        writing: Writing | None = None,
    ) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        head = _writing_head(model)
        self.writing = writing or Writing()
        if self.writing.tokens_max < 1 or self.writing.temperature < 0:
            raise ObjectiveError("tokens_max must be at least 1 and the temperature at least 0")
        self.model, self.tokenizer = model, tokenizer
        self.parameters: list[tuple[Parameter, Tensor]] = [(entry, named[entry.name]) for entry in manifest]
        self.device: torch.device = next(model.parameters()).device
        self.owners: Sequence[nn.Module] | None = None
        self.dtype: torch.dtype = self.parameters[0][1].dtype
        self.trial: Trial = text_trial(model)
        self.is_whole = False
        self._head: Tensor = head.weight
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._cache_width = cache_width(model)
        self._reward, self._prompt = reward, prompt
        self._room = positions_max(model)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [] if ends is None else ([ends] if isinstance(ends, int) else list(ends))

    def size(self, item: Item) -> Size:
        """See `Evaluator`: a row holds prompt and text, but logits for one token at a time."""
        tokens = len(self._ids(item)) + self.writing.tokens_max
        return Size(tokens=tokens, outputs=self._vocabulary, held=tokens * self._cache_width)

    def losses(self, items: Sequence[Item], perturbation: Perturbation | None = None) -> Tensor:
        """See `Evaluator`: minus the rewards, f64."""
        texts = self.texts(items, perturbation)
        judged = _each_side(items, perturbation)
        losses = torch.tensor([-self._judge(item, text) for item, text in zip(judged, texts, strict=True)]).double()
        return losses if perturbation is None else losses.view(perturbation.probes, perturbation.sides, -1)

    @torch.inference_mode()
    def texts(self, items: Sequence[Item], perturbation: Perturbation | None = None) -> list[str]:
        """Return what the model writes after each prompt; under a perturbation probe by probe, +epsilon first."""
        rows = _each_side(items, perturbation)
        prompts = [self._ids(item) for item in rows]
        manifest = [entry for entry, _ in self.parameters]
        draws = _Draws(self.writing, manifest, rows=len(rows), perturbation=perturbation)
        written = self._write(prompts, perturbation, draws)
        return [str(text) for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _write(self, prompts: list[list[int]], perturbation: Perturbation | None, draws: "_Draws") -> list[list[int]]:
        """Return the new tokens of every row, without the end token."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left, so that all rows go on at the same place
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        places = (mask.cumsum(1) - 1).clamp_(min=0)
        ends = torch.tensor(self._ends, dtype=torch.long, device=self.device)
        is_done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        cache: Any = None
        steps: list[Tensor] = []
        for step in range(self.writing.tokens_max):
            logits, cache = self._forward(ids, mask, places, cache, perturbation)
            chosen = draws.choose(logits, step)
            is_done |= torch.isin(chosen, ends)
            steps.append(torch.where(is_done, -1, chosen))
            if bool(is_done.all()):
                break
            ids, places = chosen[:, None], places[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        rows: list[list[int]] = torch.stack(steps, 1).tolist()
        return [[token for token in row if token >= 0] for row in rows]

    def _forward(
        self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any, perturbation: Perturbation | None
    ) -> tuple[Tensor, Any]:
        """Return the logits after the last token, [rows, vocabulary], and the cache with these tokens in it."""
        rows, length = ids.shape
        last = torch.full((rows, 1), length - 1, dtype=torch.long, device=self.device)
        mode: Any = nullcontext()
        if perturbation is not None:
            mode = PerturbedForward(self.parameters, perturbation, rows=rows, head=self._head, positions=last)
        with mode:
            result = self.model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            )
        return result.logits[:, -1].float(), result.past_key_values

    def _ids(self, item: Item) -> list[int]:
        """Return the prompt's tokens."""
        text = self._prompt(item)
        if not isinstance(text, str):
            raise ObjectiveError(
                f"`prompt` returned {type(text).__name__} for an item; it must return the prompt's text"
            )
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] in self._ends:
            ids = ids[:-1]
        if not ids:
            raise ObjectiveError(f"the prompt {text!r:.60} turns into no tokens")
        if self._room is not None and len(ids) + self.writing.tokens_max > self._room:
            raise ObjectiveError(
                f"the prompt {text!r:.60} has {len(ids)} tokens; with {self.writing.tokens_max} new ones it does not "
                f"fit the model's {self._room} positions: shorten it, or lower tokens_max"
            )
        return ids

    def _judge(self, item: Item, text: str) -> float:
        value = self._reward(item, text)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ObjectiveError(f"`reward` returned {type(value).__name__}; it must return a number") from error


def _writing_head(model: Any) -> Any:
    """Return the layer that turns the last hidden states into logits.

    Raises:
        ObjectiveError: the model does not write a text token by token after its prompt.
    """
    config = getattr(model, "config", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    is_causal = head is not None and kind_of(model) == "causal" and not is_encoder(config)
    if not is_causal:
        raise ObjectiveError(
            f"a reward over generated text needs a causal language model (Llama, GPT-2 and others), not "
            f"{type(model).__name__}: encoder-decoders, encoders and classifiers are not supported"
        )
    return head


class _Draws:
    """Choose tokens: the greatest logit, or the one where a row's own number falls in the cumulated probabilities."""

    def __init__(
        self, writing: Writing, manifest: Sequence[Parameter], *, rows: int, perturbation: Perturbation | None
    ) -> None:
        self._temperature = writing.temperature
        if not self._temperature:
            return
        probes = 1 if perturbation is None else perturbation.probes
        sides = 1 if perturbation is None else perturbation.sides
        per_side = rows // (probes * sides)
        keys = np.array([_key(writing.seed, perturbation, manifest, probe) for probe in range(probes)], np.uint64)
        self._keys = np.repeat(keys, sides * per_side, axis=0)
        places = np.arange(per_side)[None].repeat(probes, 0)
        if perturbation is not None and perturbation.places is not None:
            places = perturbation.places
        self._examples = places.repeat(sides, 0).reshape(-1)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """Return a token for each row."""
        if not self._temperature:
            return logits.argmax(1)
        words = rng.philox(step, self._examples, 0, 0, key=(self._keys[:, 0], self._keys[:, 1]))[:, 0]
        # float64, and below the last sum: rounding must not lead past the last token.
        sums = torch.softmax(logits / self._temperature, 1).double().cumsum(1)
        points = torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-32).to(logits.device)[:, None]
        return torch.searchsorted(sums, points * sums[:, -1:])[:, 0].clamp_(max=logits.shape[1] - 1)


def _key(seed: int, perturbation: Perturbation | None, manifest: Sequence[Parameter], probe: int) -> tuple[int, int]:
    """Return a Philox key that is another for every probe of every round, whose signs stand for it, or the common one
    that the perturbation names."""
    state = hashlib.sha256(b"peerturb writing 1\0" + seed.to_bytes(8, "little"))
    if perturbation is not None and perturbation.draw_key:
        state.update(perturbation.draw_key)
    elif perturbation is not None:
        signs = 0
        for parameter in manifest:
            left = perturbation.signs.left(parameter)[probe]
            state.update(left.cpu().numpy().tobytes())
            signs += left.numel()
            if signs >= KEY_SIGNS:
                break
    digest = state.digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _each_side(items: Sequence[Item], perturbation: Perturbation | None) -> list[Item]:
    return list(items) if perturbation is None else [items[row] for row in perturbation.each_side(len(items))]

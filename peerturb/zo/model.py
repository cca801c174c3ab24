"""Load a Hugging Face model of the kind an objective needs, and number its trainable tensors.

Only safetensors weights are read and no code from a model repository is ever run. Knows nothing of probes or rounds.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from peerturb.errors import ModelError
from peerturb.manifest import DType, Manifest, Parameter
from peerturb.spec import ModelSpec
from peerturb.zo.adapters import is_adapted, is_adapter_tensor, trained_whole
from peerturb.zo.digest import run_digest
from peerturb.zo.experts import use_row_experts
from peerturb.zo.heads import fill_new, is_new
from peerturb.zo.kinds import ModelKind, Task, kind_for, positions_max
from peerturb.zo.quantised import is_quantised, quantised_digest

TORCH_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""RunSpec `model.dtype` to torch."""

BUILDERS: dict[ModelKind, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classes": AutoModelForSequenceClassification,
}

LANGUAGE_MODEL = Task()

__all__ = [
    "TORCH_DTYPES",
    "base_digest",
    "build_manifest",
    "load_model",
    "positions_max",
    "prepare",
    "trainable_weights",
]

FOLDER_MARKS = ("/", ".", "~")
"""A name that begins with one of these is a folder, never a hub name."""


def load_model(
    name_or_folder: str | Path,
    dtype: DType,
    *,
    task: Task = LANGUAGE_MODEL,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, ready for probes: evaluation mode, no gradients, every parameter in `dtype`.

    Args:
        name_or_folder: a local folder, or a hub name such as "org/model".
        task: language model or classifier. A head that the files lack is made from the task's seed.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: not found, not reachable, of another kind, weights or tokenizer missing or unreadable.
    """
    source = _locate(name_or_folder)
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    shown = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if Path(source).is_dir():
        transformers_logging.disable_progress_bar()
    try:
        kind = kind_for(_read_config(source, options), task)
        model = _read_weights(source, dtype, kind, task, options)
        tokenizer = _read_tokenizer(source, options)
    finally:
        transformers_logging.set_verbosity(shown)
        if bars:
            transformers_logging.enable_progress_bar()
    _agree_on_padding(model, tokenizer)
    return prepare(model, dtype, device=device), tokenizer


def prepare(model: PreTrainedModel, dtype: DType, *, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Put a model into the state probes need: evaluation mode, no gradients, parameters in `dtype` on `device`.

    Buffers keep their type: rotary frequencies, for instance, must stay float32.
    """
    model.eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != TORCH_DTYPES[dtype]:
            parameter.data = parameter.data.to(TORCH_DTYPES[dtype])
    model.config.dtype = TORCH_DTYPES[dtype]
    model.config.use_cache = False
    use_row_experts(model)
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return placed


def build_manifest(model: torch.nn.Module, spec: ModelSpec) -> Manifest:
    """Number the trainable tensors: sorted by name, tied ones once, without the excluded; with an adapter, its own
    and a classifier's head.

    Raises:
        ModelError: a pattern matches nothing, a tensor has the wrong type, storage is shared, or nothing is left.
    """
    named = _sorted_parameters(model)
    if spec.adapter is not None:
        if not is_adapted(model):
            raise ModelError("the RunSpec has a section model.adapter, but the model has no adapter: attach it first")
        whole = trained_whole(model)
        named = [item for item in named if is_adapter_tensor(item[0][0]) or item[0][0] in whole]
    every = [name for names, _ in named for name in names]
    for pattern in (*spec.exclude, *spec.exponents):
        if not any(fnmatchcase(name, pattern) for name in every):
            where = "model.exclude" if pattern in spec.exclude else "model.exponents"
            raise ModelError(
                f"the pattern {pattern!r} in {where} matches no parameter; names look like {', '.join(every[:3])}"
            )
    kept = [(names[0], tensor) for names, tensor in named if not _matches(names, spec.exclude)]
    if not kept:
        raise ModelError("model.exclude freezes every parameter; nothing is left to train")
    _check_storage(kept)
    return tuple(
        _describe(index, name, tensor, spec.dtype, _exponent(name, spec.exponents))
        for index, (name, tensor) in enumerate(kept)
    )


def trainable_weights(model: torch.nn.Module, manifest: Manifest) -> dict[str, Tensor]:
    """Return the model's own tensors (not copies) by name, in manifest order: the order updates and digests want.

    Raises:
        ModelError: the model lacks one.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    missing = [entry.name for entry in manifest if entry.name not in named]
    if missing:
        raise ModelError(f"the model has no parameter {missing[0]}; it is not the model of the manifest")
    return {entry.name: named[entry.name].data for entry in manifest}


def base_digest(model: torch.nn.Module, dtype: DType) -> str:
    """Return RunSpec `model.digest`: the fingerprint of all parameters, frozen ones included, hexadecimal."""
    if is_quantised(model):
        return quantised_digest(model, dtype)
    manifest = build_manifest(model, ModelSpec(name="all", digest="0" * 64, dtype=dtype))
    return run_digest(manifest, list(trainable_weights(model, manifest).values())).hex()


def _locate(name_or_folder: str | Path) -> str:
    text = str(name_or_folder)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{folder} has no .safetensors file; other weight formats are not read, because they can run code"
            )
        return str(folder)
    if isinstance(name_or_folder, Path) or text.startswith(FOLDER_MARKS) or text.count("/") > 1:
        raise ModelError(f"there is no model folder {folder}")
    return text


def _read_config(source: str, options: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # the library raises many kinds; each means that the configuration cannot be used
        raise ModelError(
            f"cannot read the configuration of the model {source}: {_first_line(error)} "
            "Check the name, or name the model's folder"
        ) from error


def _read_weights(source: str, dtype: DType, kind: ModelKind, task: Task, options: dict[str, Any]) -> PreTrainedModel:
    if kind == "classes":
        options = {**options, "num_labels": task.classes}
    try:
        loaded: Any = BUILDERS[kind].from_pretrained(
            source,
            dtype=TORCH_DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:  # as above
        raise ModelError(f"cannot load the model {source}: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    notes: dict[str, Any] = loaded[1]
    # Sizes that do not fit are allowed above only so that they can be named here.
    broken = sorted(str(key) for key in notes.get("mismatched_keys") or ())
    if broken:
        hint = f"; is {task.classes} the number of its classes?" if kind == "classes" else ""
        raise ModelError(f"the weights of {source} do not fit its configuration: {broken[0]}{hint}")
    lacking = sorted(notes.get("missing_keys") or ())
    new = [name for name in lacking if kind == "classes" and is_new(name, model.base_model_prefix)]
    missing = [name for name in lacking if name not in new]
    if missing:
        raise ModelError(
            f"the weights of {source} lack {len(missing)} tensors, the first is {missing[0]}; the files are incomplete"
        )
    fill_new(model, new, seed=task.seed)
    if task.names:
        model.config.id2label = dict(enumerate(task.names))
        model.config.label2id = {name: number for number, name in enumerate(task.names)}
    return model


def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let models and objectives without a padding token use one and the same: a classifier looks for it."""
    config: Any = model.config.get_text_config()
    if config.pad_token_id is None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        config.pad_token_id = model.config.pad_token_id = next(token for token in known if token is not None)


def _read_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # as above
        raise ModelError(f"cannot load the tokenizer of {source}: {_first_line(error)}") from error
    if not tokenizer("a b")["input_ids"]:
        raise ModelError(f"the tokenizer of {source} turns text into no tokens; are its files complete?")
    return tokenizer


def _sorted_parameters(model: torch.nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every parameter once, with its sorted names (tied ones have several), by first name."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0]):
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _check_storage(named: list[tuple[str, Tensor]]) -> None:
    owners: dict[int, str] = {}
    for name, tensor in named:
        if tensor.numel() == 0:
            continue
        address = tensor.data_ptr()
        if address in owners:
            raise ModelError(
                f"the parameters {owners[address]} and {name} share memory without being one tensor; "
                f'add "{name}" to model.exclude'
            )
        owners[address] = name


def _describe(index: int, name: str, tensor: Tensor, dtype: DType, exponent: int) -> Parameter:
    if tensor.dtype != TORCH_DTYPES[dtype]:
        raise ModelError(
            f'the parameter {name} is {tensor.dtype}, the run trains {dtype}: add "{name}" to model.exclude'
        )
    return Parameter(
        index=index,
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype,
        exponent=exponent,
        is_stack=tensor.dim() == 3 and "experts" in name.split("."),
    )


def _matches(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _exponent(name: str, exponents: dict[str, int]) -> int:
    return next((exponents[pattern] for pattern in sorted(exponents) if fnmatchcase(name, pattern)), 0)


def _first_line(error: Exception) -> str:
    lines: Iterator[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:400]

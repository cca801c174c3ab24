"""Write a Hugging Face folder: same weights, same bytes, whoever writes it (a live node or a replay).

Everything but the weights comes from the loaded base model and tokenizer; names of local folders and library-run
details that differ between machines are taken out.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from peerturb.errors import ModelError
from peerturb.zo.files import write_folder

MARKER = "config.json"
LOCAL_KEYS = (
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "tokenizer_file",
    "cache_dir",
    "local_files_only",
    "is_local",
)
"""Keys of the JSON files that say where the base was read from or by which release, not what it is."""


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write config, tokenizer and `model.safetensors` into `folder`, at once or not at all.

    Raises:
        ModelError: the folder holds something that is not a model, or cannot be written.
    """

    def write(draft: Path) -> None:
        use_cache = model.config.use_cache
        model.config.use_cache = True  # switched off for probes only (`peerturb.zo.model.prepare`)
        try:
            model.save_pretrained(draft, safe_serialization=True, max_shard_size="1TB")
            _forget_calls(tokenizer)
            tokenizer.save_pretrained(draft)
        except ValueError as error:
            raise ModelError(f"cannot write the model: {error}") from error
        finally:
            model.config.use_cache = use_cache
        for file in sorted(draft.glob("*.json")):
            if file.name != "tokenizer.json":
                _normalise(file)

    shown = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        write_folder(folder, write, marker=MARKER)
    finally:
        transformers_logging.set_verbosity(shown)
        if bars:
            transformers_logging.enable_progress_bar()


def _forget_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take back the truncation and padding of earlier calls, which the tokenizer's file would remember."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _normalise(file: Path) -> None:
    """Sort the keys and drop those that name places."""
    document: Any = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(document, dict):
        document = {key: value for key, value in document.items() if key not in LOCAL_KEYS}
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")

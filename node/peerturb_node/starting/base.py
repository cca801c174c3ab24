"""What a model's folder says of itself before it is loaded: size, longest sequence, what it can be trained for.

Reads `config.json` and the headers of the weights; needs no torch. A hub name says nothing here.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peerturb.errors import ModelError, SpecError
from peerturb.zo.positions import POSITIONS

HEADER_BYTES_MAX = 100_000_000
"""Largest header of a safetensors file, as its own library has it."""

SIZE_MAX = 10**15
"""Parameters beyond which a size is a slip of the pen."""

_FOLDER_MARKS = (".", "/", "~")
_ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "roberta",
        "xlm-roberta",
    }
)
"""Kinds of encoders that are often stored without any head."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model as far as it is known before it is loaded."""

    source: str
    """Folder or hub name, to load it from."""
    name: str
    """Its name in the RunSpec."""
    parameters: int | None = None
    positions_max: int | None = None
    suits: Literal["decoder", "encoder", "seq2seq"] = "decoder"
    is_local: bool = False


def look_at_model(text: str) -> Base:
    """Return what is known of a folder or hub name.

    Raises:
        ModelError: a folder that is not there (a similar name is suggested) or holds no model.
    """
    folder = Path(text).expanduser()
    if not folder.is_dir():
        near = near_name(folder)
        if text.startswith(_FOLDER_MARKS) or text.count("/") > 1 or folder.suffix == ".safetensors" or not text:
            raise ModelError(f"there is no model folder {text!r}{near or '; name a folder, or a model on the hub'}")
        if near and "/" not in text:
            raise ModelError(f"there is no model folder {text!r}{near} (a model on the hub: owner/name)")
        return Base(source=text, name=text)
    config = _config(folder)
    inner: object = config.get("text_config")  # of models that also see or hear
    positions: dict[str, Any] = inner if isinstance(inner, dict) else config
    size = next((positions[key] for key in POSITIONS if _is_count(positions.get(key))), None)
    return Base(
        source=str(folder),
        name=folder.resolve().name,
        parameters=sum(_sizes(folder).values()) or None,
        positions_max=size,
        suits=_suits(config),
        is_local=True,
    )


def read_size(text: str) -> int:
    """Return a number of parameters: 22700000, 22.7M, 7B.

    Raises:
        SpecError: it is none.
    """
    found = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    count = round(float(found[1].rstrip("_")) * _UNITS[found[2].upper()]) if found else 0
    if not 1 <= count <= SIZE_MAX:
        raise SpecError(f"--size {text!r} is no number of parameters; write for instance 22.7M, 7B or 869504")
    return count


def near_name(path: Path) -> str:
    """Return `; did you mean ...?` if something in the path's folder is called much the same, else nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"cannot read {file}: a JSON object is expected")
    return config


def _suits(config: dict[str, Any]) -> Literal["decoder", "encoder", "seq2seq"]:
    """Judge by the classes the folder names; `peerturb.zo.kinds` judges again, with the library, when it is loaded."""
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    classes = " ".join(map(str, config.get("architectures") or ()))
    is_encoder = "MaskedLM" in classes or "SequenceClassification" in classes or config.get("model_type") in _ENCODERS
    return "encoder" if is_encoder and not config.get("is_decoder") else "decoder"


def _sizes(folder: Path) -> dict[str, int]:
    """Return the number of elements of every tensor in the folder's safetensors files."""
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(file):
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if isinstance(shape, list) and all(_is_count(extent) or extent == 0 for extent in shape):
                found[name] = math.prod(shape)
    return found


def _header(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= HEADER_BYTES_MAX else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read the header of {file}: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is not a safetensors file")
    yield from ((name, entry) for name, entry in header.items() if name != "__metadata__")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

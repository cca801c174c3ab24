"""The demo: a network of real processes on loopback that fine-tunes a small model, offline.

`pretrain` makes the base model, `task` the data; the weights lie in `assets/base`, the run's settings in `RUN.toml`.
"""

from pathlib import Path

BASE_MODEL_FOLDER = Path(__file__).parent / "assets" / "base"
"""The committed base model, in the Hugging Face format."""

RUN_FILE = Path(__file__).parent / "RUN.toml"
"""The demo's RunSpec."""

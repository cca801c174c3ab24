"""What every section of the RunSpec is: frozen, and strict about its keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the spec; unknown keys are errors. What stands below a field is its description, of which
    `peerturb init` writes the first sentence into RUN.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

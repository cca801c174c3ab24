"""Where the demo writes what: the names of its files, and the rule about folders that are there already."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from peerturb.errors import DataError

_MARK = ".peerturb-demo"
"""A file that says: this folder is a demo's and may be replaced by the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoFolder:
    """The out folder and everything in it."""

    out: Path

    @classmethod
    def prepare(cls, out: Path) -> Self:
        """Make an empty folder; an earlier demo's is replaced, anything else is left alone.

        Raises:
            DataError: the folder holds something that no demo wrote, or cannot be written.
        """
        folder = cls(out=out)
        try:
            if out.is_dir() and any(out.iterdir()):
                if not (out / _MARK).exists():
                    raise DataError(f"{out} is not empty and not of an earlier demo; name another folder with --out")
                for entry in out.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif entry.name != _MARK:
                        entry.unlink()
            out.mkdir(parents=True, exist_ok=True)
            (out / _MARK).touch()
            for path in (folder.data, folder.nodes, folder.logs):
                path.mkdir()
        except OSError as error:
            raise DataError(
                f"cannot write to {out}: {error.strerror or error}; name another folder with --out"
            ) from error
        return folder

    def tidy(self) -> None:
        """Remove what only matters while processes run."""
        for path in (self.coordinator, self.nodes, self.replayed):
            shutil.rmtree(path, ignore_errors=True)
        self.port_file.unlink(missing_ok=True)

    @property
    def run_file(self) -> Path:
        """The RunSpec of this run."""
        return self.out / "RUN.toml"

    @property
    def data(self) -> Path:
        """Private parts and the held-out part."""
        return self.out / "data"

    @property
    def base(self) -> Path:
        """A copy of the base model: base + log = model, all in one folder."""
        return self.out / "base"

    @property
    def model(self) -> Path:
        """The fine-tuned model of a live node, in the Hugging Face format."""
        return self.out / "model"

    @property
    def replayed(self) -> Path:
        """The same model made from base weights and log."""
        return self.out / "replayed"

    @property
    def log(self) -> Path:
        """The run log."""
        return self.out / "demo.runlog"

    @property
    def report(self) -> Path:
        """The page."""
        return self.out / "report.html"

    @property
    def summary(self) -> Path:
        """The figures."""
        return self.out / "summary.json"

    @property
    def logs(self) -> Path:
        """What the processes printed."""
        return self.out / "logs"

    @property
    def coordinator(self) -> Path:
        """The coordinator's data folder."""
        return self.out / "coordinator"

    @property
    def nodes(self) -> Path:
        """One state folder per node."""
        return self.out / "nodes"

    @property
    def port_file(self) -> Path:
        """Where the coordinator says which port it took."""
        return self.out / "coordinator.port"

"""What all tests share: where the test models and data are, and which tests this machine can run."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with test models (`models/`), data sets (`datasets/`) and corpora (`corpora/`); skips where there is none.

    `PEERTURB_SHARED` names the folder that holds `data/`, or `data` itself; by default it is the checkout's neighbour.
    """
    given = Path(os.environ.get("PEERTURB_SHARED", REPOSITORY.parent / "shared"))
    for folder in (given / "data", given):
        if (folder / "models").is_dir():
            return folder
    pytest.skip(f"no test models: there is no {given / 'data'}; PEERTURB_SHARED may name another folder")


@pytest.fixture(params=["compiled", "interpreted"])
def either_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test of the numerics twice: with Numba's loops and as on a machine without Numba."""
    from peerturb.zo import fast

    if request.param == "interpreted":
        monkeypatch.setattr(fast, "compiled", lambda: None)
    elif fast.compiled() is None:
        pytest.skip("Numba is not installed")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # Imported only when a test asks: torch costs seconds that the protocol's tests need not pay.
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

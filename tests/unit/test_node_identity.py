"""A node's key: made once, private, and never replaced in silence."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from peerturb.errors import SpecError
from peerturb_node.folder import StateFolder
from peerturb_node.identity import FILE_NAME, load_or_create


def test_the_key_is_made_once_and_signs(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    first = load_or_create(folder)
    again = load_or_create(folder)
    assert first.public == again.public
    assert len(first.public) == 32
    Ed25519PublicKey.from_public_bytes(first.public).verify(again.sign(b"hello"), b"hello")
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == [FILE_NAME]


def test_two_folders_are_two_identities(tmp_path: Path) -> None:
    assert load_or_create(tmp_path / "a").public != load_or_create(tmp_path / "b").public


def test_a_key_others_may_read_is_refused(tmp_path: Path) -> None:
    load_or_create(tmp_path)
    (tmp_path / FILE_NAME).chmod(0o640)
    with pytest.raises(SpecError, match="chmod 600"):
        load_or_create(tmp_path)


@pytest.mark.parametrize("content", [b"", b"zz", b"\xff\xfe", b"ab" * 31, b"ab" * 33])
def test_a_damaged_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SpecError, match="damaged"):
        load_or_create(tmp_path)
    assert path.read_bytes() == content


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SpecError, match="--state"):
        load_or_create(tmp_path / "state")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(SpecError, match="state"):
        StateFolder(tmp_path / "state")


def test_a_state_folder_serves_one_node_at_a_time(tmp_path: Path) -> None:
    with StateFolder(tmp_path), pytest.raises(SpecError, match="another node"):
        StateFolder(tmp_path)
    StateFolder(tmp_path).close()

"""What the doctor says of a certificate: pinned, another one, or one that nobody vouches for."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from peerturb_coordinator.keys import make_keys
from peerturb_node.doctor import network
from peerturb_node.doctor.network import Network
from peerturb_node.settings import NodeSettings

ADDRESS = "192.0.2.7:7470"


@pytest.fixture
def fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `ADDRESS` show a self-signed certificate; return its fingerprint."""
    made = make_keys(tmp_path, ["192.0.2.7"])
    shown = x509.load_pem_x509_certificate(made.certificate.read_bytes()).public_bytes(Encoding.DER)

    def fetch(address: str, *, timeout_s: float) -> bytes:
        assert address == ADDRESS
        assert timeout_s > 0
        return shown

    monkeypatch.setattr(network, "fetch_certificate", fetch)
    return made.fingerprint


def test_the_pinned_certificate_is_in_order(fingerprint: str) -> None:
    assert Network(NodeSettings(coordinator=ADDRESS, fingerprint=fingerprint))._secure().outcome == "ok"


def test_another_certificate_names_both_sides(fingerprint: str) -> None:
    expected = "sha256:" + "0" * 64
    check = Network(NodeSettings(coordinator=ADDRESS, fingerprint=expected))._secure()
    assert check.outcome == "fail"
    assert fingerprint in check.found
    assert expected in check.found


def test_a_certificate_that_vouches_for_itself_needs_the_fingerprint(fingerprint: str) -> None:
    check = Network(NodeSettings(coordinator=ADDRESS))._secure()
    assert check.outcome == "fail"
    assert "--fingerprint" in check.remedy
    # What a stranger shows must not be offered for pinning.
    assert fingerprint not in check.found + check.remedy


@pytest.mark.parametrize("is_insecure", [False, True])
def test_a_node_without_tls_is_told_that_the_coordinator_has_it(
    is_insecure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "fetch_certificate", lambda address, *, timeout_s: b"a certificate")
    check = Network(NodeSettings(coordinator="127.0.0.1:7470", insecure=is_insecure))._secure()
    assert check.outcome == "fail"
    assert "speaks TLS" in check.found
    assert "--fingerprint" in check.remedy
    assert ("--insecure" in check.remedy) == is_insecure

"""Certificates, tokens and the join command, on disk and as text."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from peerturb.errors import SpecError
from peerturb.wire.channel import (
    fingerprint_of,
    is_loopback,
    is_self_signed,
    join_address,
    parse_fingerprint,
    security_for,
    split_address,
)
from peerturb_coordinator.keys import join_command, load_tls, make_keys, read_token, ready_keys


def test_made_keys_load_and_name_their_hosts(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ["example.org", "192.0.2.7", "2001:db8::1"])
    loaded = load_tls(tmp_path / "keys")
    assert loaded.fingerprint == made.fingerprint
    certificate = x509.load_pem_x509_certificate(loaded.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "example.org" in names.get_values_for_type(x509.DNSName)
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "2001:db8::1"]
    for secret in (made.key, made.token_file):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert read_token(str(made.token_file)) == made.token
    assert made.token not in ("", read_token("other"))


def test_existing_keys_are_not_replaced_by_accident(tmp_path: Path) -> None:
    first = make_keys(tmp_path, [])
    with pytest.raises(SpecError, match="--replace"):
        make_keys(tmp_path, [])
    assert load_tls(tmp_path).fingerprint == first.fingerprint
    assert make_keys(tmp_path, [], replace=True).fingerprint != first.fingerprint


def test_a_strange_pair_is_refused(tmp_path: Path) -> None:
    one, two = make_keys(tmp_path / "one", []), make_keys(tmp_path / "two", [])
    two.key.replace(one.key)
    with pytest.raises(SpecError, match="was not made for"):
        load_tls(tmp_path / "one")
    one.certificate.write_text("no certificate")
    with pytest.raises(SpecError, match="cannot be read"):
        load_tls(tmp_path / "one")
    with pytest.raises(SpecError, match="peerturb coordinator keys"):
        load_tls(tmp_path / "three")


def test_keys_are_made_once_and_a_lost_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    token = ready_keys(folder, ["192.0.2.7"]).read_text()
    fingerprint = load_tls(folder).fingerprint
    assert ready_keys(folder, []).read_text() == token
    assert load_tls(folder).fingerprint == fingerprint
    (folder / "coordinator.key").unlink()
    with pytest.raises(SpecError, match=r"has no coordinator\.key; .*--replace"):
        ready_keys(folder, [])
    assert (folder / "join-token").read_text() == token


def test_a_host_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="neither a host name nor an IP address"):
        make_keys(tmp_path, ["höst"])


@pytest.mark.parametrize("text", ["two words", "tab\tbed", "ümlaut", "x" * 257])
def test_tokens_that_cannot_travel_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="token"):
        read_token(text)


def test_a_token_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere"):
        read_token(str(tmp_path / "nowhere"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SpecError, match="is empty"):
        read_token(str(tmp_path / "empty"))


def test_the_join_command_is_one_line() -> None:
    line = join_command("example.org:7470", fingerprint="sha256:00", token="t")
    assert line == "peerturb node run --coordinator example.org:7470 --fingerprint sha256:00 --token t --data FILE"
    assert join_command("127.0.0.1:7470", fingerprint="", token="") == (
        "peerturb node run --coordinator 127.0.0.1:7470 --data FILE"
    )


def test_fingerprints_have_one_written_form() -> None:
    written = fingerprint_of(b"certificate")
    digits = written.removeprefix("sha256:")
    with_colons = ":".join(digits[i : i + 2] for i in range(0, 64, 2)).upper()
    assert parse_fingerprint(with_colons) == parse_fingerprint(digits) == parse_fingerprint(written) == written
    for wrong in ("", "sha256:", digits[:-1], "sha1:" + digits):
        with pytest.raises(SpecError, match="not a fingerprint"):
            parse_fingerprint(wrong)


@pytest.mark.parametrize(("address", "parts"), [("example.org:1", ("example.org", 1)), ("[::1]:7470", ("::1", 7470))])
def test_addresses_split_and_join(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    assert join_address(*parts) == address


@pytest.mark.parametrize("address", ["", "example.org", ":1", "example.org:", "example.org:x", "example.org:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(SpecError, match="HOST:PORT"):
        split_address(address)


def test_trust_follows_the_address_unless_told() -> None:
    assert security_for("127.0.0.1:1").insecure
    assert not security_for("192.0.2.7:1").insecure
    assert security_for("192.0.2.7:1", insecure=True).insecure
    assert not security_for("127.0.0.1:1", fingerprint="sha256:" + "0" * 64).insecure
    assert is_loopback("[::1]:1")
    assert not is_loopback("0.0.0.0:1")


def test_a_certificate_without_an_authority_is_told(tmp_path: Path) -> None:
    made = make_keys(tmp_path, ["192.0.2.7"])
    own = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    key = serialization.load_pem_private_key(made.key.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    issued = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator.example.org")]))
        .issuer_name(own.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(own.not_valid_before_utc)
        .not_valid_after(own.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )
    assert is_self_signed(own.public_bytes(serialization.Encoding.DER))
    assert not is_self_signed(issued.public_bytes(serialization.Encoding.DER))

"""Certificates for tests: an authority for servers on loopback and devices, and one on its own."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Authority", "self_signed"]


class Authority:
    """Issues certificates that are valid for a day.

    Args:
        folder: where the PEM files go.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ca = folder, folder / "ca.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(f"authority of {folder.name}")
        made = self._signed(self._name, self._key.public_key(), [x509.BasicConstraints(True, None)])
        self.ca.write_bytes(made)

    def server(self, name: str = "server") -> tuple[Path, Path]:
        """Certificate and key for localhost and 127.0.0.1."""
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), loopback])
        return self._issue(name, names)

    def device(self, name: str) -> tuple[Path, Path]:
        """Certificate and key whose subject is a device."""
        return self._issue(name, x509.BasicConstraints(False, None))

    def odd(self, file: str, names: list[str], hosts: list[str]) -> tuple[Path, Path]:
        """Certificate and key with any common names, and names of hosts beside them."""
        extension: x509.ExtensionType = x509.BasicConstraints(False, None)
        if hosts:
            extension = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
        kinds = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
        return self._issue(
            file,
            extension,
            x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "devices"), *kinds]),
        )

    def _issue(
        self, name: str, extension: x509.ExtensionType, subject: x509.Name | None = None
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        made = self._signed(subject or _named(name), key.public_key(), [extension])
        certificate.write_bytes(made)
        private.write_bytes(_private_pem(key))
        private.chmod(0o600)
        return certificate, private

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        extensions: list[x509.ExtensionType],
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key: cert.pem, key.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = _named("loopback"), datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(_private_pem(key))
    private.chmod(0o600)
    return certificate, private


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

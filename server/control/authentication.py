"""Who calls, and over which connection: TLS of the server, credentials of devices."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from prunecast.common.files import exposure
from prunecast.server.control.errors import Unbindable
from prunecast.server.fleet.errors import TokenRefused
from prunecast.server.fleet.reports import Certified, Credential

__all__ = ["credential_of", "server_credentials"]


def server_credentials(certificate: Path, key: Path, client_ca: Path | None) -> Any:
    """gRPC's server credentials.

    Args:
        certificate: PEM file with the server's certificate chain.
        key: PEM file with its private key.
        client_ca: PEM file with the authorities that issue devices' certificates; without one
            devices authenticate by tokens.

    Raises:
        Unbindable: a file is missing or unusable, or others can read the key.
    """
    files = [certificate, key, *([client_ca] if client_ca else [])]
    try:
        exposed = exposure(key, group=True)
        held, seen = _configuration(*files), _stamps(files)
    except OSError as error:  # ssl.SSLError is one
        where = error.filename or certificate
        raise Unbindable(f"a TLS file is unusable ({error.strerror or error}): {where}") from error

    if exposed:
        raise Unbindable(exposed)

    def fetch() -> Any:
        """Called at every handshake; None: nothing is new."""
        nonlocal seen
        try:
            stamps = _stamps(files)
            if stamps == seen:
                return None
            made = _configuration(*files)
        except OSError:
            return None  # a renewal may be under way: certificate and key do not match yet
        seen = stamps
        return made

    return grpc.dynamic_ssl_server_credentials(held, fetch, client_ca is not None)


def _configuration(certificate: Path, key: Path, client_ca: Path | None = None) -> Any:
    # gRPC itself says nothing about unusable files
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    if client_ca:
        context.load_verify_locations(client_ca)
    return grpc.ssl_server_certificate_configuration(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=client_ca.read_bytes() if client_ca else None,
    )


def _stamps(files: list[Path]) -> list[tuple[int, int, int]]:
    found = [path.stat() for path in files]
    return [(s.st_ino, s.st_mtime_ns, s.st_size) for s in found]


_BEARER = re.compile(r"Bearer ([A-Za-z0-9_-]{43})")
"""What `FleetService.enrol` makes; anything else need not be looked up."""


def credential_of(
    metadata: Iterable[tuple[str, str | bytes]],
    transport: Mapping[str, Iterable[bytes]],
    *,
    certificates: bool,
) -> Credential:
    """The credential of a call.

    Args:
        metadata: of the call.
        transport: gRPC's authentication context of the connection.
        certificates: whether devices authenticate by client certificates, which the transport has
            then verified against the authority; their token, if any, is not looked at.

    Raises:
        TokenRefused: there is none, or a certificate does not name exactly one device.
    """
    if certificates:
        return Certified(_certified_name(*transport.get("x509_pem_cert", ())))
    given = [str(value) for key, value in metadata if key == "authorization"]
    found = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise TokenRefused(
            "a device token is needed: the one that `prunecast fleet device add` printed, "
            "as metadata authorization: Bearer TOKEN"
        )
    return found[1]


@lru_cache(4096)
def _certified_name(*certificates: bytes) -> str:
    """The device that a client certificate names.

    gRPC's own ``x509_common_name`` is the last of several, and another program that reads the
    certificate may take another one.
    """
    try:
        (pem,) = certificates
        certificate = x509.load_pem_x509_certificate(pem)
        subject = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        names = [str(one.value) for one in subject]
        others = _alternative_names(certificate)
    except ValueError as error:
        raise TokenRefused("the client certificate cannot be read: issue it anew") from error
    if len(names) != 1 or not names[0] or not names[0].isprintable():
        found = ", ".join(repr(name[:80]) for name in names[:4]) or "none"
        raise TokenRefused(
            "the client certificate must name one device, as the only common name of its subject; "
            f"it has {found}: issue it anew"
        )
    for other in others:
        if other != names[0] and not other.startswith(f"{names[0]}."):
            raise TokenRefused(
                f"the client certificate names {names[0][:80]!r}, and {other[:80]!r} as an "
                "alternative: issue it anew with one of them"
            )
    return names[0]


def _alternative_names(certificate: x509.Certificate) -> list[str]:
    """The names of hosts in a certificate, which others look at before the common name."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.DNSName)

"""The server's side of TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from prunecast.server.repository.errors import ServerError

__all__ = ["load_certificate", "tls_context"]


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with a certificate; None without one.

    Raises:
        ServerError: one of the two is missing or unusable.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ServerError("TLS needs both a certificate and its key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    load_certificate(context, certificate, key)
    return context


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Use a certificate for connections from now on; those that are open keep theirs.

    Raises:
        ServerError: a file is missing or unusable; the context keeps what it had.
    """
    for file in (certificate, key):
        if not file.is_file():
            raise ServerError(f"{file} does not exist")
    try:
        # a throw-away context first: a failure must not leave a certificate without its key
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ServerError(f"the certificate or its key is unusable: {error}") from error

"""Why a server could not be reached, in words that name the cause and the remedy."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime
from urllib.parse import urlsplit

import urllib3
from tuf.api.exceptions import DownloadError, SlowRetrievalError

from prunecast.client.edge.updating.clock import shown_time
from prunecast.client.edge.updating.proxies import Proxy

__all__ = ["TooSlow", "certificate_problem", "connection_problem", "wants_credentials"]

_EXPIRED, _NOT_YET = 10, 9  # codes of X509_V_ERR_..., openssl/x509_vfy.h
_UNKNOWN = {18, 19, 20, 21}
_OTHER_NAME = {62, 63, 64}
_PLAIN = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


class TooSlow(TimeoutError):
    """A server sends less than the least rate."""


def certificate_problem(code: int, detail: str, host: str, option: str) -> str:
    """What is wrong with a server's certificate, and what to do.

    Args:
        code: of OpenSSL; 0 if only the text is known.
        detail: in OpenSSL's words.
        host: the name that the server was asked by.
        option: of the command line that names the authorities to trust.
    """
    said, clock = detail.lower(), shown_time(datetime.now(UTC))
    if code == _NOT_YET or "not yet valid" in said:
        return (
            f"its TLS certificate is not valid yet by this device's clock, which says "
            f"{clock}: set the clock"
        )
    if code == _EXPIRED or "has expired" in said:
        return (
            f"its TLS certificate has expired by this device's clock, which says {clock}: "
            "set the clock if that is wrong, and have the certificate renewed if it is right"
        )
    if code in _UNKNOWN or "self signed" in said or "self-signed" in said or "issuer" in said:
        return (
            f"its TLS certificate is of an authority that this device does not trust ({detail}): "
            f"give that authority's certificate by {option}"
        )
    if code in _OTHER_NAME or "mismatch" in said:
        return (
            f"its TLS certificate is not for {host}: ask the server by a name that stands in its "
            "certificate, or have that name added"
        )
    return f"its TLS certificate is refused ({detail}): see {option}"


def connection_problem(
    what: str, error: urllib3.exceptions.HTTPError, url: str, proxy: Proxy | None, seconds: float
) -> DownloadError:
    """The cause in a few words, out of the layers that urllib3 wraps around it.

    Args:
        what: could not be done.
        error: of urllib3.
        url: that was asked for, perhaps after a redirection; only its host and port are shown.
        proxy: that leads there.
        seconds: that a connection may take.
    """
    chain: list[BaseException] = [error]
    while (inner := _inner(chain[-1])) is not None and inner not in chain:
        chain.append(inner)
    parts = urlsplit(url)
    host = parts.hostname or ""
    at = f"{host}:{parts.port or {'http': 80, 'https': 443}.get(parts.scheme, 0)}"
    to_proxy = proxy is not None and (
        parts.scheme == "http" or any(isinstance(c, urllib3.exceptions.ProxyError) for c in chain)
    )
    if proxy is not None and to_proxy:
        host, at = proxy.host, f"the proxy {proxy.address} (of {proxy.variable})"
    for cause in reversed(chain):
        if isinstance(cause, TooSlow):
            return SlowRetrievalError(f"{what}: {cause}")
        if isinstance(cause, ssl.SSLCertVerificationError):
            code, detail = cause.verify_code, cause.verify_message
            return DownloadError(f"{what}: {certificate_problem(code, detail, host, '--ca-file')}")
        if isinstance(cause, ssl.SSLError) and (cause.reason or "").startswith(_PLAIN):
            return DownloadError(f"{what}: {at} does not speak TLS: is it http:// there?")
        if isinstance(cause, socket.gaierror):
            return DownloadError(
                f"{what}: the name {host} cannot be resolved, see --url and the network"
            )
        if isinstance(cause, ConnectionRefusedError):
            return DownloadError(f"{what}: connection refused at {at}: is it running there?")
    if proxy is not None and "407" in str(chain[-1]):
        return DownloadError(f"{what}: {wants_credentials(proxy)}")
    timeouts = [c for c in chain if isinstance(c, urllib3.exceptions.TimeoutError)]
    if any(isinstance(c, urllib3.exceptions.NewConnectionError) for c in timeouts):
        return DownloadError(f"{what}: no connection to {at}: {_words(chain[-1])}")
    if any(isinstance(c, urllib3.exceptions.ConnectTimeoutError) for c in timeouts):
        told = f"{what}: {at} did not answer within {seconds:g} seconds"
        return SlowRetrievalError(told)
    if timeouts:
        return SlowRetrievalError(f"{what}: the server stopped sending, or never began")
    through = f" through {at}" if to_proxy else ""
    return DownloadError(f"{what}{through}: {_words(chain[-1])}")


def wants_credentials(proxy: Proxy) -> str:
    """What to do where a proxy answers 407; the credentials themselves are not shown."""
    given = "refuses the credentials" if proxy.credentials else "asks for credentials"
    return (
        f"the proxy {proxy.address} {given}: give them in {proxy.variable}, as "
        f"{proxy.scheme}://USER:PASSWORD@{proxy.address}"
    )


def _words(error: BaseException) -> str:
    detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(detail.split())[:160]


def _inner(error: BaseException) -> BaseException | None:
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return reason
    given = next((a for a in reversed(error.args) if isinstance(a, BaseException)), None)
    return given or error.__cause__ or error.__context__

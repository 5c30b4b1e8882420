"""Which proxy leads to an address, by the variables of the environment that everybody knows.

``http_proxy`` for http, ``https_proxy`` for https, ``all_proxy`` for both, ``no_proxy`` for what is
reached directly: names with everything below them, addresses, networks such as ``10.0.0.0/8``, each
with ``:PORT`` for one port only, or ``*``. Lower case goes before upper case. The control server is
reached like an https address, unless gRPC's own ``grpc_proxy`` and ``no_grpc_proxy`` say otherwise.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from prunecast.client.edge.errors import NetworkError

__all__ = ["Proxies", "Proxy"]

_PORTS = {"http": 80, "https": 443, "grpcs": 443}
_VARIABLES = {
    "http": ("http_proxy", "all_proxy"),
    "https": ("https_proxy", "all_proxy"),
    "grpcs": ("grpc_proxy", "https_proxy", "all_proxy"),
}
_EXCEPT = {"grpcs": ("no_grpc_proxy", "no_proxy")}


@dataclass(frozen=True)
class Proxy:
    """A proxy: how it is reached, and by which variable it was named.

    Attributes:
        variable: of the environment.
        scheme: ``http`` or ``https``, between here and the proxy.
        host: name or address, IPv6 without brackets.
        port: of TCP.
        credentials: ``USER:PASSWORD``, decoded; empty without. They are never shown.
    """

    variable: str
    scheme: str
    host: str
    port: int
    credentials: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """``HOST:PORT``, which can be shown."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Without the credentials."""
        return f"{self.scheme}://{self.address}"


class Proxies:
    """The proxies that an environment names.

    Args:
        environment: variables and their values; default: this process's, now.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        names = {name for known in _VARIABLES.values() for name in known}
        names |= {"no_proxy", "no_grpc_proxy"}
        self._found = {n: given.get(n) or given.get(n.upper()) or "" for n in names}
        if "REQUEST_METHOD" in given:  # under CGI a client's header would stand in HTTP_PROXY
            self._found["http_proxy"] = given.get("http_proxy", "")

    def find(self, url: str) -> Proxy | None:
        """The proxy that leads to a URL of http, https or grpcs; None: none does.

        Raises:
            NetworkError: the variable holds no address of a proxy.

        >>> proxies = Proxies({"HTTPS_PROXY": "http://ada:secret@gate:3128", "no_proxy": ".lan"})
        >>> proxies.find("https://releases.example/")
        Proxy(variable='https_proxy', scheme='http', host='gate', port=3128)
        >>> proxies.find("https://releases.lan/"), proxies.find("http://releases.example/")
        (None, None)
        """
        parts = urlsplit(url)
        variables = _VARIABLES.get(parts.scheme, ())
        variable = next((name for name in variables if self._found[name]), None)
        if variable is None or not parts.hostname:
            return None
        exceptions = next(
            (self._found[n] for n in _EXCEPT.get(parts.scheme, ("no_proxy",)) if self._found[n]), ""
        )
        port = parts.port or _PORTS[parts.scheme]
        if any(_matches(one, parts.hostname, port) for one in re.split(r"[,\s]+", exceptions)):
            return None
        return _parsed(variable, self._found[variable])


def _parsed(variable: str, value: str) -> Proxy:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in ("http", "https") or not host:
        raise NetworkError(
            f"{variable} names no proxy of HTTP: write it like http://HOST:PORT, with "
            "USER:PASSWORD@ before the host if the proxy asks for that"
        )
    credentials = ""
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(variable, scheme, host, port or (443 if scheme == "https" else 80), credentials)


def _matches(pattern: str, host: str, port: int) -> bool:
    """Whether an entry of ``no_proxy`` speaks of a host and port."""
    if pattern == "*":
        return True
    name, _, only = pattern.rpartition(":")
    if name and only.isdigit() and (name.endswith("]") or ":" not in name):
        if int(only) != port:
            return False
        pattern = name
    pattern = pattern.strip("[]").lower().removeprefix("*").removeprefix(".")
    if not pattern:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(pattern, strict=False)
    except ValueError:  # one of them is a name
        return host.lower() == pattern or host.lower().endswith(f".{pattern}")

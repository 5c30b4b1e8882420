"""Where the endpoint listens, a Unix socket or TCP that stays on the device, and if it answers."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import secrets
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prunecast.client.edge.errors import EndpointError

__all__ = ["Listener", "is_answering", "listen"]

_TCP = re.compile(r"(localhost|\d+\.\d+\.\d+\.\d+|\[[0-9a-fA-F:.]+\]):(\d{1,5})")
_PROBE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_BACKLOG = 64
_MOST_PATH = 107  # bytes, see unix(7)


@dataclass(frozen=True)
class Listener:
    """A socket that listens.

    Attributes:
        socket: accepts connections.
        address: of the endpoint, with the port that the system chose if it was asked to.
        path: of a Unix socket.
        inode: of that file, so that only this very one is removed.
    """

    socket: socket.socket
    address: str
    path: Path | None = None
    inode: int = 0

    def close(self) -> None:
        """Accept nothing any more, and remove the socket's file if it is still this one."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that accepts
        self.socket.close()
        if self.path is not None:
            with suppress(OSError):
                if self.path.lstat().st_ino == self.inode:
                    self.path.unlink()


def listen(address: str) -> Listener:
    """Listen on ``unix:PATH`` (mode 0660) or ``HOST:PORT`` with a loopback host; port 0 chooses.

    Raises:
        EndpointError: no such address, not a loopback address, or it is in use.
    """
    if address.startswith("unix:"):
        return _listen_unix(Path(address.removeprefix("unix:")))
    found = _TCP.fullmatch(address)
    if not found:
        raise EndpointError(
            f"cannot listen on {address!r}: give unix:/path/of/socket or 127.0.0.1:PORT"
        )
    host, port = found[1].strip("[]"), int(found[2])
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise EndpointError(f"cannot listen on {address!r}: {error}") from error
    if not loopback:
        raise EndpointError(
            f"{host} can be reached from other machines, and the endpoint asks nobody who they "
            "are: use a Unix socket or 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise EndpointError(f"cannot listen on {address}: {_reason(error)}") from error
    shown = f"[{host}]" if ":" in host else host
    return Listener(made, f"http://{shown}:{made.getsockname()[1]}")


def _listen_unix(path: Path) -> Listener:
    if len(os.fsencode(path)) > _MOST_PATH:
        raise EndpointError(f"cannot listen on {path}: a socket's path has {_MOST_PATH} bytes")
    _check_free(path)
    # bound under another name until its mode is right, then moved over what a crash left behind
    temporary = path.with_name(f".{secrets.token_hex(4)}")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(str(temporary))
        os.chmod(temporary, 0o660)
        made.listen(_BACKLOG)
        inode = temporary.lstat().st_ino
        os.rename(temporary, path)
    except OSError as error:
        made.close()
        with suppress(OSError):
            temporary.unlink()
        raise EndpointError(f"cannot listen on {path}: {_reason(error)}") from error
    return Listener(made, f"unix:{path}", path, inode)


def _check_free(path: Path) -> None:
    """Only a socket that nobody listens on may be replaced."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise EndpointError(f"{path} exists and is no socket: choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            return
        if not isinstance(error, TimeoutError):  # a full queue: somebody is there
            raise EndpointError(f"cannot listen on {path}: {_reason(error)}") from error
    raise EndpointError(f"{path} is in use by another process: choose another path")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def is_answering(address: str, seconds: float) -> bool:
    """Whether HTTP comes back within so many seconds; a refusal for being busy is an answer.

    Args:
        address: of an `InferenceServer`: ``unix:PATH`` or ``http://HOST:PORT``.
        seconds: for each step of the exchange.
    """
    with suppress(OSError), _connected(address, seconds) as probe:
        probe.sendall(_PROBE)
        return probe.recv(7) == b"HTTP/1."
    return False


def _connected(address: str, seconds: float) -> socket.socket:
    if not address.startswith("unix:"):
        host, _, port = address.removeprefix("http://").rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(seconds)
        probe.connect(address.removeprefix("unix:"))
    except OSError:
        probe.close()
        raise
    return probe

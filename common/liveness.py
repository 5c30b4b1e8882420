"""What of another process can be known from outside: whether it answers, moves and exchanges.

Linux tells it: ``/proc``, and the sockets of this network namespace by netlink (sock_diag(7)). What
cannot be known (another system, another user's process) is None, which is never a fault.
"""

from __future__ import annotations

import errno
import http.client
import math
import os
import socket
import ssl
import struct
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

__all__ = [
    "answers",
    "cpu_seconds",
    "descendants",
    "main_thread_switches",
    "seconds_since_received",
    "status_of",
]

_PROC = Path("/proc")

# linux/sock_diag.h, linux/inet_diag.h, linux/netlink.h, linux/tcp.h
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST, _DUMP = 0x1, 0x300
_DONE, _ERROR = 3, 2
_INFO = 2  # the attribute that is a tcp_info
_ESTABLISHED, _LISTEN = 1, 10
_HEADER, _MESSAGE = struct.Struct("=IHHII"), struct.Struct("=BBBBHH16s16sIIIIIIII")
_LAST_RECEIVED = 52  # place of tcpi_last_data_recv, milliseconds, in a tcp_info
_MOST = 4096  # datagrams of an answer


def answers(url: str, *, authority: Path | None = None, seconds: float = 5.0) -> bool:
    """Whether somebody answers an HTTP request at all; what the answer is does not matter."""
    return status_of(url, authority=authority, seconds=seconds) is not None


def status_of(url: str, *, authority: Path | None = None, seconds: float = 5.0) -> int | None:
    """The status of an HTTP answer; None for no answer within `seconds` for each step.

    No proxy is asked and no redirection followed.

    Args:
        url: ``http://`` or ``https://``, of a host and a port.
        authority: PEM file of the authorities by which a certificate is verified; None for those
            of the system.
        seconds: to connect, to send, and to wait for the head of the answer, each.
    """
    try:
        parts = urlsplit(url)
        path = parts.path or "/"
        host, port = parts.hostname or "", parts.port
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=authority)
            connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            return connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        return None


# -- processes ------------------------------------------------------------------------------------


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, by id, with their command lines; those that have ended are left out."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir() if _PROC.is_dir() else ():
        found = _stat(int(folder.name)) if folder.name.isdigit() else None
        if found is not None and found[0] not in "ZX":
            children.setdefault(int(found[1]), []).append(int(folder.name))
    below: dict[int, str] = {}
    queue = [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            queue.append(child)
            with suppress(OSError):
                line = (_PROC / str(child) / "cmdline").read_bytes()
                below[child] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return below


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and of those of its children that have ended."""
    found = _stat(pid)
    if found is None:
        return None
    return sum(map(int, found[11:15])) / os.sysconf("SC_CLK_TCK")


def main_thread_switches(pid: int) -> int | None:
    """How often the main thread of a process was put to sleep or woken; it grows while it moves."""
    try:
        text = (_PROC / str(pid) / "task" / str(pid) / "status").read_text()
    except OSError:
        return None
    lines = [line.split() for line in text.splitlines() if "ctxt_switches:" in line]
    return sum(int(line[1]) for line in lines) if lines else None


def _stat(pid: int) -> list[str] | None:
    """Fields of proc(5)'s stat from the third on, which is the state."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


# -- connections ----------------------------------------------------------------------------------


def seconds_since_received(pid: int) -> float | None:
    """How long ago a process received data over a TCP connection that it opened itself.

    Returns:
        Infinity where it has no such connection now; None where that cannot be known.
    """
    sockets: set[int] = set()
    try:
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                target = os.readlink(entry)
                if target.startswith("socket:["):
                    sockets.add(int(target[8:-1]))
        found = [one for f in (socket.AF_INET, socket.AF_INET6) for one in _connections(f)]
    except OSError:
        return None
    mine = [one for one in found if one[0] in sockets]
    listening = {port for _, state, port, _ in mine if state == _LISTEN}
    ages = [
        age
        for _, state, port, age in mine
        if state == _ESTABLISHED and port not in listening and age is not None
    ]
    return min(ages, default=math.inf)


def _connections(family: int) -> list[tuple[int, int, int, float | None]]:
    """Inode, state, local port, and seconds since data came, of each TCP socket."""
    states = (1 << _ESTABLISHED) | (1 << _LISTEN)
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 0, states) + bytes(
        48
    )
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, 1, 0)
    found: list[tuple[int, int, int, float | None]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:
        diag.settimeout(5)
        diag.send(head + body)
        for _ in range(_MOST):
            over = _take(diag.recv(1 << 16), found)
            if over:
                return found
    raise OSError(errno.EMSGSIZE, "an answer without an end")


def _take(data: bytes, found: list[tuple[int, int, int, float | None]]) -> bool:
    """Add the sockets of a datagram; whether it is the last one.

    Raises:
        OSError: the kernel says that it cannot tell, as one without ``tcp_diag`` does.
    """
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        if kind == _ERROR:
            (number,) = struct.unpack_from("=i", data.ljust(_HEADER.size + 4, b"\0"), _HEADER.size)
            raise OSError(-number, os.strerror(-number))
        if kind == _DONE or length < _HEADER.size:
            return True
        found.append(_connection(data[_HEADER.size : length]))
        data = data[(length + 3) & ~3 :]
    return False


def _connection(data: bytes) -> tuple[int, int, int, float | None]:
    _, state, _, _, port, *rest = _MESSAGE.unpack_from(data)
    inode, age, place = rest[-1], None, _MESSAGE.size
    while place + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, place)
        if kind == _INFO and length >= 4 + _LAST_RECEIVED + 4:
            age = struct.unpack_from("=I", data, place + 4 + _LAST_RECEIVED)[0] / 1000
        place += max(4, (length + 3) & ~3)
    return inode, state, socket.ntohs(port), age

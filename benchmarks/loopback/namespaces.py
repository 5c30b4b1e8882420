"""Links between network namespaces: a pair of interfaces for each node, rates by `tc`.

All of it lives in a namespace of its own, and nothing is left on the machine when its processes
end. It needs root, or user namespaces for others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Ends", "enter", "inside", "linked", "not_allowed"]

_INSIDE = "PRUNECAST_INSIDE_NAMESPACE"
_TOOLS = ("unshare", "nsenter", "ip", "tc")
_PROBE = (
    "ip link set lo up && ip link add probe0 type veth peer name probe1 && "
    "tc qdisc add dev probe0 root tbf rate 1mbit burst 5000 latency 100ms"
)
_SECONDS = 20


@dataclass(frozen=True)
class Ends:
    """A node's namespace.

    Attributes:
        enter: command words that run what follows in it.
        server: address of the server, as it sees it.
    """

    enter: tuple[str, ...]
    server: str


def _unshare() -> list[str]:
    return ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def not_allowed() -> str:
    """Why links cannot be made here; "" where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        [*_unshare(), "sh", "-c", _PROBE], capture_output=True, text=True, timeout=_SECONDS
    )
    told = tried.stderr.strip().splitlines()
    return (told[-1] if told else "refused") if tried.returncode else ""


def inside() -> bool:
    """Whether this process is in the namespace that `enter` made."""
    return _INSIDE in os.environ


def enter(command: Sequence[str]) -> None:
    """Become `command`, in a new network namespace."""
    found = [*_unshare(), *command]
    os.execvpe(found[0], found, {**os.environ, _INSIDE: "1"})


def _run(*words: str) -> None:
    subprocess.run(words, check=True, timeout=_SECONDS)


@contextmanager
def linked(nodes: int, *, up: float, down: float) -> Iterator[list[Ends]]:
    """Links of as many nodes with this namespace, where their ends are ``link0``, ``link1``, ...

    Packets are single ones of Ethernet, so that interfaces count every header.

    Args:
        nodes: how many.
        up, down: bits per second, from each node and to it.
    """
    _run("ip", "link", "set", "lo", "up")
    with ExitStack() as stack:
        found = []
        for node in range(nodes):
            holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
            stack.callback(_end, holder)
            found.append(_link(node, holder.pid, up, down))
        yield found
    for node in range(nodes):  # gone with their other end, in a moment
        subprocess.run(["ip", "link", "del", f"link{node}"], capture_output=True, check=False)


def _link(node: int, pid: int, up: float, down: float) -> Ends:
    namespace = f"/proc/{pid}/ns/net"
    deadline = time.monotonic() + _SECONDS
    while os.readlink(namespace) == os.readlink("/proc/self/ns/net"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"unshare made no namespace in {_SECONDS} seconds")
        time.sleep(0.02)
    there = ("nsenter", f"--net={namespace}")
    here, network = f"link{node}", f"10.87.{node}"
    _run("ip", "link", "add", here, "type", "veth", "peer", "name", "uplink", "netns", str(pid))
    _run(*there, "ip", "link", "set", "lo", "up")
    for prefix, name, last, rate in (((), here, 1, down), (there, "uplink", 2, up)):
        _run(*prefix, "ip", "link", "set", name, "addrgenmode", "none", "gso_max_segs", "1")
        _run(*prefix, "ip", "addr", "add", f"{network}.{last}/30", "dev", name)
        _run(*prefix, "ip", "link", "set", name, "up")
        burst = max(3_000, round(rate / 8 / 100))  # what 10 ms carry, two packets at least
        words = ("tbf", "rate", f"{round(rate)}bit", "burst", str(burst), "latency", "300ms")
        _run(*prefix, "tc", "qdisc", "add", "dev", name, "root", *words)
    return Ends(there, f"{network}.1")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(_SECONDS)

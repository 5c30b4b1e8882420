"""What an agent is told, which release it goes to, and what it tells about one check."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from prunecast.client.edge.errors import OrderRefused, UrlRefused
from prunecast.common.bounded import thread_bytes
from prunecast.common.fleet_protocol import CONFIRM_SECONDS

__all__ = [
    "AGENT_VERSION",
    "DEFAULT_BOUNDS",
    "AgentConfig",
    "Bounds",
    "Order",
    "PayloadKind",
    "QuietHours",
    "UpdateResult",
    "candidates",
    "check_url",
    "memory_bytes",
]

AGENT_VERSION = "0.1.0"
PayloadKind = Literal["patch", "keyframe", "none"]
_BYTES_PER_SECOND = 10e6
_MOST_INFERENCE = 512 * 2**20
_EXPANSION = 5  # 8-bit integers become float32, and a little for layouts
_LIBRARIES = 64 * 2**20  # what onnxruntime takes for itself, and the self-test
_UNPRINTED = re.compile(r"[^!-~]|[\\\\<>\"^`{|}]")
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class QuietHours:
    """A daily window of local time; it may cross midnight.

    Attributes:
        begin: first moment of the window.
        end: first moment after it.

    >>> hours = QuietHours.parse("22:00-06:00")
    >>> datetime(2026, 1, 1, 23, 30) in hours, datetime(2026, 1, 1, 6, 0) in hours
    (True, False)
    """

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> QuietHours:
        """Read ``HH:MM-HH:MM``.

        Raises:
            ValueError: not of that form, or empty.
        """
        found = _WINDOW.fullmatch(text)
        if not found or found[1] + found[2] == found[3] + found[4]:
            raise ValueError(f"{text!r} is no window of time: write it like 22:00-06:00")
        hours = [int(part) for part in found.groups()]
        return cls(time(hours[0], hours[1]), time(hours[2], hours[3]))

    def __contains__(self, moment: datetime) -> bool:
        """Whether a local time lies in the window."""
        at = moment.time()
        if self.begin < self.end:
            return self.begin <= at < self.end
        return at >= self.begin or at < self.end


def check_url(url: str) -> None:
    """Hold the URL of a repository to what files can be put under and what may be shown.

    Raises:
        UrlRefused: it holds credentials, a query or a fragment, or is no URL of http, https or
            grpcs; what it holds is not repeated.

    >>> check_url("https://releases.example:8443/digits/")
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https", "grpcs") and bool(parts.hostname)
        usable = usable and parts.port != 0
    except ValueError:
        raise UrlRefused("it is no URL: write it like https://HOST:PORT/PATH/") from None
    if "@" in parts.netloc or (not usable and "@" in url):
        raise UrlRefused(
            "it holds credentials, which would be shown wherever the URL is: put the token into a "
            "file and give that by --token-file"
        )
    if "?" in url or "#" in url:
        raise UrlRefused(
            "it has a query or a fragment, after which no file can be named: give what lets this "
            "device in by --token-file, or by --certificate and --key"
        )
    if not usable or _UNPRINTED.search(url):
        raise UrlRefused("it is no URL: write it like https://HOST:PORT/PATH/")


@dataclass(frozen=True)
class Bounds:
    """What a release may cost on this device.

    Attributes:
        seconds: for loading it and its self-test, and one more for each 10 MB of it.
        inference_bytes: memory for the tensors of all inferences that run at a time, besides
            the weights. None: half of what the process may have, and at most 512 MiB.
    """

    seconds: float = 60.0
    inference_bytes: int | None = None

    def load_seconds(self, slot: Path) -> float:
        """Seconds that the trial of the release in a slot may take."""
        return self.seconds + _size(slot) / _BYTES_PER_SECOND

    def memory(self, slot: Path) -> int:
        """Bytes that a session of the release in a slot may take."""
        own = self.inference_bytes
        if own is None:
            own = min(_MOST_INFERENCE, memory_bytes() // 2)
        return _EXPANSION * _size(slot) + own

    def load_bytes(self, slot: Path) -> int:
        """Bytes that a process may take to load it: for a moment weights exist twice."""
        return self.memory(slot) + _EXPANSION * _size(slot) + thread_bytes() + _LIBRARIES


DEFAULT_BOUNDS = Bounds()


def _size(slot: Path) -> int:
    return sum((slot / name).stat().st_size for name in ("model.onnx", "weights.bin"))


def memory_bytes() -> int:
    """Memory that this process may have: of its control group if that is less than the machine's.

    >>> memory_bytes() > 0
    True
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers:
                continue  # version 1
            folder = Path("/sys/fs/cgroup") / group.lstrip("/")
            for one in (folder, *folder.parents):
                with suppress(OSError, ValueError):
                    found.append(int((one / "memory.max").read_text()))
    return min(found)


@dataclass(frozen=True)
class AgentConfig:
    """What an agent needs to know; trust has no default.

    Attributes:
        state: folder for everything the agent keeps.
        url: of the release repository.
        name: of the release to follow.
        root: the repository's root metadata, given to the device when it was provisioned.
        threads: threads of the inference session; None leaves the choice to onnxruntime.
        most_bytes: refuse releases whose `weights.bin` or payload is larger.
        most_starts: for how many starts a release may have to answer before it is confirmed, by
            how they ended; then the agent goes back: the sign of a crash loop.
        confirm_after: seconds of service, over all starts, after which `run` confirms a release.
        quiet: daily window in which no release is downloaded; metadata are.
        bounds: what a release may cost here; one that needs more is rejected.
        optimise: keep each release as onnxruntime has optimised it for this CPU; starts are
            quicker and need less memory, for up to five times the disk of `weights.bin`.

    Raises:
        UrlRefused: see `check_url`.
    """

    state: Path
    url: str
    name: str
    root: bytes
    threads: int | None = None
    most_bytes: int = 4 * 2**30
    most_starts: int = 3
    confirm_after: float = CONFIRM_SECONDS
    quiet: QuietHours | None = None
    bounds: Bounds = DEFAULT_BOUNDS
    optimise: bool = False

    def __post_init__(self) -> None:
        check_url(self.url)

    def waits(self, version: int, at: datetime) -> str | None:
        """Why a release must not be downloaded at this local time; None if it may."""
        if self.quiet is None or at not in self.quiet:
            return None
        return f"release {version} waits for the end of the quiet hours at {self.quiet.end:%H:%M}"


@dataclass(frozen=True)
class UpdateResult:
    """What one check for updates did.

    Attributes:
        outcome: ``updated``; ``current``: nothing newer; ``rejected``: the newer release did not
            pass and the old one stays.
        version: the release that is active now; None when there is none.
        previous: the one that was active before.
        payload: how the weights came: ``patch``, ``keyframe``, or ``none``.
        downloaded: bytes received by kind: ``metadata``, ``patch``, ``keyframe``, ``files``.
        reason: why a release was rejected or waits, or a patch was replaced by the keyframe.
        difference: largest difference in the self-test.
        settings: onnxruntime's session settings of a release that was activated, see
            `InferenceSession.settings`.
        seconds: duration.
    """

    outcome: Literal["updated", "current", "rejected"]
    version: int | None
    previous: int | None = None
    payload: PayloadKind = "none"
    downloaded: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    difference: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Order:
    """What a device shall run, from whoever may decide that: see `prunecast.client.edge.control`.

    An order only chooses among the releases that are signed and live.

    Attributes:
        version: of the release; None: keep what runs.
        downgrade: the version may be lower than what runs; without it, that is refused.
    """

    version: int | None = None
    downgrade: bool = False


def candidates(order: Order | None, live: Sequence[int], held: int) -> list[int]:
    """Versions to go to, the first one that was not rejected on this device.

    Args:
        order: what to run; None: the highest version.
        live: numbers of the releases that are signed and live, ascending.
        held: what runs; 0: nothing.

    Raises:
        OrderRefused: the order names a release that is not live, or goes down without saying so.

    >>> candidates(None, [1, 2, 3], 1), candidates(Order(2), [1, 2, 3], 1)
    ([3, 2], [2])
    >>> candidates(Order(1, downgrade=True), [1, 2, 3], 2), candidates(Order(), [1, 2, 3], 2)
    ([1], [])
    """
    if order is None:
        return [version for version in reversed(live) if version > held]
    version = order.version
    if version is None or version == held:
        return []
    if version not in live:
        shown = ", ".join(map(str, live)) or "none"
        raise OrderRefused(
            f"release {version} is ordered but not signed and live (live: {shown}): publish it "
            "again under a new number, and roll that out"
        )
    if version < held and not order.downgrade:
        raise OrderRefused(
            f"release {version} is ordered, lower than the {held} that runs, and the order does "
            "not say that this is meant"
        )
    return [version]

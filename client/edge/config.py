"""What an agent is told, and what it tells about one check for updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prunecast.client.edge.limits import QuietHours

__all__ = ["AGENT_VERSION", "AgentConfig", "PayloadKind", "UpdateResult"]

AGENT_VERSION = "0.1.0"
PayloadKind = Literal["patch", "keyframe", "none"]


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
        most_starts: how often a process may start with a release that never gets confirmed
            before the agent goes back: the sign of a crash loop.
        confirm_after: seconds of service after which `run` confirms a release.
        quiet: daily window in which no release is downloaded; metadata are.
        optimise: keep each release as onnxruntime has optimised it for this CPU; starts are
            quicker and need less memory, for up to five times the disk of `weights.bin`.
    """

    state: Path
    url: str
    name: str
    root: bytes
    threads: int | None = None
    most_bytes: int = 4 * 2**30
    most_starts: int = 3
    confirm_after: float = 60.0
    quiet: QuietHours | None = None
    optimise: bool = False


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
        seconds: duration.
    """

    outcome: Literal["updated", "current", "rejected"]
    version: int | None
    previous: int | None = None
    payload: PayloadKind = "none"
    downloaded: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    difference: float | None = None
    seconds: float = 0.0

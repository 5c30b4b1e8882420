"""How the processes of an agent ended, and what of that a release has to answer for.

No process can note how it is ended. So it leaves a note while it runs (`Begun`, in `start.json`),
and takes it back when it ends by itself. A process that finds the note of an earlier one compares:
another boot of the machine means a power cut; more OOM kills than then, one for want of memory;
anything else, a kill or a crash.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["BAD_ENDS", "WEIGHTS", "Begun", "EndKind", "Work", "how_it_ended"]

EndKind = Literal["stopped", "steady", "killed", "memory", "cut"]
"""``stopped``: by itself; ``steady``: in any other way, but after enough service; before that:
``killed`` or crashed, ``memory``: by the OOM killer, ``cut``: the machine lost its power."""

Work = Literal["load", "serve", "install"]
"""What a process was at: loading the active release, serving it, or obtaining another one."""

WEIGHTS: dict[EndKind, float] = {
    "stopped": 0.0,
    "steady": 0.0,
    "killed": 1.0,
    # seldom the release's doing; three in the place of one, so that no loop goes on for ever
    "memory": 1 / 3,
    "cut": 1 / 3,
}
"""For how many starts of a crash loop an end counts."""

BAD_ENDS: tuple[EndKind, ...] = ("killed", "memory", "cut")

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_OOM_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))


@dataclass(frozen=True)
class Begun:
    """The note of a process that runs, for the one that finds it dead.

    Attributes:
        boot: id of the machine's boot; empty where the system has none.
        oom_kills: how many processes the system had killed for memory.
        work: what the process is at.
        trying: manifest (hex digest) of the release whose self-test runs; empty: none does.
        passed: whether that release has passed its trial, in a process of its own.
        served: seconds for which the active release has served, as noted last.
    """

    boot: str = ""
    oom_kills: int = 0
    work: Work = "serve"
    trying: str = ""
    passed: bool = False
    served: float = 0.0

    @classmethod
    def now(cls, work: Work) -> Begun:
        """The note of this process."""
        boot = ""
        with suppress(OSError, ValueError):
            boot = _BOOT.read_text("ascii").strip()
        return cls(boot, sum(map(_oom_kills, _OOM_COUNTERS)), work)


def how_it_ended(found: Begun, now: Begun, steady_after: float) -> EndKind:
    """How the process that left `found` behind was ended.

    Args:
        found: its note.
        now: the note of this process.
        steady_after: seconds of service after which an end speaks against nobody.

    >>> how_it_ended(Begun("a", 1), Begun("a", 1), 60), how_it_ended(Begun("a"), Begun("b"), 60)
    ('killed', 'cut')
    >>> how_it_ended(Begun("a", 1), Begun("a", 2), 60), how_it_ended(Begun(served=61), Begun(), 60)
    ('memory', 'steady')
    """
    if found.served >= steady_after:
        return "steady"
    if found.boot != now.boot:
        return "cut"
    return "memory" if now.oom_kills > found.oom_kills else "killed"


def _oom_kills(path: Path) -> int:
    """The system's counter in a file of lines such as ``oom_kill 3``; 0 where there is none."""
    with suppress(OSError, ValueError):
        for line in path.read_text("ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0

"""How a watched process is, by what repeated looks at it have found: pure, and its file's reader.

`prunecast.common.watching` takes the looks, writes the file, and ends what hangs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunecast.common.documents import read_document

__all__ = ["SCHEMA", "Limits", "Observation", "Pulse", "read_pulse"]

State = Literal["starting", "healthy", "unreachable", "hung"]

SCHEMA = 1
"""Of the file that `read_pulse` reads."""

_LEAST_CPU = 2.0  # seconds in `Limits.stalled`: the heartbeats of a ClientApp alone take less
_STALE = 30.0  # seconds beyond a few intervals


@dataclass(frozen=True)
class Limits:
    """How long what may last, in seconds.

    Attributes:
        start: until a command answers for the first time.
        silence: without an answer from then on.
        quiet: in which a SuperNode's main thread does not move, or it exchanges nothing with a
            SuperLink that can be reached. It sends heartbeats every 18 to 23 seconds, and asks for
            messages every 3 while it has none.
        stalled: in which a ClientApp uses less than 2 seconds of CPU; None for any time. One that
            computes in vain cannot be told from one that trains.
    """

    start: float = 180.0
    silence: float = 60.0
    quiet: float = 120.0
    stalled: float | None = None


@dataclass(frozen=True)
class Observation:
    """What one look has found; None is what cannot be known.

    Attributes:
        answered: whether the command answered.
        switches: of its main thread, see `main_thread_switches`.
        received: seconds since it received anything from elsewhere; infinity without a connection.
        client_app: process id and CPU seconds of the ClientApp that runs; None for no ClientApp.
        reachable: whether the SuperLink answers; asked only where nothing is exchanged.
    """

    answered: bool | None = None
    switches: int | None = None
    received: float | None = None
    client_app: tuple[int, float] | None = None
    reachable: Callable[[], bool] = lambda: True


@dataclass
class Pulse:
    """What follows from the looks so far. Times are of the clock that `take` is given.

    Attributes:
        state: "hung" is final in the sense that the command should be ended.
        problems: why it is not healthy.
        answered: when it last answered; None for never.
        exchanged: when it last exchanged something with its SuperLink.
        client_app: process id of the ClientApp that runs.
    """

    limits: Limits
    begun: float
    state: State = "starting"
    problems: list[str] = field(default_factory=list)
    answered: float | None = None
    exchanged: float | None = None
    client_app: int | None = None
    _moved: float | None = None
    _switches: int | None = None
    _computed: tuple[int, float, float] | None = None  # process, CPU seconds, when

    def take(self, now: float, seen: Observation) -> State:
        """Take one look."""
        limits, self.problems = self.limits, []
        if seen.answered:
            self.answered = now
        elif seen.answered is False:
            since, most = self.answered, limits.silence
            if since is None:
                since, most = self.begun, limits.start
            if now - since > most:
                self.problems.append(f"it has not answered for {_for(now - since)}")
        self._take_thread(now, seen)
        unreachable = self._take_exchange(now, seen)
        self._take_client_app(now, seen)
        if self.problems:
            self.state = "hung"
        elif unreachable:
            self.state, self.problems = "unreachable", ["the SuperLink cannot be reached from here"]
        elif self.answered is not None or seen.answered is None:
            self.state = "healthy"
        return self.state

    def _take_thread(self, now: float, seen: Observation) -> None:
        if seen.switches is None:
            return
        if seen.switches != self._switches or self._moved is None:
            self._switches, self._moved = seen.switches, now
        elif now - self._moved > self.limits.quiet:
            still = _for(now - self._moved)
            self.problems.append(f"its main loop has stood still for {still}")

    def _take_exchange(self, now: float, seen: Observation) -> bool:
        """Whether nothing is exchanged because the SuperLink cannot be reached."""
        if seen.received is None:
            return False
        if math.isfinite(seen.received):
            self.exchanged = max(self.exchanged or self.begun, now - seen.received)
        since = self.exchanged if self.exchanged is not None else self.begun
        if now - since <= self.limits.quiet:
            return False
        if not seen.reachable():
            # it may take a while to connect again once that is possible
            self.exchanged = max(since, now - self.limits.quiet)
            return True
        self.problems.append(
            f"it has exchanged nothing for {_for(now - since)} with a SuperLink that answers"
        )
        return False

    def _take_client_app(self, now: float, seen: Observation) -> None:
        self.client_app = None if seen.client_app is None else seen.client_app[0]
        if seen.client_app is None:
            self._computed = None
            return
        pid, cpu = seen.client_app
        if self._computed is None or pid != self._computed[0]:
            self._computed = pid, cpu, now
        _, before, when = self._computed
        if abs(cpu - before) >= _LEAST_CPU:  # less: of children that have not been waited for
            self._computed = pid, cpu, now
        elif self.limits.stalled is not None and now - when > self.limits.stalled:
            self.problems.append(f"its ClientApp has computed nothing for {_for(now - when)}")


def _for(seconds: float) -> str:
    return f"{seconds:.0f} s"


def read_pulse(file: Path, *, reachable: bool = False, now: float | None = None) -> dict[str, Any]:
    """What a watch last wrote, and whether that is well.

    Args:
        file: that a `Watch` was given.
        reachable: a SuperLink that cannot be reached is not well either.
        now: Unix time, for tests.

    Returns:
        What was written, with ``well`` and the list ``problems``.
    """
    now = time.time() if now is None else now
    try:
        found = read_document(file)
        if found.get("schema", SCHEMA) != SCHEMA:
            raise ValueError("another version of Prunecast watches: restart it, or ask that one")
        for name in ("answered", "exchanged"):
            found[name] = None if found.get(name) is None else float(found[name])
        age, often = now - float(found["at"]), float(found["interval"])
        state, problems = str(found["state"]), [str(one) for one in found["problems"]]
    except FileNotFoundError:
        return {"well": False, "problems": [f"nobody watches: there is no {file}"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        return {"well": False, "problems": [f"{file} cannot be read: {error}"]}
    if abs(age) > 4 * often + _STALE:
        late = f"has written nothing for {_for(age)}"
        if age < 0:
            late = f"has last written {_for(-age)} from now, by a clock that was wrong or is now"
        problems = [f"the watch itself {late}", *problems]
        return {**found, "well": False, "problems": problems}
    well = state == "healthy" or (state == "unreachable" and not reachable)
    if state == "starting":
        problems = ["it has not answered yet"]
    return {**found, "well": well, "problems": problems}

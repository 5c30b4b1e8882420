"""Networks between clients and server: named profiles, and traces in CSV files.

A link says how long bytes take, and what they cost in energy where its source states it. Nothing
here waits: `clock` turns the ledger of a finished run into simulated time.
"""

from __future__ import annotations

import csv
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from prunecast.simulations.kinds import Range, ScenarioError, build, choice

__all__ = ["ClassSpec", "Link", "NetworkSpec", "Trace", "airtime", "profiles", "trace_of"]

Direction = Literal["down", "up"]

_SEGMENT = 1460  # bytes of payload of a TCP segment on Ethernet
_MATHIS = math.sqrt(1.5)
_BANDWIDTH = 125_000.0  # Hz, of LoRa's DR0 to DR5
_PREAMBLE = 8 + 4.25  # symbols
_LORAWAN = 13  # bytes around an application payload: header, frame header, port, integrity code


def airtime(payload: int, spreading_factor: int) -> float:
    """Seconds that a LoRa frame is on air.

    Semtech SX1276 datasheet, section 4.1.1.7: 125 kHz, coding rate 4/5, an explicit header, a CRC,
    and low data rate optimisation from SF11 on.

    Args:
        payload: bytes of the frame, LoRaWAN's own included.
        spreading_factor: 7 to 12.

    >>> round(airtime(51 + 13, 12), 3), round(airtime(222 + 13, 7), 3)
    (2.793, 0.369)
    """
    symbol = 2.0**spreading_factor / _BANDWIDTH
    low_rate = 2 if spreading_factor >= 11 else 0
    bits = 8 * payload - 4 * spreading_factor + 28 + 16
    coded = max(math.ceil(bits / (4 * (spreading_factor - low_rate))) * 5, 0)
    return (_PREAMBLE + 8 + coded) * symbol


@dataclass(frozen=True)
class Link:
    """What lies between a client and the server.

    Attributes:
        down, up: bits per second, towards the client and from it; not for LoRa.
        latency: round trip in milliseconds.
        loss: fraction of packets, or frames, that are lost and sent again.
        availability: fraction of rounds in which the client can be reached.
        examples_per_second: how fast the client trains; 0: training takes no time.
        spreading_factor: of LoRa, 7 to 12; 0 for another network.
        frame: most bytes of application payload in a LoRa frame.
        duty_down, duty_up: largest fraction of time on air.
        watts_sending, watts_receiving: while on air; 0 where nobody states it.
    """

    down: Annotated[float, Range(0)] = 0.0
    up: Annotated[float, Range(0)] = 0.0
    latency: Annotated[float, Range(0)] = 0.0
    loss: Annotated[float, Range(0, 0.99)] = 0.0
    availability: Annotated[float, Range(0, 1)] = 1.0
    examples_per_second: Annotated[float, Range(0)] = 0.0
    spreading_factor: Annotated[int, Range(0, 12)] = 0
    frame: Annotated[int, Range(0)] = 0
    duty_down: Annotated[float, Range(0, 1, above=True)] = 1.0
    duty_up: Annotated[float, Range(0, 1, above=True)] = 1.0
    watts_sending: Annotated[float, Range(0)] = 0.0
    watts_receiving: Annotated[float, Range(0)] = 0.0

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for a link that nothing can cross."""
        if self.spreading_factor:
            if self.spreading_factor < 7 or not self.frame:
                raise ScenarioError(key, "is no LoRa", "give spreading_factor 7 to 12 and frame")
        elif not (self.down and self.up):
            raise ScenarioError(key, "has no rate", "give down and up in bits per second")

    def on_air(self, size: int, direction: Direction) -> float:
        """Seconds that the channel is used for a message of `size` bytes."""
        again = 1 / (1 - self.loss)
        if self.spreading_factor:
            whole, rest = divmod(size, self.frame)
            seconds = whole * airtime(self.frame + _LORAWAN, self.spreading_factor)
            if rest:
                seconds += airtime(rest + _LORAWAN, self.spreading_factor)
            return seconds * again
        return 8 * size * again / self._rate(self.down if direction == "down" else self.up)

    def _rate(self, most: float) -> float:
        """Bits per second of one TCP connection: what loss leaves of the link's.

        Mathis, Semke, Mahdavi & Ott 1997, "The Macroscopic Behavior of the TCP Congestion Avoidance
        Algorithm", equation 3: segment / round trip · √(3/2) / √loss.
        """
        if not (self.loss and self.latency):
            return most
        congested = 8e3 * _SEGMENT / self.latency * _MATHIS / math.sqrt(self.loss)
        return min(most, congested)

    def seconds(self, size: int, direction: Direction) -> float:
        """Seconds from the first byte sent to the last one received.

        Half a round trip, and the time on air; under a duty cycle, the pauses between frames too.
        """
        duty = self.duty_down if direction == "down" else self.duty_up
        used = self.on_air(size, direction)
        if duty < 1 and self.spreading_factor and size:
            last = airtime(min(size, self.frame) + _LORAWAN, self.spreading_factor)
            used = max(used - last, 0.0) / duty + last  # nothing follows the last frame
        return self.latency / 2e3 + used

    def joules(self, size: int, direction: Direction) -> float:
        """Energy of the client's radio for a message."""
        watts = self.watts_receiving if direction == "down" else self.watts_sending
        return watts * self.on_air(size, direction)


@cache
def profiles() -> Mapping[str, Link]:
    """The named profiles."""
    tables = tomllib.loads((files(__name__) / "profiles.toml").read_text(encoding="utf-8"))
    return {name: build(Link, table, name) for name, table in tables.items()}


# -- traces ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A link that changes: what holds from which second on; the last row stays.

    Attributes:
        rows: (seconds from the beginning, link), ascending, the first at 0.
    """

    rows: tuple[tuple[float, Link], ...]

    def at(self, second: float) -> Link:
        """The link at a time."""
        return [link for begin, link in self.rows if begin <= second][-1]


_COLUMNS = {
    "down_bps": "down",
    "up_bps": "up",
    "latency_ms": "latency",
    "loss": "loss",
    "availability": "availability",
    "examples_per_second": "examples_per_second",
}


def trace_of(source: str, key: str) -> dict[str, Trace]:
    """The link of a profile, or those of a CSV file, by class; "" is that of any class.

    Args:
        source: name of a profile, or path of a file that ends in ``.csv``.
        key: of the scenario, for messages.

    Raises:
        ScenarioError: there is none, or the file cannot be used.
    """
    if not source.endswith(".csv"):
        choice(key, source, profiles())
        return {"": Trace(((0.0, profiles()[source]),))}
    try:
        with Path(source).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = list(reader)
            header = set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ScenarioError(key, f"cannot read {source} ({reason})", "give a CSV file") from error
    known = {"class", "seconds", *_COLUMNS}
    if not found or not {"down_bps", "up_bps"} <= header or header - known:
        columns = f"it may have {', '.join(sorted(known))}"
        remedy = f"it needs rows and the columns down_bps and up_bps; {columns}"
        raise ScenarioError(key, f"{source} is no trace", remedy)
    rows: dict[str, list[tuple[float, Link]]] = {}
    for number, row in enumerate(found, start=2):
        where = f"{key} ({source}, line {number})"
        try:
            values = {c: float(row[c]) for c in ("seconds", *_COLUMNS) if row.get(c)}
        except (ValueError, TypeError) as error:
            raise ScenarioError(where, f"is no number ({error})", "write numbers") from error
        second = values.pop("seconds", 0.0)
        link = build(Link, {_COLUMNS[column]: value for column, value in values.items()}, where)
        link.check(where)
        rows.setdefault(row.get("class") or "", []).append((second, link))
    for name, timed in rows.items():
        begins = [begin for begin, _ in timed]
        if begins != sorted(set(begins)) or begins[0] != 0 or not math.isfinite(begins[-1]):
            raise ScenarioError(
                key, f"the seconds of class {name!r} in {source} do not ascend from 0", "sort them"
            )
    return {name: Trace(tuple(timed)) for name, timed in rows.items()}


# -- the table of a scenario ----------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSpec:
    """``[network.classes.<name>]``: some of the clients.

    Attributes:
        share: of the clients, relative to the other classes.
        profile: a profile's name or a CSV file; that of ``[network]`` where empty.
        availability: instead of the profile's.
        examples_per_second: instead of the profile's.
    """

    share: Annotated[float, Range(0, above=True)] = 1.0
    profile: str = ""
    availability: Annotated[float | None, Range(0, 1)] = None
    examples_per_second: Annotated[float | None, Range(0)] = None


@dataclass(frozen=True)
class NetworkSpec:
    """``[network]``: what simulated time is counted by; it changes nothing that is trained.

    Attributes:
        profile: a profile's name, or a CSV file whose classes the clients get in turn.
        deadline: seconds after which a round ends without those who are late; 0 for none.
        target: of the task's metric, the time to which is told.
        classes: of clients; all are alike without any.
    """

    profile: str = "slow-4g"
    deadline: Annotated[float, Range(0)] = 0.0
    target: float | None = None
    classes: Mapping[str, ClassSpec] = field(default_factory=dict)

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for an unknown profile below `key`; files are read by `links`."""
        named = {f"{key}.profile": self.profile}
        named |= {f"{key}.classes.{n}.profile": spec.profile for n, spec in self.classes.items()}
        for where, profile in named.items():
            if profile and not profile.endswith(".csv"):
                choice(where, profile, profiles())

    def located(self, folder: Path) -> NetworkSpec:
        """The same, relative paths of files taken from a folder."""

        def place(profile: str) -> str:
            return str(folder / profile) if profile.endswith(".csv") else profile

        classes = {n: replace(c, profile=place(c.profile)) for n, c in self.classes.items()}
        return replace(self, profile=place(self.profile), classes=classes)

    def links(self, key: str = "network") -> dict[str, tuple[float, Trace]]:
        """Share and link of every class.

        Raises:
            ScenarioError: a profile or file cannot be used, or has no such class.
        """
        if not self.classes:
            found = trace_of(self.profile, f"{key}.profile")
            return {name or self.profile: (1.0, trace) for name, trace in found.items()}
        links = {}
        for name, spec in self.classes.items():
            where = f"{key}.classes.{name}.profile"
            traces = trace_of(spec.profile or self.profile, where)
            if name not in traces and "" not in traces:
                choice(where, name, traces)
            trace = traces.get(name) or traces[""]
            links[name] = (spec.share, _instead(trace, spec))
        return links


def _instead(trace: Trace, spec: ClassSpec) -> Trace:
    given = {
        key: value
        for key in ("availability", "examples_per_second")
        if (value := getattr(spec, key)) is not None
    }
    return replace(trace, rows=tuple((begin, replace(link, **given)) for begin, link in trace.rows))

"""Traffic in a report: bytes of messages and on the wire, joining, and what coding takes."""

from __future__ import annotations

from collections.abc import Mapping

from prunecast.common.text import bytes_text, duration_text, percent
from prunecast.simulations.report.messages import caught_up, codec_seconds, joining, wire_bytes
from prunecast.simulations.report.parts import (
    MISSING,
    Section,
    Table,
    bytes_of,
    mean_of,
    seconds_of,
)
from prunecast.simulations.report.study import Spread, Study

__all__ = ["joining_section", "seconds_section", "wire_section"]


def wire_section(study: Study) -> Section:
    """Bytes of messages, and those that HTTP makes of them."""
    rows = []
    for arm in study.arms.values():
        wire = wire_bytes(arm)
        up, down = arm.spread("bytes_up"), arm.spread("bytes_down")

        def ratio(*ways: Spread | None, whole: float = arm.total().mean or 1) -> str:
            known = [way.mean for way in ways if way]
            return f"{sum(known) / whole:.2f}×" if len(known) == len(ways) else MISSING

        rows.append(
            [
                arm.label,
                bytes_text(mean_of(up)),
                bytes_of(wire["up"]),
                bytes_text(mean_of(down)),
                bytes_of(wire["down"]),
                ratio(wire["up"], wire["down"]),
                bytes_of(wire["tls_up"]),
                bytes_of(wire["tls_down"]),
                ratio(wire["tls_up"], wire["tls_down"]),
            ]
        )
    header = ["arm", "messages up", "≈ wire up", "messages down", "≈ wire down", "ratio"]
    header += ["≈ TLS up", "≈ TLS down", "ratio"]
    return Section(
        "Message bytes and wire bytes",
        "measured, estimated",
        "Messages are measured, as Flower serialises them. Wire bytes (≈) are estimated from their "
        "number of objects: what HTTP between SuperNodes and a SuperLink adds to each, from the "
        "nodes and to them, as a relay counted it, and then what TLS adds. Nodes that wait for "
        "messages are not counted. No wire was there in a simulation.",
        tables=[Table(header, rows)],
    )


def joining_section(study: Study) -> Section:
    """What joining and coming back cost."""
    header = [
        "arm",
        "first join",
        "joins at the end",
        "back after absence",
        "missed 1",
        "missed more",
    ]
    rows = []
    for arm in study.arms.values():
        joins, ends = joining(arm), caught_up(arm)
        away = MISSING if joins.first is None else "nobody was away"
        if joins.back is not None:
            away = f"{bytes_text(joins.back.mean)} ({joins.returned:,} times)"
        rows.append(
            [
                arm.label,
                bytes_of(joins.first),
                bytes_of(ends.get("whole")),
                away,
                bytes_text(ends["1"].mean) if "1" in ends else "as a join" if ends else MISSING,
                _missed(ends),
            ]
        )
    return Section(
        "Joining and coming back",
        note="“First join” is the first message down to a client, the mean over clients; “back "
        "after absence” the mean message down to a client that the round before had left out. "
        "The other columns encode, after the last round, what a client would be sent that joins "
        "then, or missed so many versions: measured, not sent; the record without its message. "
        "A model that is drawn from a seed costs its first clients a seed alone.",
        tables=[Table(header, rows)],
    )


def _missed(ends: Mapping[str, Spread]) -> str:
    more = [key for key in ends if key not in ("whole", "1")]
    if not ends:
        return MISSING
    if not more:
        return "as a join" if "1" not in ends else "–"
    return ", ".join(f"{key}: {bytes_text(ends[key].mean)}" for key in more)


def seconds_section(study: Study) -> Section:
    """How long messages were coded."""
    header = [
        "arm",
        "server encodes",
        "clients encode",
        "server decodes",
        "per message",
        "of run time",
    ]
    rows = []
    for arm in study.arms.values():
        if not arm.first["trained"]:
            continue
        times = codec_seconds(arm)
        cells = [MISSING] * 5
        if times and (arm.baseline or any(spread.mean for spread in times.values())):
            whole = sum(spread.mean for spread in times.values())
            ran, messages = arm.spread("seconds"), arm.spread("messages")
            cells = [seconds_of(times[key]) if times[key].mean else "0" for key in times]
            cells += [duration_text(whole / messages.mean) if messages and whole else "0"]
            cells += [percent(whole / ran.mean) if ran and ran.mean else MISSING]
        rows.append([arm.label, *cells])
    return Section(
        "Codec seconds",
        note="Processor time is not separated: seconds that passed while messages were coded, over "
        "all messages. What clients take to decode is not recorded. Plain Flower codes nothing; "
        "what it serialises is not counted for any arm.",
        tables=[Table(header, rows)] if rows else [],
    )

"""Runs of several seeds summed up: the spread of what they reached, and where their bytes went."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["summary", "tables"]

Row = Mapping[str, Any]
_MEASURES = ("ratio", "accuracy", "against_dense")
_TENSORS = 12  # rows of a table; the smallest of more are one row


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each kind of model, preset and number of rounds.

    Args:
        rows: of single runs, as `benchmarks/bytes.py` writes them.

    Returns:
        For each of ``ratio``, ``accuracy`` and ``against_dense`` mean, least, most and standard
        error (None for a single seed); ``parts`` and ``tensors``, means over the seeds of the
        bytes by direction and kind of payload, and by direction and tensor.
    """
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["preset"] != "dense":
            groups[row["kind"], row["preset"], row["rounds"]].append(row)
    return [
        {
            "kind": kind,
            "preset": preset,
            "rounds": rounds,
            "seeds": [row["seed"] for row in some],
            **{name: spread([row[name] for row in some]) for name in _MEASURES},
            "parts": _parts(some),
            "tensors": _tensors(some),
        }
        for (kind, preset, rounds), some in groups.items()
    ]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, least, most, and standard error of the mean.

    >>> spread([1.0, 2.0, 3.0])
    {'mean': 2.0, 'min': 1.0, 'max': 3.0, 'error': 0.577}
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "mean": round(statistics.fmean(values), 3),
        "min": min(values),
        "max": max(values),
        "error": None if error is None else round(error, 3),
    }


def _parts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    names = ("messages", "bytes", "headers", "payload", "envelope")
    for row in rows:
        for part in row["account"]:
            counted = sums[part["direction"], part["kind"]]
            counted.update({name: part[name] for name in names})
    return [
        {
            "direction": direction,
            "kind": kind,
            **{name: round(total[name] / len(rows), 1) for name in names},
        }
        for (direction, kind), total in sums.items()
    ]


def _tensors(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, Counter[str]] = {"down": Counter(), "up": Counter()}
    for row in rows:
        for part in row["account"]:
            found[part["direction"]].update(part["tensors"])
    names = dict.fromkeys([*found["down"], *found["up"]])
    return {
        name: {way: round(sums[name] / len(rows), 1) for way, sums in found.items()}
        for name in names
    }


def tables(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: the spread of all, then the bytes of each."""
    yield "| kind | preset | rounds | seeds | ratio | accuracy, % | against dense, points |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for entry in entries:
        cells = [
            *(entry["kind"], entry["preset"], str(entry["rounds"]), str(len(entry["seeds"]))),
            *(_spread(entry["ratio"], ".1f"), _spread(entry["accuracy"], ".2f")),
            _spread(entry["against_dense"], "+.2f"),
        ]
        yield f"| {' | '.join(cells)} |"
    for entry in entries:
        yield ""
        yield f"{entry['kind']}, {entry['preset']}: bytes of a run"
        yield ""
        yield from _part_table(entry["parts"])
        yield ""
        yield from _tensor_table(entry["tensors"], entry["parts"])


def _spread(of: Mapping[str, float | None], form: str) -> str:
    """Such as ``95.41 (95.20 to 95.60, ± 0.12)``, the last of which is the standard error."""
    mean, least, most = (format(of[name], form) for name in ("mean", "min", "max"))
    if of["error"] is None:
        return mean
    return f"{mean} ({least} to {most}, ± {format(of['error'], form.lstrip('+'))})"


def _part_table(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    whole = sum(part["bytes"] for part in parts) or 1
    yield (
        "| direction, payload | messages | tensors | headers | envelopes | share, % "
        "| envelope of a message |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for part in parts:
        numbers = (part["payload"] - part["headers"], part["headers"], part["envelope"])
        yield (
            f"| {part['direction']}, {part['kind']} | {part['messages']:,.0f} | "
            + " | ".join(f"{number:,.0f}" for number in numbers)
            + f" | {100 * part['bytes'] / whole:.1f} | {part['envelope'] / part['messages']:,.0f} |"
        )


def _tensor_table(
    tensors: Mapping[str, Mapping[str, float]], parts: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """The largest tensors, the others together, then what belongs to none; it sums to all bytes."""
    by_size = sorted(tensors, key=lambda name: -sum(tensors[name].values()))
    shown = by_size if len(by_size) <= _TENSORS + 1 else by_size[:_TENSORS]
    rows = {name: (tensors[name]["down"], tensors[name]["up"]) for name in shown}
    if rest := by_size[len(shown) :]:
        rows[f"{len(rest)} others"] = _both(tensors[name] for name in rest)
    for name in ("headers", "envelope"):
        rows[f"({name})"] = _both({part["direction"]: part[name]} for part in parts)
    whole = sum(map(sum, rows.values())) or 1
    yield "| tensor | down | up | share, % |"
    yield "|---|---:|---:|---:|"
    for name, (down, up) in rows.items():
        yield f"| {name} | {down:,.0f} | {up:,.0f} | {100 * (down + up) / whole:.1f} |"


def _both(amounts: Iterator[Mapping[str, float]]) -> tuple[float, float]:
    some = list(amounts)
    return sum(a.get("down", 0.0) for a in some), sum(a.get("up", 0.0) for a in some)

"""What ledgers and events say of an arm's messages: wire bytes, joins, codec times, tensors."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunecast.simulations.report.study import ArmRun, Spread, StudyArm

__all__ = [
    "Joins",
    "LayerBytes",
    "bytes_by_kind",
    "caught_up",
    "codec_seconds",
    "joining",
    "layer_bytes",
    "sparsity_by_layer",
    "wire_bytes",
]


def wire_bytes(arm: StudyArm) -> dict[str, Spread | None]:
    """Estimated wire bytes; None where a ledger lacks what they are estimated from.

    Returns:
        ``up`` and ``down`` by HTTP, ``tls_up`` and ``tls_down`` by HTTP with TLS.
    """
    tallies = [run.tally for run in arm.runs]
    return {
        way: Spread.of(None if t is None else getattr(t.totals(), f"wire_{way}") for t in tallies)
        for way in ("up", "down", "tls_up", "tls_down")
    }


def codec_seconds(arm: StudyArm) -> dict[str, Spread]:
    """Seconds that the server and the clients encoded, and the server decoded; {} if unknown."""
    columns: dict[str, list[float]] = {"encoding": [], "clients": [], "decoding": []}
    for run in arm.runs:
        if run.tally is None:
            return {}
        down, up = (run.tally.totals(direction=way) for way in ("down", "up"))
        columns["encoding"].append(down.encode_ms / 1e3)
        columns["clients"].append(up.encode_ms / 1e3)
        columns["decoding"].append(up.decode_ms / 1e3)
    found = {key: Spread.of(values) for key, values in columns.items()}
    return {key: spread for key, spread in found.items() if spread is not None}


@dataclass(frozen=True)
class Joins:
    """Messages down to clients that began, or came back.

    Attributes:
        first: bytes of the first message to a client, over seeds the mean of clients.
        back: bytes of a message to a client that was left out the round before, likewise.
        returned: how often that happened, all seeds together.
    """

    first: Spread | None
    back: Spread | None
    returned: int


def joining(arm: StudyArm) -> Joins:
    """What joining and coming back took, as the ledgers have it."""
    firsts: list[float] = []
    backs: list[float] = []
    returned = 0
    for run in arm.runs:
        seen: dict[int, int] = {}
        first, back = [], []
        for entry in run.entries:
            if entry.direction != "down" or entry.message_type == "query":
                continue
            before = seen.get(entry.node)
            seen[entry.node] = entry.round
            if before is None:
                first.append(entry.payload_bytes)
            elif entry.round > before + 1:
                back.append(entry.payload_bytes)
        if first:
            firsts.append(statistics.fmean(first))
        if back:
            backs.append(statistics.fmean(back))
            returned += len(back)
    return Joins(Spread.of(firsts), Spread.of(backs), returned)


def caught_up(arm: StudyArm) -> dict[str, Spread]:
    """What a client would be sent after the last round: "whole", or by versions missed."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in arm.runs:
        told = run.ended.get("catching_up") or {}
        if "whole" in told:
            found["whole"].append(told["whole"])
        for back, size in (told.get("missed") or {}).items():
            found[back].append(size)
    spreads = {key: Spread.of(values) for key, values in found.items()}
    return {key: spread for key, spread in spreads.items() if spread is not None}


def bytes_by_kind(run: ArmRun) -> dict[tuple[str, str], dict[int, tuple[int, int]]]:
    """By direction and kind, messages and bytes of every round; {} without a ledger."""
    found: dict[tuple[str, str], dict[int, tuple[int, int]]] = {}
    for entry in run.entries:
        rounds = found.setdefault((entry.direction, entry.kind), {})
        messages, size = rounds.get(entry.round, (0, 0))
        rounds[entry.round] = messages + 1, size + entry.payload_bytes
    return found


@dataclass(frozen=True)
class LayerBytes:
    """Estimated bytes of tensors over a run, from single messages of each kind.

    Attributes:
        down, up: by tensor; "" is what belongs to none: names, envelopes, instructions.
        messages: how many were looked into.
        covered: fraction of the run's bytes whose kinds were looked into.
        shared: whether tensors had bytes in common that were split by entropy.
    """

    down: Mapping[str, float]
    up: Mapping[str, float]
    messages: int
    covered: float
    shared: bool


def layer_bytes(run: ArmRun) -> LayerBytes | None:
    """Where the bytes of a run lie, tensor by tensor; None where no message was looked into."""
    samples: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in run.events:
        for sample in event.get("sampled") or []:
            samples[sample["direction"], sample["kind"]].append(sample)
    if not samples or run.tally is None:
        return None
    found: dict[str, dict[str, float]] = {"down": defaultdict(float), "up": defaultdict(float)}
    covered = 0
    for (way, kind), told in samples.items():
        size = run.tally.totals(direction=way, kind=kind).payload_bytes  # type: ignore[arg-type]
        whole = sum(sample["bytes"] for sample in told)
        if not size or not whole:
            continue
        covered += size
        part = size / whole
        for sample in told:
            named = 0
            for name, nbytes in (*sample["tensors"].items(), ("others", sample.get("others", 0))):
                if nbytes:
                    found[way][name] += nbytes * part
                    named += nbytes
            found[way][""] += (sample["bytes"] - named) * part
    everything = run.tally.totals().payload_bytes or 1
    count = sum(map(len, samples.values()))
    shared = any(sample["estimated"] for told in samples.values() for sample in told)
    return LayerBytes(found["down"], found["up"], count, covered / everything, shared)


def sparsity_by_layer(run: ArmRun) -> dict[str, dict[int, tuple[int, int]]]:
    """By tensor and round, entries and zeros of the model; {} where that was not recorded."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for event in run.events:
        layers = event.get("layers") or {}
        for name, (size, zeros) in layers.get("tensors", {}).items():
            found.setdefault(name, {})[event["round"]] = size, zeros
        if "others" in layers:
            size, zeros = layers["others"]
            found.setdefault("others", {})[event["round"]] = size, zeros
    return found

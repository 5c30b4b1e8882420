"""What commands share that train many runs by a comparison and write a page of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.federation import digest_of
from benchmarks.harness.report import machine
from prunecast.common.files import write_atomically
from prunecast.simulations.comparison import Comparison

__all__ = ["fill", "forget_stale", "teller", "write_page"]

_SOURCES = "sources.json"  # in a comparison's folder: what the code was when a run was begun


def fill(chosen: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Give arguments that were left out their defaults."""
    for name, value in defaults.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)


def teller(name: str) -> Callable[[Mapping[str, Any]], None]:
    """Prints which run of a comparison is begun, or kept."""

    def hear(event: Mapping[str, Any]) -> None:
        told = event["event"] in ("kept", "step") and event["text"].startswith("seed ")
        if told or event["event"] == "failed":
            print(f"{name}: {event['text']}", flush=True)

    return hear


def forget_stale(comparison: Comparison) -> None:
    """Remove runs that other code than this one made, and note the code of those to come."""
    path = comparison.folder / _SOURCES
    known: dict[str, str] = {}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    now = dict(known)
    for scenario, folder in comparison.runs():
        trained = {n: arm for n, arm in scenario.arms.items() if arm.trains}
        alone = dataclasses.replace(scenario, arms=trained, output="")
        key = str(folder.relative_to(comparison.folder))
        now[key] = digest_of(json.loads(json.dumps(alone.to_mapping())))
        if known.get(key) != now[key]:
            shutil.rmtree(folder, ignore_errors=True)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())


def write_page(
    out: Path,
    stem: str,
    page: Sequence[str],
    command: str,
    facts: Mapping[str, Any],
    draw: Callable[[Path], None],
) -> None:
    """Write what was measured as Markdown, JSON and PNG, and print the page.

    Args:
        out: folder.
        stem: of the files' names.
        page: lines of Markdown, without the picture.
        command: that made it.
        facts: of the JSON, beside machine and command.
        draw: writes the picture.
    """
    out.mkdir(parents=True, exist_ok=True)
    draw(out / f"{stem}.png")
    document = {"machine": machine(), "command": command, **facts}
    write_atomically(out / f"{stem}.json", (json.dumps(document, indent=1) + "\n").encode())
    text = "\n".join(page) + "\n"
    write_atomically(out / f"{stem}.md", text.encode())
    print(f"{text}\n{out / stem}.md")

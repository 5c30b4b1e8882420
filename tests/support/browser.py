"""A real browser, headless: what a page asked for, what its scripts said, what it looks like."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Seen", "open_page"]

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # nothing leaves this machine, whatever the page or the browser itself would like
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    *("--enable-logging=stderr", "--virtual-time-budget=3000"),
)
_SECONDS = 120


@dataclass(frozen=True)
class Seen:
    """What became of a page.

    Attributes:
        dom: its document after scripts ran, if there are any.
        fetched: URLs that the page asked for, itself and what is inside of it left out.
        said: what its scripts wrote to the console, exceptions included.
    """

    dom: str
    fetched: list[str]
    said: list[str]


def open_page(page: Path, scratch: Path, *, width: int = 1200, shot: Path | None = None) -> Seen:
    """Open a file in Chromium; skips the test where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    log = scratch / "net.json"
    flags = [*_FLAGS, f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},1400"]
    picture = [f"--screenshot={shot}"] if shot else ["--dump-dom"]
    done = subprocess.run(
        [chromium, *flags, f"--log-net-log={log}", *picture, page.as_uri()],
        capture_output=True, timeout=_SECONDS, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.decode().splitlines() if ":CONSOLE" in line]
    return Seen(done.stdout.decode(), _requests(log), said)


def _requests(log: Path) -> list[str]:
    """Requests that a page made: those of the browser itself have no origin."""
    text = log.read_text()
    text = text if text.rstrip().endswith("}") else re.sub(r",?\s*$", "]}", text)
    asked = [event.get("params") or {} for event in json.loads(text)["events"]]
    found = [p["url"] for p in asked if p.get("initiator", "not an origin") != "not an origin"]
    return [url for url in dict.fromkeys(found) if not url.startswith("data:")]

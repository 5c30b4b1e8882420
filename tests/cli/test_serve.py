"""`prunecast serve` as its documentation describes it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from prunecast.cli.serve import serve
from prunecast.server.repository.serving import ServingLimits

TEXT = (Path(__file__).parents[2] / "docs" / "releases.md").read_text(encoding="utf-8")
DEFAULTS = {
    name.replace("_", "-"): parameter.default
    for name, parameter in inspect.signature(serve).parameters.items()
    if name not in ("repository", "as_json")
}


def test_every_option_is_documented_and_every_documented_option_exists() -> None:
    section = re.search(r"^## Serving\n(.*?)^## ", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    assert set(re.findall(r"--([a-z-]*[a-z])", section[1])) == set(DEFAULTS)


def test_documented_defaults_are_those_of_server_and_command() -> None:
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([0-9]+)", TEXT, flags=re.MULTILINE))
    assert len(rows) == 7
    rows["header-bytes"] = str(int(rows["header-bytes"]) * 1024)
    for name, value in rows.items():
        assert float(value) == DEFAULTS[name] == getattr(ServingLimits(), name.replace("-", "_"))

"""`prunecast node`: what is kept, what would go, and that nothing in use does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.client.training.store import NodeStore
from prunecast.compression.versions import PublishedModel
from prunecast.compression.versions.model import RawTensor

MODEL = PublishedModel({"w": RawTensor(np.arange(4096, dtype=np.float32))}, 1)
DAY = 86_400


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str, answer: str | None = None) -> Any:
        return CliRunner().invoke(app, ["node", *arguments], answer, prog_name="prunecast")

    return invoke


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, NodeStore]:
    """Of four jobs: one goes on, one is finished, one was left for long, one trains right now."""
    made = {job: NodeStore(tmp_path / "store", job, 7) for job in ("on", "done", "left", "now")}
    for store in made.values():
        store.keep("arrays", MODEL)
    made["done"].note_end(last=True)
    for job, days in {"on": 2, "done": 1, "left": 40, "now": 50}.items():
        os.utime(made[job]._folder, (time.time() - days * DAY,) * 2)
    for job in ("on", "done", "left"):
        made[job].close()
    return made


def there(stores: dict[str, NodeStore]) -> set[str]:
    return {job for job, store in stores.items() if store._folder.exists()}


def test_status_shows_what_is_kept_and_what_would_go(
    run: Callable[..., Any], stores: dict[str, NodeStore], tmp_path: Path
) -> None:
    result = run("status")
    assert result.exit_code == 0
    for words in ("finished", "stale", "in use", "kept", "40 d ago", "4 nodes", "`prunecast node"):
        assert words in result.output
    assert "kB of 2 nodes" in result.output
    document = json.loads(run("status", "--json").output)
    assert document["store"] == str(tmp_path / "store")
    assert {kept["job"]: kept["state"] for kept in document["kept"]} == {
        "on": "kept",
        "done": "finished",
        "left": "stale",
        "now": "in use",
    }
    assert document["bytes"] == sum(kept["bytes"] for kept in document["kept"]) > 4 * 4096
    assert there(stores) == {"on", "done", "left", "now"}


def test_an_empty_store_is_said_to_be_one(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("status").output.strip().endswith("nothing is kept")
    assert json.loads(run("status", "--json", "--store", str(tmp_path)).output)["kept"] == []
    assert "nothing to remove" in run("clean", "--yes").output


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ((), {"on", "now"}),
        (("--older-than", "36h"), {"done", "now"}),
        (("--older-than", "45d"), {"on", "done", "left", "now"}),
        (("--job", "on"), {"done", "left", "now"}),
        (("--job", "on", "--job", "left", "--older-than", "1w"), {"on", "done", "now"}),
        (("--job", "now"), {"on", "done", "left", "now"}),  # a message is being handled
    ],
)
def test_clean_removes_what_was_asked_and_never_what_is_in_use(
    run: Callable[..., Any], stores: dict[str, NodeStore], arguments: Any, left: set[str]
) -> None:
    result = run("clean", "--yes", *arguments)
    assert result.exit_code == 0
    assert there(stores) == left
    assert stores["now"].held("arrays") is not None


def test_clean_asks_first(run: Callable[..., Any], stores: dict[str, NodeStore]) -> None:
    refused = run("clean", answer="n\n")
    assert refused.exit_code == 1
    assert "Remove" in refused.output
    assert there(stores) == {"on", "done", "left", "now"}
    assert run("clean", answer="y\n").exit_code == 0
    assert there(stores) == {"on", "now"}


def test_clean_tells_a_program_what_went(
    run: Callable[..., Any], stores: dict[str, NodeStore]
) -> None:
    assert run("clean", "--json").exit_code == 2  # nobody can be asked
    document = json.loads(run("clean", "--yes", "--json").output)
    assert {kept["job"] for kept in document["removed"]} == {"done", "left"}
    assert document["kept"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--older-than", "soon"), "no time"), (("--job", "other"), "no job 'other'")],
)
def test_what_cannot_be_is_a_usage_error(
    run: Callable[..., Any], stores: dict[str, NodeStore], arguments: Any, words: str
) -> None:
    result = run("clean", "--yes", *arguments)
    assert result.exit_code == 2
    assert words in result.output + result.stderr
    assert there(stores) == {"on", "done", "left", "now"}

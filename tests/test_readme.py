"""What README and first pages say is so: code runs, the diff is the diff, tables are defaults."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common.config import flatten_dict

from prunecast.compression.pruning.masks import holding
from prunecast.server.federation import PRESETS, Policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
POLICY = (ROOT / "docs/policy.md").read_text(encoding="utf-8")
PAGES = README + POLICY + (ROOT / "docs/edge.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, page: str = PAGES) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every `prunecast` command of the console blocks."""
    lines = "\n".join(blocks("console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("prunecast ")]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """All Python blocks of the page on policies, run one after the other."""
    scope: dict[str, Any] = {}
    for number, block in enumerate(blocks("python", POLICY)):
        exec(compile(block, f"docs/policy.md, Python block {number}", "exec"), scope)
    return scope


def test_python_blocks_run(names: dict[str, Any]) -> None:
    assert names["policy"].sparsity == 0.8


def test_mask_block_holds_pruned_weights_at_zero(names: dict[str, Any]) -> None:
    model = torch.nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    with holding({"weight": mask.numpy()}):
        optimiser = names["optimiser_of"](model)
    assert torch.equal(model.weight != 0, mask)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    assert torch.equal(model.weight != 0, mask)


def test_diff_is_the_difference_of_the_examples() -> None:
    plain, compressed = (ROOT / "examples" / f"quickstart-{n}" for n in ("plain", "prunecast"))
    expected: list[str] = []
    for name in ("client_app.py", "server_app.py", "task.py", "__init__.py"):
        old, new = (folder / "quickstart" / name for folder in (plain, compressed))
        difference = difflib.unified_diff(
            old.read_text().splitlines(),
            new.read_text().splitlines(),
            *(str(path.relative_to(ROOT / "examples")) for path in (old, new)),
            lineterm="",
            n=0,
        )
        expected += [line for line in difference if not line.startswith("@@")]
    (shown,) = blocks("diff")
    assert shown.splitlines() == [line for line in expected if line.strip("+-")]


@pytest.mark.parametrize(
    ("page", "app"),
    [
        ("examples/README.md", "quickstart-prunecast"),
        ("docs/run.md", "ready-apps"),
        ("docs/deploy.md", "ready-apps"),
    ],
)
def test_run_configs_have_keys_that_the_app_lists(page: str, app: str) -> None:
    """Flower refuses others."""
    text = (ROOT / page).read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "examples" / app / "pyproject.toml").read_text())
    listed = set(flatten_dict(project["tool"]["flwr"]["app"]["config"]))
    given = re.findall(r"--run-config (['\"])(.+?)\1(?=\s)", text)
    assert given
    keys = {word.partition("=")[0] for _, words in given for word in shlex.split(words)}
    assert keys | set(re.findall(r"`(metrics-[a-z]+)=", text)) <= listed


def test_knob_table_is_complete_and_states_the_defaults() -> None:
    rows = re.findall(r"^\| `prunecast\.([a-z-]+)` \| (.+?) \|", POLICY, flags=re.MULTILINE)
    stated = {key.replace("-", "_"): value for key, value in rows}
    fields = {field.name: getattr(Policy(), field.name) for field in dataclasses.fields(Policy)}
    assert stated.keys() == fields.keys()
    for name, default in fields.items():
        value = tomllib.loads("value = " + stated[name].replace("\\*", "*"))["value"]
        key = "prunecast." + name.replace("_", "-")
        policy = Policy.from_run_config({key: value}, preset="balanced")
        assert getattr(policy, name) == default, name


def test_preset_table_is_complete() -> None:
    table = POLICY.split("| preset |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z]+)` \|", table, flags=re.MULTILINE)) == set(PRESETS)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist_with_these_options(command: list[str]) -> None:
    words = [word for word in command[1:] if re.fullmatch("[a-z-]+", word)]
    words = words[: next((i for i, w in enumerate(words) if w.startswith("-")), len(words))]
    shown = ""
    for depth in (2, 1, 0):
        result = subprocess.run(
            [sys.executable, "-m", "prunecast.cli", *words[:depth], "--help"],
            capture_output=True,
            text=True,
            timeout=300,
            env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": ""},
        )
        if result.returncode == 0:
            shown = result.stdout
            break
    for option in (word.split("=")[0] for word in command if word.startswith("--")):
        assert option in shown, f"{option} is not an option of {' '.join(words)}:\n{shown}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert path.name == "README.md" or f"]({path.name})" in index, f"{path.name} is not listed"


def test_decisions_are_numbered_without_gaps_and_doubles() -> None:
    found = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in found] == list(range(1, len(found) + 1))
    for path in found:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(f"# {int(path.name[:4])}. "), f"{path.name} begins {first!r}"


def test_readme_has_no_gaps() -> None:
    assert "goes here" not in README
    assert "go here" not in README

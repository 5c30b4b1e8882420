"""The examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "compression", "server", "client", "simulations", "cli")
WITH_EXAMPLES = [
    ".".join(["prunecast", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstring_examples(module: str) -> None:
    imported = importlib.import_module(module)
    result = doctest.testmod(imported, extraglobs={"np": importlib.import_module("numpy")})
    assert result.attempted > 0
    assert result.failed == 0, f"see the captured output of {module}"

"""docs/schemes.md: its examples run, and its table is what comes out."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prunecast.compression.schemes.interface import Option
from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import SCHEMES, scheme

PAGE = Path(__file__).parents[3] / "docs" / "schemes.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
NAMES: dict[str, Any] = {"np": np}


def synthetic_update() -> dict[str, NDArray[np.float32]]:
    """The page's own function."""
    if "synthetic_update" not in NAMES:
        source = TEXT.split(">>> def synthetic_update", 1)[1].split("```")[0]
        lines = ("def synthetic_update" + source).splitlines()
        exec("\n".join(line.removeprefix("... ") for line in lines), NAMES)
    tensors: dict[str, NDArray[np.float32]] = NAMES["synthetic_update"]()
    return tensors


def options(cell: str) -> dict[str, Option]:
    pairs = re.findall(r"`(\w+)` = ([^,]+)", cell)
    return {key: ast.literal_eval(value) for key, value in pairs}


def measured(name: str, config: dict[str, Option]) -> tuple[float, float, float]:
    tensors = synthetic_update()
    count = sum(t.size for t in tensors.values())
    bits = []
    for coding in ("paper", "prunecast"):
        one = scheme(name, coding=coding, **config)
        payload, _ = one.encode(tensors, one.init(layout_of(tensors)), key=0)
        bits.append(8 * len(payload) / count)
    decoded = one.decode(payload)
    wrong = sum(float(np.square(decoded[n].astype(float) - t).sum()) for n, t in tensors.items())
    whole = sum(float(np.square(t.astype(float)).sum()) for t in tensors.values())
    return bits[0], bits[1], float(np.sqrt(wrong / whole))


def test_examples() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_update_has_as_many_parameters_as_the_page_says() -> None:
    count = sum(t.size for t in synthetic_update().values())
    assert f"{count:,} parameters" in TEXT


@pytest.mark.parametrize("row", ROW.findall(TEXT), ids=lambda row: f"{row[0]} {row[1]}")
def test_table(row: tuple[str, str, str, str, str]) -> None:
    name, cell, *figures = row
    paper, ours, error = measured(name, options(cell))
    assert float(figures[0]) == pytest.approx(paper, rel=5e-3)
    assert float(figures[1]) == pytest.approx(ours, rel=0.05)  # the codec's encoder may improve
    assert float(figures[2]) == pytest.approx(error, rel=5e-3, abs=5e-5)


def test_table_names_every_scheme() -> None:
    assert {row[0] for row in ROW.findall(TEXT)} == set(SCHEMES)


def test_defaults_are_the_documented_ones() -> None:
    section = TEXT.split("## What each does", 1)[1].split("Sources", 1)[0]
    for kind in SCHEMES.values():
        line = next(x for x in section.splitlines() if x.startswith("| ") and f"`{kind.name}`" in x)
        for option, default in kind.options().items():
            if option != "coding":
                assert f"`{option}`" in line, (kind.name, option)
                if isinstance(default, int | float):
                    shown = str(default).lower().removesuffix(".0")
                    assert re.search(rf"`{option}`( \(`s`\))? {re.escape(shown)}\b", line), option

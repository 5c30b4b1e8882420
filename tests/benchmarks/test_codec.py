"""The codec's benchmark: it runs end to end, and nothing that loses data gets a figure."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> Iterator[SimpleNamespace]:
    """The modules behind the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("cases", "coders", "compare", "measure", "memory", "report", "store", "table")
        yield SimpleNamespace(**{n: importlib.import_module(f"harness.{n}") for n in names})


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "codec.py", *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )


def synthetic(harness: SimpleNamespace, part: str) -> Any:
    (found,) = harness.cases.all_cases(trained=None, own=None, wanted=[part])
    return found


def test_end_to_end(tmp_path: Path) -> None:
    saved, chart, tables = (tmp_path / name for name in ("run.json", "run.png", "run.md"))
    tables.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    chosen = ("--case", "synthetic-lenet/masked", "synthetic-lenet/float")
    outputs = ("--json", saved, "--chart", chart, "--markdown", tables)
    done = run("--quick", *chosen, "--coder", "zlib", *outputs)
    assert done.returncode == 0, done.stderr

    report = json.loads(saved.read_text())
    assert {"cpu", "cores", "architecture", "python", "numpy", "prunecast"} <= set(
        report["machine"]
    )
    assert list(report["coders"]) == ["prunecast", "zlib -6"]
    names = [case["name"].removeprefix("synthetic-lenet/") for case in report["cases"]]
    assert names == ["masked", "float", "float-delta"]
    for case in report["cases"]:
        assert case["parameters"] == 44_046
        ours, peer = case["rows"]
        assert (ours["coder"], peer["coder"]) == ("prunecast", "zlib -6")
        assert 0 < ours["bytes"] < peer["bytes"]
        assert sum(ours["sections"].values()) == ours["bytes"]
        assert ours["bits_per_parameter"] == 8 * ours["bytes"] / case["parameters"]
        assert ours["against_entropy"] == 8 * ours["bytes"] / case["entropy_bits"] - 1
        assert min(ours["encode_mb_s"], ours["decode_mb_s"]) > 0
        assert case["name"] in done.stdout

    assert chart.read_bytes().startswith(b"\x89PNG")
    text = tables.read_text()
    assert text.startswith("before\n<!-- measured -->\n")
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "synthetic-lenet/masked" in text
    assert "](run.png)" in text
    assert "\nold\n" not in text

    again = run("--load", saved, "--compare", saved)
    assert again.returncode == 0, again.stderr
    assert "3 cases in common" in again.stdout


def test_a_case_that_does_not_exist_is_an_error() -> None:
    done = run("--quick", "--case", "no-such-case", "--coder", "zlib")
    assert done.returncode != 0
    assert "no-such-case" in done.stderr


KINDS = ("update-0.01", "update-0.6", "pruned", "delta", "masked", "float", "float-delta")


@pytest.mark.parametrize("kind", KINDS)
def test_every_coder_gives_the_tensors_back(harness: SimpleNamespace, kind: str) -> None:
    subject = next(
        c
        for c in harness.cases.all_cases(trained=None, own=None, wanted=["synthetic-lenet"])
        if c.name.endswith("/" + kind)
    )
    coders, _ = harness.coders.load_coders()
    rows = [harness.measure.measure(subject, c, repeat=1, memory=False) for c in coders]
    measured = {row.coder: row.bytes for row in rows if row is not None}
    assert {"prunecast", "zlib -6"} <= set(measured)
    assert all(0 < size < 4.1 * subject.parameters for size in measured.values())


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: [*arrays[:-1], np.where(arrays[-1] == 0, 1, arrays[-1])],
        lambda arrays: [a.astype(np.int64) for a in arrays],
        lambda arrays: [a.ravel() for a in arrays],
        lambda arrays: arrays[:-1],
    ],
    ids=["value", "dtype", "shape", "missing"],
)
def test_loss_is_an_error(
    harness: SimpleNamespace, damage: Callable[[list[Any]], list[Any]]
) -> None:
    subject = synthetic(harness, "synthetic-lenet/masked")
    coder = harness.coders.Ours()
    bound = coder.bind(subject)
    broken = SimpleNamespace(
        name="broken",
        bind=lambda case: dataclasses.replace(bound, decode=lambda d: damage(bound.decode(d))),
    )
    with pytest.raises(harness.measure.LossError, match="broken is not lossless"):
        harness.measure.measure(subject, broken, repeat=1, memory=False)


def test_what_both_know_goes_and_comes_back(harness: SimpleNamespace) -> None:
    cases = harness.cases
    rng = np.random.default_rng(0)
    before = rng.integers(-2, 3, (40, 30)).astype(np.int32)
    mask = before != 0
    change = rng.integers(-3, 4, before.shape).astype(np.int32)
    odd = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -3.4e38, 1.0]
    floats = np.array(odd, np.float32)[rng.integers(0, 8, 500)]
    other = np.array(odd, np.float32)[rng.integers(0, 8, 500)]
    empty = np.zeros((0, 3), np.int32)
    for given, context in [
        ({"w": change, "e": empty}, {}),
        ({"w": change, "e": empty}, {"previous": {"w": before}}),
        ({"v": change, "w": change * mask}, {"mask": {"w": mask}}),
        ({"w": change * mask}, {"mask": {"w": mask}, "previous": {"w": before}}),
        ({"w": change * 0}, {"mask": {"w": mask & False}}),
        ({"f": floats}, {}),
        ({"f": floats}, {"previous": {"f": other}}),
    ]:
        kind = "float-delta" if "f" in given else "delta"
        subject = cases.case("x", kind, given, **context)
        arrays = cases.to_arrays(subject)
        assert [a.size for a in arrays] == cases.sizes(subject)
        back = cases.from_arrays(subject, arrays)
        for a, b in zip(given.values(), back, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


def test_entropy(harness: SimpleNamespace) -> None:
    entropy, case_entropy = harness.cases.entropy, harness.cases.case_entropy
    assert entropy(np.arange(8)) == pytest.approx(24)
    assert entropy(np.zeros(9)) == 0
    even = {"a": np.array([0, 1] * 8, np.int32), "b": np.zeros(5, np.int32)}
    assert case_entropy(harness.cases.case("x", "update", even)) == pytest.approx(16)
    where = {"a": np.array([1, 0] * 8) == 1}
    under = {"a": even["a"] * where["a"], "b": even["b"]}
    assert case_entropy(harness.cases.case("x", "masked", under, mask=where)) == 0


def test_comparison_tells_changes_from_other_data(harness: SimpleNamespace, tmp_path: Path) -> None:
    module = harness.report

    def report(size: int, digest: str) -> Any:
        row = harness.measure.Row("prunecast", size, 0.1, 0.1)
        case = module.Measured("a/b", "delta", 1000, digest, 800.0, {"prunecast": row})
        return module.Report({}, {"prunecast": ""}, {}, [case])

    old = tmp_path / "old.json"
    old.write_text(report(100, "one").to_json())
    assert module.Report.from_json(old).to_json() == report(100, "one").to_json()
    assert "+5.0%" in harness.compare.compare(report(105, "one"), old)
    assert "not compared" in harness.compare.compare(report(105, "two"), old)
    old.write_text("{}")
    with pytest.raises(ValueError, match="not a report"):
        harness.compare.compare(report(105, "one"), old)
    with pytest.raises(ValueError, match="not a report"):
        module.Report.from_json(old)


_PEAK = """
import numpy as np
from benchmarks.harness import memory

def call():
    return int(np.ones(8_000_000).sum())

print(memory.peak_resident(call, lambda: None), memory.peak_traced(call))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_peak_sees_what_is_allocated_and_freed() -> None:
    # in a process without threads, as the benchmark is: a fork may else wait for what they held
    done = subprocess.run(
        [sys.executable, "-c", _PEAK],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        timeout=120,
        check=True,
    )
    resident, traced = map(int, done.stdout.split())
    assert 64e6 <= resident < 72e6
    assert 64e6 <= traced < 65e6


def test_docstring_examples(harness: SimpleNamespace) -> None:
    for name in ("harness.cases.entropy", "harness.coders.streams"):
        found = doctest.testmod(sys.modules[name])
        assert found.attempted > 0
        assert found.failed == 0

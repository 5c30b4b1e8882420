"""Parts of the variants' benchmark that its figures rest on."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.onnx.qdq import quantise
from support.convolutional import convolutional, convolutional_graph, convolutional_images

FILE = Path(__file__).parents[2] / "benchmarks" / "variants.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = spec_from_file_location("variants_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_row_is_measured_with_the_settings_of_an_agent(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    images = convolutional_images()
    made = quantise(convolutional_graph(), convolutional(1), {"image": images})
    bound = bind_weights(made.graph, made.model, tmp_path, variant="fp32")
    found = benchmark.one(bound.model, False, size=8)
    assert set(found) == {"load_ms", "peak_mb", "held_mb", "median_ms", "p99_ms"}
    assert 0 < found["median_ms"] <= found["p99_ms"]
    assert found["load_ms"] > 0
    fused = benchmark.session(bound.model, True).run(None, {"image": images})[0]
    floats = benchmark.session(bound.model, False).run(None, {"image": images})[0]
    assert 0 < np.abs(fused - floats).max() < 0.1  # integers, then floats


def test_rows_are_printed_in_columns(benchmark: ModuleType) -> None:
    row = benchmark.Row("int8", 10_000, 2, 3, 4, 5, 6, 7, 8, 0.012345, 0.5)
    plain = benchmark.line(benchmark.texts(row), False)
    assert "10,000" in plain
    assert benchmark.line(benchmark.texts(row), True).startswith("| int8 | 10,000 | 2 |")

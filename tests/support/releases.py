"""Fixtures of a release: a small classifier, keys, an empty repository.

A conftest imports them by name: ``from support.releases import graph, ...``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import KeyRing, PublishedRelease, Repository
from prunecast.server.repository.authoring import ReleaseContents
from support.classifier import classifier, classifier_graph, classifier_inputs

__all__ = ["graph", "images", "keys", "model", "publish_model", "repository"]


@pytest.fixture(scope="session")
def graph() -> ExportedGraph:
    return classifier_graph()


@pytest.fixture(scope="session")
def model() -> Callable[[int], PublishedModel]:
    """A function: number -> that version of the model."""
    return classifier


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return classifier_inputs()


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    return KeyRing.create(tmp_path / "keys")


@pytest.fixture
def repository(tmp_path: Path, keys: KeyRing) -> Repository:
    return Repository.create(tmp_path / "repository", keys)


def publish_model(
    repository: Repository,
    name: str,
    model: PublishedModel,
    graph: ExportedGraph,
    *,
    selftest_inputs: Arrays | np.ndarray,
    at_least: int = 1,
    **described: Any,
) -> PublishedRelease:
    """Publish a model without a recipe; `described` are other fields of `ReleaseContents`."""
    contents = ReleaseContents(model, graph, selftest_inputs, **described)
    return repository.publish(name, contents, at_least=at_least)

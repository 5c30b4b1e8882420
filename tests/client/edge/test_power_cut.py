"""Power cuts: whatever of the unsynced survives, a complete verified version is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig, open_model
from prunecast.client.edge.errors import NoModel
from prunecast.client.edge.slots import trial
from prunecast.compression.release.manifest import ReleaseManifest
from support.powercut import VARIANTS, Disk, Recorder

Publish = Callable[..., ReleaseManifest]
Outputs = Callable[[int], np.ndarray]


@pytest.fixture
def expected(model, images: np.ndarray) -> Outputs:
    """A function: number -> outputs of that version, computed with numpy."""

    def expected(number: int) -> np.ndarray:
        a = model(number).arrays()
        return np.maximum(images @ a["w1"].T + a["b1"], 0) @ a["w2"].T + a["b2"]

    return expected


def _record(config: AgentConfig, network, **options: object) -> Recorder:
    """One check for updates, recorded."""
    config.state.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(config.state)
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        with Agent(config, fetcher=network, **options) as agent:  # type: ignore[arg-type]
            assert agent.update_once().outcome == "updated"
    recorder.close()
    return recorder


def _moments(recorder: Recorder, variant: str) -> Iterator[tuple[int, Disk]]:
    """All of them; of the two mixed variants each has every other one, and both the last."""
    last = len(recorder.moments) - 1
    for number, disk in enumerate(recorder.moments):
        if "mixed" not in variant or number == last or variant == f"mixed {1 + number % 2}":
            yield number, disk


@pytest.fixture
def tried_here(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases are tried in this process, of hundreds of agents, but where least survives."""

    def call(function: str, arguments: Mapping[str, Any], **options: object) -> list[str] | None:
        assert function == f"{trial.__name__}:_try"
        return trial._try(**arguments)

    if variant != "durable":
        monkeypatch.setattr(trial, "call_bounded", call)
        monkeypatch.setattr(trial, "bound_process", lambda **limits: None)


def _served(folder: Path, images: np.ndarray) -> tuple[int, np.ndarray]:
    served = open_model(folder, threads=1).infer({"input": images})
    return served.version, served.outputs["output"]


@pytest.mark.usefixtures("tried_here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_power_cut_at_any_moment_of_an_update(
    config: AgentConfig,
    network,
    publish: Publish,
    expected: Outputs,
    images: np.ndarray,
    tmp_path: Path,
    variant: str,
) -> None:
    publish(1)
    with Agent(config, fetcher=network) as agent:
        agent.update_once()
        agent.confirm()
    publish(2)
    recorder = _record(config, network)
    assert len(recorder.moments) > 60
    known: dict[Any, int] = {}
    versions = []
    for number, disk in _moments(recorder, variant):
        left = tuple(disk.left(variant, number).items())
        if left not in known:
            folder = tmp_path / "cut"
            disk.restore(folder, variant, number)
            version, outputs = _served(folder, images)
            assert np.abs(outputs - expected(version)).max() < 1e-5, disk.after
            with Agent(replace(config, state=folder), fetcher=network) as agent:
                assert agent.model.version == version, disk.after
                agent.update_once()
                assert agent.model.version == 2, disk.after
            assert _served(folder, images)[0] == 2
            known[left] = version
            shutil.rmtree(folder)
        versions.append(known[left])
    assert set(versions) == {1, 2}
    if "mixed" not in variant:
        assert versions == sorted(versions)  # old until one moment, new from then on
    assert versions[-1] == 2  # an update that was reported is durable


@pytest.mark.usefixtures("tried_here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_power_cut_at_any_moment_of_the_first_installation(
    config: AgentConfig,
    network,
    publish: Publish,
    images: np.ndarray,
    tmp_path: Path,
    variant: str,
) -> None:
    publish(1)
    recorder = _record(config, network)
    known: set[Any] = set()
    for number, disk in _moments(recorder, variant):
        left = tuple(disk.left(variant, number).items())
        if left not in known:
            known.add(left)
            folder = tmp_path / "cut"
            disk.restore(folder, variant, number)
            try:
                found: int | None = _served(folder, images)[0]
            except NoModel:
                found = None
            with Agent(replace(config, state=folder), fetcher=network) as agent:
                assert agent.model.version == found, disk.after
                agent.update_once()
                assert agent.model.version == 1, disk.after
            shutil.rmtree(folder)
    assert found == 1


def test_a_rollback_is_still_noticed_after_a_power_cut(
    config: AgentConfig, network, publish: Publish, tmp_path: Path
) -> None:
    """The timestamp that proves a later state is durable before anything is done with it."""
    publish(1)
    with Agent(config, fetcher=network) as agent:
        agent.update_once()
    publish(2)
    early = (config.state / "metadata" / "timestamp.json").read_bytes()
    late = (network.folder / "metadata" / "timestamp.json").read_bytes()
    recorder = _record(config, network)
    begun = 0
    for disk in recorder.moments:
        asked = any(path.startswith("downloads") for path in disk.names())
        begun += asked
        for variant in VARIANTS:
            held = disk.left(variant)["metadata/timestamp.json"]
            assert held == late or (held == early and not asked), (variant, disk.after)
    assert begun > 20

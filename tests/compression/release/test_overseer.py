"""Inferences are broken off when their time is over, or all at once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from prunecast.compression.release import OutOfMemory, OutOfTime
from prunecast.compression.release.overseer import OVERSEER, Overseer
from prunecast.compression.release.runtime import open_session
from support import endless


def save(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize("make", [endless.endless, endless.endless_in_function])
def test_an_endless_inference_ends_with_its_time(make, tmp_path: Path) -> None:
    session = open_session(save(make(), tmp_path), threads=1)
    with pytest.raises(OutOfTime, match=r"did not end within 0\.2 seconds"):
        session.run(endless.INPUTS, seconds=0.2)
    assert not OVERSEER.is_late(0.0)


def test_all_inferences_can_be_ended_at_once(tmp_path: Path) -> None:
    session = open_session(save(endless.endless(), tmp_path), threads=1)
    found: list[BaseException] = []

    def ask() -> None:
        try:
            session.run(endless.INPUTS)
        except OutOfTime as error:
            found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(found) < 2:
        OVERSEER.end_all("the device sleeps")
        threads[len(found)].join(0.05)
    assert {str(error) for error in found} == {"inference was broken off: the device sleeps"}


def test_what_does_not_end_is_late() -> None:
    overseer, asked = Overseer(), threading.Event()
    with overseer.watching(0.01, asked.set) as watched:
        assert asked.wait(20)
        assert watched.ended == "time"
        while not overseer.is_late(0.0):
            pass
        assert not overseer.is_late(3600.0)
    assert not overseer.is_late(0.0)


def test_a_later_one_with_less_time_is_ended_first() -> None:
    overseer, first, second = Overseer(), threading.Event(), threading.Event()
    with overseer.watching(3600.0, first.set), overseer.watching(0.01, second.set):
        assert second.wait(20)
        assert not first.is_set()


def test_memory_of_an_inference_is_limited_and_given_back(tmp_path: Path) -> None:
    session = open_session(save(endless.outer(), tmp_path), threads=1, memory=64 << 20)
    with pytest.raises(OutOfMemory, match="more memory than the 67,108,864 bytes"):
        session.run({"x": np.ones((8192, 4), np.float32)})  # 256 MiB for the square
    for _ in range(3):  # 24 MiB, twice, each time: it has been given back
        y = session.run({"x": np.ones((2500, 4), np.float32)})["y"]
    np.testing.assert_allclose(
        y, 1 + 6.25e6 * np.sin(np.float32(4)), rtol=0.05
    )  # summed in float32


def test_each_session_has_memory_of_its_own(tmp_path: Path) -> None:
    path = save(endless.outer(), tmp_path)
    sessions = [open_session(path, threads=1, memory=size << 20) for size in (64, 256, 64)]
    square = {"x": np.ones((5000, 4), np.float32)}  # 100 MiB
    assert sessions[1].run(square)["y"].shape == (5000, 4)
    for session in (sessions[0], sessions[2]):
        with pytest.raises(OutOfMemory):
            session.run(square)

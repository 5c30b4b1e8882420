"""Series in time: sensors on people, voices, and a country's demand for power."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data.named.definition import Arrays, DataSet, Member, Package
from prunecast.simulations.data.named.pickles import unpickle
from prunecast.simulations.kinds import DataError

__all__ = ["SETS", "read_ts"]

_WINDOW = 100  # samples: two seconds at 50 Hz


def _activity(files: Mapping[str, bytes]) -> Arrays:
    """Windows that do not overlap, so that none of those to measure with was seen in training."""
    ((path, content),) = files.items()
    try:
        file = io.BytesIO(content)
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise DataError(f"{path} is no file of numpy ({error})") from error
    held = unpickle(file.read(), path)
    windows, labels, subjects = [], [], []
    try:
        table = held.item()
        for recording, label, subject in zip(table["X"], table["y"], table["subject"], strict=True):
            count, channels = len(recording) // _WINDOW, recording.shape[1]
            cut = recording[: count * _WINDOW].reshape(count, _WINDOW, channels)
            windows.append(cut.transpose(0, 2, 1).astype(np.float32))
            labels += [int(label)] * count
            subjects += [int(subject) - 1] * count
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds no recordings ({error})") from error
    return {
        "x_train": np.concatenate(windows),
        "y_train": np.array(labels, np.uint8),
        "id_train": np.array(subjects, np.uint8),
    }


def read_ts(content: bytes, label: str) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Series and their classes of a ``.ts`` file (timeseriesclassification.com), classes from 1.

    Returns:
        For each example (channels, steps), as long as it is; and its class, counted from 0.

    Raises:
        DataError: it is none.
    """
    _, found, lines = content.decode("utf-8", "replace").partition("@data")
    series, classes = [], []
    try:
        if not found:
            raise ValueError("it has no @data")
        for line in lines.split("\n"):
            if line.strip():
                *channels, last = line.strip().split(":")
                values = [np.array(one.split(","), np.float32) for one in channels]
                series.append(np.stack(values))
                classes.append(int(last) - 1)
    except ValueError as error:
        raise DataError(f"{label} is no file of series ({error})") from error
    return series, classes


def _padded(content: bytes, label: str, steps: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """All series of a file, zeros after their end."""
    series, classes = read_ts(content, label)
    if not series or max(one.shape[1] for one in series) > steps:
        raise DataError(f"{label} holds no series, or one of more than {steps} steps")
    whole = np.zeros((len(series), len(series[0]), steps), np.float32)
    for row, one in zip(whole, series, strict=True):
        row[:, : one.shape[1]] = one
    return whole, np.array(classes, np.uint8)


def _two_files(files: Mapping[str, bytes], steps: int) -> Arrays:
    found: dict[str, NDArray[Any]] = {}
    for part, (path, content) in zip(("train", "test"), files.items(), strict=True):
        found[f"x_{part}"], found[f"y_{part}"] = _padded(content, path, steps)
    return found


def _vowels(files: Mapping[str, bytes]) -> Arrays:
    found = _two_files(files, 29)
    return {**found, "id_train": found["y_train"], "id_test": found["y_test"]}


def _power(files: Mapping[str, bytes]) -> Arrays:
    return _two_files(files, 24)


_AEON = Package(
    index="pip",
    name="aeon",
    version="1.6.0",
    file="aeon-1.6.0-py3-none-any.whl",
    nbytes=6_421_000,
    sha256="d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
)
_AEON_FILES = "aeon/datasets/data/"

SETS = (
    DataSet(
        name="activity",
        text="2,369 windows of 2 s of a watch's 6 axes, 7 shoulder exercises of 10 people",
        licence="BSD 3-Clause (with seglearn, D. Burns)",
        convert=_activity,
        package=Package(
            index="pip",
            name="seglearn",
            version="1.2.5",
            file="seglearn-1.2.5-py3-none-any.whl",
            nbytes=11_320_941,
            sha256="ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd",
        ),
        members=(
            Member(
                "seglearn/data/watch_dataset.npy",
                18_118_091,
                "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537",
            ),
        ),
        nbytes=5_690_338,
        sha256="a36e439a4ceccf8366436adcfd4ceb29af42bd43961823b23774ed24ee9c83bb",
        identity="subject",
    ),
    DataSet(
        name="japanese-vowels",
        text="270 voices as 12 channels of up to 29 steps, 370 to measure with, 9 speakers",
        licence="CC BY 4.0 (M. Kudo, J. Toyama, M. Shimbo)",
        convert=_vowels,
        package=_AEON,
        members=(
            Member(
                _AEON_FILES + "JapaneseVowels/JapaneseVowels_TRAIN.ts",
                487_971,
                "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
            ),
            Member(
                _AEON_FILES + "JapaneseVowels/JapaneseVowels_TEST.ts",
                649_132,
                "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
            ),
        ),
        nbytes=892_160,
        sha256="9d2256de2ef14ffbb164593a6f45a5d625693be9734655d69d1afe632c697fa5",
        identity="speaker",
    ),
    DataSet(
        name="italy-power",
        text="67 days of 24 hours of power demand, 1,029 to measure with, 2 seasons",
        licence="none stated (UCR archive)",
        convert=_power,
        package=_AEON,
        members=(
            Member(
                _AEON_FILES + "ItalyPowerDemand/ItalyPowerDemand_TRAIN.ts",
                18_300,
                "341269cb7e6cef96846b30e774580beec79addb93848ba360145219115a74b7c",
            ),
            Member(
                _AEON_FILES + "ItalyPowerDemand/ItalyPowerDemand_TEST.ts",
                274_054,
                "26122451f87dd0387ef90b18bc8a86c041371b8a1c068004922b939971247144",
            ),
        ),
        nbytes=106_312,
        sha256="d5ed4032156bb3709796f4a27b123c8069d8d3934e048258ac0df75f29519934",
    ),
)
"""Data sets."""

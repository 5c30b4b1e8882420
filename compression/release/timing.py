"""How long an inference takes here, and what memory and energy: measured, on one thread."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.release.runtime import one_example, open_session

__all__ = ["Inference", "joules_so_far", "measure_inference", "median_seconds"]

_WARM, _LEAST, _MOST, _SECONDS = 5, 9, 200, 1.0
_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Inference:
    """What one inference of one example takes.

    Attributes:
        milliseconds: the median of several, after a warm-up.
        memory: bytes by which the process grew from before the model was opened to after it had
            run; None where the system does not tell.
        joules: of the whole processor package, whatever else ran on it; None where it is not
            measured or may not be read.
    """

    milliseconds: float
    memory: int | None
    joules: float | None

    @property
    def throughput(self) -> float:
        """Examples in a second, one after the other."""
        return 1e3 / self.milliseconds


def measure_inference(path: Path, inputs: Mapping[str, NDArray[np.generic]]) -> Inference:
    """Open a model in onnxruntime with one thread and run its first example many times.

    Args:
        path: of the ``.onnx`` file, its weights beside it.
        inputs: by name; the first example alone is run where the batch is free.

    Raises:
        ReleaseError: onnxruntime refuses the model or the inputs.
    """
    before = _resident()
    session = open_session(path, threads=1)
    given = one_example(session, inputs)
    seconds, joules = median_seconds(lambda: session.run(given))
    after = _resident()
    grown = None if before is None or after is None else max(0, after - before)
    return Inference(1e3 * seconds, grown, joules)


def median_seconds(run: Callable[[], object]) -> tuple[float, float | None]:
    """Median seconds of a call, and the mean joules of one where the machine measures them.

    It is called some times to warm up, then again for about a second, at least nine times.
    """
    for _ in range(_WARM):
        run()
    times: list[float] = []
    before, began = joules_so_far(), time.perf_counter()
    while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() - began < _SECONDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    after = joules_so_far()
    joules = None
    if before is not None and after is not None and after >= before:  # else the counter wrapped
        joules = (after - before) / len(times)
    return statistics.median(times), joules


def joules_so_far(folder: Path = _RAPL) -> float | None:
    """The counters of RAPL of all processor packages together; None where there are none to read.

    Linux has them in ``/sys/class/powercap``, as a rule for root alone. They wrap around.
    """
    total = 0
    found = sorted(folder.glob("intel-rapl:[0-9]*"))
    for zone in found:
        if zone.name.count(":") > 1:
            continue  # a part of a package
        try:
            total += int((zone / "energy_uj").read_text())
        except (OSError, ValueError):
            return None
    return total / 1e6 if found else None


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None

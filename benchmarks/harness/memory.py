"""Peak memory of a call, two ways: what Python allocates, and what the process occupies."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import tracemalloc
import warnings
from collections.abc import Callable

__all__ = ["peak_resident", "peak_traced"]

_DEADLINE = 300  # seconds, for a child that hangs


def peak_traced(call: Callable[[], object]) -> int:
    """Peak bytes allocated through Python and numpy during a call; native code stays unseen."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_resident(call: Callable[[], object], warm_up: Callable[[], object]) -> int | None:
    """How many bytes the resident set grows during a call, native allocations included.

    Measured in a forked child whose freed memory was given back before, so that reuse does not
    hide growth; `warm_up` runs before, so that code is loaded. Good to about a megabyte. None
    where the system has no ``/proc/self/clear_refs`` (Linux has).
    """
    if sys.platform != "linux" or not os.path.exists("/proc/self/clear_refs"):
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # threads of libraries do not exist in the child, and nothing measured uses any
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(_DEADLINE)
            os.write(writer, str(_growth(call, warm_up)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return int(said) if said else None


def _growth(call: Callable[[], object], warm_up: Callable[[], object]) -> int:
    gc.collect()
    gc.disable()
    warm_up()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins at what is resident now
    before = _status("VmRSS")
    result = call()
    after = _status("VmHWM")
    del result
    return max(0, after - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")

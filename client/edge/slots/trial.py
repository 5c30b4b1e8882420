"""A release is tried in a process of its own before the agent loads it.

Nobody can break off what onnxruntime does while it loads a model, nor what one operator does, and
memory that it takes is the agent's. So a model is loaded and asked for its self-test where time and
memory are limited and where a crash ends nothing else. What passed there is loaded by the agent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prunecast.client.edge.config import Bounds
from prunecast.client.edge.errors import MemoryShort, StateError, disk
from prunecast.common.bounded import (
    ChildError,
    ChildFailed,
    ChildKilled,
    ChildTimeout,
    bound_process,
    call_bounded,
    own_bytes,
)
from prunecast.compression.release import (
    OutOfMemory,
    OutOfTime,
    ReleaseError,
    RuntimeFailure,
    SelfTestFailed,
)
from prunecast.compression.release.externals import check_externals
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.overseer import OVERSEER
from prunecast.compression.release.runtime import (
    InferenceSession,
    import_onnxruntime,
    open_session,
)
from prunecast.compression.release.selftest import check_outputs, unpack_arrays

__all__ = ["Poll", "patiently", "self_test", "try_release"]

T = TypeVar("T")
Poll = Callable[[], None]
"""Called all the time while something lasts; what it raises ends it."""

_REFUSALS = {e.__name__: e for e in (OutOfMemory, OutOfTime, RuntimeFailure, SelfTestFailed)}
_GRACE = 2.0  # seconds in which a thread that was asked to end does so
_SIGKILL = 9


def try_release(
    folder: Path, manifest: ReleaseManifest, *, threads: int | None, bounds: Bounds, poll: Poll
) -> None:
    """Load the signed model of a slot elsewhere, and run its self-test there.

    Raises:
        OutOfTime: it did not end in time.
        OutOfMemory: it needs more memory than it may take.
        RuntimeFailure: onnxruntime refuses the model, or crashed.
        SelfTestFailed: it does not reproduce the recorded outputs.
        MemoryShort: the system ended the trial, most likely for want of memory.
        StateError: it could not begin, or failed for a reason that says nothing about the release.
    """
    seconds = bounds.load_seconds(folder)
    arguments = {
        "folder": str(folder.absolute()),
        "threads": threads,
        "memory": bounds.memory(folder),
        "most": bounds.load_bytes(folder),
        "seconds": seconds,
    }
    try:
        with disk("start the trial of a release"):
            found = call_bounded(f"{__name__}:_try", arguments, seconds=seconds, poll=poll)
    except ChildTimeout as error:
        raise OutOfTime(
            f"loading and the self-test did not end within {seconds:.0f} seconds"
        ) from error
    except ChildKilled as error:
        if error.signal == _SIGKILL:
            raise MemoryShort(
                f"the trial of release {manifest.version} was killed by the system, most likely "
                "for want of memory: free some; it is tried again"
            ) from error
        raise RuntimeFailure(f"onnxruntime crashed with this model: {error}") from error
    except ChildFailed as error:
        if error.kind == MemoryError.__name__:
            raise OutOfMemory(_needs_more(bounds.memory(folder))) from error
        raise StateError(f"the trial of release {manifest.version} failed: {error}") from error
    except ChildError as error:
        raise StateError(f"the trial of release {manifest.version} failed: {error}") from error
    if found is not None:
        kind, message = found
        raise _REFUSALS.get(kind, RuntimeFailure)(message)


def _try(
    folder: str, threads: int | None, memory: int, most: int, seconds: float
) -> list[str] | None:
    """In the child: why a release is refused, as class and message; None if it passed."""
    slot = Path(folder)
    manifest = ReleaseManifest.from_bytes((slot / "release.json").read_bytes())
    import_onnxruntime()
    before = own_bytes()
    bound_process(memory=most)
    try:
        graph = (slot / "model.onnx").read_bytes()
        check_externals(graph, file="weights.bin", size=manifest.weights.length)
        del graph
        session = open_session(slot / "model.onnx", threads=threads, memory=memory)
        # onnxruntime itself does not refuse what weights take: beyond the limit, there was none
        if before and own_bytes() - before > memory:
            raise OutOfMemory(_needs_more(memory))
        self_test(slot, manifest, session, seconds)
    except OutOfMemory:
        return [OutOfMemory.__name__, _needs_more(memory)]
    except ReleaseError as error:
        return [type(error).__name__, str(error)]
    return None


def _needs_more(memory: int) -> str:
    return (
        f"it needs more than the {memory:,} bytes of memory that it may take on this device: "
        "raise --inference-memory"
    )


def self_test(
    folder: Path, manifest: ReleaseManifest, session: InferenceSession, seconds: float
) -> float:
    """Ask a session what the slot's self-test asks.

    Returns:
        The largest difference, in units of the output.

    Raises:
        OutOfTime: it took longer than `seconds`.
        SelfTestFailed: the outputs are not the recorded ones.
        StateError: a file cannot be read.
    """
    with disk(f"read the self-test in {folder}"):
        inputs = unpack_arrays((folder / "selftest.npz").read_bytes())
        expected = unpack_arrays((folder / "expected.npz").read_bytes())
    return check_outputs(expected, session.run(inputs, seconds=seconds), manifest.tolerance)


def patiently(work: Callable[[], T], seconds: float, poll: Poll) -> T:
    """Do native work in another thread, so that this one still hears what `poll` has to say.

    Args:
        work: what to do.
        seconds: after which it counts as late, see `Overseer`.
        poll: when it raises, inferences are asked to end, and `work` is left alone.

    Raises:
        OutOfTime: it has not ended and cannot be broken off; its thread stays behind, so that
            this process is late from now on and should be started again.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def do() -> None:
        try:
            with OVERSEER.watching(seconds, lambda: None):
                results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=do, name="load", daemon=True).start()
    last = time.monotonic() + seconds + _GRACE
    while not over.wait(0.05):
        if time.monotonic() > last:
            raise OutOfTime(f"loading and the self-test did not end within {seconds:.0f} seconds")
        try:
            poll()
        except BaseException:
            OVERSEER.end_all("the agent was asked to end")
            over.wait(_GRACE)
            raise
    if errors:
        raise errors[0]
    return results[0]

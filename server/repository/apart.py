"""Models that somebody else may have made run in a process of their own, with bounds.

Whoever wrote a graph decides what opening it costs: 260 bytes may ask for terabytes while
onnxruntime folds constants, functions that call each other twice grow without end when they are
inlined, and a loop may never finish. See `prunecast.common.bounded` for the process; here is how
much it may take, and what a user is told where it takes more.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from prunecast.common.bounded import (
    ChildFailed,
    ChildKilled,
    ChildTimeout,
    call_bounded,
    is_out_of_memory,
    thread_bytes,
)
from prunecast.common.bounds import byte_limit
from prunecast.common.text import bytes_text
from prunecast.compression.codec import CodecError
from prunecast.compression.files import FilesError
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.release import ReleaseError
from prunecast.compression.versions import VersionsError
from prunecast.server.repository.errors import RecipeError, RepositoryError

__all__ = ["Allowance", "allowance", "run_apart"]

_LEAST_SECONDS, _SECONDS_A_BYTE = 40.0, 1e-6
_LIBRARIES = 1 << 29  # bytes, of what is imported while it runs
_ERRORS = (ReleaseError, RepositoryError, PlanError, VersionsError, CodecError)


class Allowance(TypedDict):
    """As `call_bounded` and `bound_process` take it: bytes and seconds."""

    memory: int
    seconds: float


def allowance(
    size: int, max_bytes: int | None = None, max_seconds: float | None = None
) -> Allowance:
    """What a process may take.

    Args:
        size: bytes on disk of all that it reads.
        max_bytes: for what is read, see `byte_limit`; libraries and threads come on top.
        max_seconds: None for 40, and one for every megabyte.
    """
    seconds = _LEAST_SECONDS + _SECONDS_A_BYTE * size if max_seconds is None else max_seconds
    memory = byte_limit(size, max_bytes) + _LIBRARIES + thread_bytes()
    return {"memory": memory, "seconds": seconds}


def run_apart(
    function: str,
    arguments: Mapping[str, Any],
    *,
    what: str,
    size: int,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    refusal: type[Exception] = RepositoryError,
) -> Any:
    """Call a function that opens a model from elsewhere, see `call_bounded` and `allowance`.

    Args:
        function: as ``package.module:function``.
        arguments: by name, JSON values.
        what: it does, for messages: ``running m.onnx``.
        size: see `allowance`, and so the next two.
        max_bytes: what the user allows.
        max_seconds: what the user allows.
        refusal: raised where more is taken, or where it ends for a reason that is not ours.

    Raises:
        ReleaseError, RepositoryError, PlanError, VersionsError, CodecError: as `function` did.
    """
    bounds = allowance(size, max_bytes, max_seconds)
    more = f"{bytes_text(byte_limit(size, max_bytes))}; allow more if you trust it (--max-bytes)"
    try:
        return call_bounded(function, arguments, **bounds)
    except ChildTimeout as error:
        raise refusal(
            f"{what} takes too long and was ended; allow more if you trust it (--max-seconds)"
        ) from error
    except ChildKilled as error:
        why = "was killed by the system, most likely for want of memory: it"
        if error.signal != signal.SIGKILL:
            why = f"ended with {signal.Signals(error.signal).name}: it crashes, or"
        raise refusal(f"{what} {why} takes more memory than {more}") from error
    except ChildFailed as error:
        if error.kind == MemoryError.__name__ or is_out_of_memory(str(error)):
            raise refusal(f"{what} takes more memory than {more}") from error
        raise _told(error, what, refusal) from error
    except OSError as error:
        raise refusal(f"{what} cannot begin: {error.strerror or error}") from error


def _told(error: ChildFailed, what: str, refusal: type[Exception]) -> Exception:
    """The error that the process ended with."""
    if error.kind in (kind.__name__ for kind in _family(FilesError)):
        return refusal(str(error))
    kinds = {kind.__name__: kind for base in _ERRORS for kind in _family(base)}
    kind = kinds.get(error.kind)
    if kind is None:
        return refusal(f"{what} failed: {error.kind}: {error}")
    if kind is RecipeError:
        return RecipeError(*str(error).split(": ", 1))
    return kind(str(error))


def _family(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for kind in base.__subclasses__():
        yield from _family(kind)

"""How much a file from elsewhere may ask for: one limit for every reader, and a bounded process.

A few bytes of a compressed archive, of a sparse tensor or of a graph can state terabytes. Every
reader of foreign files adds up what a file states, compares it with `byte_limit`, and only then
allocates. What cannot be added up, because somebody else's runtime decides, runs in a process of
its own under the same limit: `run_bounded`.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prunecast.common.references import load_callable
from prunecast.common.text import bytes_text

__all__ = [
    "OUT_OF_MEMORY",
    "BoundsExceeded",
    "bound_process",
    "byte_limit",
    "disk_bytes",
    "run_bounded",
    "too_large",
]

_FREE_BYTES = 1 << 30
_EXPANSION = 64
_OWN_BYTES = 1 << 29  # of an interpreter with its libraries
_OWN_BYTES_A_CPU = 1 << 24  # stacks of a runtime's threads
_BLOCK = 512  # bytes, the unit of st_blocks
_PIECE = 1 << 16
OUT_OF_MEMORY = 77
"""Exit status of a bounded process that could not allocate."""


class BoundsExceeded(RuntimeError):
    """A process took more memory or time than it was given; the message says which."""


def byte_limit(size: int, max_bytes: int | None = None) -> int:
    """Bytes that the content of a file may take in memory.

    Args:
        size: of the file on disk, see `disk_bytes`.
        max_bytes: what the user allows; None for 1 GiB, or 64 times `size` where that is more.

    >>> byte_limit(1778), byte_limit(1 << 30), byte_limit(1 << 30, 10**9)
    (1073741824, 68719476736, 1000000000)
    """
    return max(_FREE_BYTES, _EXPANSION * size) if max_bytes is None else max_bytes


def disk_bytes(path: Path) -> int:
    """Bytes that a file takes on disk: of a file with holes, fewer than it seems to have.

    Raises:
        OSError: the file system refuses.
    """
    found = os.stat(path)
    return min(found.st_size, _BLOCK * found.st_blocks)


def too_large(what: str, limit: int) -> str:
    """What a reader says of a file beyond the limit, and the remedy.

    >>> too_large("it inflates to", 1000)
    'it inflates to more than 1,000 bytes; allow more if you trust it (--max-bytes)'
    """
    return f"{what} more than {limit:,} bytes; allow more if you trust it (--max-bytes)"


def bound_process(memory: int, seconds: float) -> None:
    """Bound this process from now on: what it may allocate, and for how long it lives.

    The memory of the interpreter, its libraries and the stacks of its threads comes on top;
    address space that is only reserved, and files that are mapped, do not count.

    Args:
        memory: bytes.
        seconds: from now.
    """
    allowed = memory + _OWN_BYTES + _OWN_BYTES_A_CPU * (os.cpu_count() or 1)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        allowed = min(allowed, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it computes
    signal.setitimer(signal.ITIMER_REAL, seconds)


def run_bounded(
    function: str, arguments: Sequence[str], *, memory: int, seconds: float, what: str
) -> tuple[int, str]:
    """Call a function in a process of its own, with bounds on its memory and its time.

    The function may widen them by `bound_process` where it learns that more is due.

    Args:
        function: as ``package.module:function``.
        arguments: of the function.
        memory: bytes that it may allocate.
        seconds: until it is ended.
        what: it does, for messages: ``running model.onnx``.

    Returns:
        Its exit status, and the end of what it wrote to standard output and error.

    Raises:
        BoundsExceeded: it was ended, or ended itself, for lack of memory or time.
    """
    bounds = [str(memory), str(seconds)]
    # what it leaves there when it is killed goes with the folder
    with tempfile.TemporaryDirectory() as folder:
        status, said = _run([*bounds, function, *arguments], folder)
    if status == -signal.SIGALRM:
        raise BoundsExceeded(
            f"{what} takes too long and was ended; allow more if you trust it (--max-seconds)"
        )
    text = said.decode("utf-8", "replace").strip()
    # the C library, too, ends a process that has no memory left
    if status == OUT_OF_MEMORY or (status and "cannot allocate memory" in text.lower()):
        raise BoundsExceeded(
            f"{what} takes more memory than {bytes_text(memory)}; allow more if you trust it "
            "(--max-bytes)"
        )
    if status < 0:
        raise BoundsExceeded(
            f"{what} ended with {signal.Signals(-status).name}: it crashes, or takes more memory "
            f"than {bytes_text(memory)}; allow more if you trust it (--max-bytes)"
        )
    return status, text


def _run(arguments: list[str], folder: str) -> tuple[int, bytes]:
    """Status and output of the process, whose temporary files go into a folder."""
    environment = {
        **os.environ,
        "TMPDIR": folder,
        # what is installed, and nothing that lies in the current folder, beside a model perhaps
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        "OPENBLAS_NUM_THREADS": "1",  # its buffers for every CPU would count
    }
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            said = b""
            while piece := process.stdout.read(_PIECE):
                said = (said + piece)[-_PIECE:]
            status = process.wait()
        finally:
            process.kill()
    return status, said


def _main(memory: str, seconds: str, function: str, *arguments: str) -> None:
    bound_process(int(memory), float(seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        load_callable(function)(*arguments)
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    _main(*sys.argv[1:])

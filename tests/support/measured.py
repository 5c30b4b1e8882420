"""Memory of the processes that a piece of code starts, apart from all others of the test run."""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable

__all__ = ["largest_child"]


def largest_child(function: Callable[[], object]) -> int:
    """Call a function in a fork, and return the memory of the largest process that it waited for.

    The system's figure for children is a maximum over all that this process ever had.

    Returns:
        kB, resident.

    Raises:
        AssertionError: the function raised; holds its traceback.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "?"
        try:
            function()
            said = str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(write, said.encode()[-60_000:])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    assert text.isdigit(), text
    return int(text)

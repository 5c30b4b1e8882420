"""Where parts of files are worked on: here, or on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prunecast.compression.files import FilesError

__all__ = ["ClusterUnavailable", "Run", "one_after_the_other", "ray_cluster"]

_CONNECT_SECONDS = 5
_AHEAD = 2  # tasks that wait for each processor, so that none is idle

Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Results of a function of one argument, in the order of the arguments; where, it decides."""


def one_after_the_other(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[Any]:
    """Do the work here."""
    return map(function, jobs)


class ClusterUnavailable(FilesError):
    """There is no such cluster, or it cannot do the work."""


@contextmanager
def ray_cluster(address: str) -> Iterator[Run]:
    """Join a Ray cluster; what it yields runs functions there, each on one processor.

    Prunecast is installed on all of its machines, and the checkpoint and the folder that is written
    to lie under the same paths there, on a file system that they share.

    Args:
        address: ``HOST:PORT`` of its head, or "auto" for the one of this machine.

    Raises:
        ClusterUnavailable: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise ClusterUnavailable("ray is not installed: pip install 'prunecast[sim]'") from error
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray goes on trying for minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise ClusterUnavailable(
            f"no Ray cluster answers at {address!r}: start one with ray start --head, or leave "
            "--ray out"
        ) from error
    try:
        task = ray.remote(num_cpus=1, max_retries=2)(_call)
        most = max(1, int(_AHEAD * ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call, unused-ignore]

        def run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[Any]:
            waiting: deque[Any] = deque()
            left = iter(jobs)
            try:
                while True:
                    while len(waiting) < most and (job := next(left, _END)) is not _END:
                        waiting.append(task.remote(function, job))
                    if not waiting:
                        return
                    yield ray.get(waiting.popleft())
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                raise ClusterUnavailable(f"the Ray cluster failed: {error}") from error
            finally:
                for one in waiting:
                    ray.cancel(one)

        yield run
    finally:
        ray.shutdown()


_END = object()


def _call(function: Callable[[Any], Any], job: Any) -> Any:
    return function(job)

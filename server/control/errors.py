"""Errors of the control server, and the status codes of gRPC by which devices learn of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from prunecast.server.fleet.errors import DatabaseError, TokenRefused, Unusable

__all__ = [
    "BadPath",
    "ControlError",
    "FileTooLarge",
    "ForeignName",
    "GoingDown",
    "NoSuchFile",
    "OffsetBehindEnd",
    "QuotaExceeded",
    "Unbindable",
    "WatchReplaced",
    "WrongRelease",
    "answering",
]

_LOG = logging.getLogger(__name__)


class ControlError(RuntimeError):
    """Base of every error that `prunecast.server.control` raises.

    Attributes:
        code: how a call ends that raises it.
    """

    code = grpc.StatusCode.INTERNAL


class Unbindable(ControlError):
    """The address cannot be bound, or a TLS file is unusable."""


class ForeignName(ControlError):
    """A device speaks in the name of another one."""

    code = grpc.StatusCode.PERMISSION_DENIED


class WrongRelease(ControlError):
    """An agent follows another release than its device's group."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class WatchReplaced(ControlError):
    """The device watches over another connection now."""

    code = grpc.StatusCode.ABORTED


class GoingDown(ControlError):
    """The server ends."""

    code = grpc.StatusCode.UNAVAILABLE


class BadPath(ControlError):
    """A path that no file of a release repository has."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NoSuchFile(ControlError):
    """The repository has no such file."""

    code = grpc.StatusCode.NOT_FOUND


class OffsetBehindEnd(ControlError):
    """A transfer should go on behind the end of the file."""

    code = grpc.StatusCode.OUT_OF_RANGE


class FileTooLarge(ControlError):
    """The file is larger than the control server hands out."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class QuotaExceeded(ControlError):
    """A device asks for more than its share.

    Attributes:
        seconds: after which it is worth trying again.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, seconds: float) -> None:
        super().__init__(f"try again in {seconds:.0f} seconds")
        self.seconds = seconds


@asynccontextmanager
async def answering(context: Any) -> AsyncIterator[None]:
    """End the call with the right status when the body raises.

    A device learns what it did wrong, and nothing about the inside of the server.
    """
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except DatabaseError as error:
        _LOG.warning("the fleet's database: %s", error)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the fleet's database does not answer")
    except QuotaExceeded as error:
        await context.abort(error.code, str(error), (("retry-after", f"{error.seconds:.0f}"),))
    except Unusable as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (TokenRefused, ForeignName) as error:
        _LOG.warning("%s is refused: %s", context.peer(), error)
        code = getattr(error, "code", grpc.StatusCode.UNAUTHENTICATED)
        await context.abort(code, str(error))
    except ControlError as error:
        await context.abort(error.code, str(error))
    except Exception:
        _LOG.exception("a call of %s failed", context.peer())
        await context.abort(grpc.StatusCode.INTERNAL, "the server failed, see its log")

"""Errors of the control server, and the status codes of gRPC by which devices learn of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from prunecast.server.fleet.errors import DatabaseError, TokenRefused, Unusable

__all__ = [
    "ControlError",
    "QuotaExceeded",
    "Refused",
    "Unbindable",
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


class Refused(ControlError):
    """A call that the server ends; the code tells the device what to make of it.

    Args:
        code: how the call ends, as the methods of `fleet.proto` document it.
        words: for the device.
    """

    def __init__(self, code: grpc.StatusCode, words: str) -> None:
        super().__init__(words)
        self.code = code


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
    except TokenRefused as error:
        _LOG.warning("%s is refused: %s", context.peer(), error)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
    except ControlError as error:
        if error.code is grpc.StatusCode.PERMISSION_DENIED:
            _LOG.warning("%s is refused: %s", context.peer(), error)
        await context.abort(error.code, str(error))
    except Exception:
        _LOG.exception("a call of %s failed", context.peer())
        await context.abort(grpc.StatusCode.INTERNAL, "the server failed, see its log")

"""What goes wrong, as gRPC's status codes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from prunecast.server.control import errors
from prunecast.server.control.quota import QuotaExceeded
from prunecast.server.fleet import DatabaseError, TokenRefused, Unusable

__all__ = ["answering"]

_LOG = logging.getLogger(__name__)
_CODES: dict[type[Exception], grpc.StatusCode] = {
    TokenRefused: grpc.StatusCode.UNAUTHENTICATED,
    errors.ForeignName: grpc.StatusCode.PERMISSION_DENIED,
    Unusable: grpc.StatusCode.INVALID_ARGUMENT,
    errors.BadPath: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NoSuchFile: grpc.StatusCode.NOT_FOUND,
    errors.OffsetBehindEnd: grpc.StatusCode.OUT_OF_RANGE,
    errors.FileTooLarge: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WrongRelease: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WatchReplaced: grpc.StatusCode.ABORTED,
    errors.GoingDown: grpc.StatusCode.UNAVAILABLE,
    QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


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
    except tuple(_CODES) as error:
        trailing: tuple[tuple[str, str], ...] = ()
        if isinstance(error, QuotaExceeded):
            trailing = (("retry-after", f"{error.seconds:.0f}"),)
        code = _CODES[type(error)]
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            _LOG.warning("%s is refused: %s", context.peer(), error)
        await context.abort(code, str(error), trailing)
    except Exception:
        _LOG.exception("a call of %s failed", context.peer())
        await context.abort(grpc.StatusCode.INTERNAL, "the server failed, see its log")

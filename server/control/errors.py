"""Errors of the control server, and the status codes of gRPC by which devices learn of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from prunecast.common.listening import SparingLog
from prunecast.server.fleet.errors import DatabaseError, TokenRefused, Unusable

__all__ = [
    "Answering",
    "ControlError",
    "QuotaExceeded",
    "Refused",
    "Unbindable",
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


class Answering:
    """Ends calls with the right status when they raise; strangers cannot fill the log by it.

    A device learns what it did wrong, and nothing about the inside of the server.

    Args:
        address: where a call comes from, by gRPC's name for it.
        log: of what is refused.
    """

    def __init__(self, address: Callable[[str], str], log: SparingLog) -> None:
        self._address, self._log = address, log

    @asynccontextmanager
    async def __call__(self, context: Any) -> AsyncIterator[None]:
        """For one call."""
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except DatabaseError as error:
            self._log.warning("database", "the fleet's database: %s", error)
            words = "the fleet's database does not answer"
            await context.abort(grpc.StatusCode.UNAVAILABLE, words)
        except QuotaExceeded as error:
            await context.abort(error.code, str(error), (("retry-after", f"{error.seconds:.0f}"),))
        except Unusable as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TokenRefused as error:
            self._refused("credential", context, error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except ControlError as error:
            if error.code is grpc.StatusCode.PERMISSION_DENIED:
                self._refused("permission", context, error)
            await context.abort(error.code, str(error))
        except Exception:
            _LOG.exception("a call of %s failed", self._address(context.peer()))
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed, see its log")

    def _refused(self, kind: str, context: Any, error: Exception) -> None:
        self._log.warning(kind, "%s is refused: %s", self._address(context.peer()), error)

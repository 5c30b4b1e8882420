"""Errors of the local endpoint."""

from __future__ import annotations

from prunecast.client.edge.errors import EdgeError

__all__ = ["EndpointError", "RequestRefused"]


class EndpointError(EdgeError):
    """The endpoint cannot be served at the address that was asked for."""


class RequestRefused(EdgeError):
    """One request cannot be answered.

    Args:
        status: of HTTP.
        message: what is wrong with the request and what would be right.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

"""A control server on loopback."""

from support.control import authority, database, fleet, repository, server

__all__ = ["authority", "database", "fleet", "repository", "server"]

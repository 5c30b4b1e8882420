"""The distribution server: a repository's files over HTTP(S), with ranges, caching and limits.

The same folder can be served by nginx, a CDN or an object store; nothing here is needed for
trust.
"""

from prunecast.server.repository.serving.connection import ServingLimits
from prunecast.server.repository.serving.server import ReleaseServer

__all__ = ["ReleaseServer", "ServingLimits"]

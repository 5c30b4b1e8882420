"""What a node says of itself where it is asked, so that the server can treat it as it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.fields import FieldReader, FieldWriter

__all__ = ["Capabilities"]

_LAYOUT = b"\x01"  # first byte; what is added comes at the end, and is passed over by older readers
_MEGA = 10**6
_LONGEST_VERSION = 32  # characters
_MOST_BYTES = 256


@dataclass(frozen=True)
class Capabilities:
    """What a node can do and bear. Zero is what it does not know.

    Attributes:
        package: version of Prunecast, 32 characters at most.
        formats: lowest and highest format of instructions that it understands.
        disk: bytes that are free where its store is, in whole megabytes.
        memory: bytes of its machine, or of its container where that has a limit, in whole
            megabytes.
        link: megabits per second of its link, as its config states them: it cannot be measured.
    """

    package: str = ""
    formats: tuple[int, int] = (0, 0)
    disk: int = 0
    memory: int = 0
    link: float = 0.0

    def to_bytes(self) -> bytes:
        """As docs/payloads.md has it."""
        out = FieldWriter(_LAYOUT)
        out.text(self.package[:_LONGEST_VERSION])
        for number in (*self.formats, self.disk // _MEGA, self.memory // _MEGA):
            out.number(number)
        out.real(self.link)
        return bytes(out.data)

    @classmethod
    def from_bytes(cls, data: bytes) -> Capabilities:
        """Parse and check.

        Raises:
            BadPayload: these are none.
        """
        if not 0 < len(data) <= _MOST_BYTES or data[:1] != _LAYOUT:
            raise _strange("they are none, or of another layout")
        found = FieldReader(data[1:], partial(_strange))
        package = found.text()[:_LONGEST_VERSION]
        lowest, highest, disk, memory = (found.number() for _ in range(4))
        link = found.real()
        if not (math.isfinite(link) and link >= 0):
            raise _strange("the link is no rate")
        printable = "".join(c for c in package if c.isprintable())
        return cls(printable, (lowest, highest), disk * _MEGA, memory * _MEGA, link)


def _strange(why: str) -> BadPayload:
    return BadPayload(f"capabilities from the node are not understood ({why}): versions differ?")

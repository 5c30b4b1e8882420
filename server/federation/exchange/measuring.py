"""What a message takes: its bytes, its objects, and its bytes under other codings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Message

from prunecast.compression.flower.internals import (
    Measured,
    content_bytes,
    objects_in,
    serialised_objects,
    uncached,
)

__all__ = ["Recode", "measured_message"]

Recode = Callable[[bytes], int]
"""From the bytes of a message to how many bytes it has under another coding."""


def measured_message(
    message: Message,
    alternatives: Mapping[str, Recode],
    measured: Mapping[str, Measured] | None = None,
) -> tuple[int, dict[str, int], int]:
    """Serialised bytes of a message, also under other codings, and its objects.

    The message is not touched.

    Args:
        message: the message.
        alternatives: the other codings, by name; each is given the joined objects.
        measured: those of its records that were measured before.
    """
    if alternatives or message.has_error():
        objects = serialised_objects(uncached(message))
        joined = b"".join(objects)
        others = {name: recode(joined) for name, recode in alternatives.items()}
        return sum(map(len, objects)), others, len(objects)
    known = measured or {}
    records = {key: known.get(key) or Measured(r) for key, r in message.content.items()}
    # besides those of its records, the content and the message
    return content_bytes(records, message), {}, len(objects_in(records.values())) + 2

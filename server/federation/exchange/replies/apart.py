"""Array records that came back otherwise than the policy has it, and why."""

from __future__ import annotations

import math

from flwr.app import ArrayRecord, Message

from prunecast.compression.flower import STATISTICS_RECORD, float_names, open_coded
from prunecast.compression.schemes.interface import Scheme
from prunecast.server.federation.exchange.batches import Prepared
from prunecast.server.federation.reporting.ledger import Entry
from prunecast.server.federation.reporting.notices import Notices, uncodable

__all__ = ["note_apart"]

_LARGE = 1024  # elements: of what is smaller nothing is said
_UNLIKE = (
    "no tensor of it has name and shape of one that was sent, so that there is no update to code"
)
_ZEROS = "large arrays of hardly anything but zeros, unlike any that was sent, are not coded"
_BY_SCHEME = "finite floats of a name and shape that were sent, which are all that a scheme codes"


def note_apart(
    reply: Message, sent: Prepared, entry: Entry, scheme: Scheme | None, notices: Notices
) -> None:
    """Say which array records did not come back as the policy has it.

    Args:
        reply: as it came.
        sent: the message that it answers.
        entry: the reply's line in the ledger.
        scheme: that updates travel by; None for none.
        notices: told of it.
    """
    records = reply.content.array_records.items()
    kept = [(key, r) for key, r in records if not (key == STATISTICS_RECORD and sent.wanted)]
    notices.counted(records=len(kept))
    for (key, record), kind in zip(kept, entry.kind.split("+"), strict=False):
        if kind.endswith("verbatim") and len(record):
            coded = open_coded(record)
            if coded is not None:
                cause = uncodable(ArrayRecord(coded[1])) or _ZEROS
            else:
                cause = uncodable(record) or _changed(sent, scheme)
            notices.apart(entry.node, "up", kind, key, cause)
        elif kind == "plain" and sent.versions:
            notices.apart(entry.node, "up", kind, key, _UNLIKE)
        elif beside := _beside_scheme(record, scheme):
            cause = f"tensor {beside[:80]!r} is none of the {_BY_SCHEME}"
            notices.apart(entry.node, "up", f"{kind} in part", key, cause)


def _beside_scheme(record: ArrayRecord, scheme: Scheme | None) -> str:
    """The first array worth coding that a scheme left as it is; "" for none."""
    coded = open_coded(record) if scheme is not None else None
    beside = ArrayRecord() if coded is None else ArrayRecord(coded[1])
    large = [n for n in float_names(beside) if math.prod(beside[n].shape) >= _LARGE]
    return next(iter(large), "")


def _changed(sent: Prepared, scheme: Scheme | None) -> str:
    """Why a record came as it is that could have been coded."""
    if scheme is not None:
        return f"it has none of the {_BY_SCHEME}"
    if sent.rule is None:
        return "the message had no arrays; what is answered to such ones is coded from now on"
    return (
        "another mod in front of compression_mod() changed it after it was coded: put "
        "compression_mod() first in ClientApp(mods=[...])"
    )

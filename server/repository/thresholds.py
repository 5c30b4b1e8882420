"""Who has signed metadata, and who is still needed; nothing here touches a file or a clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tuf.api.metadata import Metadata, Root, Targets

from prunecast.server.repository.errors import ThresholdNotMet
from prunecast.server.repository.holders import holder_of

__all__ = ["Tally", "require_signed", "tally"]


@dataclass(frozen=True)
class Tally:
    """Valid signatures on one role's metadata, by the keys that one delegator names.

    Attributes:
        subject: what was signed, such as ``root 2``.
        delegator: who names the keys, such as ``root 1``.
        threshold: how many must sign.
        signed: holders whose signature is valid.
        unsigned: holders who have not signed, or whose signature is of other bytes.
    """

    subject: str
    delegator: str
    threshold: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]

    @property
    def missing(self) -> int:
        """How many signatures are still needed."""
        return max(0, self.threshold - len(self.signed))

    def __str__(self) -> str:
        who = f": {', '.join(self.signed)}" if self.signed else ""
        said = f"{self.subject} has {len(self.signed)} of {self.threshold} signatures{who}"
        return f"{said} (keys of {self.delegator})"

    @property
    def asked(self) -> str:
        """Whom to ask for what is missing."""
        return f"{self.missing} more of {', '.join(self.unsigned) or 'nobody'} must sign"


def tally(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> Tally:
    """Count the valid signatures on `metadata` by the keys that `delegator` names for `role`.

    Raises:
        ValueError: `delegator` has no such role.
    """
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return Tally(
        f"{role} {metadata.signed.version}",
        f"{delegator.type} {delegator.version}",
        result.threshold,
        tuple(sorted(map(holder_of, result.signed.values()))),
        tuple(sorted(map(holder_of, result.unsigned.values()))),
    )


def require_signed(tallies: Iterable[Tally]) -> None:
    """Refuse what has not enough signatures.

    Raises:
        ThresholdNotMet: names who has signed and who can.
    """
    for counted in tallies:
        if counted.missing:
            raise ThresholdNotMet(
                f"{counted}: {counted.asked}, with `prunecast release keys sign`; nothing was "
                "published"
            )

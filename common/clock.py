"""The time, as far as a machine can be believed about it.

A machine without a battery wakes up in 1970, and whatever expires has then not expired yet. What is
certain is that it is not earlier than when this code was built.
"""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["BUILT", "ClockWrong", "utc_now"]

BUILT = datetime(2026, 11, 1, tzinfo=UTC)
"""A time at which this version was being made; raised with every release of Prunecast."""


class ClockWrong(ValueError):
    """This machine's clock says a time that is past for certain."""


def utc_now() -> datetime:
    """The time by this machine's clock, for what is signed and judged by it.

    Raises:
        ClockWrong: the clock is behind; a signature by it would have expired for everybody else,
            and nothing would ever expire here.
    """
    now = datetime.now(UTC)
    if now < BUILT:
        raise ClockWrong(
            f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, which is before this Prunecast "
            f"was made ({BUILT:%Y-%m-%d}): set it"
        )
    return now

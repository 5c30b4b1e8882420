"""Who calls: the credential of a connection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prunecast.server.fleet import Certified, Credential, TokenRefused

__all__ = ["credential_of"]

_BEARER = re.compile(r"Bearer ([A-Za-z0-9_-]{43})")
"""What `FleetService.enrol` makes; anything else need not be looked up."""


def credential_of(
    metadata: Iterable[tuple[str, str | bytes]],
    transport: Mapping[str, Iterable[bytes]],
    *,
    certificates: bool,
) -> Credential:
    """The credential of a call.

    Args:
        metadata: of the call.
        transport: gRPC's authentication context of the connection.
        certificates: whether devices authenticate by client certificates, which the transport has
            then verified against the authority; their token, if any, is not looked at.

    Raises:
        TokenRefused: there is none.
    """
    if certificates:
        names = [name.decode("utf-8", "replace") for name in transport.get("x509_common_name", ())]
        if len(names) != 1 or not names[0]:
            raise TokenRefused(
                "the client certificate names no device: its subject needs one common name"
            )
        return Certified(names[0])
    given = [str(value) for key, value in metadata if key == "authorization"]
    found = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise TokenRefused(
            "a device token is needed: the one that `prunecast fleet device add` printed, "
            "as metadata authorization: Bearer TOKEN"
        )
    return found[1]

"""Operators who prove who they are, so that the audit log names them and nobody else.

A fleet without operators trusts what the calling program says about its user. With the first one,
every change needs an operator's token. Whoever may write the database itself is above that.
"""

from __future__ import annotations

import hmac
import json
import secrets

from sqlalchemy.orm import Session

from prunecast.server.fleet.audit import AuditEntry, AuditKind
from prunecast.server.fleet.database import Database
from prunecast.server.fleet.devices import token_hash
from prunecast.server.fleet.errors import AlreadyExists, NotFound, TokenRefused
from prunecast.server.fleet.model import check_name
from prunecast.server.fleet.tables import MetaRow
from prunecast.server.fleet.transactions import write_audit

__all__ = ["Operators"]

_KEY = "operators"


class Operators:
    """The operators of a fleet, of whose tokens only hashes are kept.

    Args:
        database: of the fleet.
        token: of the operator who acts; None: nobody has shown one.
    """

    def __init__(self, database: Database, token: str | None) -> None:
        self._database, self._token = database, token

    def names(self) -> list[str]:
        """Who may change the fleet, in order; empty: whoever can open the database."""
        with self._database.transaction() as session:
            return sorted(_held(session))

    def add(self, name: str, *, now: float, actor: str) -> str:
        """Add an operator.

        Returns:
            The token, which cannot be shown again.

        Raises:
            AlreadyExists: there is one of that name.
            TokenRefused: there are operators, and none of them acts.
            Unusable: the name.
        """
        token = secrets.token_urlsafe(32)
        check_name(name, "operator")
        with self._database.transaction() as session:
            held = _held(session)
            acting = self._acting(held, actor)
            if name in held:
                raise AlreadyExists(f"there is an operator {name} already: remove it first")
            _store(session, held | {name: token_hash(token)})
            write_audit(session, [AuditEntry(now, acting, AuditKind.OPERATOR_ADDED, name)])
        return token

    def remove(self, name: str, *, now: float, actor: str) -> None:
        """Refuse an operator's token from now on; without the last one, tokens are not needed.

        Raises:
            NotFound: there is none of that name.
            TokenRefused: none of the operators acts.
        """
        with self._database.transaction() as session:
            held = _held(session)
            acting = self._acting(held, actor)
            if held.pop(name, None) is None:
                raise NotFound(
                    f"there is no operator {name!r}: list them with `prunecast fleet operator list`"
                )
            _store(session, held)
            write_audit(session, [AuditEntry(now, acting, AuditKind.OPERATOR_REMOVED, name)])

    def acting(self, claimed: str) -> str:
        """Who acts, for the audit log: ``operator:NAME``, or without any operators `claimed`.

        Raises:
            TokenRefused: there are operators, and the token is none of theirs.
        """
        with self._database.transaction() as session:
            return self._acting(_held(session), claimed)

    def _acting(self, held: dict[str, str], claimed: str) -> str:
        if not held:
            return claimed
        shown = token_hash(self._token or "")
        for name, wanted in held.items():
            if hmac.compare_digest(shown, wanted):
                return f"operator:{name}"
        what = "the operator's token is unknown" if self._token else "this fleet has operators"
        raise TokenRefused(
            f"{what}: let PRUNECAST_OPERATOR name the file with a token that "
            "`prunecast fleet operator add` printed"
        )


def _held(session: Session) -> dict[str, str]:
    """Hashes of tokens by operator; the row is locked until the transaction ends."""
    row = session.get(MetaRow, _KEY, with_for_update=True)
    found: dict[str, str] = json.loads(row.value) if row else {}
    return found


def _store(session: Session, held: dict[str, str]) -> None:
    session.merge(MetaRow(key=_KEY, value=json.dumps(held)))

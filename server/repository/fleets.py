"""The fleets that follow a repository: which they are, and what they stand on.

`.fleets.json` beside the metadata remembers the databases' URLs, without passwords and for its
owner alone; no server of ours hands it out. Fleets are asked only when a release is about to be
withdrawn, so that publishing and reading need neither a database nor its libraries.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from prunecast.common.documents import from_document, read_document
from prunecast.common.files import replacing
from prunecast.server.repository.errors import FleetUnanswered, ReleaseInUse, RepositoryError

if TYPE_CHECKING:
    from prunecast.server.fleet.uses import Use

__all__ = ["FollowingFleets", "forget_fleet", "known_fleets", "remember_fleet"]

_FILE = ".fleets.json"


@dataclass(frozen=True)
class _Content:
    schema: int
    fleets: tuple[str, ...]


def known_fleets(repository: Path) -> tuple[str, ...]:
    """URLs of the databases of all fleets that follow a repository.

    Raises:
        FleetUnanswered: the list is there, but cannot be read.
    """
    path = repository / _FILE
    try:
        return from_document(_Content, read_document(path)).fleets
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FleetUnanswered(
            f"{path} cannot be read ({why}), so nobody knows which fleets follow this repository: "
            "run this as its owner, or restore the file"
        ) from error


def remember_fleet(repository: Path, url: str) -> None:
    """Let a repository know that a fleet follows it; the caller holds the repository's lock.

    Args:
        repository: its folder.
        url: of the fleet's database; its password is left out.

    Raises:
        StorageError: the folder cannot be written.
    """
    _write(repository, {*known_fleets(repository), _lasting(url)})


def forget_fleet(repository: Path, url: str) -> None:
    """The contrary of `remember_fleet`, for a fleet that is no more.

    Raises:
        RepositoryError: it is not remembered.
    """
    known, given = known_fleets(repository), _lasting(url)
    if given not in known:
        shown = ", ".join(known) or "none"
        raise RepositoryError(f"{given} is none of the fleets of {repository} (known: {shown})")
    _write(repository, [one for one in known if one != given])


class FollowingFleets:
    """All fleets that follow a repository, and what they stand on.

    Args:
        repository: its folder.
        given: URLs of databases, besides those that are remembered or instead of them: a given one
            may have a password.
    """

    def __init__(self, repository: Path, given: Iterable[str] = ()) -> None:
        self._repository, self._given = repository, tuple(given)

    def uses(self, now: datetime) -> Iterator[tuple[str, Use]]:
        """What the fleets need, each with the URL of the fleet without a password.

        Args:
            now: the time.

        Raises:
            FleetUnanswered: one of them cannot be asked.
        """
        urls = {url: url for url in known_fleets(self._repository)}
        urls |= {_lasting(url): url for url in self._given}
        for label, url in urls.items():
            yield from ((label, use) for use in _ask(label, url, now.timestamp()))

    def require_unused(self, name: str, version: int, now: datetime) -> tuple[str, ...]:
        """Refuse to withdraw a release that a fleet needs.

        Returns:
            For what it would have been good to have, in sentences.

        Raises:
            ReleaseInUse: says who needs it, and how to do without it.
            FleetUnanswered: a fleet cannot be asked.
        """
        needed, missed = [], []
        for fleet, use in self.uses(now):
            if (use.release.name, use.release.version) == (name, version):
                text = f"{use} (fleet {fleet})"
                needed += [f"{text}: {use.remedy}"] if use.lasting else []
                missed += [] if use.lasting else [text]
        if needed:
            raise ReleaseInUse(f"{name} {version} stays live: {'; '.join(needed)}")
        return tuple(missed)

    def needing(self, name: str, versions: Collection[int], now: datetime) -> dict[int, str]:
        """Which of some versions must stay live, and why: all of them if a fleet does not say."""
        found: dict[int, list[str]] = {}
        try:
            for fleet, use in self.uses(now) if versions else ():
                if use.release.name == name and use.release.version in versions:
                    found.setdefault(use.release.version, []).append(f"{use} (fleet {fleet})")
        except FleetUnanswered as error:
            return dict.fromkeys(versions, str(error))
        return {version: "; ".join(why) for version, why in found.items()}


def _ask(label: str, url: str, at: float) -> list[Use]:
    try:
        from prunecast.server.fleet.errors import FleetError
        from prunecast.server.fleet.service import FleetService
        from prunecast.server.fleet.uses import uses_of
    except ModuleNotFoundError as error:
        raise FleetUnanswered(
            f"a fleet follows this repository, and {error.name} is not installed to ask it: "
            "pip install 'prunecast[server]'"
        ) from error
    try:
        with FleetService(url, list) as service:
            return uses_of(service.overview(), at)
    except FleetError as error:
        raise FleetUnanswered(
            f"the fleet {label} cannot be asked what it stands on ({error}); if it is no more: "
            f"`prunecast release fleets REPOSITORY --forget {label}`"
        ) from error


def _lasting(url: str) -> str:
    from prunecast.server.fleet.database import lasting_url

    return lasting_url(url)


def _write(repository: Path, fleets: Iterable[str]) -> None:
    document = {"schema": 1, "fleets": sorted(fleets)}
    with replacing(repository / _FILE) as temporary:
        temporary.chmod(0o600)
        temporary.write_bytes(json.dumps(document, indent=1).encode() + b"\n")

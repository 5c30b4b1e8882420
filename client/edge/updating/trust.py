"""What is released, according to signed metadata (TUF)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import DelegatedRole, Metadata, Root, Snapshot, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import Updater, UpdaterConfig

from prunecast.client.edge.errors import ContentRefused, NetworkError, StateError, TrustError
from prunecast.client.edge.updating.clock import TimeFloor, shown_time
from prunecast.client.edge.updating.transport import Fetcher, Passing
from prunecast.common.files import StorageError, make_folder, write_atomically
from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import (
    MAX_MANIFEST_BYTES,
    ReleaseManifest,
    manifest_path,
    parse_manifest_path,
)

__all__ = ["TrustedListing"]

_TOP_LEVEL = ("root", "timestamp", "snapshot", "targets")
_MOST_ROLES = 16  # that may publish one name; each list costs a request

_RENEW = "renew it with prunecast release renew, or set this device's clock if that is wrong"
_REMEDIES: dict[type[RepositoryError], str] = {
    UnsignedMetadataError: (
        "it is not signed by the keys this device trusts; if the repository is the right one, "
        "give the device its root file again"
    ),
    ExpiredMetadataError: _RENEW,
    BadVersionNumberError: (
        "it is older than what this device has seen: a copy is stale, or somebody replays it; if "
        "the repository was restored from a backup, publish again"
    ),
}


class TrustedListing:
    """The live releases, refreshed once; everything it returns is signed.

    Args:
        url: of the repository.
        folder: where verified metadata is kept between runs; it is what detects a rollback.
        root: the root metadata this device was provisioned with.
        fetcher: the network.
        on_bytes: called with the number of bytes received.
        on_warning: called with what is wrong with this device's clock.

    Raises:
        TrustError: metadata is forged, expired, rolled back, or `root` is no root metadata.
        NetworkError: the repository cannot be reached.
        StateError: the folder cannot be written.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        root: bytes,
        fetcher: Fetcher,
        on_bytes: Callable[[int], None] = lambda count: None,
        on_warning: Callable[[str], None] = lambda told: None,
    ) -> None:
        def counted(chunks: Iterator[bytes]) -> Iterator[bytes]:
            for chunk in chunks:
                on_bytes(len(chunk))
                yield chunk

        self._folder = folder
        base = url if url.endswith("/") else f"{url}/"
        _check_root(root)
        with _translated():
            make_folder(folder)
            self._updater = _DurableUpdater(
                metadata_dir=str(folder),
                metadata_base_url=f"{base}metadata/",
                target_base_url=f"{base}targets/",
                fetcher=Passing(fetcher, counted),
                config=UpdaterConfig(targets_max_length=4_000_000, max_delegations=_MOST_ROLES),
                bootstrap=root,
            )
            self._time = TimeFloor(folder)
            self._clock = self._updater.judge_by(self._time.judge)
        if problem := self._time.problem(self._clock):
            on_warning(problem)
        with self._judged():
            self._updater.refresh()
        self._time.verified(self._clock)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """What has expired is told with the time by which it was judged."""
        with _translated():
            try:
                yield
            except ExpiredMetadataError as error:
                if not self._time.is_behind(self._clock):
                    self._time.saw(self._clock)
                told = _expired(error, self._updater, self._time, self._clock)
                raise TrustError(told) from error

    def versions(self, name: str) -> list[int]:
        """Numbers of the live releases of `name`, ascending; raises as the class does."""
        listings = [self._read(Targets.type), *self._delegated(name)]
        found = (parse_manifest_path(path) for listing in listings for path in listing.targets)
        return sorted({parsed[1] for parsed in found if parsed and parsed[0] == name})

    def names(self) -> list[str]:
        """Names that have a live release or a role that publishes them, in alphabetical order."""
        targets = self._read(Targets.type)
        found = [parsed[0] for parsed in map(parse_manifest_path, targets.targets) if parsed]
        for role in _roles(targets).values():
            found += [path.split("/")[0] for path in role.paths or []]
        return sorted(set(found))

    def _delegated(self, name: str) -> list[Targets]:
        """The verified lists of the roles that may publish `name`, in the order of precedence."""
        probe = manifest_path(name, 0)  # no release has this number, so no role is left out
        with self._judged():
            self._updater.get_targetinfo(probe)  # fetches and verifies those lists
            snapshot = Metadata[Snapshot].from_file(str(self._folder / "snapshot.json")).signed
        found = []
        for role, given in _roles(self._read(Targets.type)).items():
            if not given.is_delegated_path(probe):
                continue
            listing = self._read(role)
            named = snapshot.meta.get(f"{role}.json")
            if listing.delegations is not None or named is None or named.version != listing.version:
                raise TrustError(
                    f"the list of {role} is not the one that the signed snapshot names, or hands "
                    "releases on to other roles: have it signed again"
                )
            found.append(listing)
            if given.terminating:
                break
        return found

    def _read(self, role: str) -> Targets:
        path = self._folder / f"{quote(role, '')}.json"  # as Updater names it
        with _translated():
            # Updater has no listing; this file is what it has just verified
            return Metadata[Targets].from_file(str(path)).signed

    def digest(self, name: str, version: int) -> str:
        """SHA-256 (hex) of a listed release's manifest, known without downloading it.

        Raises:
            TrustError: not listed, or signed without this digest.
        """
        return str(self._target(name, version).hashes["sha256"])

    def manifest(self, name: str, version: int, path: Path) -> ReleaseManifest:
        """Download a release's manifest to `path`.

        Raises:
            TrustError: not listed, or it describes another release.
            ContentRefused: not the signed file.
            NetworkError: the repository cannot be reached.
        """
        wanted, target = manifest_path(name, version), self._target(name, version)
        if target.length > MAX_MANIFEST_BYTES:
            raise ContentRefused(f"{wanted} is {target.length} bytes: too large to be one")
        with _translated():
            make_folder(path.parent)
            if self._updater.find_cached_target(target, str(path)) is None:
                self._updater.download_target(target, str(path))
            try:
                manifest = ReleaseManifest.from_bytes(path.read_bytes())
            except ManifestError as error:
                raise ContentRefused(f"{wanted}: {error}") from error
        if (manifest.name, manifest.version) != (name, version):
            raise TrustError(
                f"{wanted} describes release {manifest.name} {manifest.version}: an old release "
                "was put in the place of a new one"
            )
        with suppress(ValueError):
            made = datetime.fromisoformat(manifest.created)
            if made.tzinfo is not None and self._time.is_behind(self._clock):
                self._time.saw(min(made, *self._updater.expiries().values()))
        return manifest

    def _target(self, name: str, version: int) -> TargetFile:
        path = manifest_path(name, version)
        with self._judged():
            target = self._updater.get_targetinfo(path)
        if target is None or "sha256" not in target.hashes:
            raise TrustError(f"{path} is not in the signed metadata with a SHA-256")
        return target


def _expired(
    error: ExpiredMetadataError, updater: _DurableUpdater, floor: TimeFloor, clock: datetime
) -> str:
    """Which metadata have expired, by which time, and whether that may be the clock's fault."""
    told = f"the repository's metadata is refused: {str(error).rstrip('.')}"
    late = [at for at in updater.expiries().values() if at <= updater.judged_at]
    if late:
        told += f", since {shown_time(min(late))}"
    says = f"this device's clock says {shown_time(clock)}"
    if floor.is_behind(clock):
        return (
            f"{told}; {says}, which is past for certain, so this is judged by "
            f"{shown_time(updater.judged_at)}, the latest time that it has known: set the clock, "
            "and renew the metadata with prunecast release renew if it stays"
        )
    if floor.is_far_ahead(clock):
        return (
            f"{told}; {says}, far ahead of {shown_time(floor.floor)}, the latest time that it "
            "knows for certain: set the clock if that is wrong, and renew the metadata with "
            "prunecast release renew if it is right"
        )
    return f"{told}; {says}: {_RENEW}"


def _roles(targets: Targets) -> Mapping[str, DelegatedRole]:
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return targets.delegations.roles


class _DurableUpdater(Updater):
    """Writes metadata so that it survives a power cut, and judges expiry by the time it is told.

    tuf replaces files without fsync: after a power cut a file may be empty. It is then fetched
    again, but what it proved against a rollback is gone.
    """

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        if path.is_file() and path.read_bytes() == data:
            return  # the root is handed over at every check
        make_folder(path.parent)
        write_atomically(path, data)

    def judge_by(self, judge: Callable[[datetime], datetime]) -> datetime:
        """Judge expiry by what a function makes of the time that this device's clock says.

        Returns:
            The time by the clock.
        """
        clock = self._trusted_set.reference_time
        self._trusted_set.reference_time = judge(clock)
        return clock

    @property
    def judged_at(self) -> datetime:
        """The time by which expiry is judged."""
        return self._trusted_set.reference_time

    def expiries(self) -> dict[str, datetime]:
        """When the metadata that were loaded expire, by role."""
        loaded = self._trusted_set
        return {role: loaded[role].expires for role in _TOP_LEVEL if role in loaded}

    def _update_root_symlink(self) -> None:
        """Leave out `root.json`: nobody reads it, and a full disk may refuse to make it anew."""


def _check_root(root: bytes) -> None:
    try:
        usable = isinstance(Metadata.from_bytes(root).signed, Root)
    except (RepositoryError, ValueError):
        usable = False
    if not usable:
        raise TrustError(
            "the root file of this device is no root metadata: give it the repository's "
            "metadata/1.root.json, over a channel you trust"
        )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DownloadLengthMismatchError as error:
        raise ContentRefused(f"a file is longer than what was signed: {error}") from error
    except (RepositoryError, DeserializationError) as error:
        detail = (str(error) or type(error).__name__).rstrip(".")
        remedy = next((f": {r}" for kind, r in _REMEDIES.items() if isinstance(error, kind)), "")
        raise TrustError(f"the repository's metadata is refused: {detail}{remedy}") from error
    except DownloadError as error:
        raise NetworkError(str(error) or type(error).__name__) from error
    except (StorageError, OSError) as error:
        raise StateError(f"the state folder refuses: {error}") from error

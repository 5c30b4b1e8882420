"""Obtain everything a release consists of, verified, by the fewest bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError

from prunecast.client.edge.config import AGENT_VERSION, AgentConfig, PayloadKind
from prunecast.client.edge.errors import (
    AgentTooOld,
    ContentMissing,
    ContentRefused,
    NetworkError,
    StateError,
    disk,
)
from prunecast.client.edge.slots.weights import patch_base
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.updating.transport import AskLater, Fetcher
from prunecast.common.files import (
    file_digest,
    folder_bytes,
    keep_only,
    make_folder,
    sync,
    write_atomically,
)
from prunecast.compression.codec import Limits
from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import (
    FileRef,
    PatchRef,
    ReleaseManifest,
    blob_path,
    unpack_file,
)
from prunecast.compression.versions import PublishedModel, VersionsError, decode_model

__all__ = ["Acquirer", "Download"]

_SPARE = 2**20
_ATTEMPTS = 4  # over a connection that breaks
_PATIENCE = 60.0  # seconds that a server may ask for between two attempts


class Acquirer:
    """Downloads the parts of one release, verified; takes from the active slot what is the same.

    Args:
        active: the active slot, None when there is none.
        step: called with the name of every step before it begins.
        count: called with the kind and the number of bytes received.
        wait: sleeps for so many seconds between attempts.
    """

    def __init__(
        self,
        config: AgentConfig,
        folder: StateFolder,
        active: str | None,
        fetcher: Fetcher,
        *,
        step: Callable[[str], None],
        count: Callable[[str, int], None],
        wait: Callable[[float], None],
    ) -> None:
        self._config, self._folder, self._fetcher = config, folder, fetcher
        self._held = folder.slot(active) if active else None
        self._step, self._count, self._wait = step, count, wait

    def acquire(
        self, manifest: ReleaseManifest
    ) -> tuple[dict[str, Path], tuple[PublishedModel, PayloadKind, str | None]]:
        """Everything that the release needs, if this agent and this disk can take it.

        Returns:
            The small files by name: where they are now. The model, how it came, and why a patch
            was not used although there was one.

        Raises:
            AgentTooOld: it needs a newer agent.
            ContentRefused: larger than this agent accepts, or not what was signed.
            NetworkError: see `Download.run`.
            StateError: the disk is too full, or refuses.
        """
        self._drop_others(manifest)
        self._check_fit(manifest)
        self._step("download files")
        files = {name: self._file(name, ref) for name, ref in manifest.files.items()}
        return files, self._model(manifest)

    def _check_fit(self, manifest: ReleaseManifest) -> None:
        if _numbers(manifest.minimum_agent) > _numbers(AGENT_VERSION):
            raise AgentTooOld(
                f"release {manifest.version} needs agent {manifest.minimum_agent}, this is "
                f"{AGENT_VERSION}: update prunecast on the device"
            )
        files = manifest.files.values()
        sizes = (manifest.weights, manifest.keyframe, *files, *(ref.travels for ref in files))
        if max(ref.length for ref in sizes) > self._config.most_bytes:
            raise ContentRefused(
                f"release {manifest.version} is larger than the {self._config.most_bytes} bytes "
                "this agent accepts"
            )
        # before the first byte: a slot with the model, and the files it is made from
        small = sum(ref.length for ref in manifest.files.values())
        small += sum(ref.packed.length for ref in manifest.files.values() if ref.packed)
        slot = manifest.weights.length + manifest.keyframe.length + small
        needed = slot + manifest.keyframe.length + small + _SPARE
        # what is freed before the new slot is written
        held = folder_bytes(self._held) if self._held else 0
        there = folder_bytes(self._folder.path / "slots") - held
        there += folder_bytes(self._folder.downloads)
        free = shutil.disk_usage(self._folder.path).free
        if free + there < needed:
            raise StateError(
                f"release {manifest.version} needs {needed - there:,} bytes of disk at "
                f"{self._folder.path}, {free:,} are free: make room; the next check tries again"
            )

    def _drop_others(self, manifest: ReleaseManifest) -> None:
        """Remove downloads that belong to other releases: nobody will finish them."""
        names = {"release.json"}
        for ref in (*manifest.references().values(), *manifest.files.values()):
            names |= {ref.sha256, f"{ref.sha256}.part"}
        with disk(f"tidy {self._folder.downloads}"):
            keep_only(self._folder.downloads, names)

    def _model(self, manifest: ReleaseManifest) -> tuple[PublishedModel, PayloadKind, str | None]:
        """By the cheapest way that works: held, patch, keyframe."""
        held = patch_base(self._held) if self._held else None
        reason = None
        if held is not None:
            if held.digest.hex() == manifest.model_digest:
                return held, "none", None
            patch = manifest.patch_from(held.digest.hex())
            if patch is not None:
                try:
                    return self._patched(manifest, patch, held), "patch", None
                except (VersionsError, ContentRefused, ContentMissing) as error:
                    reason = f"the patch did not apply: {error}"
        self._step("download keyframe")
        data = self._fetch("keyframe", manifest.keyframe)
        self._step("decode keyframe")
        try:
            model = decode_model(data, stream=manifest.stream, limits=_limits(manifest))
        except VersionsError as error:
            raise ContentRefused(f"keyframe of release {manifest.version}: {error}") from error
        _check_digest(model, manifest, "the keyframe")
        return model, "keyframe", reason

    def _patched(
        self, manifest: ReleaseManifest, patch: PatchRef, held: PublishedModel
    ) -> PublishedModel:
        self._step("download patch")
        data = self._fetch("patch", patch.file)
        self._step("apply patch")
        model = decode_model(data, held=held, stream=manifest.stream, limits=_limits(manifest))
        _check_digest(model, manifest, "the patch")
        return model

    def _file(self, name: str, ref: FileRef) -> Path:
        target = self._folder.downloads / ref.sha256
        held = self._held / name if self._held else None
        with disk(f"copy {held}"):
            if held and held.is_file() and file_digest(held) == ref.sha256:
                make_folder(target.parent)
                shutil.copyfile(held, target)  # its slot may be the one that is rebuilt
                return target
        if ref.packed is None:
            return self._download("files", ref)
        try:
            data = unpack_file(self._fetch("files", ref.packed), ref)
        except ManifestError as error:
            raise ContentRefused(f"{name}: {error}") from error
        with disk(f"write {target}"):
            write_atomically(target, data)
        return target

    def _fetch(self, kind: str, ref: FileRef) -> bytes:
        path = self._download(kind, ref)
        with disk(f"read {path}"):
            return path.read_bytes()

    def _download(self, kind: str, ref: FileRef) -> Path:
        path = self._folder.downloads / ref.sha256
        url = f"{self._config.url.rstrip('/')}/{blob_path(ref.sha256)}"
        Download(
            self._fetcher, url, ref, path, lambda size: self._count(kind, size), self._wait
        ).run()
        return path


def _limits(manifest: ReleaseManifest) -> Limits:
    """What a payload of this release may make the device allocate.

    The model fills `weights.bin`, so its size is known and signed. Integers are decoded as int32
    and stored in a byte or more; inference may leave out as many tensors as it reads.
    """
    elements = 2 * manifest.weights.length + _SPARE
    return Limits(elements=elements, decoded_bytes=4 * elements, free_bytes=4 * elements)


def _check_digest(model: PublishedModel, manifest: ReleaseManifest, what: str) -> None:
    if model.digest.hex() != manifest.model_digest:
        raise ContentRefused(f"{what} of release {manifest.version} leads to another model")


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


@dataclass(frozen=True)
class Download:
    """A verified download that goes on where it was interrupted.

    An interrupted one leaves ``<path>.part``, and the next attempt, in this process or a later one,
    asks only for the rest. Never more than ``ref.length`` bytes are written.

    Attributes:
        ref: its digest and length, from signed metadata.
        path: where it goes.
        on_bytes: called with the number of bytes of every piece received.
        wait: sleeps for so many seconds between attempts.
    """

    fetcher: Fetcher
    url: str
    ref: FileRef
    path: Path
    on_bytes: Callable[[int], None] = lambda count: None
    wait: Callable[[float], None] = time.sleep

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def run(self) -> None:
        """Fetch the file and check it; one that is there already is kept.

        Raises:
            ContentRefused: longer or shorter than `ref` says, or with another digest.
            ContentMissing: the server does not have it.
            NetworkError: not reachable; the part is kept.
            StateError: the disk refuses.
        """
        path, part, wanted = self.path, self._part, self.ref.sha256
        with disk(f"write {path}"):
            if path.is_file() and file_digest(path) == wanted:
                return
            make_folder(path.parent)
            resumed = self._fill()
            while file_digest(part) != wanted:
                part.unlink()
                if not resumed:
                    told = f"{self.url} is not the file that was signed: digest differs"
                    raise ContentRefused(told)
                # the kept part may have been damaged on disk: once more, from the beginning
                resumed = self._fill()
            os.replace(part, path)
            sync(path.parent)

    def _fill(self) -> bool:
        """Complete `part`; returns whether it began with bytes of an earlier attempt."""
        part = self._part
        if part.is_symlink() or (part.exists() and part.stat().st_size > self.ref.length):
            part.unlink()
        resumed = _size(part) > 0
        whole = not resumed  # whether every byte of the part came in this call
        for attempt in range(1, _ATTEMPTS + 1):
            problem: DownloadError
            pause = 0.25 * 2**attempt
            try:
                self._append()
            except AskLater as error:
                if error.seconds > _PATIENCE:
                    raise NetworkError(f"{error}; what has come is kept") from error
                pause, problem = max(pause, error.seconds), error
            except DownloadHTTPError as error:
                if error.status_code == 416:
                    if whole:  # the server's file ends where the part does, or before
                        raise self._short() from error
                    part.unlink(missing_ok=True)
                    whole = True
                elif error.status_code < 500:
                    raise ContentMissing(f"cannot download: {error}") from error
                problem = error
            except DownloadError as error:
                problem = error
            else:
                if _size(part) == self.ref.length:
                    return resumed
                if attempt == _ATTEMPTS:  # every time without any error: the file is too short
                    raise self._short()
                problem = DownloadError("ended early")
            if attempt < _ATTEMPTS:
                self.wait(pause)
        told = f"cannot download after {_ATTEMPTS} attempts: {problem}"
        raise NetworkError(told) from problem

    def _short(self) -> ContentRefused:
        return ContentRefused(
            f"{self.url} ended early: the server has {_size(self._part)} of the {self.ref.length} "
            "bytes that were signed; its copy is truncated: copy the repository there again"
        )

    def _append(self) -> None:
        part, length = self._part, self.ref.length
        held = _size(part)
        if held == length:
            part.touch()
            return
        stream = self.fetcher.open(self.url, held)
        with open(part, "r+b" if part.exists() else "w+b") as file:
            file.truncate(stream.start)
            file.seek(stream.start)
            size = stream.start
            try:
                for chunk in stream.chunks:
                    self.on_bytes(len(chunk))
                    size += len(chunk)
                    if size > length:
                        raise ContentRefused(
                            f"{self.url} is longer than the {length} bytes that were signed"
                        )
                    file.write(chunk)
            except ContentRefused:
                file.truncate(0)
                raise
            except DownloadError:
                raise
            except OSError as error:
                raise DownloadError(f"connection to {self.url} broke: {error}") from error
            finally:
                file.flush()
                os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

"""Obtain everything a release consists of, by the fewest bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from prunecast.client.edge.config import AGENT_VERSION, AgentConfig, PayloadKind
from prunecast.client.edge.errors import AgentTooOld, ContentMissing, ContentRefused, StateError
from prunecast.client.edge.slots.patch_base import patch_base
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.updating.download import download
from prunecast.client.edge.updating.transport import Fetcher
from prunecast.common.files import file_digest, folder_bytes, keep_only, make_folder
from prunecast.compression.codec import Limits
from prunecast.compression.release.manifest import FileRef, PatchRef, ReleaseManifest, blob_path
from prunecast.compression.versions import PublishedModel, VersionsError, decode_model

__all__ = ["Acquirer", "Count"]

Count = Callable[[str, int], None]
_SPARE = 2**20


class Acquirer:
    """Downloads the parts of one release, verified; takes from the active slot what is the same.

    Args:
        config: of the agent.
        folder: its state folder.
        active: the active slot, None when there is none.
        fetcher: the network.
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
        count: Count,
        wait: Callable[[float], None],
    ) -> None:
        self._config, self._folder, self._fetcher = config, folder, fetcher
        self._held = folder.slot(active) if active else None
        self._step, self._count, self._wait = step, count, wait

    def check_fit(self, manifest: ReleaseManifest) -> None:
        """Whether this agent and this disk can take the release.

        Raises:
            AgentTooOld: it needs a newer agent.
            ContentRefused: larger than this agent accepts.
            StateError: the disk is too full.
        """
        if _numbers(manifest.minimum_agent) > _numbers(AGENT_VERSION):
            raise AgentTooOld(
                f"release {manifest.version} needs agent {manifest.minimum_agent}, this is "
                f"{AGENT_VERSION}: update prunecast on the device"
            )
        sizes = (manifest.weights, manifest.keyframe, *manifest.files.values())
        if max(ref.length for ref in sizes) > self._config.most_bytes:
            raise ContentRefused(
                f"release {manifest.version} is larger than the {self._config.most_bytes} bytes "
                "this agent accepts"
            )
        self._check_disk(manifest)

    def _check_disk(self, manifest: ReleaseManifest) -> None:
        """Before the first byte: a slot with the model, and the files it is made from."""
        small = sum(ref.length for ref in manifest.files.values())
        slot = manifest.weights.length + manifest.keyframe.length + small
        needed = slot + manifest.keyframe.length + small + _SPARE
        there = self._spare_slot_bytes() + folder_bytes(self._folder.downloads)
        free = shutil.disk_usage(self._folder.path).free
        if free + there < needed:
            raise StateError(
                f"release {manifest.version} needs {needed - there:,} bytes of disk at "
                f"{self._folder.path}, {free:,} are free: make room; the next check tries again"
            )

    def _spare_slot_bytes(self) -> int:
        """What is freed before the new slot is written."""
        slots = self._folder.path / "slots"
        held = folder_bytes(self._held) if self._held else 0
        return folder_bytes(slots) - held

    def drop_others(self, manifest: ReleaseManifest) -> None:
        """Remove downloads that belong to other releases: nobody will finish them.

        Raises:
            StateError: the disk refuses.
        """
        names = {"release.json"}
        for ref in manifest.references().values():
            names |= {ref.sha256, f"{ref.sha256}.part"}
        try:
            keep_only(self._folder.downloads, names)
        except OSError as error:
            problem = error.strerror or error
            raise StateError(f"cannot tidy {self._folder.downloads}: {problem}") from error

    def files(self, manifest: ReleaseManifest) -> dict[str, Path]:
        """The small files by name: where they are now.

        Raises:
            ContentRefused, NetworkError, StateError: see `download`.
        """
        return {name: self._file(name, ref) for name, ref in manifest.files.items()}

    def model(self, manifest: ReleaseManifest) -> tuple[PublishedModel, PayloadKind, str | None]:
        """The published model by the cheapest way that works: held, patch, keyframe.

        Returns:
            The model, how it came, and why a patch was not used although there was one.

        Raises:
            ContentRefused, NetworkError, StateError: see `download`.
        """
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
        try:
            if held and held.is_file() and file_digest(held) == ref.sha256:
                make_folder(target.parent)
                shutil.copyfile(held, target)  # its slot may be the one that is rebuilt
                return target
        except OSError as error:
            raise StateError(f"cannot copy {held}: {error.strerror or error}") from error
        return self._download("files", ref)

    def _fetch(self, kind: str, ref: FileRef) -> bytes:
        path = self._download(kind, ref)
        try:
            return path.read_bytes()
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror or error}") from error

    def _download(self, kind: str, ref: FileRef) -> Path:
        path = self._folder.downloads / ref.sha256
        base = self._config.url.rstrip("/")
        download(
            self._fetcher,
            f"{base}/{blob_path(ref.sha256)}",
            ref,
            path,
            on_bytes=lambda size: self._count(kind, size),
            wait=self._wait,
        )
        return path


def _limits(manifest: ReleaseManifest) -> Limits:
    """What a payload of this release may make the device allocate.

    The model fills `weights.bin`, so its size is known and signed. Integers are decoded as int32
    and stored in a byte or more; inference may leave out as many tensors as it reads.
    """
    elements = 2 * manifest.weights.length + _SPARE
    return Limits(elements=elements, decoded_bytes=4 * elements)


def _check_digest(model: PublishedModel, manifest: ReleaseManifest, what: str) -> None:
    if model.digest.hex() != manifest.model_digest:
        raise ContentRefused(f"{what} of release {manifest.version} leads to another model")


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))

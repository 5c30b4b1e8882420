"""A slot: one folder that holds one complete release."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prunecast.client.edge.errors import ContentRefused, StateError
from prunecast.client.edge.slots.externals import check_externals
from prunecast.client.edge.slots.optimised import may_optimise, open_and_seal, open_sealed
from prunecast.client.edge.slots.patch_base import REST, save_rest
from prunecast.common.files import StorageError, file_digest, make_folder, sync, write_synced
from prunecast.compression.release import LayoutError, ReleaseError
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.release.manifest import RELEASE_FILES, ReleaseManifest
from prunecast.compression.release.runtime import InferenceSession, open_session
from prunecast.compression.release.selftest import check_outputs, unpack_arrays
from prunecast.compression.versions import PublishedModel, VersionsError

__all__ = [
    "LoadedRelease",
    "build_slot",
    "clear_slot",
    "open_optimised",
    "open_slot",
    "verify_slot",
]

_MANIFEST, _WEIGHTS = "release.json", "weights.bin"


@dataclass(frozen=True)
class LoadedRelease:
    """A release in memory: session and manifest belong together.

    Attributes:
        manifest: of the release.
        session: runs it.
        difference: largest difference in the self-test, in units of the output.
        seal: of the optimised model that the session was loaded from; None: the signed one.
    """

    manifest: ReleaseManifest
    session: InferenceSession
    difference: float
    seal: str | None = None


def clear_slot(folder: Path) -> None:
    """Empty a slot that nothing refers to.

    Raises:
        StateError: the file system refuses.
    """
    try:
        make_folder(folder.parent)
        if folder.is_symlink():
            folder.unlink()  # what it leads to is none of the agent's business
        elif folder.exists():
            shutil.rmtree(folder)
        sync(folder.parent)
        folder.mkdir()
    except OSError as error:
        raise StateError(f"cannot clear {folder}: {error.strerror or error}") from error


def build_slot(
    folder: Path, manifest: bytes, files: Mapping[str, Path], model: PublishedModel
) -> None:
    """Write a release into a cleared slot, durably, and check what was written.

    Args:
        folder: the slot.
        manifest: content of `release.json`.
        files: the small files by name: where they are now.
        model: the published model; `weights.bin` is rebuilt from it.

    Raises:
        ContentRefused: the rebuilt `weights.bin` is not the signed one.
        StateError: the file system refuses.
    """
    parsed = ReleaseManifest.from_bytes(manifest)
    try:
        for name, source in files.items():
            write_synced(folder / name, source.read_bytes())
        layout = WeightsLayout.from_bytes((folder / "layout.json").read_bytes())
        if layout.size != parsed.weights.length:
            raise ContentRefused("layout.json and release.json disagree about weights.bin")
        sha256 = layout.write(model, folder / _WEIGHTS)
        if sha256 != parsed.weights.sha256:
            raise ContentRefused("the rebuilt weights.bin is not the one that was signed")
        save_rest(model, layout, folder / REST)
        write_synced(folder / _MANIFEST, manifest)
        sync(folder)
        sync(folder.parent)
    except LayoutError as error:
        raise ContentRefused(f"the release contradicts itself: {error}") from error
    except (VersionsError, StorageError) as error:
        raise StateError(str(error)) from error
    except OSError as error:
        raise StateError(f"cannot write {folder}: {error.strerror or error}") from error


def verify_slot(folder: Path, manifest_sha256: str) -> ReleaseManifest:
    """Check every file that inference depends on against its digest.

    Raises:
        StateError: a file is missing, damaged, or a link that leads out of the slot.
    """
    try:
        for path in (folder, *(folder / name for name in (_MANIFEST, _WEIGHTS, *RELEASE_FILES))):
            if stat.S_ISLNK(path.lstat().st_mode):
                raise StateError(f"{path} is a link: a slot holds its own files")
        if file_digest(folder / _MANIFEST) != manifest_sha256:
            raise StateError(f"{folder / _MANIFEST} is damaged")
        manifest = ReleaseManifest.from_bytes((folder / _MANIFEST).read_bytes())
        for name, ref in {**manifest.files, _WEIGHTS: manifest.weights}.items():
            if file_digest(folder / name) != ref.sha256:
                raise StateError(f"{folder / name} is damaged")
    except OSError as error:
        raise StateError(f"{folder} is incomplete: {error}") from error
    return manifest


def open_slot(
    folder: Path, manifest: ReleaseManifest, *, threads: int | None, optimise: bool = False
) -> LoadedRelease:
    """Load a new session of the signed model and run the self-test.

    Args:
        folder: a verified slot.
        manifest: of the release in it.
        threads: see `open_session`.
        optimise: keep what onnxruntime makes of the model, if the disk has room, and serve that
            after the same self-test.

    Raises:
        RuntimeFailure: onnxruntime refuses the model, or it reads other files than its own.
        SelfTestFailed: it does not reproduce the recorded outputs.
        StateError: a file cannot be read.
    """
    try:
        graph = (folder / "model.onnx").read_bytes()
    except OSError as error:
        raise StateError(f"cannot read {folder}: {error}") from error
    check_externals(graph, file=_WEIGHTS, size=manifest.weights.length)
    if not (optimise and may_optimise(folder, manifest)):
        return _tested(folder, manifest, open_session(folder / "model.onnx", threads=threads))
    session, seal = open_and_seal(folder, manifest, threads=threads)
    loaded = _tested(folder, manifest, session)
    return open_optimised(folder, manifest, seal, threads=threads) or loaded


def open_optimised(
    folder: Path,
    manifest: ReleaseManifest,
    seal: str | None,
    *,
    threads: int | None,
    mark: bool = True,
) -> LoadedRelease | None:
    """Load the model that was optimised for this CPU and run the self-test.

    Args:
        folder: a verified slot.
        manifest: of the release in it.
        seal: of the optimised model, as `state.json` has it.
        threads: see `open_session`.
        mark: see `open_sealed`.

    Returns:
        None when it is not the one that was sealed, or does not pass: the signed one is there.

    Raises:
        StateError: a file cannot be read.
    """
    session = open_sealed(folder, seal, threads=threads, mark=mark)
    if session is None:
        return None
    try:
        return replace(_tested(folder, manifest, session), seal=seal)
    except ReleaseError:
        return None


def _tested(folder: Path, manifest: ReleaseManifest, session: InferenceSession) -> LoadedRelease:
    try:
        inputs = unpack_arrays((folder / "selftest.npz").read_bytes())
        expected = unpack_arrays((folder / "expected.npz").read_bytes())
    except OSError as error:
        raise StateError(f"cannot read {folder}: {error}") from error
    difference = check_outputs(expected, session.run(inputs), manifest.tolerance)
    return LoadedRelease(manifest, session, difference)

"""A slot: one folder that holds one complete release.

Arguments named alike mean the same: `folder` is the slot, which `verify_slot` has checked before
it is opened; `manifest` is of the release in it; `threads` as in `open_session`; `seal` as
`state.json` has it.

Beside the signed model may lie what onnxruntime makes of it for this CPU: optimising and folding
constants again at every start costs time and memory. It is not signed and nobody else may use it:
a *seal* in `state.json` binds its bytes to the release, to the version of onnxruntime and to the
CPU. Whatever does not match is not opened.

::

    optimised/model.onnx, weights.bin   in a slot; replaced as a whole, never changed in place
    optimised.loading                   exists while it is made or opened: found at a start, it
                                        says that this ended the process; it is not tried again
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.errors import ContentRefused, StateError, disk
from prunecast.client.edge.slots.weights import REST, check_externals, save_rest
from prunecast.common.files import file_digest, make_folder, sync, write_synced
from prunecast.compression.release import LayoutError, ReleaseError, RuntimeFailure
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.release.manifest import RELEASE_FILES, ReleaseManifest
from prunecast.compression.release.runtime import (
    InferenceSession,
    computes_in_integers,
    import_onnxruntime,
    open_session,
)
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
_FOLDER, _NEW, _MARK = "optimised", "optimised.new", "optimised.loading"
_FILES = ("model.onnx", _WEIGHTS)
_GROWTH = 5  # 8-bit integers become float32, and a little for layouts
_SPARE = 16 * 2**20
_CPU_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")


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
    """Empty a slot that nothing refers to; a StateError when the file system refuses."""
    with disk(f"clear {folder}"):
        make_folder(folder.parent)
        if folder.is_symlink():
            folder.unlink()  # what it leads to is none of the agent's business
        elif folder.exists():
            shutil.rmtree(folder)
        sync(folder.parent)
        folder.mkdir()


def build_slot(
    folder: Path, manifest: bytes, files: Mapping[str, Path], model: PublishedModel
) -> None:
    """Write a release into a cleared slot, durably, and check what was written.

    Args:
        manifest: content of `release.json`.
        files: the small files by name: where they are now.
        model: the published model; `weights.bin` is rebuilt from it.

    Raises:
        ContentRefused: the rebuilt `weights.bin` is not the signed one.
        StateError: the file system refuses.
    """
    parsed = ReleaseManifest.from_bytes(manifest)
    try:
        with disk(f"write {folder}"):
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
    except VersionsError as error:
        raise StateError(str(error)) from error


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
        optimise: keep what onnxruntime makes of the model, if the disk has room, and serve that
            after the same self-test.

    Raises:
        RuntimeFailure: onnxruntime refuses the model, or it reads other files than its own.
        SelfTestFailed: it does not reproduce the recorded outputs.
        StateError: a file cannot be read.
    """
    with disk(f"read {folder / 'model.onnx'}"):
        graph = (folder / "model.onnx").read_bytes()
    check_externals(graph, file=_WEIGHTS, size=manifest.weights.length)
    if not (optimise and _may_optimise(folder, manifest)):
        return _tested(folder, manifest, open_session(folder / "model.onnx", threads=threads))
    session, seal = _open_and_seal(folder, manifest, threads)
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
        mark: whether to leave a mark in case that opening ends the process; the one agent does.

    Returns:
        None when it is not the one that was sealed, or does not pass: the signed one is there.

    Raises:
        StateError: a file cannot be read.
    """
    session = _open_sealed(folder, seal, threads, mark)
    if session is None:
        return None
    try:
        return replace(_tested(folder, manifest, session), seal=seal)
    except ReleaseError:
        return None


def _open_sealed(
    folder: Path, seal: str | None, threads: int | None, mark: bool
) -> InferenceSession | None:
    """The optimised model of a slot whose signed files were verified; None without this seal."""
    if seal is None or (folder / _MARK).exists() or _seal(folder, folder / _FOLDER) != seal:
        return None
    try:
        _check(folder / _FOLDER)
        with _marked(folder) if mark else nullcontext():
            return open_session(
                folder / _FOLDER / "model.onnx",
                threads=threads,
                integers=computes_in_integers(folder / "model.onnx"),
                optimise=False,
            )
    except (OSError, ReleaseError):
        return None


def _tested(folder: Path, manifest: ReleaseManifest, session: InferenceSession) -> LoadedRelease:
    with disk(f"read the self-test in {folder}"):
        inputs = unpack_arrays((folder / "selftest.npz").read_bytes())
        expected = unpack_arrays((folder / "expected.npz").read_bytes())
    difference = check_outputs(expected, session.run(inputs), manifest.tolerance)
    return LoadedRelease(manifest, session, difference)


def _may_optimise(folder: Path, manifest: ReleaseManifest) -> bool:
    """Whether the disk has room, and no earlier attempt ended the process."""
    try:
        free = shutil.disk_usage(folder).free
        return free >= _most_bytes(folder, manifest) + _SPARE and not (folder / _MARK).exists()
    except OSError:
        return False


def _open_and_seal(
    folder: Path, manifest: ReleaseManifest, threads: int | None
) -> tuple[InferenceSession, str | None]:
    """Open the signed model of a slot, and keep what onnxruntime makes of it, with its seal.

    A disk that refuses costs the optimised model (the seal is None), not the signed one.
    """
    new = folder / _NEW
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        with _marked(folder):
            session = open_session(
                folder / "model.onnx", threads=threads, save_optimised=new / "model.onnx"
            )
        if sum(path.stat().st_size for path in new.iterdir()) > _most_bytes(folder, manifest):
            raise OSError("the optimised model is too large")
        _check(new)
        for name in _FILES:
            sync(new / name)
        sync(new)
        seal = _seal(folder, new)
        shutil.rmtree(folder / _FOLDER, ignore_errors=True)
        new.rename(folder / _FOLDER)
        sync(folder)
        return session, seal
    except (OSError, RuntimeFailure):
        shutil.rmtree(new, ignore_errors=True)
        return open_session(folder / "model.onnx", threads=threads), None


def _seal(folder: Path, optimised: Path) -> str | None:
    """Hex SHA-256 over the optimised model, `release.json`, onnxruntime and CPU; None without."""
    seal = hashlib.sha256(f"{_platform()}\n".encode())
    try:
        seal.update(f"{file_digest(folder / 'release.json')}\n".encode())
        for path in (optimised, *(optimised / name for name in _FILES)):
            if stat.S_ISLNK(path.lstat().st_mode):
                return None
        for name in _FILES:
            seal.update(f"{name} {file_digest(optimised / name)}\n".encode())
    except OSError:
        return None
    return seal.hexdigest()


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """A mark that stays if the process ends meanwhile, and goes with an answer or a refusal."""
    mark = folder / _MARK
    mark.touch()
    try:
        yield
    except (OSError, ReleaseError):
        _clear(mark)
        raise
    _clear(mark)


def _clear(mark: Path) -> None:
    with suppress(OSError):
        mark.unlink(missing_ok=True)


def _check(folder: Path) -> None:
    """Hold the optimised graph to its own weights, as the signed one is held to its."""
    weights = folder / "weights.bin"
    if not weights.exists():
        weights.touch()  # all of them are small and lie in the graph
    graph = (folder / "model.onnx").read_bytes()
    check_externals(graph, file=weights.name, size=weights.stat().st_size)


def _most_bytes(folder: Path, manifest: ReleaseManifest) -> int:
    return _GROWTH * (manifest.weights.length + (folder / "model.onnx").stat().st_size) + 2**20


def _platform() -> str:
    """Everything that the optimised model depends on besides the release."""
    onnxruntime = import_onnxruntime()
    cpu: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _CPU_FIELDS:
                cpu.add(f"{name.strip()}={value.strip()}")
    runtime = f"{onnxruntime.__version__} {onnxruntime.get_build_info()}"
    return "\n".join([AGENT_VERSION, runtime, platform.machine(), *sorted(cpu)])

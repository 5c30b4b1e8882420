"""A slot: one folder that holds one complete release.

Arguments named alike mean the same: `folder` is the slot, which `verify_slot` has checked before
it is opened; `manifest` is of the release in it; `threads` as in `open_session`; `seal` as
`state.json` has it; `bounds` are what the release may cost; `poll` as in `Poll`.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunecast.client.edge.config import AGENT_VERSION, DEFAULT_BOUNDS, Bounds
from prunecast.client.edge.errors import ContentRefused, MemoryShort, StateError, disk
from prunecast.client.edge.slots.trial import Poll, patiently, self_test, try_release
from prunecast.client.edge.slots.weights import REST, save_rest
from prunecast.common.files import file_digest, make_folder, sync, write_synced
from prunecast.compression.release import LayoutError, OutOfMemory, ReleaseError, RuntimeFailure
from prunecast.compression.release.externals import check_externals
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.release.manifest import RELEASE_FILES, ReleaseManifest
from prunecast.compression.release.runtime import (
    InferenceSession,
    computes_in_integers,
    import_onnxruntime,
    open_session,
)
from prunecast.compression.versions import PublishedModel, VersionsError

__all__ = [
    "LoadedRelease",
    "build_slot",
    "clear_slot",
    "forget_slot",
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
        passed: digest of the agent, the onnxruntime and the CPU with which its trial was passed.
    """

    manifest: ReleaseManifest
    session: InferenceSession
    difference: float
    seal: str | None = None
    passed: str | None = None


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


def forget_slot(folder: Path) -> None:
    """Make a slot whose release was given up incomplete, so that it is never recovered."""
    with suppress(OSError):
        (folder / _MANIFEST).unlink(missing_ok=True)


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
    folder: Path,
    manifest: ReleaseManifest,
    *,
    threads: int | None,
    optimise: bool = False,
    bounds: Bounds = DEFAULT_BOUNDS,
    passed: str | None = None,
    poll: Poll = lambda: None,
    elsewhere: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> LoadedRelease:
    """Load a new session of the signed model and run the self-test.

    Unless it has passed here before, it is tried in a process of its own first.

    Args:
        optimise: keep what onnxruntime makes of the model, if the disk has room, and serve that
            after the same self-test.
        passed: `LoadedRelease.passed` of an earlier time.
        elsewhere: entered while the trial runs, during which it cannot end this process.

    Raises:
        OutOfTime, OutOfMemory: it costs more than the bounds allow.
        RuntimeFailure: onnxruntime refuses the model, or it reads other files than its own.
        SelfTestFailed: it does not reproduce the recorded outputs.
        StateError: a file cannot be read, or the trial could not be made.
    """
    if passed != _digest_of_platform():
        with elsewhere():
            try_release(folder, manifest, threads=threads, bounds=bounds, poll=poll)
    with disk(f"read {folder / 'model.onnx'}"):
        graph = (folder / "model.onnx").read_bytes()
    check_externals(graph, file=_WEIGHTS, size=manifest.weights.length)
    how = _How(folder, manifest, threads, bounds, poll)
    if not (optimise and _may_optimise(folder, manifest)):
        return how.test(lambda: how.open(folder / "model.onnx"))
    seal: str | None = None

    def open_and_seal() -> InferenceSession:
        nonlocal seal
        session, seal = _open_and_seal(how)
        return session

    loaded = how.test(open_and_seal)
    quick = open_optimised(folder, manifest, seal, threads=threads, bounds=bounds, poll=poll)
    return quick or loaded


def open_optimised(
    folder: Path,
    manifest: ReleaseManifest,
    seal: str | None,
    *,
    threads: int | None,
    mark: bool = True,
    bounds: Bounds = DEFAULT_BOUNDS,
    poll: Poll = lambda: None,
) -> LoadedRelease | None:
    """Load the model that was optimised for this CPU and run the self-test.

    Args:
        mark: whether to leave a mark in case that opening ends the process; the one agent does.

    Returns:
        None when it is not the one that was sealed, or does not pass: the signed one is there.

    Raises:
        StateError: a file cannot be read.
    """
    if seal is None or (folder / _MARK).exists() or _seal(folder, folder / _FOLDER) != seal:
        return None
    how = _How(folder, manifest, threads, bounds, poll)
    try:
        return replace(how.test(lambda: _open_sealed(how, mark)), seal=seal)
    except (OSError, ReleaseError):
        return None


@dataclass(frozen=True)
class _How:
    """How the release in a slot is opened and tested."""

    folder: Path
    manifest: ReleaseManifest
    threads: int | None
    bounds: Bounds
    poll: Poll

    def open(self, path: Path, **options: Any) -> InferenceSession:
        memory = self.bounds.memory(self.folder)
        return open_session(path, threads=self.threads, memory=memory, **options)

    def test(self, opening: Callable[[], InferenceSession]) -> LoadedRelease:
        seconds = self.bounds.load_seconds(self.folder)

        def load() -> LoadedRelease:
            session = opening()
            difference = self_test(self.folder, self.manifest, session, seconds)
            passed = _digest_of_platform()
            return LoadedRelease(self.manifest, session, difference, passed=passed)

        try:
            return patiently(load, seconds, self.poll)
        except OutOfMemory as error:  # within the same bounds it has passed its trial
            raise MemoryShort(
                f"too little memory for release {self.manifest.version} beside what runs: free "
                f"some; it is tried again ({error})"
            ) from error


def _open_sealed(how: _How, mark: bool) -> InferenceSession:
    """The optimised model of a slot whose signed files were verified."""
    _check(how.folder / _FOLDER)
    with _marked(how.folder) if mark else nullcontext():
        return how.open(
            how.folder / _FOLDER / "model.onnx",
            integers=computes_in_integers(how.folder / "model.onnx"),
            optimise=False,
        )


def _may_optimise(folder: Path, manifest: ReleaseManifest) -> bool:
    """Whether the disk has room, and no earlier attempt ended the process."""
    try:
        free = shutil.disk_usage(folder).free
        return free >= _most_bytes(folder, manifest) + _SPARE and not (folder / _MARK).exists()
    except OSError:
        return False


def _open_and_seal(how: _How) -> tuple[InferenceSession, str | None]:
    """Open the signed model of a slot, and keep what onnxruntime makes of it, with its seal.

    A disk that refuses costs the optimised model (the seal is None), not the signed one.
    """
    folder = how.folder
    new = folder / _NEW
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        with _marked(folder):
            session = how.open(folder / "model.onnx", save_optimised=new / "model.onnx")
        if sum(path.stat().st_size for path in new.iterdir()) > _most_bytes(folder, how.manifest):
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
        return how.open(folder / "model.onnx"), None


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


def _digest_of_platform() -> str:
    return hashlib.sha256(_platform().encode()).hexdigest()


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

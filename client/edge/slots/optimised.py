"""The model as onnxruntime has optimised it for this CPU, kept beside the signed one.

Optimising and folding constants again at every start costs time and memory, so the result can be
kept. It is not signed and nobody else may use it: a *seal* in `state.json` binds its bytes to the
release, to the version of onnxruntime and to the CPU. Whatever does not match is not opened.

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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.slots.externals import check_externals
from prunecast.common.files import file_digest, sync
from prunecast.compression.release import ReleaseError, RuntimeFailure
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.runtime import (
    InferenceSession,
    computes_in_integers,
    import_onnxruntime,
    open_session,
)

__all__ = ["may_optimise", "open_and_seal", "open_sealed"]

_FOLDER, _NEW, _MARK = "optimised", "optimised.new", "optimised.loading"
_FILES = ("model.onnx", "weights.bin")
_GROWTH = 5  # 8-bit integers become float32, and a little for layouts
_SPARE = 16 * 2**20
_CPU_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")


def may_optimise(folder: Path, manifest: ReleaseManifest) -> bool:
    """Whether the disk has room, and no earlier attempt ended the process."""
    try:
        free = shutil.disk_usage(folder).free
        return free >= _most_bytes(folder, manifest) + _SPARE and not (folder / _MARK).exists()
    except OSError:
        return False


def open_and_seal(
    folder: Path, manifest: ReleaseManifest, *, threads: int | None
) -> tuple[InferenceSession, str | None]:
    """Open the signed model of a slot, and keep what onnxruntime makes of it.

    A disk that refuses costs the optimised model, not the signed one.

    Returns:
        The session of the signed model; the seal of the optimised one, None if there is none.

    Raises:
        RuntimeFailure: onnxruntime refuses the model.
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


def open_sealed(
    folder: Path, seal: str | None, *, threads: int | None, mark: bool = True
) -> InferenceSession | None:
    """Open the optimised model of a slot if it is the one that was sealed; None if it is not.

    Args:
        folder: the slot, whose signed files were verified.
        seal: as `state.json` has it.
        threads: see `open_session`.
        mark: whether to leave a mark in case that opening ends the process; the one agent does.
    """
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
    """Hold the optimised graph to its own weights, as the signed one is held to its.

    Raises:
        RuntimeFailure: it reads another file.
        OSError: it cannot be read.
    """
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

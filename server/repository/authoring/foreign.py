"""Releases of ``.onnx`` files from elsewhere, made in a process of its own.

Whoever wrote the file decides what opening it costs: a graph of 260 bytes may ask for terabytes
while onnxruntime folds its constants, functions that call each other twice grow without end when
they are inlined, and a loop may never finish. So the file is taken apart, quantised, compared and
run for its self-test under bounds on memory and time (`prunecast.common.bounds`), and comes back
as what a device will get. The process reads and writes files of a folder; nothing is pickled.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunecast.common.bounds import (
    OUT_OF_MEMORY,
    BoundsExceeded,
    bound_process,
    byte_limit,
    disk_bytes,
    run_bounded,
)
from prunecast.common.npz import NpzArchive
from prunecast.compression.codec import CodecError
from prunecast.compression.files import FilesError
from prunecast.compression.files.onnx_files import TensorReader, read_proto
from prunecast.compression.onnx import ForeignModel
from prunecast.compression.onnx.graph import load_graph, save_graph, tensors
from prunecast.compression.onnx.lattice import Steps
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.runtime import Signature, open_session
from prunecast.compression.release.selftest import Arrays, Tolerance, pack_arrays
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    VersionsError,
)
from prunecast.server.repository.authoring.build import (
    RecordedModel,
    ReleaseContents,
    Samples,
    make_variant,
    record_selftest,
    run_samples,
    split_samples,
)
from prunecast.server.repository.authoring.sources import from_onnx
from prunecast.server.repository.errors import RecipeError, RepositoryError

__all__ = ["ForeignFile", "make_bounded"]

_LEAST_SECONDS, _SECONDS_A_BYTE = 40.0, 1e-6
_ERRORS = (ReleaseError, RepositoryError, FilesError, VersionsError, CodecError)
_ALLOCATION = (
    "bad_alloc",
    "bad allocation",
    "allocate memory",
    "needs more memory",
)  # as runtimes say it


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """What is to be made of an ``.onnx`` file; see `ReleaseRecipe` for each field."""

    path: Path
    variant: str
    bits: int | None
    steps: Steps
    most_difference: float | None
    seed: int
    inputs: Arrays | None
    samples: Samples | None
    held: PublishedModel | None
    max_bytes: int | None = None
    max_seconds: float | None = None

    def bounds(self, files: list[Path], folder: Path) -> tuple[int, float]:
        """Bytes and seconds that may be spent on it.

        Args:
            files: that the model consists of, as far as they are known.
            folder: with what else is read.
        """
        size = sum(disk_bytes(path) for path in (*files, *folder.iterdir()))
        free = _LEAST_SECONDS + _SECONDS_A_BYTE * size
        seconds = free if self.max_seconds is None else self.max_seconds
        return byte_limit(size, self.max_bytes), seconds

    def make(self) -> ReleaseContents:
        """Make it in this process.

        Raises:
            ReleaseError, RepositoryError: nothing can be released.
        """
        made = from_onnx(
            self.path,
            bits=self.bits,
            steps=self.steps,
            variant="fp32" if self.variant == "fp32" else "lattice",
            held=self.held,
            inputs=self.inputs,
            seed=self.seed,
            most_difference=self.most_difference,
            max_bytes=self.max_bytes,
        )
        kind = "int8-qdq" if self.variant == "int8-qdq" else made.kind
        if self.samples is not None or kind == "int8-qdq":
            reference = None
            if self.samples is not None:  # what the file refers to has been checked
                reference = run_samples(open_session(self.path), self.samples)
            made = make_variant(made, kind, self.samples, reference=reference, held=self.held)
        return replace(made, recorded=record_selftest(made))


def make_bounded(file: ForeignFile) -> ReleaseContents:
    """Make the release of a file in a process of its own.

    Raises:
        ForeignModel: it takes more memory or time than is allowed, or crashes.
        ReleaseError, RepositoryError: nothing can be released.
    """
    if file.path.exists() and not file.path.is_file():
        raise ForeignModel(f"cannot read {file.path}: it is no regular file")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_order(folder, file)
        what = f"making a release of {file.path}"
        try:
            memory, seconds = file.bounds([file.path], folder)
            status, said = run_bounded(
                f"{__name__}:main", [str(folder)], memory=memory, seconds=seconds, what=what
            )
        except BoundsExceeded as error:
            raise ForeignModel(str(error)) from error
        except OSError as error:
            raise ForeignModel(f"cannot read {file.path}: {error.strerror or error}") from error
        if (folder / "error.json").is_file():
            raise _told(json.loads((folder / "error.json").read_bytes()))
        if status:
            last = (said.splitlines() or [f"it ended with code {status}"])[-1]
            raise ForeignModel(f"{what} failed: {last}")
        return _read_contents(folder)


def _told(document: dict[str, Any]) -> Exception:
    """The error that the process ended with."""
    kinds = {kind.__name__: kind for base in _ERRORS for kind in _family(base)}
    kind = kinds.get(document["kind"], ForeignModel)
    if kind is RecipeError:
        return RecipeError(document["option"], document["message"])
    return kind(document["message"])


def _family(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for kind in base.__subclasses__():
        yield from _family(kind)


# -- what both sides write and read ---------------------------------------------------------------


def _write_order(folder: Path, file: ForeignFile) -> None:
    simple = ("variant", "bits", "steps", "most_difference", "seed", "max_bytes", "max_seconds")
    document: dict[str, Any] = {key: getattr(file, key) for key in simple}
    document |= {"path": str(file.path)}  # the process begins in the same folder
    if file.inputs is not None:
        _write_arrays(folder / "given.npz", file.inputs)
    if file.samples is not None:
        labels = {} if file.samples.labels is None else {"labels": file.samples.labels}
        _write_arrays(folder / "samples.npz", {**file.samples.inputs, **labels})
    if file.held is not None:
        document["held"] = _write_model(folder / "held.npz", file.held)
    (folder / "order.json").write_text(json.dumps(document))


def _read_order(folder: Path) -> ForeignFile:
    document: dict[str, Any] = json.loads((folder / "order.json").read_bytes())
    held, path = document.pop("held", None), Path(document.pop("path"))
    given, samples = folder / "given.npz", folder / "samples.npz"
    return ForeignFile(
        path=path,
        inputs=_read_arrays(given) if given.is_file() else None,
        samples=split_samples(_read_arrays(samples)) if samples.is_file() else None,
        held=None if held is None else _read_model(folder / "held.npz", held),
        **document,
    )


def _write_contents(folder: Path, made: ReleaseContents) -> None:
    recorded = made.recorded
    assert recorded is not None
    assert isinstance(made.inputs, Mapping)
    document = {
        "model": _write_model(folder / "model.npz", made.model),
        "variant": made.variant,
        "metrics": dict(made.metrics),
        "kind": made.kind,
        "numerics": dict(made.numerics),
        "notes": list(made.notes),
        "tolerance": asdict(recorded.tolerance),
        "takes": [[s.name, s.dtype, s.shape] for s in recorded.takes],
        "gives": [[s.name, s.dtype, s.shape] for s in recorded.gives],
        "settings": dict(recorded.settings),
    }
    save_graph(made.graph, folder / "graph.onnx")
    save_graph(made.exported or made.graph, folder / "exported.onnx")
    _write_arrays(folder / "inputs.npz", made.inputs)
    _write_arrays(folder / "tested.npz", recorded.inputs)
    _write_arrays(folder / "expected.npz", recorded.expected)
    (folder / "made.json").write_text(json.dumps(document))


def _read_contents(folder: Path) -> ReleaseContents:
    document: dict[str, Any] = json.loads((folder / "made.json").read_bytes())
    return ReleaseContents(
        _read_model(folder / "model.npz", document["model"]),
        load_graph(folder / "graph.onnx"),
        _read_arrays(folder / "inputs.npz"),
        document["variant"],
        metrics=document["metrics"],
        kind=document["kind"],
        numerics=document["numerics"],
        notes=tuple(document["notes"]),
        exported=load_graph(folder / "exported.onnx"),
        recorded=RecordedModel(
            _read_arrays(folder / "tested.npz"),
            _read_arrays(folder / "expected.npz"),
            Tolerance(**document["tolerance"]),
            _signatures(document["takes"]),
            _signatures(document["gives"]),
            settings=document["settings"],
        ),
    )


def _signatures(rows: list[Any]) -> tuple[Signature, ...]:
    return tuple(Signature(name, dtype, tuple(shape)) for name, dtype, shape in rows)


def _write_arrays(path: Path, arrays: Arrays) -> None:
    path.write_bytes(pack_arrays(arrays, level=0))


def _read_arrays(path: Path) -> dict[str, Any]:
    return NpzArchive(path, max_bytes=path.stat().st_size).read_all()


def _write_model(path: Path, model: PublishedModel) -> dict[str, Any]:
    """Write the arrays of a model; returns what else there is to it."""
    rows: list[tuple[str, tuple[float, bool, str] | None]] = []
    arrays: dict[str, Any] = {}
    for number, (name, tensor) in enumerate(model.tensors.items()):
        if isinstance(tensor, LatticeTensor):
            arrays[str(number)] = tensor.q
            rows.append((name, (tensor.step, tensor.pruned, tensor.dtype.name)))
        else:
            arrays[str(number)] = tensor.values
            rows.append((name, None))
    _write_arrays(path, arrays)
    return {"counter": model.counter, "tensors": rows}


def _read_model(path: Path, document: dict[str, Any]) -> PublishedModel:
    arrays, found = _read_arrays(path), dict[str, Tensor]()
    for number, (name, lattice) in enumerate(document["tensors"]):
        values = arrays[str(number)]
        found[name] = RawTensor(values) if lattice is None else LatticeTensor(values, *lattice)
    return PublishedModel(found, document["counter"])


# -- the process ----------------------------------------------------------------------------------


def main(name: str) -> None:
    """What the process does: an order out of the folder `name`, what was made into it."""
    folder = Path(name)
    file = _read_order(folder)
    try:
        proto, reader = read_proto(file.path), TensorReader(file.path, file.max_bytes)
        for tensor in tensors(proto):
            if tensor.external_data:
                reader.place(tensor)
        del proto
        bound_process(*file.bounds(reader.files, folder))  # now that all files are known
        _write_contents(folder, file.make())
    except _ERRORS as error:
        text = str(error)
        if any(words in text for words in _ALLOCATION):
            sys.exit(OUT_OF_MEMORY)
        wrapped = error if not isinstance(error, FilesError) else ForeignModel(text)
        document = {"kind": type(wrapped).__name__, "message": text}
        if isinstance(error, RecipeError):
            document |= {"option": error.option, "message": error.message}
        (folder / "error.json").write_text(json.dumps(document))

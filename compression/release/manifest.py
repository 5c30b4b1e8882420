"""`release.json`: what a release is and the digests of everything that belongs to it.

The file is small and is itself signed by digest (it is a TUF target), so each digest in it is as
trusted as the signature. Only numpy and the standard library: server and device share it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, cast

import numpy as np

from prunecast.common.documents import strict_json
from prunecast.compression.codec import CodecError, Limits, encode, open_payload
from prunecast.compression.release import ManifestError, ReleaseError
from prunecast.compression.release.runtime import Signature
from prunecast.compression.release.selftest import Tolerance

__all__ = [
    "MAX_MANIFEST_BYTES",
    "RELEASE_FILES",
    "FileRef",
    "PatchRef",
    "ReleaseManifest",
    "blob_path",
    "check_release_name",
    "manifest_path",
    "pack_file",
    "parse_manifest_path",
    "unpack_file",
]

MAX_MANIFEST_BYTES = 2**20
RELEASE_FILES = ("model.onnx", "layout.json", "selftest.npz", "expected.npz")
_SCHEMA = 1
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(rf"({_NAME.pattern})/([1-9][0-9]{{0,14}})/release\.json")
_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){0,2}")


def check_release_name(name: str) -> str:
    """Return `name` if it can name a release: it becomes part of paths and URLs.

    Raises:
        ManifestError: empty, too long, or with characters other than a-z 0-9 . _ -
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ManifestError(
            f"release name {str(name)[:80]!r} is not usable: at most 64 of a-z 0-9 . _ -, "
            "beginning and ending with a letter or digit, without '..'"
        )
    return name


def manifest_path(name: str, version: int) -> str:
    """Target path of a release's `release.json` in the repository's signed metadata."""
    return f"{check_release_name(name)}/{version}/release.json"


def parse_manifest_path(path: str) -> tuple[str, int] | None:
    """Name and version of a target path that `manifest_path` made; None for any other path."""
    found = _PATH.fullmatch(path)
    return (found[1], int(found[2])) if found and ".." not in found[1] else None


def blob_path(sha256: str) -> str:
    """Path of a file in the repository by its content, relative to the repository's URL."""
    return f"blobs/{sha256}"


@dataclass(frozen=True)
class FileRef:
    """A file by content.

    Attributes:
        sha256: hex digest.
        length: size in bytes.
        packed: what travels instead, see `pack_file`; None where the file itself does.
    """

    sha256: str
    length: int
    packed: FileRef | None = None

    @property
    def travels(self) -> FileRef:
        """What is stored and downloaded: the packed file, or this one."""
        return self.packed or self


_CONTENT = "file"
_LEAST_SAVED = 0.05  # share of a file's bytes


def pack_file(data: bytes) -> bytes | None:
    """What may travel instead of a file: a payload of the codec; None where that saves little."""
    packed = encode({_CONTENT: np.frombuffer(data, np.uint8)}, thorough=True)
    return packed if len(packed) < (1 - _LEAST_SAVED) * len(data) else None


def unpack_file(packed: bytes, ref: FileRef) -> bytes:
    """The file that a packed one holds, checked against its digest.

    No more is allocated than the file's signed length calls for.

    Raises:
        ManifestError: it is damaged, or holds another file.
    """
    most = 4 * ref.length + 1024  # as the codec counts: four bytes an element
    limits = Limits(
        elements=ref.length, decoded_bytes=most, free_bytes=most, tensors=1, serial_symbols=most
    )
    try:
        payload = open_payload(packed, limits=limits)
        data = payload[_CONTENT].tobytes() if _CONTENT in payload else b""
    except CodecError as error:
        raise ManifestError(f"a packed file is damaged: {error}") from error
    if len(data) != ref.length or hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ManifestError("a packed file is not the one that was signed")
    return data


@dataclass(frozen=True)
class PatchRef:
    """A delta payload.

    Attributes:
        base_version: release it starts from.
        base_digest: hex digest of the published model it starts from.
        file: the payload.
    """

    base_version: int
    base_digest: str
    file: FileRef


@dataclass(frozen=True)
class ReleaseManifest:
    """Content of `release.json`.

    Attributes:
        name: what is released; also the stream of its payloads.
        version: counts up with every release of that name.
        created: UTC time, ISO 8601.
        model_digest: hex digest of the published model (the federation's version).
        counter: the federation's number of that version.
        variant: ``lattice`` or ``fp32``: what `weights.bin` holds.
        inputs: signature of the inputs.
        outputs: signature of the outputs.
        files: the files of `RELEASE_FILES` by name.
        weights: `weights.bin`; never travels, it is rebuilt from the model.
        keyframe: payload that carries the published model alone.
        patches: payloads that carry it against an earlier release.
        tolerance: of the self-test.
        metrics: figures measured on this very model.
        licence: SPDX expression, or None when not stated.
        minimum_agent: lowest agent version that can run the release, ``X.Y.Z``.
        kind: which variant of the model this is, in a word for people; agents do not read it.
        numerics: how far it computes from the float32 reference, and on how many samples.
    """

    name: str
    version: int
    created: str
    model_digest: str
    counter: int
    variant: str
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    files: Mapping[str, FileRef]
    weights: FileRef
    keyframe: FileRef
    patches: tuple[PatchRef, ...]
    tolerance: Tolerance
    metrics: Mapping[str, float] = field(default_factory=dict)
    licence: str | None = None
    minimum_agent: str = "0.1.0"
    kind: str = ""
    numerics: Mapping[str, float] = field(default_factory=dict)

    @property
    def stream(self) -> bytes:
        """Identifier that the payloads of this release are made for."""
        return self.name.encode()

    def patch_from(self, model_digest: str) -> PatchRef | None:
        """The patch from a held published model, when there is one smaller than the keyframe."""
        found = [p for p in self.patches if p.base_digest == model_digest]
        best = min(found, key=lambda p: p.file.length, default=None)
        return best if best and best.file.length < self.keyframe.length else None

    def references(self) -> dict[str, FileRef]:
        """Every file that travels, as it does, by a name for messages."""
        return {
            **{name: ref.travels for name, ref in self.files.items()},
            "keyframe": self.keyframe,
            **{f"patch from {p.base_version}": p.file for p in self.patches},
        }

    def to_bytes(self) -> bytes:
        """JSON with sorted keys; the same manifest gives the same bytes."""
        document = {
            "schema": _SCHEMA,
            "name": self.name,
            "version": self.version,
            "created": self.created,
            "model": {"digest": self.model_digest, "counter": self.counter},
            "inputs": [astuple(s) for s in self.inputs],
            "outputs": [astuple(s) for s in self.outputs],
            "files": {name: _entry(ref) for name, ref in self.files.items()},
            "weights": {"variant": self.variant, **_entry(self.weights)},
            "keyframe": _entry(self.keyframe),
            "patches": [
                {"base_version": p.base_version, "base_digest": p.base_digest, **_entry(p.file)}
                for p in self.patches
            ],
            "selftest": asdict(self.tolerance),
            "metrics": dict(self.metrics),
            "licence": self.licence,
            "minimum_agent": self.minimum_agent,
        }
        if self.kind:
            document["kind"] = self.kind
        if self.numerics:
            document["numerics"] = dict(self.numerics)
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> ReleaseManifest:
        """Read what `to_bytes` wrote, checking every field.

        Raises:
            ManifestError: malformed, too large, or of a newer schema.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"release.json exceeds {MAX_MANIFEST_BYTES} bytes")
        try:
            document: Any = strict_json(data)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"release.json is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
            raise ManifestError(f"release.json is not of schema {_SCHEMA}: update the agent")
        try:
            return _parse(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ManifestError):
                raise
            why = str(error) if isinstance(error, ReleaseError) else f"field {error}"
            raise ManifestError(f"release.json is malformed: {why}") from error


def _parse(document: Mapping[str, Any]) -> ReleaseManifest:
    files = {str(name): _packable(entry) for name, entry in document["files"].items()}
    if set(files) != set(RELEASE_FILES):
        raise ManifestError(f"release.json must list exactly the files {', '.join(RELEASE_FILES)}")
    test, weights = document["selftest"], document["weights"]
    if weights["variant"] not in ("lattice", "fp32"):
        raise ManifestError(f"release.json has unknown weights {str(weights['variant'])[:20]!r}")
    licence = document["licence"]
    return ReleaseManifest(
        name=check_release_name(document["name"]),
        version=_integer(document["version"], low=1),
        created=_text(document["created"], 40),
        model_digest=_hex(document["model"]["digest"]),
        counter=_integer(document["model"]["counter"]),
        variant=weights["variant"],
        inputs=tuple(_signature(row) for row in document["inputs"]),
        outputs=tuple(_signature(row) for row in document["outputs"]),
        files=files,
        weights=_file(weights),
        keyframe=_file(document["keyframe"]),
        patches=tuple(
            PatchRef(_integer(p["base_version"], low=1), _hex(p["base_digest"]), _file(p))
            for p in document["patches"]
        ),
        tolerance=Tolerance(_number(test["atol"]), _number(test["rtol"]), bool(test["argmax"])),
        metrics={_text(k, 100): _number(v) for k, v in document["metrics"].items()},
        licence=None if licence is None else _text(licence, 200),
        minimum_agent=_version(document["minimum_agent"]),
        kind=_text(document.get("kind", ""), 40),
        numerics={_text(k, 100): _number(v) for k, v in document.get("numerics", {}).items()},
    )


def _file(entry: Mapping[str, Any]) -> FileRef:
    return FileRef(_hex(entry["sha256"]), _integer(entry["length"]))


def _packable(entry: Mapping[str, Any]) -> FileRef:
    return replace(_file(entry), packed=_file(entry["packed"]) if "packed" in entry else None)


def _entry(ref: FileRef) -> dict[str, Any]:
    entry: dict[str, Any] = {"sha256": ref.sha256, "length": ref.length}
    return {**entry, "packed": _entry(ref.packed)} if ref.packed else entry


def _expect(value: Any, usable: bool, what: str) -> Any:
    if not usable:
        raise ManifestError(f"release.json has {str(value)[:80]!r} in the place of {what}")
    return value


def _hex(value: object) -> str:
    usable = isinstance(value, str) and _SHA256.fullmatch(value) is not None
    return str(_expect(value, usable, "a SHA-256"))


def _integer(value: object, *, low: int = 0) -> int:
    usable = type(value) is int and low <= value < 2**53
    return int(_expect(value, usable, "a number"))


def _number(value: object) -> float:
    usable = type(value) in (int, float) and math.isfinite(cast(float, value))
    return float(_expect(value, usable, "a number"))


def _text(value: object, limit: int) -> str:
    usable = isinstance(value, str) and len(value) <= limit and value.isprintable()
    return str(_expect(value, usable, "a text"))


def _version(value: object) -> str:
    text = _text(value, 30)
    return str(_expect(text, _VERSION.fullmatch(text) is not None, "an agent version"))


def _signature(row: Any) -> Signature:
    name, dtype, shape = row
    dims = tuple(n if isinstance(n, str) else _integer(n) for n in shape)
    return Signature(_text(name, 200), _text(dtype, 20), dims)

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.codec import encode
from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import (
    RELEASE_FILES,
    FileRef,
    PatchRef,
    ReleaseManifest,
    check_release_name,
    pack_file,
    unpack_file,
)
from prunecast.compression.release.runtime import Signature
from prunecast.compression.release.selftest import Tolerance

MANIFEST = ReleaseManifest(
    name="mnist",
    version=3,
    created="2030-01-01T00:00:00Z",
    model_digest="ab" * 32,
    counter=17,
    variant="lattice",
    inputs=(Signature("input", "float32", ("batch", 1, 28, 28)),),
    outputs=(Signature("output", "float32", ("batch", 10)),),
    files={name: FileRef("01" * 32, 10) for name in RELEASE_FILES},
    weights=FileRef("02" * 32, 1000),
    keyframe=FileRef("03" * 32, 500),
    patches=(
        PatchRef(2, "cd" * 32, FileRef("04" * 32, 40)),
        PatchRef(1, "ef" * 32, FileRef("05" * 32, 600)),
    ),
    tolerance=Tolerance(1e-4, 1e-3, True),
    metrics={"accuracy": 0.97},
    licence="Apache-2.0",
)


def test_manifest_survives_its_json() -> None:
    assert ReleaseManifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST


def test_a_packed_file_survives_and_travels_instead_of_the_plain_one() -> None:
    packed = FileRef("06" * 32, 4)
    files = {**MANIFEST.files, "model.onnx": FileRef("01" * 32, 10, packed)}
    manifest = replace(MANIFEST, files=files)
    assert ReleaseManifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.references()["model.onnx"] == packed
    assert manifest.references()["layout.json"] == FileRef("01" * 32, 10)


def test_a_file_is_packed_where_that_saves_bytes_and_unpacked_to_its_length() -> None:
    data = b"the same words again and again, " * 300
    packed = pack_file(data)
    assert packed is not None
    assert len(packed) < 200
    ref = FileRef(hashlib.sha256(data).hexdigest(), len(data))
    assert unpack_file(packed, ref) == data
    assert pack_file(np.random.default_rng(1).bytes(4000)) is None
    bomb = encode({"file": np.zeros(1 << 24, np.uint8)})
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match="elements"):
            unpack_file(bomb, ref)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ManifestError, match="not the one that was signed"):
        unpack_file(packed, FileRef("00" * 32, len(data)))


def test_a_patch_is_chosen_only_when_it_is_smaller_than_the_keyframe() -> None:
    patch = MANIFEST.patch_from("cd" * 32)
    assert patch is not None
    assert patch.file.length == 40
    assert MANIFEST.patch_from("ef" * 32) is None
    assert MANIFEST.patch_from("00" * 32) is None


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", "A", "a..b", ".a", "a.", "-", "x" * 65, "a b", "ä", "a\n"]
)
def test_names_that_would_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ManifestError):
        check_release_name(name)
    document = json.loads(MANIFEST.to_bytes()) | {"name": name}
    with pytest.raises(ManifestError):
        ReleaseManifest.from_bytes(json.dumps(document).encode())


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *where, last, value = path

    def change(document: dict[str, Any]) -> None:
        for step in where:
            document = document[step]
        document[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("schema", 2),
        _set("version", 0),
        _set("version", True),
        _set("version", "3"),
        _set("files", {}),
        _set("files", "../../etc/passwd", {"sha256": "01" * 32, "length": 1}),
        _set("files", "model.onnx", "sha256", "01" * 31 + "0G"),
        _set("files", "model.onnx", "length", -1),
        _set("keyframe", "sha256", "../x"),
        _set("weights", "variant", "code"),
        _set("weights", "length", 2**60),
        _set("metrics", {"accuracy": "high"}),
        _set("minimum_agent", "latest"),
        _set("selftest", "atol", -1),
        _set("selftest", None),
        _set("inputs", [["input", "float32"]]),
        _set("patches", [3]),
        _set("created", "now\nlater"),
    ],
)
def test_malformed_manifests_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(MANIFEST.to_bytes())
    change(document)
    with pytest.raises(ManifestError):
        ReleaseManifest.from_bytes(json.dumps(document).encode())


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_only_our_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        ReleaseManifest.from_bytes(data)


def test_an_oversized_manifest_is_refused() -> None:
    with pytest.raises(ManifestError, match="exceeds"):
        ReleaseManifest.from_bytes(b" " * (2**20 + 1))


@pytest.mark.parametrize("more", [b'"version":1,', b'"x":{"y":1,"y":2},', b'"x":Infinity,'])
def test_documents_that_two_readers_could_read_differently(more: bytes) -> None:
    whole = MANIFEST.to_bytes()
    with pytest.raises(ManifestError, match=r"given twice|Infinity"):
        ReleaseManifest.from_bytes(b"{" + more + whole[1:])

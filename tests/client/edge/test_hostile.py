"""Content made to do harm, correctly signed or not: refused, and what runs goes on running."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import ContentRefused, StateError
from prunecast.client.edge.slots.slot import verify_slot
from prunecast.compression.codec import TensorSpec, encode
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.externals import check_externals
from prunecast.compression.release.manifest import (
    FileRef,
    PatchRef,
    ReleaseManifest,
    manifest_path,
    pack_file,
    unpack_file,
)
from prunecast.compression.versions import PublishedModel, frame
from prunecast.compression.versions.layout import TensorHead, pack_changes, pack_heads
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import build
from prunecast.server.repository.reading import target_file

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]
Change = Callable[[Any, dict[str, bytes]], Any]


@pytest.fixture
def agent(start: Start, publish: Publish) -> Agent:
    """An agent that runs release 1."""
    publish(1)
    agent = start()
    agent.update_once()
    agent.confirm()
    return agent


@pytest.fixture
def publish_changed(monkeypatch: pytest.MonkeyPatch, publish: Publish) -> Callable[..., Any]:
    """A function: a publisher who signs what `change(manifest, blobs)` makes of a release."""
    real = build.BuiltRelease.finish

    def publish_changed(change: Change) -> ReleaseManifest:
        def changed(*arguments: Any) -> tuple[ReleaseManifest, dict[str, bytes]]:
            manifest, blobs = real(*arguments)
            return change(manifest, blobs), blobs

        with monkeypatch.context() as patch:
            patch.setattr(build.BuiltRelease, "finish", changed)
            return publish(2)

    return publish_changed


def _keep(blobs: dict[str, bytes], data: bytes) -> FileRef:
    ref = FileRef(hashlib.sha256(data).hexdigest(), len(data))
    blobs[ref.sha256] = data
    return ref


def _with_file(name: str, change: Callable[[bytes], bytes]) -> Change:
    def changed(manifest: ReleaseManifest, blobs: dict[str, bytes]) -> ReleaseManifest:
        held = manifest.files[name]
        data = blobs[held.travels.sha256]
        ref = _keep(blobs, change(unpack_file(data, held) if held.packed else data))
        return replace(manifest, files={**manifest.files, name: ref})

    return changed


def _release_1_runs(agent: Agent, images: np.ndarray) -> None:
    assert agent.model.infer({"input": images}).version == 1
    assert agent.status()["active"]["version"] == 1


# packed files


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (lambda data: b"no payload", "damaged"),
        (lambda data: pack_file(data)[:-9], "damaged"),
        (lambda data: pack_file(data + bytes(9)), "damaged"),  # more than was signed
        (lambda data: pack_file(data), "not the one that was signed"),
        (lambda data: encode({"other": np.zeros(9, np.uint8)}), "not the one that was signed"),
        (lambda data: encode({"file": np.zeros(1 << 24, np.uint8)}), "damaged"),
    ],
)
def test_packed_files_that_are_not_the_signed_ones(
    agent: Agent,
    publish_changed: Callable[..., Any],
    images: np.ndarray,
    packed: Callable[[bytes], bytes],
    says: str,
) -> None:
    def changed(manifest: ReleaseManifest, blobs: dict[str, bytes]) -> ReleaseManifest:
        plain = manifest.files["model.onnx"]
        assert plain.packed is not None
        data = unpack_file(blobs[plain.packed.sha256], plain)
        held = FileRef("ab" * 32, plain.length, _keep(blobs, packed(data)))
        return replace(manifest, files={**manifest.files, "model.onnx": held})

    publish_changed(changed)
    with pytest.raises(ContentRefused, match=says):
        agent.update_once()
    _release_1_runs(agent, images)


# external data


@pytest.mark.parametrize(
    "location",
    ["../../../../etc/passwd", "/etc/passwd", "a/../weights.bin", "release.json", "", "C:\\x"],
)
def test_external_data_outside_the_release(
    agent: Agent, publish_changed, images: np.ndarray, location: str
) -> None:
    def point_elsewhere(data: bytes) -> bytes:
        model = onnx.ModelProto.FromString(data)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location
        return model.SerializeToString()

    publish_changed(_with_file("model.onnx", point_elsewhere))
    result = agent.update_once()
    assert (result.outcome, result.version) == ("rejected", 1)
    assert "may read weights.bin alone" in str(result.reason)
    _release_1_runs(agent, images)


def _external(location: str = "/etc/passwd", **entries: object) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=1)
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor


def _hidden(where: str) -> onnx.ModelProto:
    """A model whose only external tensor lies where a shallow check does not look."""
    model, tensor = onnx.ModelProto(ir_version=10), _external()
    attribute = onnx.AttributeProto(name="value")
    if where == "constant":
        attribute.t.CopyFrom(tensor)
    elif where == "list":
        attribute.tensors.append(tensor)
    elif where == "branch":
        attribute.g.initializer.append(tensor)
    elif where == "branches":
        attribute.graphs.add().initializer.append(tensor)
    elif where == "sparse attribute":
        attribute.sparse_tensor.values.CopyFrom(tensor)
    elif where == "sparse values":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif where == "sparse indices":
        model.graph.sparse_initializer.add().indices.CopyFrom(tensor)
    elif where == "training":
        model.training_info.add().algorithm.initializer.append(tensor)
    if where == "function":
        node = model.functions.add().node.add()
        attribute.t.CopyFrom(tensor)
    else:
        node = model.graph.node.add()
    node.attribute.append(attribute)
    return model


@pytest.mark.parametrize(
    "where",
    [
        *("constant", "list", "branch", "branches", "function", "training"),
        *("sparse attribute", "sparse values", "sparse indices"),
    ],
)
def test_external_data_wherever_a_model_can_hide_them(where: str) -> None:
    with pytest.raises(RuntimeFailure, match="/etc/passwd"):
        check_externals(_hidden(where).SerializeToString(), file="weights.bin", size=100)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (_external("weights.bin", offset=64, length=37), "outside the 100 bytes"),
        (_external("weights.bin", offset=-1), "outside"),
        (_external("weights.bin", offset="１"), "outside"),
        (_external("weights.bin", basepath="/etc"), "ambiguously"),
        (onnx.TensorProto(name="t", data_location=1), "may read"),
    ],
)
def test_external_data_beyond_the_weights(tensor: onnx.TensorProto, problem: str) -> None:
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.append(tensor)
    with pytest.raises(RuntimeFailure, match=problem):
        check_externals(model.SerializeToString(), file="weights.bin", size=100)


def test_an_entry_given_twice_is_refused() -> None:
    tensor = _external("weights.bin")
    tensor.external_data.add(key="location", value="/etc/passwd")
    model = onnx.ModelProto()
    model.graph.initializer.append(tensor)
    with pytest.raises(RuntimeFailure, match="ambiguously"):
        check_externals(model.SerializeToString(), file="weights.bin", size=100)


def test_damaged_and_foreign_graphs(graph: ExportedGraph) -> None:
    whole = graph.skeleton
    check_externals(whole, file="weights.bin", size=0)
    for data in (whole[:-1], b"\xff" * 30, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x3b"):
        with pytest.raises(RuntimeFailure, match="damaged"):
            check_externals(data, file="weights.bin", size=0)
    with pytest.raises(RuntimeFailure, match="own format"):
        check_externals(b"\0\0\0\0ORTM", file="weights.bin", size=0)
    nested = onnx.GraphProto()
    for _ in range(25):
        outer = onnx.GraphProto()
        outer.node.add().attribute.add().g.CopyFrom(nested)
        nested = outer
    with pytest.raises(RuntimeFailure, match="deep"):
        check_externals(onnx.ModelProto(graph=nested).SerializeToString(), file="w", size=0)


# links in the state folder


@pytest.mark.parametrize("what", ["weights.bin", "model.onnx", "release.json", "slot"])
def test_a_link_in_the_place_of_a_file(
    agent: Agent, start: Start, config: AgentConfig, tmp_path: Path, what: str
) -> None:
    """The very same content behind a link could be changed after it was verified."""
    slot = config.state / "slots" / agent.status()["active"]["slot"]
    path = slot if what == "slot" else slot / what
    digest = agent.status()["active"]["manifest"]
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(StateError, match="is a link"):
        verify_slot(slot, digest)
    again = start()
    assert again.model.version is None
    assert "is a link" in again.status()["last_error"]
    assert again.update_once().version == 1  # fetched again, beside the link
    assert outside.exists()
    assert again.update_once().outcome == "current"


def test_a_slot_that_leads_elsewhere_is_not_emptied(
    agent: Agent, publish: Publish, config: AgentConfig, tmp_path: Path
) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("kept")
    used = agent.status()["active"]["slot"]
    (config.state / "slots" / ("b" if used == "a" else "a")).symlink_to(outside)
    publish(2)
    assert agent.update_once().version == 2
    assert (outside / "file").read_text() == "kept"
    assert [p.name for p in outside.iterdir()] == ["file"]


def test_a_download_does_not_follow_a_link(
    agent: Agent, publish: Publish, config: AgentConfig, tmp_path: Path
) -> None:
    outside = tmp_path / "precious"
    outside.write_text("kept")
    ref = publish(2).patches[0].file
    (config.state / "downloads").mkdir()
    os.symlink(outside, config.state / "downloads" / f"{ref.sha256}.part")
    assert agent.update_once().version == 2
    assert outside.read_text() == "kept"


# bombs and endless data


def _bomb(model: PublishedModel, base: PublishedModel | None) -> bytes:
    """A payload of a few hundred bytes that declares 4 TB."""
    from prunecast.compression.versions.layout import head_of

    heads = {name: head_of(tensor) for name, tensor in model.tensors.items()}
    huge = TensorHead(TensorSpec(np.dtype(np.float64), (2**20, 2**19)), None, False)
    if base is None:
        layout = pack_heads({**model.tensors, "b1": _Huge()})  # type: ignore[dict-item]
        kind, digest = frame.Kind.KEYFRAME, b""
    else:
        old = {name: head_of(tensor) for name, tensor in base.tensors.items()}
        layout = pack_changes([*{**heads, "b1": huge}.values()], [*old.values()])
        kind, digest = frame.Kind.DELTA, base.digest
    return frame.pack(
        kind, b"toy", model.counter, model.digest, base=digest, layout=layout, body=b"x" * 40
    )


class _Huge:
    """What the coder of a layout reads from a raw tensor."""

    dtype = np.dtype(np.float64)
    shape = (2**20, 2**19)
    spec = TensorSpec(dtype, shape)


@pytest.mark.parametrize("which", ["patch", "keyframe"])
def test_payload_bomb(agent: Agent, publish_changed, model, images: np.ndarray, which: str) -> None:
    """A tiny payload that declares huge tensors is refused before they are allocated."""

    def bomb(manifest: ReleaseManifest, blobs: dict[str, bytes]) -> ReleaseManifest:
        if which == "keyframe":
            ref = _keep(blobs, _bomb(model(2), None))
            return replace(manifest, keyframe=ref, patches=())
        (patch,) = manifest.patches
        ref = _keep(blobs, _bomb(model(2), model(1)))
        return replace(manifest, patches=(PatchRef(1, patch.base_digest, ref),))

    publish_changed(bomb)
    tracemalloc.start()
    try:
        if which == "patch":
            result = agent.update_once()
            assert (result.version, result.payload) == (2, "keyframe")
            assert "above the limits" in str(result.reason)
        else:
            with pytest.raises(ContentRefused, match="above the limits"):
                agent.update_once()
            _release_1_runs(agent, images)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_self_test_bomb(agent: Agent, publish_changed, images: np.ndarray) -> None:
    def huge(_: bytes) -> bytes:
        header, out = io.BytesIO(), io.BytesIO()
        described = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 12)}
        np.lib.format.write_array_header_1_0(header, described)
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("input.npy", header.getvalue())
        return out.getvalue()

    publish_changed(_with_file("selftest.npz", huge))
    result = agent.update_once()
    assert (result.outcome, result.version) == ("rejected", 1)
    assert "declares" in str(result.reason)
    _release_1_runs(agent, images)


@pytest.mark.parametrize("what", ["patch", "keyframe", "expected.npz", "manifest", "timestamp"])
def test_endless_data(
    agent: Agent, publish: Publish, network, images: np.ndarray, config: AgentConfig, what: str
) -> None:
    """A response without end is cut at the signed length, or at the limit of metadata."""
    manifest = publish(2)
    patch = f"blobs/{manifest.patches[0].file.sha256}"
    (target,) = (network.folder / "targets" / "toy" / "2").iterdir()
    path = {
        "patch": patch,
        "keyframe": f"blobs/{manifest.keyframe.sha256}",
        "expected.npz": f"blobs/{manifest.files['expected.npz'].sha256}",
        "manifest": str(target.relative_to(network.folder)),
        "timestamp": "metadata/timestamp.json",
    }[what]
    network.endless.add(path)
    if what == "patch":
        assert agent.update_once().payload == "keyframe"
        return
    if what == "keyframe":
        network.replaced[patch] = None
    with pytest.raises(ContentRefused, match="longer"):
        agent.update_once()
    written = sum(p.stat().st_size for p in config.state.rglob("*") if p.is_file())
    assert written < 100_000
    _release_1_runs(agent, images)


# names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("keyframe", "sha256"), "../../../../etc/passwd"),
        (("files", "model.onnx", "sha256"), "../" * 20 + "x"),
        (("weights", "sha256"), "/etc/passwd"),
        (("patches", 0, "sha256"), "..%2f..%2fx"),
        (("name",), "../toy"),
        (("name",), "toy/../../x"),
        (("version",), "../2"),
        (("minimum_agent",), "../0"),
    ],
)
def test_path_traversal_inside_release_json(
    agent: Agent,
    publish: Publish,
    repository: Repository,
    keys: KeyRing,
    network,
    images: np.ndarray,
    tmp_path: Path,
    field: tuple[Any, ...],
    value: str,
) -> None:
    """Names inside the manifest never reach the file system, even when they are signed."""
    from datetime import UTC, datetime

    from tuf.api.metadata import TargetFile

    document = json.loads(publish(2).to_bytes())
    inner = document
    for key in field[:-1]:
        inner = inner[key]
    inner[field[-1]] = value
    data, path = json.dumps(document).encode(), manifest_path("toy", 2)
    state = repository._load()
    target = TargetFile.from_data(path, data, ["sha256"])
    state.targets.signed.targets[path] = target
    target_file(repository.path, path, target.hashes["sha256"]).write_bytes(data)
    repository._commit(state.sign(["targets"], keys.signers, repository._expiry, datetime.now(UTC)))
    before = sorted(p for p in tmp_path.rglob("*") if "state" not in p.parts)
    network.asked.clear()
    with pytest.raises(ContentRefused, match=r"release\.json|release name"):
        agent.update_once()
    assert not any(".." in asked or "%" in asked for asked, _ in network.asked)
    assert sorted(p for p in tmp_path.rglob("*") if "state" not in p.parts) == before
    _release_1_runs(agent, images)

"""Attacks by name. The agent must refuse each one and keep what it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import ContentRefused, NetworkError, TrustError
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.manifest import ReleaseManifest, manifest_path
from prunecast.compression.versions import PublishedModel, encode_delta
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.reading import target_file
from support.releases import publish_model

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]
Model = Callable[[int], PublishedModel]


@pytest.fixture
def agent(start: Start, publish: Publish) -> Agent:
    """An agent that runs release 1."""
    publish(1)
    agent = start()
    agent.update_once()
    assert agent.model.version == 1
    return agent


def _keeps_release_1(agent: Agent, images: np.ndarray) -> None:
    assert agent.model.version == 1
    assert agent.model.infer({"input": images}).version == 1
    assert agent.status()["active"]["version"] == 1


def _state_of(folder: Path) -> dict[str, bytes]:
    return {
        f"metadata/{p.name}": p.read_bytes()
        for p in (folder / "metadata").iterdir()
        if p.name == "timestamp.json"
    }


def _listing(network) -> str:
    return max(
        (p.name for p in (network.folder / "metadata").glob("*.name.toy.json")),
        key=lambda n: int(n.split(".")[0]),
    )


def _manifest_file(network, version: int) -> str:
    (path,) = (network.folder / "targets" / "toy" / str(version)).iterdir()
    return str(path.relative_to(network.folder))


def test_rollback_to_an_older_state(
    agent: Agent, publish: Publish, network, images: np.ndarray
) -> None:
    old = _state_of(network.folder)
    publish(2)
    agent.update_once()
    network.replaced |= old
    with pytest.raises(TrustError):
        agent.update_once()
    assert agent.model.version == 2


def test_rollback_after_a_restart(agent: Agent, start: Start, publish: Publish, network) -> None:
    old = _state_of(network.folder)
    publish(2)
    agent.update_once()
    network.replaced |= old
    again = start()
    with pytest.raises(TrustError):
        again.update_once()
    assert again.model.version == 2


@pytest.mark.parametrize("what", ["patch", "keyframe", "expected.npz", "manifest", "targets"])
def test_flipped_bit(
    agent: Agent, publish: Publish, network, images: np.ndarray, what: str
) -> None:
    manifest = publish(2)
    path = {
        "patch": f"blobs/{manifest.patches[0].file.sha256}",
        "keyframe": f"blobs/{manifest.keyframe.sha256}",
        "expected.npz": f"blobs/{manifest.files['expected.npz'].sha256}",
        "manifest": _manifest_file(network, 2),
        "targets": f"metadata/{_listing(network)}",
    }[what]
    data = bytearray((network.folder / path).read_bytes())
    data[len(data) // 2] ^= 0x10
    network.replaced[path] = bytes(data)
    if what == "patch":
        result = agent.update_once()  # falls back to the keyframe
        assert (result.version, result.payload) == (2, "keyframe")
        assert "patch did not apply" in str(result.reason)
        return
    if what == "keyframe":
        network.replaced[f"blobs/{manifest.patches[0].file.sha256}"] = None
    with pytest.raises((ContentRefused, TrustError)):
        agent.update_once()
    _keeps_release_1(agent, images)


@pytest.mark.parametrize("what", ["expected.npz", "manifest"])
def test_oversized_target(
    agent: Agent, publish: Publish, network, images: np.ndarray, what: str, config: AgentConfig
) -> None:
    _serve_oversized(agent, publish, network, what, config)
    _keeps_release_1(agent, images)


def test_oversized_timestamp(
    agent: Agent, publish: Publish, network, images: np.ndarray, config: AgentConfig
) -> None:
    _serve_oversized(agent, publish, network, "timestamp", config)
    _keeps_release_1(agent, images)


def _serve_oversized(
    agent: Agent, publish: Publish, network, what: str, config: AgentConfig
) -> None:
    manifest = publish(2)
    path = {
        "expected.npz": f"blobs/{manifest.files['expected.npz'].sha256}",
        "manifest": _manifest_file(network, 2),
        "timestamp": "metadata/timestamp.json",
    }[what]
    real = (network.folder / path).read_bytes()
    network.replaced[path] = real + b" " * 50_000_000
    with pytest.raises(ContentRefused, match="longer"):
        agent.update_once()
    written = sum(p.stat().st_size for p in config.state.rglob("*") if p.is_file())
    assert written < 200_000


def test_foreign_keys(
    agent: Agent,
    network,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
    tmp_path: Path,
) -> None:
    """A whole repository signed by somebody else, with a higher version of everything."""
    foreign = Repository.create(tmp_path / "foreign", KeyRing.create(tmp_path / "foreign-keys"))
    for number in (1, 2, 3):
        publish_model(foreign, "toy", model(number), graph, selftest_inputs=images)
    network.folder = foreign.path
    with pytest.raises(TrustError, match="timestamp"):
        agent.update_once()
    _keeps_release_1(agent, images)


def test_old_target_under_a_new_name(
    agent: Agent, publish: Publish, network, images: np.ndarray
) -> None:
    """A mirror serves the old manifest in the place of the new one."""
    publish(2)
    old = (network.folder / _manifest_file(network, 1)).read_bytes()
    network.replaced[_manifest_file(network, 2)] = old
    with pytest.raises((ContentRefused, TrustError)):
        agent.update_once()
    _keeps_release_1(agent, images)


def test_old_target_signed_under_a_new_name(
    agent: Agent, repository: Repository, network, images: np.ndarray, keys: KeyRing
) -> None:
    """Even a signature over the wrong name does not make an old release a new one."""
    from tuf.api.metadata import TargetFile

    old = (network.folder / _manifest_file(network, 1)).read_bytes()
    path = manifest_path("toy", 2)
    state = repository._load()
    target = TargetFile.from_data(path, old, ["sha256"])
    state.targets.signed.targets[path] = target
    file = target_file(repository.path, path, target.hashes["sha256"])
    file.parent.mkdir(parents=True)
    file.write_bytes(old)
    repository._commit(state.sign(["targets"], keys.signers, repository._expiry, datetime.now(UTC)))
    with pytest.raises(TrustError, match="old release"):
        agent.update_once()
    _keeps_release_1(agent, images)


def test_expired_timestamp(
    network,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
    tmp_path: Path,
    config: AgentConfig,
    keys: KeyRing,
) -> None:
    """Freezing a device on an old state works only until the timestamp expires."""
    past = datetime.now(UTC) - timedelta(days=8)
    frozen = Repository.create(tmp_path / "frozen", keys, now=lambda: past)
    publish_model(frozen, "toy", model(1), graph, selftest_inputs=images)
    network.folder = frozen.path
    config = replace(config, root=frozen.trusted_root())
    with Agent(config, fetcher=network) as agent:
        with pytest.raises(TrustError, match="expired"):
            agent.update_once()
        assert agent.model.version is None
        Repository(frozen.path, keys).renew()
        assert agent.update_once().version == 1


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_revoked_key(
    agent: Agent,
    repository: Repository,
    publish: Publish,
    graph: ExportedGraph,
    model: Model,
    network,
    images: np.ndarray,
    keys: KeyRing,
    role: str,
) -> None:
    """A stolen key is worthless once the device has seen the root that revokes it."""
    repository.rotate_key(role)
    publish(2)
    assert agent.update_once().version == 2  # the rotation itself is accepted
    stolen = keys.path(role).with_suffix(".pem.old")
    keys.path(role).write_bytes(stolen.read_bytes())
    state = repository._load()
    now = datetime.now(UTC)
    if role == "root":
        state._bump("root", repository._expiry, now)
        state.root.sign(keys.signers("root")[0])
        version = state.root.signed.version
        network.replaced[f"metadata/{version}.root.json"] = state.root.to_bytes()
    else:
        metadata = getattr(state, role)
        metadata.signed.version += 10
        metadata.sign(keys.signers(role)[0])
        forged = metadata.to_bytes()
        if role == "timestamp":
            network.replaced["metadata/timestamp.json"] = forged
        else:
            # the other online keys are still good: only the revoked role is forged
            _forge(state, role, forged, network, repository, keys, now)
    with pytest.raises(TrustError):
        agent.update_once()
    assert agent.model.version == 2


def _forge(state, role, forged, network, repository, keys, now) -> None:
    from tuf.api.metadata import MetaFile

    version = getattr(state, role).signed.version
    network.replaced[f"metadata/{version}.{role}.json"] = forged
    if role == "targets":
        meta = MetaFile.from_data(version, forged, ["sha256"])
        state.snapshot.signed.meta["targets.json"] = meta
        files = state.sign(["snapshot"], keys.signers, repository._expiry, now)
    else:
        state.timestamp.signed.snapshot_meta = MetaFile.from_data(version, forged, ["sha256"])
        files = state.sign(["timestamp"], keys.signers, repository._expiry, now)
    network.replaced |= {f"metadata/{name}": data for name, data in files.items()}


def test_truncated_patch(agent: Agent, publish: Publish, network) -> None:
    ref = publish(2).patches[0].file
    path = f"blobs/{ref.sha256}"
    network.replaced[path] = (network.folder / path).read_bytes()[: ref.length // 2]
    result = agent.update_once()
    assert (result.version, result.payload) == (2, "keyframe")
    assert "ended early" in str(result.reason)


def test_missing_patch(agent: Agent, publish: Publish, network) -> None:
    network.replaced[f"blobs/{publish(2).patches[0].file.sha256}"] = None
    result = agent.update_once()
    assert (result.version, result.payload) == (2, "keyframe")


@pytest.mark.parametrize("attack", ["wrong base", "wrong release", "wrong result"])
def test_wrong_patch_signed(
    agent: Agent,
    repository: Repository,
    model: Model,
    publish: Publish,
    network,
    monkeypatch: pytest.MonkeyPatch,
    attack: str,
) -> None:
    """A patch that was signed by mistake does not apply; the keyframe is taken instead."""
    import prunecast.server.repository.authoring.build as build

    def wrong(base: PublishedModel, made: PublishedModel, *, stream: bytes) -> bytes:
        if attack == "wrong base":
            return encode_delta(model(5), made, stream=stream)
        if attack == "wrong release":
            return encode_delta(base, made, stream=b"other")
        return encode_delta(base, model(4), stream=stream)

    monkeypatch.setattr(build, "encode_delta", wrong)
    manifest = publish(2)
    assert manifest.patches
    result = agent.update_once()
    assert (result.version, result.payload) == (2, "keyframe")
    assert result.reason is not None
    assert agent.model.manifest.model_digest == model(2).digest.hex()


def test_rebuilt_weights_that_differ_from_the_signed_digest(
    agent: Agent, publish: Publish, monkeypatch: pytest.MonkeyPatch, images: np.ndarray
) -> None:
    from prunecast.compression.release.manifest import FileRef
    from prunecast.server.repository.authoring.build import BuiltRelease

    real = BuiltRelease.finish

    def wrong(*arguments):
        manifest, blobs = real(*arguments)
        weights = FileRef("00" * 32, manifest.weights.length)
        return replace(manifest, weights=weights), blobs

    monkeypatch.setattr(BuiltRelease, "finish", wrong)
    publish(2)
    with pytest.raises(ContentRefused, match=r"weights\.bin is not the one"):
        agent.update_once()
    _keeps_release_1(agent, images)


@pytest.mark.parametrize("name", ["../../x", "toy/../x", "..", "toy%2f..", "/etc", "a\\b"])
def test_path_traversal_in_the_configured_name(
    config: AgentConfig, network, name: str, tmp_path: Path
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="release name"):
        Agent(replace(config, name=name), fetcher=network)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "path",
    [
        *("../../toy/9/release.json", "toy/9/../../../release.json", "toy/9999/../release.json"),
        *(
            "toy/-9/release.json",
            "toy/09/release.json",
            "toy//9/release.json",
            "/toy/9/release.json",
        ),
    ],
)
def test_path_traversal_in_target_names(
    agent: Agent, repository: Repository, keys: KeyRing, images: np.ndarray, path: str
) -> None:
    """Names that are no release names are not releases, even when signed."""
    from tuf.api.metadata import TargetFile

    state = repository._load()
    state.targets.signed.targets[path] = TargetFile(10, {"sha256": "00" * 32}, path)
    repository._commit(state.sign(["targets"], keys.signers, repository._expiry, datetime.now(UTC)))
    assert agent.update_once().outcome == "current"
    _keeps_release_1(agent, images)


def test_path_traversal_in_file_names(
    agent: Agent,
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
    images: np.ndarray,
    tmp_path: Path,
) -> None:
    """A manifest may name only the files of a release."""
    real = ReleaseManifest.to_bytes

    def hostile(self: ReleaseManifest) -> bytes:
        document = json.loads(real(self))
        document["files"]["../../../escaped"] = document["files"]["model.onnx"]
        return json.dumps(document).encode()

    import prunecast.server.repository.authoring.build as build

    class Trusting(ReleaseManifest):
        @classmethod
        def from_bytes(cls, data: bytes) -> ReleaseManifest:
            return None  # type: ignore[return-value]

    monkeypatch.setattr(build, "ReleaseManifest", Trusting)
    monkeypatch.setattr(Trusting, "to_bytes", hostile)
    monkeypatch.setattr("prunecast.server.repository.repository.collect", lambda *a: [])
    publish(2)
    with pytest.raises(ContentRefused, match="exactly the files"):
        agent.update_once()
    assert not list(tmp_path.rglob("*escaped*"))
    _keeps_release_1(agent, images)


def test_endless_metadata_chain_is_bounded(agent: Agent, network, images: np.ndarray) -> None:
    """A server that answers every root version with the same root is not followed forever."""
    root = (network.folder / "metadata" / "1.root.json").read_bytes()
    network.replaced |= {f"metadata/{n}.root.json": root for n in range(2, 1000)}
    with pytest.raises(TrustError):
        agent.update_once()
    assert len(network.asked) < 100
    _keeps_release_1(agent, images)


def test_garbage_in_place_of_metadata(agent: Agent, network, images: np.ndarray) -> None:
    for garbage in (b"", b"{", b"[]", b"null", b"\xff" * 1000, b'{"signed": {}}'):
        network.replaced["metadata/timestamp.json"] = garbage
        with pytest.raises((TrustError, NetworkError)):
            agent.update_once()
    _keeps_release_1(agent, images)


def test_a_root_that_is_no_root_is_refused_at_provisioning(
    config: AgentConfig, network, publish: Publish
) -> None:
    publish(1)
    timestamp = (network.folder / "metadata" / "timestamp.json").read_bytes()
    for root in (b"", b"{}", b"-----BEGIN", b"\xff\xfe", b"[1]", b'{"signed": 1}', timestamp):
        with (
            Agent(replace(config, root=root), fetcher=network) as agent,
            pytest.raises(TrustError, match=r"no root metadata: give it .*1\.root\.json"),
        ):
            agent.update_once()


def test_the_root_of_another_repository_is_named(
    config: AgentConfig, network, publish: Publish, tmp_path: Path
) -> None:
    publish(1)
    other = Repository.create(tmp_path / "other", KeyRing.create(tmp_path / "other-keys"))
    config = replace(config, root=other.trusted_root())
    with (
        Agent(config, fetcher=network) as agent,
        pytest.raises(TrustError, match=r"keys this device trusts.*root file"),
    ):
        agent.update_once()


@pytest.mark.parametrize(
    ("attack", "remedy"), [("rollback", "stale"), ("expired", "prunecast release renew")]
)
def test_a_refusal_names_the_remedy(
    agent: Agent, publish: Publish, network, keys: KeyRing, attack: str, remedy: str
) -> None:
    if attack == "rollback":
        old = _state_of(network.folder)
        publish(2)
        agent.update_once()
        network.replaced |= old
    else:
        past = datetime.now(UTC) - timedelta(days=30)
        Repository(network.folder, keys, now=lambda: past).renew()
    with pytest.raises(TrustError, match=remedy):
        agent.update_once()

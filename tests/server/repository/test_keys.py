from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from prunecast.server.repository import ROLES, KeyFileError, KeyRing, Repository, RepositoryExists


def test_key_files_are_readable_by_their_owner_only(keys: KeyRing) -> None:
    for role in ROLES:
        assert stat.S_IMODE(keys.path(role).stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.folders[0].stat().st_mode) == 0o700
    assert len({keys.signers(role)[0].public_key.keyid for role in ROLES}) == 4


def test_a_key_that_others_can_read_is_refused(keys: KeyRing) -> None:
    keys.path("targets").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.signers("targets")[0]


def test_keys_are_never_overwritten(keys: KeyRing) -> None:
    with pytest.raises(RepositoryExists):
        KeyRing.create(keys.folders[0])


def test_offline_and_online_keys_may_lie_apart(keys: KeyRing, tmp_path: Path) -> None:
    offline = tmp_path / "offline"
    offline.mkdir()
    for role in ("root", "targets"):
        keys.path(role).rename(offline / f"{role}.pem")
    online = keys.folders[0]
    assert KeyRing(online, offline).signers("root")[0]
    with pytest.raises(KeyFileError, match=r"targets\.pem is not in"):
        KeyRing(online).signers("targets")[0]


def test_keys_inside_the_served_folder_are_refused(tmp_path: Path) -> None:
    inside = KeyRing.create(tmp_path / "repository" / "keys")
    with pytest.raises(KeyFileError, match="inside the served folder"):
        Repository.create(tmp_path / "repository", inside)


def test_there_is_no_default_location() -> None:
    with pytest.raises(KeyFileError, match="folder"):
        KeyRing()


def test_other_files_are_not_keys(keys: KeyRing) -> None:
    path = keys.path("root")
    path.write_bytes(b"hello")
    with pytest.raises(KeyFileError, match="PEM"):
        keys.signers("root")[0]
    curve = generate_private_key(SECP256R1())
    path.write_bytes(curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(KeyFileError, match="Ed25519"):
        keys.signers("root")[0]

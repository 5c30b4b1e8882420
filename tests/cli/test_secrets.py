"""Files that hold secrets: every command that reads one looks who else can."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.repository import KeyFileError, KeyRing, Repository
from prunecast.server.repository.keys.keyholders import load_holder, make_holder
from support.authority import Authority


def run(*command: object, code: int = 1) -> str:
    result = CliRunner().invoke(app, [*map(str, command)], prog_name="prunecast")
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    return Repository.create(folder / "repository", KeyRing.create(folder / "keys")).path


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_servers_refuse_a_private_key_that_others_can_read(
    repository: Path, authority: Authority, tmp_path: Path, mode: int
) -> None:
    certificate, key = authority.server()
    key.chmod(mode)
    database = f"sqlite:///{tmp_path / 'fleet.db'}"
    run("fleet", "init", "--repository", repository, "--database", database, code=0)
    files = ("--certificate", certificate, "--key", key, "--port", 0)
    said = f"error: {key} can be read by others: chmod 640 {key}"
    assert run("serve", repository, *files) == said
    assert run("fleet", "serve", *files, "--database", database) == said


def test_signers_refuse_a_private_key_or_a_passphrase_that_others_can_read(
    repository: Path, tmp_path: Path
) -> None:
    keys = repository.parent / "keys"
    (keys / "timestamp.pem").chmod(0o640)
    said = run("release", "renew", repository, "--keys", keys)
    assert said.startswith(f"error: {keys / 'timestamp.pem'} can be read by others: chmod 600")
    (keys / "timestamp.pem").chmod(0o600)
    private, _ = make_holder(tmp_path, "alice", "long enough")
    assert load_holder(private, "long enough")
    private.chmod(0o640)
    with pytest.raises(KeyFileError, match=f"can be read by others: chmod 600 {private}"):
        load_holder(private, "long enough")
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("long enough\n")
    passphrase.chmod(0o640)
    said = run("release", "keys", "make", tmp_path, "bob", "--passphrase-file", passphrase)
    assert said == f"error: {passphrase} can be read by others: chmod 600 {passphrase}"


@pytest.mark.parametrize("option", ["--token-file", "--key"])
def test_a_device_warns_of_a_secret_that_others_can_read_and_goes_on(
    repository: Path, authority: Authority, tmp_path: Path, option: str
) -> None:
    certificate, key = authority.device("cam")
    token = tmp_path / "token"
    token.write_text("secret\n")
    (tmp_path / "root.json").write_bytes((repository / "metadata" / "1.root.json").read_bytes())
    file = token if option == "--token-file" else key
    more = () if option == "--token-file" else ("--certificate", certificate)
    update = ("edge", "update", "--state", tmp_path / "state", "--name", "toy")
    where = ("--root", tmp_path / "root.json", "--url", "https://127.0.0.1:9/")
    for mode, warns in ((0o644, True), (0o600, False)):
        file.chmod(mode)
        said = run(*update, *where, option, file, *more)
        assert (f"warning: {file} can be read by others: chmod 600 {file}" in said) is warns
        assert "error: " in said or "127.0.0.1" in said  # it tried, and nobody is there


def test_a_file_of_another_user_is_judged_by_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunecast.common.files import exposure

    file = tmp_path / "handed-over"
    file.write_text("secret")
    file.chmod(0o444)
    assert exposure(file) == f"{file} can be read by others: chmod 600 {file}"
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    assert exposure(file) is None
    assert exposure(file, own=False) is not None

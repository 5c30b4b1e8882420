"""`prunecast release keys`, as holders and their coordinator call it."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.releases import KeyFileError, load_holder, load_public, make_holder
from prunecast.server.releases.holders import fingerprint


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """scrypt at a fraction of its cost; the format is the same."""
    monkeypatch.setattr("prunecast.server.releases.pkcs8._N", 2**10)
    monkeypatch.setattr("prunecast.server.releases.pkcs8._P", 1)


def _run(*arguments: object, said: str | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["release", *map(str, arguments)], input=said)
    return done.exit_code, done.output


def _done(*arguments: object, said: str | None = None) -> str:
    code, output = _run(*arguments, said=said)
    assert code == 0, output
    return output


def _passphrase(folder: Path, holder: str) -> Path:
    path = folder / f"{holder}.pass"
    path.write_text(f"correct horse {holder}\n")
    path.chmod(0o600)
    return path


def test_a_ceremony_from_the_first_key_to_a_rotation(tmp_path: Path) -> None:
    passwords = {holder: _passphrase(tmp_path, holder) for holder in ("alice", "bob", "carol")}
    for holder, file in passwords.items():
        _done("keys", "make", tmp_path / holder, holder, "--passphrase-file", file)
    host, repository = tmp_path / "host", tmp_path / "served"
    _done("keys", "online", host)

    def public(holder: str) -> Path:
        return tmp_path / holder / f"{holder}.pub"

    def sign(ceremony: Path, holder: str) -> str:
        key = tmp_path / holder / f"{holder}.key"
        given = ["--passphrase-file", passwords[holder]]
        return _done("keys", "sign", ceremony, "--key", key, *given, said="y\n")

    first = tmp_path / "first"
    _done(
        *("keys", "plan", first, "--root-threshold", 2, "--targets-threshold", 1),
        *("--root", public("alice"), "--root", public("bob"), "--targets", public("alice")),
        *("--snapshot", host / "snapshot.pub", "--timestamp", host / "timestamp.pub"),
    )
    said = sign(first, "alice")
    assert "root: 2 of alice, bob" in said
    assert said.count("send back") == 2
    code, said = _run("keys", "enact", first, repository, "--keys", host)
    assert code == 1
    assert "1 more of bob must sign" in said
    sign(first, "bob")
    assert "1.root.json" in _done("keys", "enact", first, repository, "--keys", host)

    _done("keys", "online", host, "robot")
    second = tmp_path / "second"
    _done(
        *("keys", "change", second, repository, "--delegate", "robot=digits"),
        *("--add", f"robot={host / 'robot.pub'}", "--threshold", "targets=1"),
        *("--add", f"root={public('carol')}", "--revoke", "root=bob"),
    )
    files = []
    for holder in ("alice", "carol", "bob"):
        sign(second, holder)
        files = sorted((second / "signatures").iterdir())
    assert "root 2 has 2 of 2" in _done("keys", "merge", second, *files)
    _done("keys", "enact", second, repository, "--keys", host)
    assert "enacted 20" in _done("keys", "show", second)
    root = repository / "metadata" / "1.root.json"
    assert "the metadata is valid" in _done("verify", repository, "--root", root)
    renewed = json.loads(_done("renew", repository, "--keys", host, "--json"))
    assert renewed["expires_soon"] == {}
    assert set(renewed) == {"snapshot", "timestamp", "expires_soon"}
    code, said = _run("doctor", repository, "--keys", host, "--json")
    codes = {f["code"] for f in json.loads(said)["findings"]} - {"folder-above-closed"}
    # the holders' keys lie in folders beside the repository
    assert codes - {"not-readable"} == {"key-offline", "offline-key-here"}


def test_a_holders_key_is_encrypted_and_asked_for(tmp_path: Path) -> None:
    said = _done("keys", "make", tmp_path, "alice", said="correct horse\ncorrect horse\n")
    assert "correct" not in said
    private = tmp_path / "alice.key"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in private.read_bytes()
    signer = load_holder(private, "correct horse")
    held = load_public(tmp_path / "alice.pub")
    assert signer.public_key.keyid == held.keyid
    assert fingerprint(held) in said
    with pytest.raises(KeyFileError, match="another passphrase"):
        load_holder(private, "Correct horse")
    code, said = _run("keys", "make", tmp_path, "alice", said="correct horse\ncorrect horse\n")
    assert (code, "not overwritten" in said) == (1, True)


def test_openssl_reads_the_key_and_agrees_on_its_digest(tmp_path: Path) -> None:
    made = make_holder(tmp_path, "alice", "correct horse")
    (tmp_path / "pass").write_text("correct horse")
    command = ["openssl", "pkey", "-in", str(made.private), "-passin", f"file:{tmp_path / 'pass'}"]
    done = subprocess.run(
        [*command, "-pubout", "-outform", "DER"], capture_output=True, timeout=30, check=True
    )
    assert done.stdout[-32:].hex() == made.key.keyval["public"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["make", "{}", "Alice", "--passphrase-file", "{}/pass"], "cannot name a holder"),
        (["make", "{}", "alice", "--passphrase-file", "{}/short"], "too short"),
        (["make", "{}", "alice", "--passphrase-file", "{}/open"], "chmod 600"),
        (["online", "{}", "root"], "belong to holders"),
        (["show", "{}/nothing"], "holds no ceremony"),
        (["change", "{}/c", "{}", "--add", "root"], "role=value"),
        (["sign", "{}", "--key", "{}/pass", "--passphrase-file", "{}/pass"], "holds no ceremony"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: list[str], said: str) -> None:
    for name, text, mode in (
        *(("pass", "long enough\n", 0o600), ("short", "short\n", 0o600)),
        ("open", "long enough\n", 0o644),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    code, output = _run("keys", *(part.format(tmp_path) for part in arguments))
    assert code != 0
    assert said in " ".join(output.split())
    assert not (tmp_path / "alice.key").exists()


def test_files_that_are_no_public_keys(tmp_path: Path) -> None:
    made = make_holder(tmp_path, "alice", "correct horse")
    document = json.loads(made.public.read_text())
    wrong = [
        *("", "[]", "{}", made.private.read_text(errors="replace")),
        json.dumps({**document, "keyid": "0" * 64}),
        json.dumps({**document, "keyval": {"public": "00"}}),
        json.dumps({**document, "x-prunecast-holder": "../bob"}),
    ]
    for text in wrong:
        made.public.write_text(text)
        with pytest.raises(KeyFileError):
            load_public(made.public)

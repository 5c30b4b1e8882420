"""`prunecast release keys`, as holders and their coordinator call it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.repository import KeyFileError, load_holder, load_public, make_holder
from prunecast.server.repository.keys.keyholders import fingerprint


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """scrypt at a fraction of its cost; the format is the same."""
    monkeypatch.setattr("prunecast.server.repository.keys.keyholders._N", 2**10)
    monkeypatch.setattr("prunecast.server.repository.keys.keyholders._P", 1)


def _run(*arguments: object, said: str | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["release", *map(str, arguments)], input=said)
    return done.exit_code, done.output


def _done(*arguments: object, said: str | None = None) -> str:
    code, output = _run(*arguments, said=said)
    assert code == 0, output
    return output


def _documented() -> list[list[str]]:
    """Commands of the section on several holders, in order."""
    text = (Path(__file__).parents[2] / "docs" / "releases.md").read_text(encoding="utf-8")
    section = text.partition("## Keys of several holders")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```console\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def test_the_documented_ceremonies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = _documented()
    assert len(commands) > 25
    said = []
    for program, *arguments in commands:
        if program == "cp":
            shutil.copytree(arguments[1], arguments[2])
            continue
        assert program == "prunecast"
        if arguments[2:] == ["first", "repository", "--keys", "host"]:  # of `keys enact`
            folder = Path("first/signatures")
            withheld = {path: path.read_bytes() for path in folder.glob("root-*")}
            (path, content), *_ = withheld.items()
            path.unlink()
            code, output = _run(*arguments[1:])
            assert (code, "root 1 has 1 of 2 signatures" in output) == (1, True)
            path.write_bytes(content)
        given = [
            sorted(map(str, Path().glob(a))) if "*" in a and "=" not in a else [a]
            for a in arguments
        ]
        prompts = "correct horse\ncorrect horse\n" if "make" in arguments else "correct horse\ny\n"
        said.append(_done(*[a for part in given for a in part][1:], said=prompts))
    assert "root: 2 of alice, carol, dave  (was 2 of alice, bob, carol)" in "".join(said)
    assert "the metadata is valid" in said[-1]
    for number in ("first", "second", "third", "fourth", "fifth"):
        assert "\nenacted 20" in Path(number, "transcript.txt").read_text()
    root = json.loads(Path("repository/metadata/4.root.json").read_text())["signed"]
    assert root["roles"]["root"]["threshold"] == 2
    keys = ("--keys", "new-host", "--keys", "host")
    renewed = json.loads(_done("renew", "repository", *keys, "--json"))
    assert renewed["expires_soon"] == {}
    code, output = _run("doctor", "repository", *keys, "--json")
    found = {f["code"]: f for f in json.loads(output)["findings"]}
    assert code == 1
    assert "alice.key (root, targets)" in found["offline-key-here"]["subject"]
    assert "bob.key" not in found["offline-key-here"]["subject"]


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
    private, public = make_holder(tmp_path, "alice", "correct horse")
    (tmp_path / "pass").write_text("correct horse")
    command = ["openssl", "pkey", "-in", str(private), "-passin", f"file:{tmp_path / 'pass'}"]
    done = subprocess.run(
        [*command, "-pubout", "-outform", "DER"], capture_output=True, timeout=30, check=True
    )
    assert done.stdout[-32:].hex() == load_public(public).keyval["public"]


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
    private, public = make_holder(tmp_path, "alice", "correct horse")
    document = json.loads(public.read_text())
    wrong = [
        *("", "[]", "{}", private.read_text(errors="replace")),
        json.dumps({**document, "keyid": "0" * 64}),
        json.dumps({**document, "keyval": {"public": "00"}}),
        json.dumps({**document, "x-prunecast-holder": "../bob"}),
    ]
    for text in wrong:
        public.write_text(text)
        with pytest.raises(KeyFileError):
            load_public(public)

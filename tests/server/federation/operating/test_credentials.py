"""TLS of a SuperLink and keys of SuperNodes: what is made, kept and refused."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.common.files import lock_file
from prunecast.server.federation.errors import CredentialsError
from prunecast.server.federation.operating.credentials import make_credentials

NOW = datetime.now(UTC).replace(microsecond=0)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shaken_hands(folder: Path, authority: Path, host: str) -> str:
    """The host that a strict client of `authority` has verified the server's certificate for."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "server.crt", folder / "server.key")
    asking = ssl.create_default_context(cafile=authority)
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            serving.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with asking.wrap_socket(ours, server_hostname=host) as connection:
            return str(connection.server_hostname)
    finally:
        ours.close()
        thread.join(10)


def test_every_file_has_its_form_and_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    umask = os.umask(0)
    try:
        made = make_credentials(folder, hosts=["superlink.example"], nodes=2)
    finally:
        os.umask(umask)

    assert [(one.path.name, one.state) for one in made] == [
        *(("ca.crt", "made"), ("server.crt", "made")),
        *(("node-1", "made"), ("node-2", "made")),
    ]
    modes = {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.name != ".lock"
    }
    assert modes == {
        "ca.key": 0o600,
        "ca.crt": 0o644,
        "server.key": 0o600,
        "server.crt": 0o644,
        "nodes": 0o700,
        "nodes/node-1": 0o600,
        "nodes/node-1.pub": 0o644,
        "nodes/node-2": 0o600,
        "nodes/node-2.pub": 0o644,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for host in ("superlink.example", "localhost", "127.0.0.1", "::1"):
        assert shaken_hands(folder, folder / "ca.crt", host) == host
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken_hands(folder, folder / "ca.crt", "elsewhere.example")
    # as Flower's commands read them
    for number in (1, 2):
        private = load_ssh_private_key((folder / f"nodes/node-{number}").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        registered = try_load_public_key(folder / f"nodes/node-{number}.pub")
        assert registered == public_key_to_bytes(private.public_key())


def test_once_more_makes_what_is_missing_and_touches_nothing_else(tmp_path: Path) -> None:
    make_credentials(tmp_path, hosts=["a.example"], nodes=2)
    before = bytes_of(tmp_path)
    (tmp_path / "nodes/node-2.pub").unlink()

    found = make_credentials(tmp_path, nodes=3)

    after = bytes_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"nodes/node-3", "nodes/node-3.pub"}
    assert [one.state for one in found] == ["kept", "kept", "kept", "kept", "made"]
    assert found[1].hosts == ("a.example", "localhost", "127.0.0.1", "::1")
    make_credentials(tmp_path, hosts=["a.example"])


def test_the_key_of_a_server_without_a_certificate_is_kept(tmp_path: Path) -> None:
    make_credentials(tmp_path, hosts=["a.example"])
    before = bytes_of(tmp_path)
    (tmp_path / "server.crt").unlink()
    assert make_credentials(tmp_path, hosts=["b.example"])[1].state == "made"
    after = bytes_of(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"server.crt"}
    assert shaken_hands(tmp_path, tmp_path / "ca.crt", "b.example") == "b.example"


def test_renewing_replaces_the_server_and_whoever_has_the_old_authority_goes_on(
    tmp_path: Path,
) -> None:
    make_credentials(tmp_path, hosts=["a.example"], nodes=1, days=10)
    before = bytes_of(tmp_path)
    old = tmp_path / "old.crt"
    old.write_bytes(before["ca.crt"])

    authority, server, _ = make_credentials(tmp_path, nodes=1, days=20, renew=True, now=NOW)

    assert (authority.state, server.state) == ("renewed", "renewed")
    assert server.expires == NOW + timedelta(days=20)
    after = bytes_of(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"ca.crt", "server.key", "server.crt"}
    for known in (old, tmp_path / "ca.crt"):
        assert shaken_hands(tmp_path, known, "a.example") == "a.example"
    _, server, _ = make_credentials(tmp_path, hosts=["b.example"], nodes=1, renew=True)
    assert server.hosts[0] == "b.example"


def test_the_authority_key_may_be_kept_elsewhere(tmp_path: Path) -> None:
    make_credentials(tmp_path, hosts=["a.example"])
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.key").unlink()
    before = bytes_of(tmp_path)

    assert make_credentials(tmp_path, hosts=["a.example"], nodes=1)[0].state == "kept"
    with pytest.raises(CredentialsError, match=r"ca\.key is not there to sign with: bring it back"):
        make_credentials(tmp_path, renew=True)
    assert {name: data for name, data in bytes_of(tmp_path).items() if name in before} == before
    (tmp_path / "ca.key").write_bytes(key)
    assert make_credentials(tmp_path, renew=True)[0].state == "renewed"


@pytest.mark.parametrize(
    ("spoil", "again", "said"),
    [
        (lambda folder: None, {"hosts": ["b.example"]}, r"not for b\.example: give --renew"),
        (lambda folder: None, {"now": NOW + timedelta(days=400)}, "expired on .*: give --renew"),
        (lambda folder: (folder / "server.key").unlink(), {}, "not of .*: give --renew"),
        (
            lambda folder: (folder / "server.crt").unlink(),
            {"now": NOW + timedelta(days=3651)},
            r"ca\.crt expired on .*: give --renew",
        ),
        (
            lambda folder: [(folder / name).unlink() for name in ("ca.key", "ca.crt")],
            {"renew": True},
            r"ca\.crt is not there, by whose key .*: bring it back",
        ),
        (lambda folder: (folder / "server.crt").write_text("x"), {}, "is no certificate"),
        (lambda folder: (folder / "ca.key").write_text("x"), {}, "is no private key"),
        (
            lambda folder: (folder / "nodes/node-1").write_text("x"),
            {"nodes": 1},
            "no key of a node",
        ),
        (lambda folder: (folder / "nodes/node-1").unlink(), {"nodes": 1}, "without its key"),
        (lambda folder: None, {"hosts": ["https://a.example"]}, "without scheme and port"),
        (lambda folder: None, {"hosts": ["a.example:9092"]}, "without scheme and port"),
        (lambda folder: None, {"hosts": ["b\u00fccher.example"]}, "neither a host's name"),
        (lambda folder: None, {"nodes": 10**9}, "0 to 100000 nodes"),
    ],
)
def test_what_is_refused_names_the_remedy_and_writes_nothing(tmp_path, spoil, again, said) -> None:
    make_credentials(tmp_path, hosts=["a.example"], nodes=1)
    spoil(tmp_path)
    before = bytes_of(tmp_path)
    with pytest.raises(CredentialsError, match=said):
        make_credentials(tmp_path, **again)
    assert bytes_of(tmp_path) == before


def test_certificates_of_different_folders_are_not_mixed(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    make_credentials(one)
    make_credentials(other)
    (one / "server.crt").write_bytes((other / "server.crt").read_bytes())
    (one / "server.key").write_bytes((other / "server.key").read_bytes())
    with pytest.raises(CredentialsError, match="not signed by the authority beside it"):
        make_credentials(one)
    (one / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    with pytest.raises(CredentialsError, match=r"ca\.crt is not of .*ca\.key"):
        make_credentials(one)


def test_two_commands_at_a_time_are_refused(tmp_path: Path) -> None:
    with lock_file(tmp_path / ".lock"), pytest.raises(CredentialsError, match="wait for it"):
        make_credentials(tmp_path)


def test_the_command_states_what_expires_and_prints_no_key(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    arguments = ["federation", "keys", str(folder), "--nodes", "1", "--host", "a.example"]

    result = CliRunner().invoke(app, [*arguments, "--days", "20"])

    assert result.exit_code == 0, result.output
    assert "server.crt expires soon: run this again with --renew" in result.output
    assert "PRIVATE" not in result.output
    result = CliRunner().invoke(app, [*arguments, "--json", "--renew"])
    authority, server, node = json.loads(result.output)
    left = datetime.fromisoformat(server["expires"]) - datetime.now(UTC)
    assert timedelta(days=396) < left <= timedelta(days=397)
    assert server["hosts"] == ["a.example", "localhost", "127.0.0.1", "::1"]
    assert authority["state"] == server["state"] == "renewed"
    assert node == {
        "path": str(folder / "nodes/node-1"),
        "state": "kept",
        "expires": None,
        "hosts": [],
    }
    result = CliRunner().invoke(app, [*arguments[:-1], "b.example"])
    assert result.exit_code == 1
    assert "give --renew" in result.output

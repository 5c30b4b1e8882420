"""From requests to replies, without a network: names, links, conditions, ranges."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.server.repository.serving.files import (
    FilePart,
    Reply,
    family,
    file_reply,
    path_of,
    selected_range,
)

DATA = bytes(range(256)) * 8
SHA = hashlib.sha256(DATA).hexdigest()
BLOB, TAG = f"/blobs/{SHA}", f'"{SHA}"'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name in ("metadata", "blobs", "targets/toy/1"):
        (folder / name).mkdir(parents=True)
    (folder / "metadata" / "timestamp.json").write_text("{}")
    (folder / "metadata" / "1.root.json").write_text('{"root": 1}')
    (folder / "blobs" / SHA).write_bytes(DATA)
    return folder


def ask(root: Path, target: str, **headers: str) -> tuple[Reply, bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = file_reply(root, path_of(target), named)
    if not isinstance(reply.body, FilePart):
        return reply, reply.body
    with open(reply.body.file, "rb") as file:
        file.seek(reply.body.start)
        return reply, file.read(reply.body.length)


def test_a_file_is_immutable_and_its_name_is_its_tag(root: Path) -> None:
    reply, body = ask(root, BLOB)
    assert (reply.status, body, reply.kind) == (200, DATA, "blob")
    assert reply.headers["etag"] == TAG
    assert reply.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert reply.headers["accept-ranges"] == "bytes"
    assert ask(root, f"http://any.example{BLOB}?x=1")[1] == DATA


def test_the_timestamp_is_kept_for_a_minute_and_tagged_by_content(root: Path) -> None:
    first, body = ask(root, "/metadata/timestamp.json")
    assert (first.status, body, first.kind) == (200, b"{}", "timestamp")
    assert first.headers["cache-control"] == "public, max-age=60"
    tag = first.headers["etag"]
    assert ask(root, "/metadata/timestamp.json", if_none_match=tag)[0].status == 304
    (root / "metadata" / "timestamp.json").write_text("{ }")
    changed, body = ask(root, "/metadata/timestamp.json", if_none_match=tag)
    assert (changed.status, body) == (200, b"{ }")


def test_what_is_missing_must_not_be_remembered(root: Path) -> None:
    reply, _ = ask(root, "/metadata/2.root.json")
    assert (reply.status, reply.kind) == (404, "metadata")
    assert reply.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("value", "status", "wanted"),
    [
        ("bytes=10-", 206, DATA[10:]),
        ("bytes=5-9", 206, DATA[5:10]),
        ("bytes=-7", 206, DATA[-7:]),
        ("bytes=-99999", 206, DATA),
        ("bytes=2000-99999", 206, DATA[2000:]),
        ("bytes=2048-", 416, None),
        ("bytes=0-0,5-6", 416, None),
        ("bytes=9-5", 200, DATA),
        ("pages=1-2", 200, DATA),
        ("bytes=" + "9" * 40 + "-", 200, DATA),
    ],
)
def test_ranges(root: Path, value: str, status: int, wanted: bytes | None) -> None:
    reply, body = ask(root, BLOB, range=value)
    assert reply.status == status
    if wanted is None:
        assert reply.headers["content-range"] == f"bytes */{len(DATA)}"
    else:
        assert body == wanted
    if status == 206:
        positions, _, size = reply.headers["content-range"].removeprefix("bytes ").partition("/")
        first, last = map(int, positions.split("-"))
        assert (DATA[first : last + 1], int(size)) == (body, len(DATA))


@given(st.text(max_size=30), st.integers(0, 50))
def test_any_range_header_selects_positions_of_the_file(value: str, size: int) -> None:
    for header in (value, f"bytes={value}"):
        found = selected_range(header, size)
        assert found is None or (found.step == 1 and set(found) <= set(range(size)))


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_ranges_are_those_of_the_standard(size: int, first: int, last: int) -> None:
    everything = range(size)
    assert list(selected_range(f"bytes={first}-", size) or ()) == list(everything[first:])
    suffix = everything[-last:] if last else ()
    assert list(selected_range(f"bytes=-{last}", size) or ()) == list(suffix)
    if first <= last:
        wanted = everything[first : last + 1]
        assert list(selected_range(f"bytes={first}-{last}", size) or ()) == list(wanted)


def test_conditions_come_before_ranges(root: Path) -> None:
    assert ask(root, BLOB, if_none_match=f'"x", W/{TAG}', range="bytes=0-1")[0].status == 304
    assert ask(root, BLOB, if_none_match="*")[0].status == 304
    assert ask(root, BLOB, if_none_match='"x"')[0].status == 200
    assert ask(root, BLOB, if_match='"x"', range="bytes=0-1")[0].status == 412
    assert ask(root, BLOB, if_match=TAG, range="bytes=0-1")[0].status == 206
    assert ask(root, BLOB, if_match="*")[0].status == 200


@pytest.mark.parametrize("other", ['"x"', f"W/{TAG}", "Mon, 23 Nov 2026 06:00:00 GMT"])
def test_if_range_of_another_file_gives_the_whole(root: Path, other: str) -> None:
    reply, body = ask(root, BLOB, range="bytes=4-", if_range=other)
    assert (reply.status, body) == (200, DATA)
    assert ask(root, BLOB, range="bytes=4-", if_range=TAG)[0].status == 206


@pytest.mark.parametrize(
    "target",
    [
        *("/", "*", "", "/.lock", "/blobs/", "/metadata", "/blobs/../.lock", "//etc/passwd"),
        *("/blobs/%2e%2e/.lock", "/targets/../../keys/root.pem", "/targets/toy/1/release.json"),
        *("/keys/root.pem", "/metadata/root.pem", "/metadata/.1.root.json", "/blobs/" + "g" * 64),
        *(f"/targets/a..b/1/{SHA}.release.json", f"{BLOB}/", f"/blobs//{SHA}", f"{BLOB}\n"),
        *("/metadata/1.name.json.json.", "/metadata/1.name.a..b.json", "/metadata/1.name..json"),
        *("/metadata/1.root.name.json", "/metadata/name.a.json", "/metadata/1.name.A.json"),
        *("/metadata/timestamp.json%00", "/metadata/../metadata/timestamp.json", f"/%62lobs/{SHA}"),
    ],
)
def test_other_names_are_not_public(root: Path, target: str) -> None:
    (root / "keys").mkdir()
    (root / "keys" / "root.pem").write_text("secret")
    (root / "metadata" / "root.pem").write_text("secret")
    (root / ".lock").touch()
    assert family(target.removeprefix("/")) is None
    assert ask(root, target)[0].status == 404


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    """Not as a file, not as a folder on the way; the repository itself may be one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / SHA).write_text("secret")
    other = "0" * 64
    (root / "blobs" / other).symlink_to(outside / SHA)
    assert ask(root, f"/blobs/{other}")[0].status == 404
    (root / "blobs").rename(root / "real")
    (root / "blobs").symlink_to(outside, target_is_directory=True)
    assert ask(root, BLOB)[0].status == 404
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert ask(tmp_path / "link", "/metadata/1.root.json")[0].status == 200


def test_what_is_no_regular_file_is_not_served(root: Path) -> None:
    os.mkfifo(root / "blobs" / ("1" * 64))
    (root / "blobs" / ("2" * 64)).mkdir()
    for digit in "12":
        assert ask(root, "/blobs/" + digit * 64)[0].status == 404

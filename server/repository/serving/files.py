"""Which files of a repository are public, and what of one a request wants (RFC 9110, 13 and 14).

Only names that a repository itself makes are served: neither its lock, nor a file that somebody
put beside it, nor a private key can be reached, whatever else lies in the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = [
    "TIMESTAMP",
    "Family",
    "FilePart",
    "Reply",
    "family",
    "file_reply",
    "in_words",
    "open_public",
    "path_of",
    "selected_range",
]

Family = Literal["timestamp", "metadata", "manifest", "blob"]
TIMESTAMP = "metadata/timestamp.json"

# ELOOP: O_NOFOLLOW met a link; ENXIO: a socket
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
_SHA, _NUMBER = "[0-9a-f]{64}", "[1-9][0-9]{0,14}"
_NAMES: dict[Family, re.Pattern[str]] = {
    "timestamp": re.compile(re.escape(TIMESTAMP)),
    # any role: repositories may delegate; name.<name> is the list of one name
    "metadata": re.compile(
        rf"metadata/{_NUMBER}\.(?:name\.(?!\S*\.\.)[a-z0-9][a-z0-9._-]{{0,63}}"
        r"|[a-z0-9][a-z0-9_-]{0,63})\.json"
    ),
    "manifest": re.compile(
        rf"targets/(?!\S*\.\.)[a-z0-9][a-z0-9._-]{{0,63}}/{_NUMBER}/{_SHA}\.release\.json"
    ),
    "blob": re.compile(rf"blobs/{_SHA}"),
}
# what a CDN may keep: a release is seen a minute later at most, and never in part
_MINUTE, _FOR_EVER = "public, max-age=60", "public, max-age=31536000, immutable"
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_RANGE = re.compile(r"([0-9]*)-([0-9]*)")
_DIGITS = 18  # more would not be a size


class FilePart:
    """Bytes of an open file that are a body; close it after use."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the part, counted from its beginning.

        Raises:
            EOFError: the file became shorter.
        """
        data = os.pread(self.file, length, self.start + start)
        if len(data) < length:
            raise EOFError
        return data


@dataclass
class Reply:
    """What is sent back.

    Attributes:
        status: of HTTP.
        body: in memory, or part of a file.
        headers: by lower-case name, without those of the framing.
        kind: what was asked for, for counting.
        settle: called once with the bytes of the body that were sent.
    """

    status: int
    body: bytes | FilePart = b""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "other"
    settle: Callable[[int], None] = lambda sent: None

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return self.body.length if isinstance(self.body, FilePart) else len(self.body)

    def close(self) -> None:
        """Close the file, if there is one."""
        if isinstance(self.body, FilePart):
            self.body.close()


def in_words(status: int, text: str, kind: str = "other", **headers: str) -> Reply:
    """A reply in words; nobody may keep it. Underscores in names of headers become hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    fixed = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    return Reply(status, f"{text}\n".encode(), fixed | named, kind)


def path_of(target: str) -> str:
    """The path of a request's target without its leading slash; queries are ignored.

    >>> path_of("/blobs/0?x=1"), path_of("http://host:1/blobs/0"), path_of("*"), path_of("//x")
    ('blobs/0', 'blobs/0', '*', '/x')
    """
    for scheme in ("http://", "https://"):
        if target.lower().startswith(scheme):
            target = "/" + target[len(scheme) :].partition("/")[2]
    return target.partition("?")[0].removeprefix("/")


def family(name: str) -> Family | None:
    """What a public name stands for; None for every other name.

    Names are compared as they came: public ones hold nothing that a URL would encode.

    >>> family("blobs/" + "0" * 64), family("metadata/3.name.v1.2.json"), family(TIMESTAMP)
    ('blob', 'metadata', 'timestamp')
    >>> family(".lock"), family("metadata/../.lock"), family("metadata%2Ftimestamp.json")
    (None, None, None)
    """
    return next((kind for kind, names in _NAMES.items() if names.fullmatch(name)), None)


def open_public(root: Path, name: str) -> tuple[int, int]:
    """Open a regular file below `root` without following a symbolic link on the way.

    `root` may itself be a link.

    Returns:
        A file descriptor, which the caller closes, and the size in bytes.

    Raises:
        FileNotFoundError: there is no such regular file, or a link is in the way.
        OSError: it cannot be opened.
    """
    *folders, last = name.split("/")
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(folder, flags, dir_fd=at)
            os.close(at)
            at = inner
        # without O_NONBLOCK, opening a FIFO would wait for a writer
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(last, flags, dir_fd=at)
    except OSError as error:
        if error.errno in _ABSENT:
            raise FileNotFoundError(error.errno, "no such public file", name) from error
        raise
    finally:
        os.close(at)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise FileNotFoundError(f"{name} is no regular file")
    return file, found.st_size


def file_reply(root: Path, name: str, conditions: Mapping[str, str]) -> Reply:
    """Reply with a file of a repository, or the part of it that is wanted.

    Args:
        name: path of the file in it, as it was asked for.
        conditions: headers of the request by lower-case name.

    Raises:
        OSError: the file is there and cannot be read.
    """
    kind = family(name)
    if kind is None:
        return in_words(404, "not found")
    try:
        file, size = open_public(root, name)
    except FileNotFoundError:
        # never to be kept: devices ask for the next root until there is one
        return in_words(404, "not found", kind)
    part = FilePart(file, 0, size)
    if kind != "timestamp":
        # the names are unique for their content, so the name is the entity tag
        return _selected(Reply(200, part, {}, kind), name.rpartition("/")[2], conditions)
    # read whole: the file is replaced by rename, and tag, length and content must be of one file
    try:
        data = os.pread(file, size, 0)
    finally:
        part.close()
    return _selected(Reply(200, data, {}, kind), hashlib.sha256(data).hexdigest(), conditions)


def _selected(reply: Reply, tag: str, conditions: Mapping[str, str]) -> Reply:
    """What of a file a request wants, in the order of RFC 9110, section 13.2.2."""
    tag, size, body = f'"{tag}"', reply.length, reply.body
    reply.headers["etag"] = tag
    reply.headers["cache-control"] = _MINUTE if reply.kind == "timestamp" else _FOR_EVER
    if "if-match" in conditions and not _listed(conditions["if-match"], tag):
        reply.close()
        return in_words(412, "another file is here by now", reply.kind)
    if "if-none-match" in conditions and _listed(conditions["if-none-match"], tag):
        reply.close()
        return Reply(304, b"", reply.headers, reply.kind)
    reply.headers["accept-ranges"] = "bytes"
    text = reply.kind != "blob"
    reply.headers["content-type"] = "application/json" if text else "application/octet-stream"
    # dates never name an entity, for files have none here
    if "range" not in conditions or conditions.get("if-range", tag).strip() != tag:
        return reply
    wanted = selected_range(conditions["range"], size)
    if wanted is None:
        return reply
    if not wanted:
        reply.close()
        said = f"one range of the file's {size} bytes, please"
        return in_words(416, said, reply.kind, content_range=f"bytes */{size}")
    reply.status = 206
    reply.headers["content-range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
    if isinstance(body, FilePart):
        body.start, body.length = wanted.start, len(wanted)
    else:
        reply.body = body[wanted.start : wanted.stop]
    return reply


def _listed(header: str, tag: str) -> bool:
    """Whether a list of entity tags holds `tag`; ``*`` holds every tag. The comparison is weak.

    >>> _listed('"a", W/"b"', '"b"'), _listed("*", '"b"'), _listed('"a"', '"b"')
    (True, True, False)
    """
    found = (one.removeprefix("W/") for one in _TAG.findall(header))
    return header.strip() == "*" or tag in found


def selected_range(header: str, size: int) -> range | None:
    """The bytes that a Range header selects from a file.

    Args:
        header: its value.
        size: of the file in bytes.

    Returns:
        Their positions; none of them where the range cannot be satisfied or there are several,
        which is refused because it lets a small request make a large answer (RFC 9110, 14.2).
        None where the header is not about bytes or malformed, and so is to be ignored.

    >>> [selected_range(f"bytes={text}", 10) for text in ("2-4", "7-", "-3", "5-99")]
    [range(2, 5), range(7, 10), range(7, 10), range(5, 10)]
    >>> [selected_range(f"bytes={text}", 10) for text in ("10-", "0-1,3-4", "-0")]
    [range(0, 0), range(0, 0), range(0, 0)]
    >>> [selected_range(text, 10) for text in ("lines=1-2", "bytes=4-2", "bytes=x")]
    [None, None, None]
    """
    unit, _, specifier = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    found = [_RANGE.fullmatch(one.strip()) for one in specifier.split(",")]
    ends = [match.groups() for match in found if match and match[0] != "-"]
    if len(ends) != len(found) or any(len(end) > _DIGITS for pair in ends for end in pair):
        return None
    if len(ends) > 1:
        return range(0)
    first, last = ends[0]
    if not first:
        return range(max(0, size - int(last)), size) if int(last) and size else range(0)
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        return range(0)
    return range(int(first), min(int(last) + 1, size) if last else size)

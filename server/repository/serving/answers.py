"""From a request to an answer: conditions, ranges, headers; for files of a repository."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunecast.server.repository.serving.conditions import listed, part, same
from prunecast.server.repository.serving.names import Family, family, open_public

__all__ = ["Answer", "FilePart", "Request", "path_of", "plain", "repository_answer"]

_CACHING: dict[Family, str] = {
    # what a CDN may keep: a release is seen a minute later at most, and never in part
    "timestamp": "public, max-age=60",
    "metadata": "public, max-age=31536000, immutable",
    "manifest": "public, max-age=31536000, immutable",
    "blob": "public, max-age=31536000, immutable",
}
_JSON, _BINARY = "application/json", "application/octet-stream"


@dataclass(frozen=True)
class Request:
    """A request without body: method, target as it came, headers by lower-case name."""

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)


class FilePart:
    """Bytes of an open file that are a body; close it after use."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)


@dataclass
class Answer:
    """What is sent back.

    Attributes:
        status: of HTTP.
        body: in memory, or part of a file.
        headers: by name, without those of the framing.
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


def plain(status: int, text: str, kind: str = "other", **headers: str) -> Answer:
    """An answer in words; nobody may keep it. Underscores in names of headers become hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    fixed = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    return Answer(status, f"{text}\n".encode(), fixed | named, kind)


def path_of(target: str) -> str:
    """The path of a request's target without its leading slash; queries are ignored.

    >>> path_of("/blobs/0?x=1"), path_of("http://host:1/blobs/0"), path_of("*"), path_of("//x")
    ('blobs/0', 'blobs/0', '*', '/x')
    """
    for scheme in ("http://", "https://"):
        if target.lower().startswith(scheme):
            target = "/" + target[len(scheme) :].partition("/")[2]
    return target.partition("?")[0].removeprefix("/")


def repository_answer(root: Path, request: Request) -> Answer:
    """Answer from the files of a repository.

    Raises:
        OSError: a file is there and cannot be read.
    """
    name = path_of(request.target)
    kind = family(name)
    if kind is None:
        return plain(404, "not found")
    try:
        file, size = open_public(root, name)
    except FileNotFoundError:
        # never to be kept: devices ask for the next root until there is one
        return plain(404, "not found", kind)
    body = FilePart(file, 0, size)
    if kind != "timestamp":
        # the names are unique for their content, so the name is the entity tag
        return _select(request, kind, f'"{name.rpartition("/")[2]}"', body)
    # read whole: the file is replaced by rename, and tag, length and content must be of one file
    try:
        data = os.pread(file, size, 0)
    finally:
        body.close()
    return _select(request, kind, f'"{hashlib.sha256(data).hexdigest()}"', data)


def _select(request: Request, kind: Family, tag: str, body: bytes | FilePart) -> Answer:
    """What of a file a request wants, in the order of RFC 9110, section 13.2.2."""
    headers, size = request.headers, body.length if isinstance(body, FilePart) else len(body)
    answer = Answer(200, body, {"etag": tag, "cache-control": _CACHING[kind]}, kind)
    if "if-match" in headers and not listed(headers["if-match"], tag):
        return _without_body(answer, plain(412, "another file is here by now", kind))
    if "if-none-match" in headers and listed(headers["if-none-match"], tag):
        return _without_body(answer, Answer(304, b"", answer.headers, kind))
    answer.headers["accept-ranges"] = "bytes"
    answer.headers["content-type"] = _BINARY if kind == "blob" else _JSON
    if "range" not in headers or not same(headers.get("if-range", tag), tag):
        return answer
    wanted = part(headers["range"], size)
    if wanted is None:
        return answer
    if not wanted:
        said = f"one range of the file's {size} bytes, please"
        refusal = plain(416, said, kind, content_range=f"bytes */{size}")
        return _without_body(answer, refusal)
    answer.status = 206
    answer.headers["content-range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
    if isinstance(body, FilePart):
        body.start, body.length = wanted.start, len(wanted)
    else:
        answer.body = body[wanted.start : wanted.stop]
    return answer


def _without_body(answer: Answer, instead: Answer) -> Answer:
    if isinstance(answer.body, FilePart):
        answer.body.close()
    return instead

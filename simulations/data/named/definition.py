"""What is known of a named data set before it is here."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

__all__ = ["Arrays", "DataSet", "Member", "Package", "members_of"]

Arrays = Mapping[str, NDArray[Any]]
"""What a data set is converted to, examples first. A name ends in ``_train`` or, of what the data
set sets apart, ``_test``; before that it is ``y`` for targets, ``id`` for identities, and otherwise
an input. Inputs are in the network's order."""


@dataclass(frozen=True)
class Package:
    """Where a data set comes from: one version of a package of one index, one file.

    Attributes:
        index: whose client fetches it.
        name: of the package.
        version: of the package.
        file: that the client writes; its ending says what it is (.whl, .tgz, .deb).
        nbytes: of the file.
        sha256: of the file.
        options: of the client, besides.
    """

    index: Literal["pip", "npm", "apt"]
    name: str
    version: str
    file: str
    nbytes: int
    sha256: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """A file inside of a package: its path there, its size and its digest."""

    path: str
    nbytes: int
    sha256: str


def members_of(folder: str, record: str, begin: str = "") -> tuple[Member, ...]:
    """Many files of a package, from lines such as its RECORD has.

    Args:
        folder: of the package, in which they are.
        record: by line, a path, a size in bytes, and a SHA-256 in base64 as RECORD writes it.
        begin: of the paths that are wanted.
    """
    rows = [line.split() for line in record.splitlines() if line.startswith(begin) and line]
    return tuple(
        Member(folder + path, int(size), base64.urlsafe_b64decode(digest + "=").hex())
        for path, size, digest in rows
    )


@dataclass(frozen=True)
class DataSet:
    """A named data set.

    Attributes:
        name: by which scenarios and commands know it.
        text: what it is, in one line.
        licence: of the data, not of the package around them.
        convert: makes arrays of the members' bytes, which have their digests, by path; it raises
            `DataError` for what these do not hold. Without a package it takes nothing.
        package: that holds it; None where an installed one does.
        members: that are read of the package, in the order in which `convert` sees them.
        nbytes: of all arrays.
        sha256: of the arrays, see `cache.digest`; it changes with `convert`.
        pictures: whether inputs are grey images of bytes, to be scaled to [0, 1].
        identity: what an identity is, such as "speaker"; empty where there is none.
        installed: the package that needs no fetching.
    """

    name: str
    text: str
    licence: str
    convert: Callable[[Mapping[str, bytes]], Arrays]
    package: Package | None = None
    members: tuple[Member, ...] = ()
    nbytes: int = 0
    sha256: str = ""
    pictures: bool = False
    identity: str = ""
    installed: str = ""

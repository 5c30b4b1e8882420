"""Which names of a repository are public, and how their files are opened.

Only names that a repository itself makes are served: neither its lock, nor a file that somebody
put beside it, nor a private key can be reached, whatever else lies in the folder.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Literal

__all__ = ["TIMESTAMP", "Family", "family", "open_public"]

Family = Literal["timestamp", "metadata", "manifest", "blob"]
TIMESTAMP = "metadata/timestamp.json"

# ELOOP: O_NOFOLLOW met a link; ENXIO: a socket
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}

_SHA = "[0-9a-f]{64}"
_NUMBER = "[1-9][0-9]{0,14}"
_NAMES: dict[Family, re.Pattern[str]] = {
    "timestamp": re.compile(re.escape(TIMESTAMP)),
    # any role: repositories may delegate
    "metadata": re.compile(rf"metadata/{_NUMBER}\.[a-z0-9][a-z0-9_-]{{0,63}}\.json"),
    "manifest": re.compile(
        rf"targets/(?!\S*\.\.)[a-z0-9][a-z0-9._-]{{0,63}}/{_NUMBER}/{_SHA}\.release\.json"
    ),
    "blob": re.compile(rf"blobs/{_SHA}"),
}


def family(name: str) -> Family | None:
    """What a public name stands for; None for every other name.

    Names are compared as they came: public ones hold nothing that a URL would encode.

    >>> family("blobs/" + "0" * 64), family("metadata/3.snapshot.json"), family(TIMESTAMP)
    ('blob', 'metadata', 'timestamp')
    >>> family(".lock"), family("metadata/../.lock"), family("metadata%2Ftimestamp.json")
    (None, None, None)
    """
    return next((kind for kind, names in _NAMES.items() if names.fullmatch(name)), None)


def open_public(root: Path, name: str) -> tuple[int, int]:
    """Open a regular file below `root` without following a symbolic link on the way.

    Args:
        root: the repository; it may itself be a link.
        name: a public name.

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

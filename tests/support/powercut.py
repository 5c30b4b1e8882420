"""What a disk may hold after a power cut, from what a program did to a folder.

The recorder watches `os` from inside the process. At every call that changes or syncs something it
notes two things: the folder as programs see it, and as it is durable, which is the content that
each file and each folder had when it was last fsynced. A power cut leaves something in between:
file systems may write back anything early, and nothing that was not synced need be there.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["VARIANTS", "Disk", "Recorder"]

VARIANTS = ("durable", "names", "data", "all", "mixed 1", "mixed 2")
"""How much of what was not synced survives: nothing; names only, with empty or old content;
content only; everything, as after a kill; a seeded choice for each name and each file."""

_WATCHED = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "symlink")
Node = int  # inode


@dataclass(frozen=True)
class _View:
    """Folders as ``{inode: {name: inode}}``, files and links as ``{inode: content}``."""

    folders: dict[Node, dict[str, Node]] = field(default_factory=dict)
    files: dict[Node, bytes] = field(default_factory=dict)
    links: dict[Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Disk:
    """One moment: what was visible, and what of it was durable."""

    after: str
    root: Node
    seen: _View
    durable: _View

    def names(self) -> list[str]:
        """What was visible in the folder itself."""
        return sorted(self.seen.folders[self.root])

    def restore(self, target: Path, variant: str, seed: int = 0) -> None:
        """Write what a cut at this moment may leave into an empty folder."""
        target.mkdir(exist_ok=True)
        for path, what in self.left(variant, seed).items():
            if what is None:
                (target / path).mkdir()
            elif isinstance(what, str):
                os.symlink(what, target / path)
            else:
                (target / path).write_bytes(what)

    def left(self, variant: str, seed: int = 0) -> dict[str, bytes | str | None]:
        """What a cut at this moment may leave, by path.

        A file is its bytes, a link is where it leads, and a folder is None; it precedes what is in
        it.
        """
        rng = random.Random(f"{variant} {seed}")
        return dict(self._folder(self.root, "", variant, rng))

    def _folder(
        self, node: Node, path: str, variant: str, rng: random.Random
    ) -> Iterator[tuple[str, bytes | str | None]]:
        old, new = self.durable.folders.get(node, {}), self.seen.folders.get(node, {})
        for name in sorted({*old, *new}):
            if variant in ("durable", "data"):
                chosen = old.get(name)
            elif variant in ("names", "all"):
                chosen = new.get(name)
            else:
                chosen = rng.choice((old, new)).get(name)
            if chosen is None:
                continue
            if chosen in self.seen.folders or chosen in self.durable.folders:
                yield path + name, None
                yield from self._folder(chosen, f"{path}{name}/", variant, rng)
            elif chosen in self.seen.links:
                yield path + name, self.seen.links[chosen]
            else:
                yield path + name, self._content(chosen, variant, rng)

    def _content(self, node: Node, variant: str, rng: random.Random) -> bytes:
        old = self.durable.files.get(node, b"")
        new = self.seen.files.get(node, old)  # old: its last name is gone, but not durably
        if variant in ("durable", "names"):
            return old
        if variant in ("data", "all"):
            return new
        if node in self.durable.files and old == new:
            return new
        torn = new[: len(new) // 2] + bytes(len(new) - len(new) // 2)
        return rng.choice((old, new, new[: rng.randrange(len(new) + 1)], torn))


class Recorder:
    """Records the moments of a folder while it is installed.

    Args:
        folder: all of it counts as durable when the recording starts.
    """

    def __init__(self, folder: Path) -> None:
        self.moments: list[Disk] = []
        self._folder = folder
        self._handles: dict[Node, int] = {}  # an inode that is held open is not given again
        self._busy = False
        start = self._look()
        self._root = folder.stat().st_ino
        self._durable = start
        self._note("start", start)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Watch `os` until the patch is undone."""
        for name in _WATCHED:
            patch.setattr(os, name, self._watch(name, getattr(os, name)))

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _watch(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if self._busy:
                return real(*args, **options)
            self._busy = True
            try:
                self._note(f"before {name}", self._look())
                result = real(*args, **options)
                view = self._look()
                if name == "fsync":
                    self._synced(args[0], view)
                self._note(f"{name} {args[0]}", view)
                return result
            finally:
                self._busy = False

        return watched

    def _synced(self, target: Any, view: _View) -> None:
        node = os.fstat(target).st_ino
        durable = self._durable
        folders, files = dict(durable.folders), dict(durable.files)
        if node in view.folders:
            folders[node] = view.folders[node]
        elif node in view.files:
            files[node] = view.files[node]
        self._durable = _View(folders, files, {**durable.links, **view.links})

    def _note(self, after: str, view: _View) -> None:
        self.moments.append(Disk(after, self._root, view, self._durable))

    def _look(self) -> _View:
        view = _View()
        for path in [self._folder, *self._folder.rglob("*")]:
            status = path.lstat()
            node = status.st_ino
            if stat.S_ISLNK(status.st_mode):
                view.links[node] = os.readlink(path)
                continue
            if node not in self._handles:
                self._handles[node] = os.open(path, os.O_RDONLY)
            if stat.S_ISDIR(status.st_mode):
                view.folders[node] = {p.name: p.lstat().st_ino for p in path.iterdir()}
            else:
                view.files[node] = path.read_bytes()
        return view

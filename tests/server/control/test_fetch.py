"""Fetch where the system or the device fails it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunecast.common.listening import SparingLog
from prunecast.server.control import ControlLimits, servicer
from prunecast.server.control import repository as files
from prunecast.server.control.errors import Answering
from prunecast.server.control.repository import open_file

NAME = "blobs/" + "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    (tmp_path / NAME).write_bytes(b"content")
    return tmp_path


def test_a_device_that_leaves_while_its_file_is_opened_leaves_no_open_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()
    opened = []

    def slow(*args: Any, **options: Any) -> Any:
        opening.set()
        assert go_on.wait(10)
        opened.append(open_file(*args, **options))
        return opened[-1]

    @asynccontextmanager
    async def admitted(self: object, context: object, claimed: str) -> AsyncIterator[Any]:
        yield "token", SimpleNamespace(device="cam")

    monkeypatch.setattr(servicer, "open_file", slow)
    monkeypatch.setattr(servicer.Servicer, "_admitted", admitted)

    async def leave(threads: ThreadPoolExecutor) -> None:
        absent: Any = None
        answering = Answering(str, SparingLog(logging.getLogger()))
        serving = servicer.Servicer(
            *(absent, folder, threads, ControlLimits(), absent, answering), certificates=False
        )
        chunks = serving.Fetch(SimpleNamespace(path=NAME, offset=0), None)
        task = asyncio.create_task(anext(chunks))  # type: ignore[arg-type]
        await asyncio.to_thread(opening.wait, 10)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        go_on.set()

    with ThreadPoolExecutor(1) as threads:
        asyncio.run(leave(threads))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0].file)


def test_a_file_that_cannot_be_opened_is_not_said_to_be_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(root: Path, name: str) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files", name)

    monkeypatch.setattr(files, "open_public", full)
    # a device would take a missing root for the end of the chain of roots
    with pytest.raises(OSError, match="too many open files"):
        open_file(folder, NAME, 0, most_bytes=100)

"""The agent's state folder, and what a device says of itself for people and for scripts.

::

    state.json   which slot is active: replacing this file is the moment of activation
    status.json  what the last check for updates did
    start.json   the note of the process that runs, see `starts`
    slots/a, b   one complete release each; the inactive one is rebuilt by the next update
    metadata/    verified TUF metadata
    downloads/   files on their way, resumable
    lock         held by the agent that may write

`state.json` refers only to slots that are complete and verified, so a crash at any moment leaves
a complete version to start from.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunecast.client.edge.config import AGENT_VERSION, UpdateResult
from prunecast.client.edge.errors import AgentBusy, StateDamaged, StateError, disk
from prunecast.client.edge.records import SLOTS, State
from prunecast.client.edge.starts import Begun
from prunecast.client.edge.telemetry import read_telemetry
from prunecast.common.documents import from_document, read_document
from prunecast.common.files import lock_file, lock_open, make_folder, write_atomically

__all__ = ["StateFolder", "read_status", "record_check"]

_SCHEMA = 1
_STATUS, _NOTE = "status.json", "start.json"


class StateFolder:
    """Reads and writes the state folder, which the first write creates.

    What writes raises StateError when the file system refuses; what was there before stands.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata = self.path / "metadata"
        self.downloads = self.path / "downloads"
        self.refuses: str | None = None  # why it cannot be written

    def slot(self, slot: str) -> Path:
        """Folder of a slot."""
        return self.path / "slots" / slot

    def read(self) -> State | None:
        """The state; None when the folder is new.

        Raises:
            StateDamaged: unreadable, or missing although there was one.
            StateError: of a newer schema.
        """
        path = self.path / "state.json"
        try:
            document = read_document(path)
        except FileNotFoundError:
            if self._has_served():
                raise StateDamaged(f"{path} is missing") from None
            return None
        except OSError as error:
            raise StateDamaged(f"{path} is unreadable ({error.strerror or error})") from error
        except ValueError as error:
            raise StateDamaged(f"{path} is unreadable ({error})") from error
        try:
            if document["schema"] != _SCHEMA:
                raise StateError(f"{path} is of schema {document['schema']}: update the agent")
            return from_document(State, _completed(document))
        except (KeyError, TypeError, ValueError) as error:
            raise StateDamaged(f"{path} is malformed") from error

    def _has_served(self) -> bool:
        """Whether an agent has had an active release here, by the files that only inform."""
        result, figures = self.read_json(_STATUS).get("last_result"), read_telemetry(self.path)
        checked = isinstance(result, dict) and result.get("version") is not None
        return checked or (figures is not None and figures.active is not None)

    def write(self, state: State) -> None:
        """Replace the state atomically."""
        self.write_json("state.json", {"schema": _SCHEMA, **asdict(state)})

    def write_json(self, name: str, document: object) -> None:
        """Replace a JSON file atomically."""
        data = json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
        with disk(f"write {self.path / name}"):
            write_atomically(self.path / name, data)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file that only informs; empty when missing or unreadable."""
        try:
            document = read_document(self.path / name)
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    def read_note(self) -> Begun | None:
        """The note of a process that has not ended by itself; None: there is no such note."""
        try:
            return from_document(Begun, self.read_json(_NOTE))
        except ValueError:
            return None

    def write_note(self, begun: Begun | None) -> None:
        """Replace the note atomically; None removes it."""
        if begun is not None:
            self.write_json(_NOTE, asdict(begun))
            return
        with disk(f"remove {self.path / _NOTE}"):
            (self.path / _NOTE).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what a crash or a damaged file system left behind; only with the lock held.

        That is temporary files, a file where a folder belongs, and what is no file in a file's
        place: nothing could ever be written there. What is missing then is fetched again.
        """
        history = self.metadata / "root_history"
        left = [
            *(p for folder in (self.path, history) for p in folder.glob(".*.json.*")),
            # tuf itself names its temporary files tmp*
            *(
                p
                for name in (".*.json.*", ".time.floor.*", "tmp*")
                for p in self.metadata.glob(name)
            ),
        ]
        with disk(f"tidy {self.path}"):
            for path in left:
                path.unlink(missing_ok=True)
            slots = [self.slot(slot) for slot in SLOTS]
            for folder in (self.metadata, history, self.downloads, slots[0].parent, *slots):
                if (folder.is_symlink() or folder.exists()) and not folder.is_dir():
                    folder.unlink()
            kept = (self.metadata / "time.floor", *self.metadata.glob("*.json"))
            for path in (*kept, *history.glob("*.json")):
                if path.is_dir():
                    shutil.rmtree(path)
                elif not path.is_file():  # reading a pipe would wait for ever
                    path.unlink(missing_ok=True)
            for slot in SLOTS:
                shutil.rmtree(self.slot(slot) / "optimised.new", ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other agents from this folder; `refuses` then says whether it can be written.

        Raises:
            AgentBusy: another agent holds it.
            StateError: it is not there and cannot be made.
        """
        told = f"another agent works in {self.path}: stop it or use another state folder"
        try:
            make_folder(self.path)
            lock = lock_file(self.path / "lock")
        except BlockingIOError as error:
            raise AgentBusy(told) from error
        except OSError as error:
            self.refuses = f"cannot write {self.path}: {error.strerror or error}"
            if not self.path.is_dir():
                raise StateError(self.refuses) from error
            try:
                lock = lock_open(open(self.path / "lock"))  # noqa: SIM115
            except BlockingIOError:
                raise AgentBusy(told) from error
            except OSError:
                lock = io.StringIO()  # who cannot write cannot disturb another agent either
        with lock:
            yield


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """Agents before these fields left them out, and ignore them."""
    made = {"failures": {}, **document}
    for name in ("active", "previous"):
        if isinstance(made.get(name), dict):
            made[name] = {"served": 0.0, "ends": [], "passed": None, **made[name]}
    return made


def record_check(
    folder: StateFolder,
    result: UpdateResult | None,
    counted: Counter[str],
    error: str | None,
    warning: str | None = None,
) -> None:
    """Keep what a check for updates did; see `StateFolder`.

    Args:
        result: None if the check failed.
        counted: bytes received by kind, added to those of earlier checks.
        error: why it failed, or why a release was rejected.
        warning: what is wrong although it did not fail for that.
    """
    earlier = folder.read_json(_STATUS).get("downloaded_total")
    total = Counter(earlier if isinstance(earlier, dict) else {})
    total.update(counted)
    report = {
        "last_check": datetime.now(UTC).isoformat(timespec="seconds"),
        "last_result": asdict(result) if result else None,
        "last_error": error,
        "last_warning": warning,
        "downloaded_total": dict(total),
    }
    folder.write_json(_STATUS, report)


def _control(folder: StateFolder) -> dict[str, Any] | None:
    """What the fleet wants and what it has not heard yet; None without a fleet."""
    found = folder.read_json("control.json")
    if not found:
        return None
    reports = found.get("reports")
    waiting = len(reports) if isinstance(reports, list) else 0
    told = {key: found.get(key) for key in ("device", "directive", "answered")}
    return {**told, "waiting_reports": waiting}


def read_status(state: Path | str) -> dict[str, Any]:
    """Status of a state folder, without an agent: active and previous release, last check.

    Raises:
        StateError: there is no such folder, or its state is of a newer schema.
    """
    folder = StateFolder(state)
    if not folder.path.is_dir():
        raise StateError(
            f"{folder.path} does not exist: name the folder given to prunecast edge update or run"
        )
    damage: dict[str, str] = {}
    try:
        found = folder.read()
    except StateDamaged as error:
        found = None
        damage = {"last_error": f"{error}: the agent recovers it when it starts"}
    telemetry = read_telemetry(folder.path)
    return {
        "agent": AGENT_VERSION,
        "name": found.name if found else None,
        "active": asdict(found.active) if found and found.active else None,
        "previous": asdict(found.previous) if found and found.previous else None,
        "rejected": found.rejected if found else {},
        "failures": {v: asdict(f) for v, f in found.failures.items()} if found else {},
        "telemetry": telemetry.to_json() if telemetry else None,
        "control": _control(folder),
        **folder.read_json(_STATUS),
        **damage,
    }

"""The agent's state folder, and what a device says of itself for people and for scripts.

::

    state.json   which slot is active: replacing this file is the moment of activation
    status.json  what the last check for updates did
    slots/a, b   one complete release each; the inactive one is rebuilt by the next update
    metadata/    verified TUF metadata
    downloads/   files on their way, resumable
    lock         held by the agent that may write

`state.json` refers only to slots that are complete and verified, so a crash at any moment leaves
a complete version to start from.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prunecast.client.edge.config import AGENT_VERSION, UpdateResult
from prunecast.client.edge.errors import AgentBusy, StateError, disk
from prunecast.client.edge.telemetry import read_telemetry
from prunecast.common.documents import from_document, read_document
from prunecast.common.files import lock_file, make_folder, write_atomically

__all__ = [
    "Failure",
    "FailureKind",
    "SlotRecord",
    "State",
    "StateFolder",
    "read_status",
    "record_check",
]

SlotName = Literal["a", "b"]
FailureKind = Literal["self-test failed", "rolled back", "crash loop"]

_SCHEMA = 1
_STATUS = "status.json"
_SLOTS: tuple[SlotName, ...] = ("a", "b")
_REMEMBERED = 32


@dataclass(frozen=True)
class Failure:
    """Why a release was given up on this device."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True)
class SlotRecord:
    """A slot that `state.json` refers to.

    Attributes:
        slot: ``a`` or ``b``.
        version: of the release in it.
        manifest: hex digest of its `release.json`.
        confirmed: whether it has proved itself in service.
        starts: how often a process has started with it unconfirmed.
        optimised: seal of the model that was optimised for this CPU; None without one.
        passed: with which agent, onnxruntime and CPU its trial was passed, as a digest.
    """

    slot: SlotName
    version: int
    manifest: str
    confirmed: bool = False
    starts: int = 0
    optimised: str | None = None
    passed: str | None = None


@dataclass(frozen=True)
class State:
    """Content of `state.json`; immutable, every change makes a new one.

    Attributes:
        name: of the release this folder follows.
        active: what runs.
        previous: what to go back to.
        rejected: manifests that must not be tried again, with the reason.
        tries: manifests whose self-test was begun, with how often: a release that kills the
            process during its self-test must not do so forever.
        failures: why releases were rejected, by version.
    """

    name: str
    active: SlotRecord | None = None
    previous: SlotRecord | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)

    def free_slot(self) -> tuple[SlotName, State]:
        """The slot to rebuild, and the state to write before touching it.

        The last confirmed release is never given up: when the active one is unconfirmed and a
        previous one exists, the previous one becomes active on disk and the unconfirmed slot is
        rebuilt.
        """
        active, previous = self.active, self.previous
        if active and previous and not active.confirmed:
            return active.slot, replace(self, active=previous, previous=None)
        used = active.slot if active else None
        return next(s for s in _SLOTS if s != used), replace(self, previous=None)

    def activate(self, record: SlotRecord) -> State:
        """`record` becomes active; what ran before becomes previous."""
        tries = {k: v for k, v in self.tries.items() if k != record.manifest}
        return replace(self, active=record, previous=self.active, tries=tries)

    def exchange(self) -> State:
        """The previous release becomes active and the active one previous; both stay good.

        What comes back counts as confirmed: it served before, and if its slot were rebuilt as an
        unconfirmed one, a crash would bring back the release that it takes the place of.
        """
        if self.previous is None:
            return self
        active = replace(self.previous, confirmed=True, starts=0)
        return replace(self, active=active, previous=self.active)

    def go_back(self, reason: str, kind: FailureKind) -> State:
        """The previous release becomes active; the active one is rejected."""
        if self.active is None:
            return self
        failed = self.reject(self.active.manifest, self.active.version, reason, kind)
        return replace(failed, active=self.previous, previous=None)

    def lose_active(self) -> State:
        """The active slot is unfit through no fault of its release, which may be fetched again."""
        return replace(self, active=self.previous, previous=None)

    def reject(self, manifest: str, version: int, reason: str, kind: FailureKind) -> State:
        """Never try `manifest` again."""
        kept = list({**self.rejected, manifest: reason[:500]}.items())[-_REMEMBERED:]
        tries = {k: v for k, v in self.tries.items() if k != manifest}
        failure = Failure(kind, reason[:500])
        failures = list({**self.failures, version: failure}.items())[-_REMEMBERED:]
        return replace(self, rejected=dict(kept), tries=tries, failures=dict(failures))

    def tried(self, manifest: str) -> State:
        """The self-test of `manifest` is about to begin."""
        return replace(self, tries={manifest: self.tries.get(manifest, 0) + 1})

    def confirm(self) -> State:
        """The active release has proved itself."""
        if self.active is None or self.active.confirmed:
            return self
        return replace(self, active=replace(self.active, confirmed=True, starts=0))


class StateFolder:
    """Reads and writes the state folder, which the first write creates.

    What writes raises StateError when the file system refuses; what was there before stands.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata = self.path / "metadata"
        self.downloads = self.path / "downloads"

    def slot(self, slot: str) -> Path:
        """Folder of a slot."""
        return self.path / "slots" / slot

    def read(self) -> State | None:
        """The state; None when the folder is new.

        Raises:
            StateError: unreadable.
        """
        path = self.path / "state.json"
        try:
            document = read_document(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StateError(f"{path} is unreadable ({error}): delete the state folder") from error
        try:
            if document["schema"] != _SCHEMA:
                raise StateError(f"{path} is of schema {document['schema']}: update the agent")
            # agents before this field left it out, and ignore it
            return from_document(State, {"failures": {}, **document})
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{path} is malformed: delete the state folder") from error

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

    def tidy(self) -> None:
        """Remove temporary files that a crash left behind; only with the lock held."""
        history = self.metadata / "root_history"
        left = [
            *(p for folder in (self.path, history) for p in folder.glob(".*.json.*")),
            # tuf itself names its temporary files tmp*
            *(p for name in (".*.json.*", "tmp*") for p in self.metadata.glob(name)),
        ]
        with disk(f"tidy {self.path}"):
            for path in left:
                path.unlink(missing_ok=True)
            for slot in _SLOTS:
                shutil.rmtree(self.slot(slot) / "optimised.new", ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other agents from this folder.

        Raises:
            AgentBusy: another agent holds it.
        """
        with disk(f"write {self.path}"):
            make_folder(self.path)
            try:
                lock = lock_file(self.path / "lock")
            except BlockingIOError as error:
                told = f"another agent works in {self.path}: stop it or use another state folder"
                raise AgentBusy(told) from error
        with lock:
            yield


def record_check(
    folder: StateFolder, result: UpdateResult | None, counted: Counter[str], error: str | None
) -> None:
    """Keep what a check for updates did; see `StateFolder`.

    Args:
        result: None if the check failed.
        counted: bytes received by kind, added to those of earlier checks.
        error: why it failed, or why a release was rejected.
    """
    earlier = folder.read_json(_STATUS).get("downloaded_total")
    total = Counter(earlier if isinstance(earlier, dict) else {})
    total.update(counted)
    report = {
        "last_check": datetime.now(UTC).isoformat(timespec="seconds"),
        "last_result": asdict(result) if result else None,
        "last_error": error,
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
        StateError: there is no such folder, or its state is unreadable.
    """
    folder = StateFolder(state)
    if not folder.path.is_dir():
        raise StateError(
            f"{folder.path} does not exist: name the folder given to prunecast edge update or run"
        )
    found = folder.read()
    telemetry = read_telemetry(folder.path)
    return {
        "agent": AGENT_VERSION,
        "name": found.name if found else None,
        "active": asdict(found.active) if found and found.active else None,
        "previous": asdict(found.previous) if found and found.previous else None,
        "rejected": found.rejected if found else {},
        "telemetry": telemetry.to_json() if telemetry else None,
        "control": _control(folder),
        **folder.read_json(_STATUS),
    }

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
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prunecast.client.edge.config import AGENT_VERSION, UpdateResult
from prunecast.client.edge.errors import AgentBusy, StateDamaged, StateError, disk
from prunecast.client.edge.starts import BAD_ENDS, WEIGHTS, Begun, EndKind, how_it_ended
from prunecast.client.edge.telemetry import read_telemetry
from prunecast.common.documents import from_document, read_document
from prunecast.common.files import lock_file, make_folder, take_lock, write_atomically

__all__ = [
    "SLOTS",
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

_LOOP: FailureKind = "crash loop"
_SCHEMA = 1
_STATUS, _NOTE = "status.json", "start.json"
SLOTS: tuple[SlotName, ...] = ("a", "b")
_REMEMBERED = 32
_REMEMBERED_ENDS = 5
_ALMOST = 0.05  # thirds of a start do not add up to whole ones


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
        starts: how many starts it has to answer for while unconfirmed, by how they ended.
        served: seconds of service, over all starts, that count towards its confirmation.
        ends: how the latest starts with it ended, the last one at the end.
        optimised: seal of the model that was optimised for this CPU; None without one.
        passed: with which agent, onnxruntime and CPU its trial was passed, as a digest.
    """

    slot: SlotName
    version: int
    manifest: str
    confirmed: bool = False
    starts: float = 0.0
    served: float = 0.0
    ends: tuple[EndKind, ...] = ()
    optimised: str | None = None
    passed: str | None = None

    def ended(self, kind: EndKind, *, starts: float = 0.0, served: float = 0.0) -> SlotRecord:
        """Another start has ended, for which it has to answer so much."""
        ends = (*self.ends, kind)[-_REMEMBERED_ENDS:]
        if self.confirmed:
            return replace(self, ends=ends)
        starts, served = round(self.starts + starts, 2), round(self.served + served, 1)
        return replace(self, ends=ends, starts=starts, served=served)

    def loops(self, most_starts: int) -> bool:
        """Whether it has to answer for a crash loop."""
        return self.starts >= most_starts - _ALMOST


@dataclass(frozen=True)
class State:
    """Content of `state.json`; immutable, every change makes a new one.

    Attributes:
        name: of the release this folder follows.
        active: what runs.
        previous: what to go back to.
        rejected: manifests that must not be tried again, with the reason.
        tries: manifests whose self-test ended with the process, with how often: a release that
            kills the process during its self-test must not do so forever.
        failures: why releases were rejected, by version.
    """

    name: str
    active: SlotRecord | None = None
    previous: SlotRecord | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    tries: dict[str, float] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)

    def settle(
        self, found: Begun | None, now: Begun, most_starts: int, steady_after: float
    ) -> State:
        """What the process before this one was ended by is put down to whom it belongs to.

        A release answers for how its starts end, unless what it took the place of ended in the
        same way: then going back would not help, and that is how this device is used. If a
        release that was gone back to ends like that again and again, the ones that were given up
        for their ends may be tried again.

        Args:
            found: the note of the process before this one; None: it has ended by itself.
            now: the note of this process.
            most_starts: that make a crash loop.
            steady_after: seconds of service after which an end speaks against nobody.
        """
        active = self.active
        if found is None:
            return self
        if found.trying:  # after any time of service
            kind = how_it_ended(replace(found, served=0.0), now, steady_after)
            return self.tried(found.trying, WEIGHTS[kind])
        if active is None or found.work == "install":
            return self
        kind = how_it_ended(found, now, steady_after)
        most = min(most_starts, _REMEMBERED_ENDS)
        usual = self.previous is not None and self.previous.ends.count(kind) >= most
        if usual:
            active = active.ended(kind, served=found.served)
        else:
            active = active.ended(kind, starts=WEIGHTS[kind])
        settled = replace(self, active=active)
        last = active.ends[-most:]
        if active.confirmed and len(last) == most and set(last) <= set(BAD_ENDS):
            return settled.forgive()
        return settled

    def end(self, served: float) -> State:
        """The process ends by itself, which speaks against nobody; its service counts."""
        if self.active is None or (self.active.confirmed and not self.active.ends):
            return self  # nothing that anybody would want to know
        return replace(self, active=self.active.ended("stopped", served=served))

    def forgive(self) -> State:
        """Forget that releases were given up for a crash loop: others end like that, too."""
        loops = {v: failed.reason for v, failed in self.failures.items() if failed.kind == _LOOP}
        failures = {v: failed for v, failed in self.failures.items() if v not in loops}
        rejected = {m: why for m, why in self.rejected.items() if why not in loops.values()}
        return replace(self, failures=failures, rejected=rejected)

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
        return next(s for s in SLOTS if s != used), replace(self, previous=None)

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
        active = replace(self.previous, confirmed=True, starts=0.0)
        return replace(self, active=active, previous=self.active)

    def go_back(self, reason: str, kind: FailureKind) -> State:
        """The previous release becomes active; the active one is rejected."""
        if self.active is None:
            return self
        failed = self.reject(self.active.manifest, self.active.version, reason, kind)
        # how it ends from now on tells whether going back has helped
        active = replace(self.previous, ends=()) if self.previous else None
        return replace(failed, active=active, previous=None)

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

    def tried(self, manifest: str, starts: float) -> State:
        """The self-test of `manifest` has ended the process, which counts for so many starts."""
        tries = round(self.tries.get(manifest, 0) + starts, 2)
        return replace(self, tries={manifest: tries} if tries else {})

    def gives_up(self, manifest: str, most: int) -> bool:
        """Whether the self-test of `manifest` has ended the process too often."""
        return self.tries.get(manifest, 0) >= most - _ALMOST

    def confirm(self) -> State:
        """The active release has proved itself."""
        if self.active is None or self.active.confirmed:
            return self
        return replace(self, active=replace(self.active, confirmed=True, starts=0.0, served=0.0))


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
        """Remove temporary files that a crash left behind; only with the lock held."""
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
                lock = open(self.path / "lock")  # noqa: SIM115
                take_lock(lock.fileno())
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
            made[name] = {"served": 0.0, "ends": [], **made[name]}
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

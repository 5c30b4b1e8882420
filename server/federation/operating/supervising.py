"""A run of Flower that is submitted again until it has completed.

Flower does not start a ServerApp anew that failed, or whose SuperLink was killed: it marks the run
as failed. A run that resumes (``resume = "auto"``) goes on where it was when it is submitted again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunecast.server.federation.errors import FederationError

__all__ = ["FlowerCommand", "SubmittedRun", "SuperviseError", "supervise"]

_SECONDS = 120  # that a command of Flower may take
_LONG = 600.0  # seconds of a run after which the next wait is the first one again
_LONGEST_WAIT = 300.0
_VALUES = ("--federation", "--run-config", "-c", "--federation-config", "--format")
_FINISHED = ("completed", "failed", "stopped")
_LONGEST = 300  # characters of what a command said


class SuperviseError(FederationError):
    """The command cannot be supervised, or Flower did not do what it was asked."""


@dataclass
class SubmittedRun:
    """A run as the SuperLink tells of it.

    Attributes:
        run_id: Flower's.
        status: "completed", "failed" or "stopped" once it has finished; else Flower's own word.
        seconds: since it was submitted.
    """

    run_id: str
    status: str = "submitted"
    seconds: float = 0.0


class FlowerCommand:
    """``flwr run ...``, and ``flwr list`` of what it submitted.

    Args:
        command: of ``flwr run``, as a shell has split it.

    Raises:
        SuperviseError: it is another command, not there, or one whose output cannot be read.
    """

    def __init__(self, command: Sequence[str]) -> None:
        program, *rest = command or [""]
        if program.rpartition("/")[2] != "flwr" or rest[:1] != ["run"]:
            raise SuperviseError(
                f"{' '.join(command)[:80]!r} cannot be supervised: give `flwr run ...` after --"
            )
        places: list[str] = []
        asked = iter(rest[1:])
        for word in asked:
            if word in _VALUES:
                if word == "--format":
                    raise SuperviseError("leave --format out: the answer of flwr run is read here")
                next(asked, None)
            elif word == "--stream":
                raise SuperviseError("leave --stream out: follow the run with `flwr log RUN_ID`")
            elif not word.startswith("-"):
                places.append(word)
        if shutil.which(program) is None:
            raise SuperviseError(f"there is no program {program} here: give the path of flwr")
        self._run = [*command, "--format", "json"]
        self._list = [program, "list", "--format", "json", *places[1:2]]

    def submit(self) -> str:
        """Submit the run; its id.

        A SuperLink may have taken what it did not answer for, and two runs of one job would undo
        each other's work: a run that has come up since is the one.

        Raises:
            SuperviseError: Flower refused, or its answer has no id; or nobody knows which runs
                there are.
        """
        before = {run["run-id"] for run in self._runs()}
        try:
            answer = _json(self._run)
        except SuperviseError:
            submitted = {run["run-id"] for run in self._runs()} - before
            if len(submitted) != 1:  # of several, nobody knows which
                raise
            return submitted.pop()
        if not answer.get("run-id"):
            raise _refusal("flwr run", answer)
        return str(answer["run-id"])

    def status(self, run_id: str) -> str:
        """What became of a run so far, as `SubmittedRun.status` has it.

        It has failed, too, where the SuperLink was started again without what it knew of it.

        Raises:
            SuperviseError: the SuperLink does not answer.
        """
        try:
            runs = self._runs("--run-id", run_id)
        except SuperviseError:  # so does Flower answer of a run that is unknown
            runs = [run for run in self._runs() if run["run-id"] == run_id]
        if not runs:
            return "failed"
        found = runs[0]["status"]
        return found.partition(":")[2] if found.startswith("finished:") else found

    def _runs(self, *which: str) -> list[dict[str, str]]:
        """Ids and states of runs; of all, unless some are asked for.

        Raises:
            SuperviseError: nobody tells: no run is not the same as no answer.
        """
        answer = _json([*self._list, *which])
        try:
            return [{key: str(run[key]) for key in ("run-id", "status")} for run in answer["runs"]]
        except (KeyError, TypeError):
            raise _refusal("flwr list", answer) from None


def _refusal(command: str, answer: Mapping[str, Any]) -> SuperviseError:
    """Of an answer that does not have what was asked for."""
    said = " ".join(str(answer.get("error-message") or answer).split())
    if "Invalid run configuration" in said:
        said += " Flower takes keys alone that [tool.flwr.app.config] of the app has."
    return SuperviseError(f"{command}: {said[:_LONGEST]}")


def _json(command: Sequence[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SuperviseError(f"{' '.join(command[:2])}: {error}"[:_LONGEST]) from error
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        said = " ".join((done.stderr or done.stdout).split())
        raise SuperviseError(f"{' '.join(command[:2])}: {said[-_LONGEST:]}") from None
    if not isinstance(answer, dict):
        raise SuperviseError(f"{' '.join(command[:2])} answered no object")
    return answer


def supervise(
    submit: Callable[[], str],
    status: Callable[[str], str],
    *,
    restarts: int = 10,
    wait: float = 5.0,
    every: float = 5.0,
    silent: float = 3600.0,
    say: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[SubmittedRun]:
    """Submit a run, and again when it failed, until it has completed.

    A run that somebody stopped is left alone.

    Args:
        submit: submits it and returns its id; raises SuperviseError where that is not possible now.
        status: from an id to "completed", "failed", "stopped", or anything else meanwhile; raises
            SuperviseError where nobody answers.
        restarts: how often it is submitted again at most, attempts in vain included.
        wait: seconds before the first time; twice as many before each other, 300 at most, and as
            few as at first after a run of ten minutes.
        every: seconds between looking how it is.
        silent: seconds without an answer that are borne.
        say: told what happens, in one line each.
        sleep: waits so many seconds.
        clock: seconds that never go back.

    Returns:
        The runs that were submitted; the last one has completed, unless it was stopped or failed
        too often.

    Raises:
        SuperviseError: nobody answers for too long, or no run can be submitted, however often.
    """
    runs: list[SubmittedRun] = []
    pause = wait
    for left in range(restarts, -1, -1):
        try:
            run = SubmittedRun(submit())
        except SuperviseError as error:
            if not left:
                raise
            reason = str(error)
        else:
            runs.append(run)
            say(f"run {run.run_id} submitted (number {len(runs)})")
            _watch(run, status, every, silent, say, sleep, clock)
            if run.status != "failed":
                return runs
            reason = f"run {run.run_id} failed"
            if run.seconds >= _LONG:
                pause = wait
        if not left:
            say(f"{reason}: after {restarts} restarts it is not submitted again")
            return runs
        say(f"{reason}: again in {pause:.0f} s, {left} times at most")
        sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT)
    return runs


def _watch(
    run: SubmittedRun,
    status: Callable[[str], str],
    every: float,
    silent: float,
    say: Callable[[str], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Wait until a run has finished."""
    begun = answered = clock()
    while run.status not in _FINISHED:
        sleep(every)
        try:
            found = status(run.run_id)
        except SuperviseError as error:
            gone = clock() - answered
            if gone >= silent:
                raise SuperviseError(
                    f"no answer for {gone:.0f} s ({error}): see to the SuperLink; run {run.run_id} "
                    "may go on"
                ) from error
            say(f"no answer for {gone:.0f} s: {error}")
            continue
        answered = clock()
        run.seconds = answered - begun
        if found != run.status:
            run.status = found
            say(f"run {run.run_id} is {found} after {run.seconds:.0f} s")

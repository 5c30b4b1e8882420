"""A supervised run is submitted again as long as it fails, and no longer."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.federation.operating.supervising import (
    FlowerCommand,
    SuperviseError,
    supervise,
)


class SuperLink:
    """Runs that end as they are told, on a clock of their own."""

    def __init__(self, *ends: str, lasting: float = 20.0) -> None:
        self.ends, self.lasting = list(ends), lasting
        self.now, self.said, self.slept = 0.0, [], []  # type: ignore[var-annotated]
        self.begun: dict[str, float] = {}

    def submit(self) -> str:
        if self.ends[len(self.begun)] == "refused":
            self.ends.pop(len(self.begun))
            raise SuperviseError("nobody listens")
        run = str(len(self.begun))
        self.begun[run] = self.now
        return run

    def status(self, run: str) -> str:
        if self.now - self.begun[run] < self.lasting:
            return "running"
        end = self.ends[int(run)]
        if end == "gone":
            raise SuperviseError("nobody listens")
        return end

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def supervise(self, **options: Any) -> list[str]:
        runs = supervise(
            self.submit, self.status, say=self.said.append, sleep=self.sleep,
            clock=lambda: self.now, every=10.0, **options,
        )  # fmt: skip
        return [run.status for run in runs]


def test_a_run_that_completes_is_submitted_once() -> None:
    link = SuperLink("completed")
    assert link.supervise() == ["completed"]
    assert link.said == [
        "run 0 submitted (number 1)",
        "run 0 is running after 10 s",
        "run 0 is completed after 20 s",
    ]


def test_a_failed_run_is_submitted_again_after_longer_and_longer_waits() -> None:
    link = SuperLink("failed", "refused", "failed", "completed")
    assert link.supervise(wait=5.0) == ["failed", "failed", "completed"]
    assert [pause for pause in link.slept if pause != 10.0] == [5.0, 20.0]
    assert 10.0 in link.slept
    assert "run 0 failed: again in 5 s, 10 times at most" in link.said
    assert "nobody listens: again in 10 s, 9 times at most" in link.said


def test_after_a_long_run_the_waits_begin_anew() -> None:
    link = SuperLink("failed", "failed", "completed", lasting=700.0)
    assert link.supervise(wait=4.0) == ["failed", "failed", "completed"]
    assert [pause for pause in link.slept if pause != 10.0] == [4.0, 4.0]


def test_there_is_an_end_to_it() -> None:
    link = SuperLink(*["failed"] * 9)
    assert link.supervise(restarts=2) == ["failed"] * 3
    assert link.said[-1] == "run 2 failed: after 2 restarts it is not submitted again"


def test_a_run_that_was_stopped_is_left_alone() -> None:
    assert SuperLink("stopped", "completed").supervise() == ["stopped"]


def test_silence_is_borne_for_a_while() -> None:
    link = SuperLink("gone")
    with pytest.raises(SuperviseError, match=r"no answer for 60 s.*run 0 may go on"):
        link.supervise(silent=60.0)
    with pytest.raises(SuperviseError, match="nobody listens"):
        SuperLink("refused", "refused", "completed").supervise(restarts=1)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["flwr", "list"], "give `flwr run"),
        (["sh", "-c", "flwr run"], "give `flwr run"),
        ([], "give `flwr run"),
        (["flwr", "run", ".", "--stream"], "flwr log"),
        (["flwr", "run", ".", "--format", "json"], "leave --format out"),
        (["/nowhere/flwr", "run", "."], "there is no program /nowhere/flwr here"),
    ],
)
def test_only_what_can_be_followed_is_supervised(command: list[str], told: str) -> None:
    with pytest.raises(SuperviseError, match=told):
        FlowerCommand(command)


def flower(folder: Path, *ends: str) -> Path:
    """A program `flwr` that notes how it is called, and whose runs end so one after the other."""
    program = folder / "flwr"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        f"folder, ends = pathlib.Path({str(folder)!r}), {list(ends)!r}\n"
        "with open(folder / 'calls', 'a') as calls:\n"
        "    calls.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "number = len(list(folder.glob('run-*')))\n"
        "if sys.argv[1] == 'run':\n"
        "    if ends[number] == 'refused':\n"
        "        print(json.dumps({'success': False, 'error-message': 'no such app'}))\n"
        "        sys.exit(1)\n"
        "    (folder / f'run-{number}').touch()\n"
        "    if ends[number] == 'unanswered':\n"
        "        sys.exit('the connection was reset')\n"
        "    print('Loading project configuration...')\n"
        "    print(json.dumps({'success': True, 'run-id': str(10**18 + number)}))\n"
        "else:\n"
        "    runs = [{'run-id': str(10**18 + at), 'status': 'finished:' + ends[at].replace(\n"
        "        'unanswered', 'completed')} for at in range(number)]\n"
        "    print(json.dumps({'runs': runs[-1:] if '--run-id' in sys.argv else runs}))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_the_command_asks_flower_and_exits_as_the_run_ends(tmp_path: Path) -> None:
    program = flower(tmp_path, "failed", "completed")
    quick = ["--wait", "0", "--every", "0.1"]
    given = ["run", "app", "site", "--run-config", 'resume="auto"']
    done = CliRunner().invoke(
        app, ["federation", "supervise", *quick, "--json", "--", str(program), *given]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "completed"
    assert [run["status"] for run in told["runs"]] == ["failed", "completed"]
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call for call in calls if call[0] == "run"] == [[*given, "--format", "json"]] * 2
    assert calls[0] == ["list", "--format", "json", "site"]
    assert calls[2] == ["list", "--format", "json", "site", "--run-id", str(10**18)]


def test_a_run_that_was_taken_without_an_answer_is_not_submitted_twice(tmp_path: Path) -> None:
    command = FlowerCommand([str(flower(tmp_path, "completed", "unanswered", "refused")), "run"])
    assert command.submit() == str(10**18)
    assert command.submit() == str(10**18 + 1)
    assert command.status(str(10**18 + 1)) == "completed"
    with pytest.raises(SuperviseError, match="no such app"):
        command.submit()


def test_a_key_that_the_app_does_not_list_is_told_in_one_line_with_the_remedy(
    tmp_path: Path,
) -> None:
    program = flower(tmp_path, "refused")
    said = "Using SuperLink: local\\n\\n[code: 15] Invalid run configuration."
    program.write_text(program.read_text().replace("no such app", said))
    with pytest.raises(SuperviseError) as refused:
        FlowerCommand([str(program), "run"]).submit()
    assert "\n" not in str(refused.value)
    assert "run configuration. Flower takes keys alone that [tool" in str(refused.value)


def test_without_a_list_of_runs_nothing_is_submitted(tmp_path: Path) -> None:
    """An older run would be taken for the one that was submitted."""
    program = flower(tmp_path, "completed", "unanswered")
    command = FlowerCommand([str(program), "run"])
    command.submit()
    text = program.read_text()
    program.write_text(text.replace("{'runs':", "{'error-message': 'busy', 'nothing':"))
    for ask in (command.submit, lambda: command.status("1")):
        with pytest.raises(SuperviseError, match="flwr list: busy"):
            ask()
    assert len(list(tmp_path.glob("run-*"))) == 1


def test_a_run_that_a_new_superlink_knows_no_more_has_failed(tmp_path: Path) -> None:
    """Without a database it has no runs when it is started again, and Flower answers so."""
    program = flower(tmp_path, "completed", "completed")
    command = FlowerCommand([str(program), "run"])
    run = command.submit()
    program.write_text(
        program.read_text().replace(
            "    print(json.dumps({'runs':",
            "    if '--run-id' in sys.argv:\n"
            "        print(json.dumps({'success': False, 'error-message': 'Run ID not found.'}))\n"
            "        sys.exit()\n"
            "    print(json.dumps({'runs':",
        )
    )
    assert command.status(run) == "completed", "which is in the list of all"
    (tmp_path / "run-0").unlink()
    assert command.status(run) == "failed"


def test_an_answer_in_another_encoding_is_an_answer(tmp_path: Path) -> None:
    program = flower(tmp_path, "completed")
    said = "sys.stdout.buffer.write(b'gr\\xfcezi {')\nsys.exit(1)\n"
    program.write_text(program.read_text().replace("number = ", said + "number = ", 1))
    with pytest.raises(SuperviseError, match=r"gr.ezi"):
        FlowerCommand([str(program), "run"]).submit()


def test_the_command_exits_with_1_where_the_run_does_not_complete(tmp_path: Path) -> None:
    quick = ["federation", "supervise", "--wait", "0", "--every", "0.1", "--restarts", "0", "--"]
    for end, said in (("failed", "not submitted again"), ("stopped", "is stopped")):
        folder = tmp_path / end
        folder.mkdir()
        done = CliRunner().invoke(app, [*quick, str(flower(folder, end)), "run"])
        assert done.exit_code == 1
        assert said in done.output
    refused = flower(tmp_path, "refused")
    done = CliRunner().invoke(app, [*quick, str(refused), "run"])
    assert done.exit_code == 1
    assert "flwr run: no such app" in done.output

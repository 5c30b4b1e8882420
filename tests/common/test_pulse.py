"""How a watched process is: what follows from the looks at it, and the probe that reads it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.common.pulse import Limits, Observation, Pulse

LIMITS = Limits(start=100.0, silence=60.0, quiet=120.0, stalled=600.0)


def healthy(**more: Any) -> Observation:
    return Observation(**{"answered": True, "switches": None, "received": None, **more})


def test_it_may_take_its_time_to_start() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.take(99.0, Observation(answered=False)) == "starting"
    assert pulse.take(101.0, Observation(answered=False)) == "hung"
    assert pulse.problems == ["it has not answered for 101 s"]
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.take(50.0, healthy()) == "healthy"
    assert pulse.take(110.0, Observation(answered=False)) == "healthy"
    assert pulse.take(111.0, Observation(answered=False)) == "hung"
    assert pulse.problems == ["it has not answered for 61 s"]


def test_what_cannot_be_known_is_no_fault() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.take(1e6, Observation()) == "healthy"
    assert pulse.take(2e6, Observation()) == "healthy"


def test_a_main_loop_that_stands_still_is_found() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.take(0.0, healthy(switches=7)) == "healthy"
    assert pulse.take(120.0, healthy(switches=7)) == "healthy"
    assert pulse.take(121.0, healthy(switches=8)) == "healthy"
    assert pulse.take(242.0, healthy(switches=8)) == "hung"
    assert pulse.problems == ["its main loop has stood still for 121 s"]


def test_nothing_exchanged_is_a_fault_only_where_the_superlink_answers() -> None:
    asked = []

    def reachable(found: bool) -> Callable[[], bool]:
        return lambda: asked.append(found) or found

    pulse = Pulse(LIMITS, 0.0)
    assert pulse.take(10.0, healthy(received=2.0, reachable=reachable(True))) == "healthy"
    assert pulse.exchanged == 8.0
    assert pulse.take(128.0, healthy(received=math.inf, reachable=reachable(True))) == "healthy"
    assert asked == []
    assert pulse.take(129.0, healthy(received=math.inf, reachable=reachable(False))) == (
        "unreachable"
    )
    # back again, it has as long as ever to connect
    assert pulse.take(9000.0, healthy(received=math.inf, reachable=reachable(False))) == (
        "unreachable"
    )
    assert pulse.take(9000.0, healthy(received=math.inf, reachable=reachable(True))) == "healthy"
    assert pulse.take(9001.0, healthy(received=math.inf, reachable=reachable(True))) == "hung"
    assert "with a SuperLink that answers" in pulse.problems[0]


def test_a_client_app_that_computes_nothing_is_found_and_one_that_trains_is_not() -> None:
    pulse = Pulse(LIMITS, 0.0)
    for number in range(100):  # 2.5 s in 600: what a heartbeat takes, and a little more
        assert pulse.take(100.0 * number, healthy(client_app=(5, 0.42 * number))) == "healthy"
    assert pulse.client_app == 5
    begun = 20_000.0
    assert pulse.take(begun, healthy(client_app=(6, 0.0))) == "healthy"
    assert pulse.take(begun + 600, healthy(client_app=(6, 0.5))) == "healthy"
    assert pulse.take(begun + 601, healthy(client_app=(6, 0.5))) == "hung"
    assert pulse.problems == ["its ClientApp has computed nothing for 601 s"]
    assert pulse.take(begun + 602, healthy()) == "healthy"
    forever = Pulse(Limits(stalled=None), 0.0)
    forever.take(0.0, healthy(client_app=(6, 0.0)))
    assert forever.take(1e6, healthy(client_app=(6, 0.0))) == "healthy"


# -- the probe ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "options", "well", "said"),
    [
        ({"state": "healthy"}, [], True, "healthy"),
        ({"state": "starting"}, [], False, "has not answered yet"),
        ({"state": "hung", "problems": ["it stands"]}, [], False, "it stands"),
        ({"state": "unreachable", "problems": ["no SuperLink"]}, [], True, "no SuperLink"),
        ({"state": "unreachable", "problems": ["n"]}, ["--reachable"], False, "not well: n"),
        ({"at": -1000.0}, [], False, "the watch itself has written nothing for 100"),
        ({"at": 1000.0}, [], False, "a clock that was wrong or is now"),
        ({"schema": 2, "state": "dozing"}, [], False, "another version of Prunecast watches"),
        ({"answered": "yesterday"}, [], False, "cannot be read"),
        ({"exchanged": [1]}, [], False, "cannot be read"),
        ({"interval": 10**400}, [], False, "cannot be read"),
        ("no JSON", [], False, "cannot be read"),
        ("[]", [], False, "cannot be read"),
        (None, [], False, "nobody watches"),
    ],
)
def test_the_probe_says_how_it_is(
    tmp_path: Path, written: Any, options: list[str], well: bool, said: str
) -> None:
    file = tmp_path / "pulse.json"
    if isinstance(written, dict):
        at = time.time() + written.get("at", 0.0)
        basis = {"interval": 5.0, "state": "healthy", "problems": [], "exchanged": at - 3.0}
        file.write_text(json.dumps({**basis, **written, "at": at}))
    elif written is not None:
        file.write_text(written)
    arguments = ["federation", "health", str(file), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (0 if well else 1)
    assert said in result.output
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.output)["well"] is well

"""An agent under orders: goes where it is told, down too, and nowhere that is not signed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.config import Order, UpdateResult
from prunecast.client.edge.errors import EdgeError, NetworkError, OrderRefused, TrustError
from prunecast.client.edge.state import StateFolder
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.server.repository import Repository
from support.network import Network

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]


@pytest.fixture
def agent(start: Start, publish: Publish) -> Agent:
    """On release 2; 1 to 3 are live."""
    for number in (1, 2, 3):
        publish(number)
    made = start()
    for version in (1, 2):
        assert made.update_once(Order(version)).version == version
        made.confirm()
    return made


def test_an_order_holds_back_and_goes_up(agent: Agent) -> None:
    assert agent.update_once(Order()).outcome == "current"
    assert agent.update_once(Order(2)).outcome == "current"
    result = agent.update_once(Order(3))
    assert (result.version, result.payload) == (3, "patch")


def test_down_by_the_other_slot_without_a_download(
    agent: Agent, start: Start, network: Network, images: np.ndarray
) -> None:
    network.asked.clear()
    result = agent.update_once(Order(1, downgrade=True))
    assert (result.outcome, result.version, result.previous) == ("updated", 1, 2)
    assert all(path.startswith("metadata/") for path, _ in network.asked)
    assert agent.model.infer({"input": images}).version == 1
    assert agent.update_once(Order(1, downgrade=True)).outcome == "current"
    # the release that was left is not rejected, and is there for the way up again
    assert agent.failure(2) is None
    again = start()
    assert again.model.version == 1
    network.asked.clear()
    assert again.update_once(Order(2)).version == 2
    assert all(path.startswith("metadata/") for path, _ in network.asked)


def test_down_by_the_repository(agent: Agent) -> None:
    agent.update_once(Order(3))
    agent.confirm()
    result = agent.update_once(Order(1, downgrade=True))
    assert (result.version, result.payload) == (1, "keyframe")


def test_down_by_the_repository_when_the_other_slot_is_damaged(
    agent: Agent, config: AgentConfig
) -> None:
    state = StateFolder(config.state).read()
    assert state is not None
    assert state.previous is not None
    (config.state / "slots" / state.previous.slot / "weights.bin").write_bytes(b"damaged")
    result = agent.update_once(Order(1, downgrade=True))
    assert (result.version, result.payload) == (1, "keyframe")


def test_never_down_without_an_order_that_says_so(
    agent: Agent, start: Start, repository: Repository
) -> None:
    with pytest.raises(OrderRefused, match="does not say that this is meant"):
        agent.update_once(Order(1))
    assert agent.model.version == 2
    repository.retire("toy", 1)
    with pytest.raises(OrderRefused, match="not signed and live"):
        agent.update_once(Order(1, downgrade=True))
    with pytest.raises(OrderRefused, match="release 9 is ordered"):
        agent.update_once(Order(9))
    repository.retire("toy", 3)
    assert agent.update_once().outcome == "current"  # nothing higher is live: it stays
    assert agent.model.version == 2


def test_an_order_does_not_loosen_trust(agent: Agent, network: Network) -> None:
    old = (network.folder / "metadata" / "timestamp.json").read_bytes()
    network.replaced["metadata/timestamp.json"] = old.replace(b'"version":', b'"version":1')
    with pytest.raises((TrustError, EdgeError)):
        agent.update_once(Order(1, downgrade=True))
    assert agent.model.version == 2


def test_a_kill_during_the_way_down_leaves_one_of_the_two(
    agent: Agent, start: Start, config: AgentConfig
) -> None:
    class Killed(BaseException):
        pass

    for moment in ("activate", "swap"):
        victim = start(on_step=lambda step, moment=moment: _raise(Killed, step == moment))
        with pytest.raises(Killed):
            victim.update_once(Order(1, downgrade=True))
        revived = start()
        assert revived.model.version == {"activate": 2, "swap": 1}[moment]
        assert revived.update_once(Order(1, downgrade=True)).version == 1
        revived.update_once(Order(2))


def _raise(error: type[BaseException], now: bool) -> None:
    if now:
        raise error


def test_another_order_ends_a_download(agent: Agent, config: AgentConfig) -> None:
    with pytest.raises(NetworkError, match="release 3 is no longer ordered"):
        agent.update_once(Order(3), superseded=lambda: True)
    assert agent.model.version == 2
    assert any((config.state / "downloads").iterdir())


def test_a_rejected_release_stays_rejected_and_says_why(
    agent: Agent, start: Start, publish: Publish, config: AgentConfig
) -> None:
    agent.update_once(Order(3))
    agent.roll_back("worse recall")
    assert agent.model.version == 2
    failure = agent.failure(3)
    assert failure is not None
    assert (failure.kind, failure.reason) == ("rolled back", "worse recall")
    result = agent.update_once(Order(3))
    assert (result.outcome, result.reason) == (
        "current",
        "what is ordered was rejected: worse recall",
    )
    assert start().failure(3) == failure
    # a state of an agent before this field is read, and one after it by such an agent
    path = config.state / "state.json"
    document = json.loads(path.read_bytes())
    assert document["schema"] == 1
    del document["failures"]
    path.write_text(json.dumps(document))
    assert start().failure(3) is None


def test_the_loop_wakes_for_another_order(start: Start, publish: Publish) -> None:
    for number in (1, 2):
        publish(number)
    agent, stop, wake = start(), threading.Event(), threading.Event()
    orders, seen = [Order()], list[int | None]()

    def note(result: UpdateResult | EdgeError) -> None:
        assert isinstance(result, UpdateResult), result
        seen.append(result.version)
        if len(seen) <= 3:
            orders.append([Order(2), Order(1, downgrade=True), Order()][len(seen) - 1])
        else:
            stop.set()
        wake.set()

    loop = threading.Thread(
        target=agent.run, args=(1e6,),
        kwargs={"stop": stop, "wake": wake, "order": lambda: orders[-1], "on_result": note},
    )  # fmt: skip
    loop.start()
    loop.join(30)
    assert not loop.is_alive()
    assert seen == [None, 2, 1, 1]


def test_nothing_is_installed_before_the_first_order(
    start: Start, publish: Publish, tmp_path: Path
) -> None:
    publish(1)
    result = start().update_once(Order())
    assert (result.version, result.reason) == (None, "nothing is ordered yet")

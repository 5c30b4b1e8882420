"""A SuperLink and two SuperNodes as processes: TLS, authenticated nodes, `flwr run`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunecast.server.federation import Ledger
from prunecast.server.federation.operating.credentials import make_credentials

pytestmark = pytest.mark.engine

ROUNDS, NODES = 2, 2
WIDTHS = ("", "small")  # that a node's config states; nothing asks for it but one test


@pytest.fixture(scope="module")
def deployment(
    start_engine: Callable[..., Any], free_port: Callable[[], int], tmp_path_factory: Any
) -> Iterator[Any]:
    """A SuperLink that admits two registered SuperNodes."""
    folder = tmp_path_factory.mktemp("deployment")
    make_credentials(folder, nodes=NODES)
    with start_engine(folder) as engine:
        port = free_port()
        engine.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
            *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt"),
            *("--ssl-keyfile", "server.key", "--enable-supernode-auth"),
            port=port,
        )
        (folder / "flower").mkdir(exist_ok=True)
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        for node in range(NODES):
            key = f"nodes/node-{node + 1}"
            engine.flwr("supernode", "register", f"{key}.pub")
            runtime = free_port()
            engine.start(
                f"supernode{node}",
                *("flower-supernode", "--superlink", f"127.0.0.1:{port}"),
                *("--root-certificates", "ca.crt"),
                *("--auth-supernode-private-key", key),
                *("--host", "127.0.0.1", "--port", str(runtime)),
                "--node-config",
                f'partition-id={node} num-partitions={NODES} prunecast-store="{folder}/s{node}" '
                f'prunecast-width="{WIDTHS[node]}"',
                port=runtime,
            )
        yield engine


def test_run_completes_and_ledger_agrees_with_flowers_traffic_counter(
    deployment: Any, tiny_app: Path, tmp_path: Path
) -> None:
    run = deployment.run(
        tiny_app, "--run-config", f'output="{tmp_path}" num-server-rounds={ROUNDS}'
    )

    entries = list(Ledger.read(tmp_path / "ledger.jsonl"))
    assert {e.kind for e in entries} == {"keyframe", "delta", "reuse", "update", "none"}
    assert len({e.node for e in entries}) == NODES
    losses = list(json.loads((tmp_path / "losses.json").read_text()).values())
    assert losses == sorted(losses, reverse=True)

    counted = run.details["network-traffic"]["total-bytes"]
    ours = sum(e.payload_bytes for e in entries)
    assert abs(counted - ours) < 0.03 * counted, f"Flower: {counted:,}, ledger: {ours:,}"

    for node in range(NODES):
        assert list((deployment.folder / f"s{node}").rglob("*.model")), "node kept no model"


def test_a_node_trains_the_slice_of_the_class_that_its_config_states(
    deployment: Any, tiny_app: Path, tmp_path: Path
) -> None:
    widths = 'prunecast.widths="small=0.25"'
    deployment.run(
        tiny_app, "--run-config", f'output="{tmp_path}" num-server-rounds={ROUNDS} {widths}'
    )

    entries = list(Ledger.read(tmp_path / "ledger.jsonl"))
    spent = {}
    for width in WIDTHS:
        mine = [e for e in entries if e.width == width and e.message_type == "train"]
        assert len({e.node for e in mine}) == 1
        down = [e.kind for e in mine if e.direction == "down"]
        assert down[:2] == ["ask", "keyframe"]
        up = [e.kind for e in mine if e.direction == "up"]
        assert up[0] == "base-missing"
        assert len(up) == ROUNDS + 1
        assert set(up[1:]) <= {"update", "values", "mixed"}
        spent[width] = sum(e.payload_bytes for e in mine)
    assert spent["small"] < 0.4 * spent[""]
    losses = list(json.loads((tmp_path / "losses.json").read_text()).values())
    assert losses == sorted(losses, reverse=True)


def test_nodes_of_other_memory_format_and_version_are_treated_by_their_class(
    deployment: Any, tiny_app: Path, tmp_path: Path
) -> None:
    """The first says that it has 256 MB; the second is of an earlier package and format."""
    classes = "poor=memory<512:keyframes+no-residual, other=foreign&version<0.1:dense"
    run = deployment.run(
        tiny_app,
        *("--run-config", f'output="{tmp_path}" num-server-rounds={ROUNDS} fault="poor+foreign"'),
        *("--run-config", f'prunecast.classes="{classes}"'),
    )

    entries = list(Ledger.read(tmp_path / "ledger.jsonl"))
    assert {e.capability for e in entries} == {"poor", "other"}  # the first message, too
    kinds = {
        (name, way): [
            e.kind
            for e in entries
            if (e.capability, e.direction, e.message_type) == (name, way, "train")
        ]
        for name in ("poor", "other")
        for way in ("down", "up")
    }
    assert kinds["poor", "down"] == ["keyframe"] * ROUNDS
    assert kinds["poor", "up"] == ["update"] * ROUNDS
    # what it does not understand it is sent again as plain Flower sends it, in the same round
    assert kinds["other", "down"] == ["keyframe", *["dense"] * ROUNDS]
    assert kinds["other", "up"] == ["error", *["dense"] * ROUNDS]
    kept = deployment.folder / "s0" / str(run.details["run-id"])
    assert not [p for p in kept.rglob("*") if p.suffix in (".model", ".residual")]
    losses = list(json.loads((tmp_path / "losses.json").read_text()).values())
    assert losses == sorted(losses, reverse=True)

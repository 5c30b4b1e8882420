"""`prunecast edge run` as a service: endpoints for other programs, and the service manager."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunecast.client.edge import Agent

__all__ = ["figures_lines", "serving"]

_PROBE_SECONDS = 5.0


@contextmanager
def serving(
    agent: Agent, name: str, addresses: Sequence[str], as_json: bool
) -> Iterator[Callable[[str], None]]:
    """Listen while the block runs, with the service manager told; one line per endpoint.

    Args:
        agent: whose model is served.
        name: under which it is served.
        addresses: of the endpoints.
        as_json: whether lines are JSON.

    Yields:
        A function that shows the manager one line about what the agent does.
    """
    from prunecast.client.edge.inference import InferenceServer, is_answering
    from prunecast.client.edge.service_manager import ServiceManager

    manager = ServiceManager()
    with ExitStack() as stack:
        listening = []
        for address in addresses:
            endpoint = stack.enter_context(InferenceServer(agent.model, name, address))
            listening.append(endpoint.address)
            told = {"outcome": "listening", "address": endpoint.address}
            shown = json.dumps(told) if as_json else f"listening on {endpoint.address}"
            print(shown, flush=True)  # noqa: T201

        def alive() -> bool:
            return all(is_answering(address, _PROBE_SECONDS) for address in listening)

        with manager.watching(alive):
            yield lambda line: manager.tell(STATUS=line)


def figures_lines(telemetry: dict[str, Any] | None) -> list[str]:
    """What the device has counted, for people: a line for each release that was asked."""
    lines = []
    for release in (telemetry or {}).get("releases", ()):
        counts = ", ".join(f"{release[key]:,} {key}" for key in ("answered", "refused", "failed"))
        line = f"counted  release {release['version']}: {counts}"
        if release["answered"]:
            times = [f"{release[f'latency_{p}_seconds'] * 1e3:.3g}" for p in ("p50", "p90", "p99")]
            line += f"; p50/p90/p99 {'/'.join(times)} ms"
        if release["self_test"]:
            line += f"; self-test {release['self_test']}"
        lines.append(line)
    return lines

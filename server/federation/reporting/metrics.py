"""Metrics of a run for Prometheus: a listener of its events, and the address they are read at.

::

    metrics = RunMetrics()
    with MetricsServer(metrics.text, port=9400):
        Run(grid, FedAvg(), on_event=metrics).start(arrays)

docs/deploy.md lists the metrics. Names of metrics of an evaluation, kinds of messages and nodes
are labels, a bounded number of each.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prunecast.common.listening import Acceptor, Admission, Place, SparingLog, bind, end_socket
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.reporting.nodes import STATES
from prunecast.server.repository.serving.connection import Connection, Request, ServingLimits
from prunecast.server.repository.serving.files import Reply, in_words, path_of
from prunecast.server.repository.serving.monitoring import Metrics

__all__ = ["MetricsServer", "RunMetrics"]

_log = logging.getLogger(__name__)

_PREFIX = "prunecast_run_"
_NAMES = 32  # metrics of an evaluation, of each place that measures
_CONNECTIONS = 32
_ODD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # of an event that is none


class RunMetrics(Collector):
    """What Prometheus is told of a run: hand it to `Run(on_event=...)`, or each line of a file.

    Counters begin anew with every run. It may be asked in one thread and told in another.

    Args:
        most_nodes: nodes have labels of their own as long as there are no more than these.
    """

    def __init__(self, most_nodes: int = 50) -> None:
        self._most_nodes = most_nodes
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._forget()
        self._registry.register(self)

    def _forget(self) -> None:
        self._info: dict[str, str] = {}
        self._state = self._last = self._round_began = 0.0
        self._asked = self._warnings = self._releases = 0
        self._failures = {"failed": 0, "silent": 0}
        self._finished: Mapping[str, Any] = {}
        self._nodes: dict[str, Mapping[str, Any]] | None = {}
        self._rounds = self._seconds = self._took = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event of a run; one that is not known, or not as expected, changes nothing."""
        with self._lock:
            try:
                self._take(event)
            except _ODD as error:
                _log.warning("an event could not be counted: %s: %s", type(error).__name__, error)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, at = event["event"], datetime.fromisoformat(event["time"]).timestamp()
        if kind == "run-started":
            self._forget()
            names = ("run", "name", "strategy")
            self._info = {name: str(event.get(name, ""))[:200] for name in names}
            self._rounds, self._state = float(event["rounds"]), 1.0
        elif kind == "round-begun":
            self._asked, self._round_began = int(event["nodes"]), at
        elif kind == "round-finished":
            self._took, self._round_began = max(0.0, at - (self._round_began or at)), 0.0
            self._asked, self._finished, self._seconds = 0, event, float(event["seconds"])
            self._note_nodes(event.get("status") or {})
        elif kind == "release":
            self._releases += 1
        elif kind == "warning":
            self._warnings += 1
        elif kind in ("run-finished", "run-failed"):
            self._state, self._asked = (2.0 if kind == "run-finished" else 3.0), 0
            self._seconds = float(event.get("seconds", self._seconds))
        self._last = at

    def _note_nodes(self, status: Mapping[str, Any]) -> None:
        named = status.get("nodes", ())
        failures = status.get("failures") or Counter(node["state"] for node in named)  # of before
        for state in self._failures:
            self._failures[state] += failures.get(state, 0)
        for node in named:
            if self._nodes is not None:
                self._nodes[node["node"]] = node
                if len(self._nodes) > self._most_nodes:
                    self._nodes = None

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        try:
            return generate_latest(self._registry)
        except _ODD as error:  # a file that is damaged, or of another version
            with self._lock:
                self._finished, self._nodes = {}, {}
            _log.warning("a round could not be told: %s: %s", type(error).__name__, error)
            return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: what there is depends on the run."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics, see `prometheus_client.registry.Collector`."""
        with self._lock:
            yield from list(self._run())
            yield from list(self._round())
            if self._nodes:
                yield from list(self._node(self._nodes))

    def _run(self) -> Iterator[Metric]:
        said = "The run that is told of."
        info = GaugeMetricFamily(f"{_PREFIX}info", said, labels=("run", "name", "strategy"))
        if self._info:
            info.add_metric(list(self._info.values()), 1)
        yield info
        yield _gauge("state", "0: none yet, 1: it goes on, 2: finished, 3: failed.", self._state)
        yield _gauge("rounds", "Rounds that there will be.", self._rounds)
        yield _gauge("seconds", "Since the run began.", self._seconds)
        yield _gauge("last_event_seconds", "When it last told something, Unix time.", self._last)
        yield _gauge("asked_nodes", "Nodes that are training now.", self._asked)
        yield _counter("warnings", "Warnings of Flower and Prunecast.", {(): self._warnings})
        yield _counter("releases", "Releases during the run.", {(): self._releases})

    def _round(self) -> Iterator[Metric]:
        event = self._finished
        yield _gauge("round", "The last round that is over.", event.get("round", 0))
        yield _gauge("round_seconds", "What the last round took.", self._took)
        yield _gauge("sparsity", "Zeros among the published weights.", event.get("sparsity", 0.0))
        client = event.get("client_metrics") or {}
        places = {"server": event.get("metrics"), **{k: client.get(k) for k in _CLIENT}}
        labels = "by", "metric"
        metric = GaugeMetricFamily(f"{_PREFIX}metric", "Of the last round.", labels=labels)
        for place, found in places.items():
            for name, value in list((found or {}).items())[:_NAMES]:
                if isinstance(value, int | float):
                    metric.add_metric((place, _label(str(name))), value)
        yield metric
        sums = {
            (direction, kind): part
            for direction, kinds in (event.get("kinds") or {}).items()
            for kind, part in kinds.items()
        }
        labels = "direction", "kind"
        for name, said in (("bytes", "Bytes of messages."), ("messages", "Messages.")):
            values = {key: part[name] for key, part in sums.items()}
            total = "message_bytes" if name == "bytes" else name
            yield _counter(total, f"{said[:-1]} so far, HTTP not counted.", values, labels)
        ways = ("down", "up")
        dense = {(way,): event[f"dense_bytes_{way}"] for way in ways if event}
        said = "Bytes of the same messages in plain Flower."
        yield _counter("dense_bytes", said, dense, ("direction",))
        status = event.get("status") or {}
        states = GaugeMetricFamily(f"{_PREFIX}nodes", "Nodes by state.", labels=("state",))
        for state in STATES:
            states.add_metric((state,), (status.get("states") or {}).get(state, 0))
        yield states
        yield _gauge("connected_nodes", "Listed by the SuperLink.", status.get("connected") or 0)
        failures = {(state,): count for state, count in self._failures.items()}
        yield _counter("node_failures", "Nodes of a round that failed.", failures, ("state",))
        yield _gauge("version", "Number of the published version.", status.get("version") or 0)

    def _node(self, nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
        seen = GaugeMetricFamily(
            f"{_PREFIX}node_seen_seconds", "When it last answered, Unix time.", labels=("node",)
        )
        held = GaugeMetricFamily(
            f"{_PREFIX}node_version", "Number of the version it holds.", labels=("node",)
        )
        errors = {(number,): node["errors"] for number, node in nodes.items()}
        for number, node in nodes.items():
            if node["seen"] is not None:
                seen.add_metric((number,), datetime.fromisoformat(node["seen"]).timestamp())
            if node["version"] is not None:
                held.add_metric((number,), node["version"])
        yield seen
        yield held
        yield _counter("node_errors", "Its messages without a usable reply.", errors, ("node",))


_CLIENT = ("train", "evaluate")
_LONGEST = 100  # characters of a label


def _label(name: str) -> str:
    """A name, cut where it is long so that no two become one: Prometheus refuses those whole."""
    digest = f"~{zlib.crc32(name.encode()):08x}"
    return name if len(name) <= _LONGEST else name[: _LONGEST - len(digest)] + digest


def _gauge(name: str, said: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}{name}", said, value=value)


def _counter(
    name: str, said: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()
) -> Metric:
    made = CounterMetricFamily(f"{_PREFIX}{name}", said, labels=labels)
    for key, value in values.items():
        made.add_metric(key, value)
    return made


class MetricsServer:
    """Serves ``/metrics`` and ``/healthz`` over plain HTTP, in a thread, while it is entered.

    Connections, waits and requests are bounded as those of the release server.

    Args:
        text: what ``/metrics`` says.
        host: address to bind; who reaches it may read.
        port: 0 lets the system choose; `port` tells which.
        limits: of requests' size and time.

    Attributes:
        port: that is bound.
        url: of the metrics.

    Raises:
        FederationError: the address cannot be bound.
    """

    def __init__(
        self,
        text: Callable[[], bytes],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: ServingLimits | None = None,
    ) -> None:
        self._text, self._limits = text, limits or ServingLimits()
        try:
            self._socket = bind(host, port)
        except OSError as error:
            raise FederationError(
                f"cannot bind {host}:{port} for metrics: {error.strerror or error}"
            ) from error
        self.port = int(self._socket.getsockname()[1])
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}/metrics"
        patience = self._limits.patience
        self._places = Admission(_CONNECTIONS, _CONNECTIONS, patience=patience)
        self._sparing = SparingLog(_log)
        self._counts = Metrics()  # of this listener nobody reads them
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="run metrics", daemon=True)
        self._begun = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        acceptor = Acceptor(self._socket, self._accept, self._sparing)
        self._begun.set()
        await self._over.wait()
        acceptor.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        self._sparing.close()

    def _accept(self, accepted: socket.socket, client: str) -> None:
        place = self._places.enter(client, partial(end_socket, accepted))
        if place is None:
            self._sparing.warning("connections", "too many connections for metrics")
            accepted.close()
            return
        task = asyncio.create_task(self._talk(accepted, client, place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _talk(self, accepted: socket.socket, client: str, place: Place) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=accepted)
            moved = partial(self._places.move, place)
            limits, respond = self._limits, self._respond
            connection = Connection(reader, writer, limits, self._counts, respond, client, moved)
            await connection.serve()
        except OSError:
            accepted.close()
        finally:
            self._places.leave(place)

    async def _respond(self, request: Request, client: str) -> Reply:
        path = path_of(request.target)
        if path == "healthz":
            return in_words(200, "ready")
        if path != "metrics":
            return in_words(404, "see /metrics and /healthz")
        headers = {"content-type": CONTENT_TYPE_LATEST, "cache-control": "no-store"}
        return Reply(200, self._text(), headers, "metrics")

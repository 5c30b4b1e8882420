"""The control server on loopback, over TLS, as a client sees it that is not our own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prunecast.common.fleet_protocol import SERVICE, make_stub, messages
from prunecast.compression.release.manifest import blob_path
from prunecast.server.control import ControlLimits, ControlServer, Unbindable
from prunecast.server.fleet.events import PinDevice, RevokeDevice
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from support.authority import Authority

pytestmark = pytest.mark.engine


class Client:
    """One connection of a device."""

    def __init__(
        self,
        address: str,
        ca: bytes,
        token: str | None = None,
        certificate: tuple[bytes, bytes] | None = None,
    ) -> None:
        chain, key = certificate or (None, None)
        self.channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(ca, key, chain),
            options=[("grpc.use_local_subchannel_pool", 1)],
        )
        self.stub = make_stub(self.channel)
        self.metadata = [("authorization", f"Bearer {token}")] if token else []

    def call(self, method: str, request: Any, timeout: float = 20.0) -> Any:
        return getattr(self.stub, method)(request, metadata=self.metadata, timeout=timeout)

    def watch(self, **said: Any) -> Watch:
        request = messages.WatchRequest(release="toy", agent="1", **said)
        return Watch(self.call("Watch", request, timeout=60.0))

    def fetch(self, path: str, offset: int = 0) -> list[Any]:
        return list(self.call("Fetch", messages.FetchRequest(path=path, offset=offset)))

    def _exhaust(self, method: str, request: Any) -> None:
        answer = self.call(method, request)
        for _ in [] if method == "Report" else answer:
            pass

    def refused(self, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self._exhaust(method, request)
        return caught.value.code(), caught.value.details()


class Watch:
    """Events of a watch, which can be waited for."""

    def __init__(self, call: Any) -> None:
        self.call, self.events = call, queue.Queue[Any]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for event in self.call:
                self.events.put(event)
        except grpc.RpcError as error:
            self.events.put(error)

    def next(self, kind: str) -> Any:
        """The next event of a kind; what says nothing new is passed over."""
        while True:
            event = self.events.get(timeout=20)
            assert not isinstance(event, grpc.RpcError), event
            if (name := event.WhichOneof("event")) == kind:
                return getattr(event, kind)
            assert name in ("welcome", "keep_alive"), event

    def end(self) -> grpc.StatusCode:
        while not isinstance(event := self.events.get(timeout=20), grpc.RpcError):
            pass
        code: grpc.StatusCode = event.code()
        return code


@pytest.fixture
def connect(server: ControlServer, authority: Authority) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def connect(token: str | None = None, address: str | None = None, **more: Any) -> Client:
        made.append(Client(address or server.address, authority.ca.read_bytes(), token, **more))
        return made[-1]

    yield connect
    for client in made:
        client.channel.close()


@pytest.fixture
def enrol(fleet: FleetService) -> Callable[[str], str]:
    return lambda name: fleet.enrol(name, "lab", now=time.time(), actor="ada")


def report(number: int = 0, **fields: Any) -> Any:
    answer = messages.Answer(serial=1, version=1, outcome=messages.OUTCOME_CONFIRMED)
    return messages.ReportRequest(id=f"report{number:04}", answer=answer, running=1, **fields)


def test_a_watch_tells_what_changes_and_that_it_lives(
    fleet: FleetService, connect: Callable[..., Client], enrol: Callable[[str], str]
) -> None:
    watch = connect(enrol("cam1")).watch(running=1)
    assert watch.next("welcome").device == "cam1"
    first = watch.next("directive")
    assert (first.serial, first.release, first.version, first.downgrade) == (1, "toy", 1, False)
    watch.next("keep_alive")
    fleet.operate(PinDevice(at=time.time(), device="cam1", version=2))
    second = watch.next("directive")
    assert (second.serial, second.version) == (2, 2)
    fleet.operate(PinDevice(at=time.time(), device="cam1", version=None))
    third = watch.next("directive")
    assert (third.serial, third.version, third.downgrade) == (3, 1, True)
    assert fleet.devices()[0].agent == "1"


def test_reports_count_once_and_say_what_runs(
    fleet: FleetService, connect: Callable[..., Client], enrol: Callable[[str], str]
) -> None:
    client = connect(enrol("cam2"))
    client.watch().next("directive")
    request = report(device="cam2", error="hot", figures={"celsius": 71.5})
    reply = client.call("Report", request)
    assert (reply.counted, reply.replayed) == (True, False)
    reply = client.call("Report", request)
    assert (reply.counted, reply.replayed) == (False, True)
    device = fleet.device("cam2")
    assert (device.running, device.told.outcome) == (1, "confirmed")
    health = fleet.health("cam2")
    assert health is not None
    assert (health[0].error, health[0].figures) == ("hot", {"celsius": 71.5})
    for wrong in (messages.ReportRequest(id="x"), report(agent="x" * 65)):
        code, _ = client.refused("Report", wrong)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    unknown = report(1)
    unknown.answer.outcome = 77
    assert client.refused("Report", unknown)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_strangers_and_false_names_are_refused(
    fleet: FleetService, connect: Callable[..., Client], enrol: Callable[[str], str]
) -> None:
    token, other = enrol("cam3"), enrol("cam4")
    for stranger in (None, "x", "A" * 43, token[:-1] + ("a" if token[-1] != "a" else "b")):
        client = connect(stranger)
        for method, request in (
            ("Watch", messages.WatchRequest(release="toy")),
            ("Report", report()),
            ("Fetch", messages.FetchRequest(path="metadata/timestamp.json")),
        ):
            assert client.refused(method, request)[0] is grpc.StatusCode.UNAUTHENTICATED
    client = connect(token)
    code, words = client.refused("Report", report(device="cam4"))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert words.startswith("this is the credential of cam3, not of 'cam4'")
    request = messages.WatchRequest(release="toy", device="cam4")
    assert client.refused("Watch", request)[0] is grpc.StatusCode.PERMISSION_DENIED
    code, words = client.refused("Watch", messages.WatchRequest(release="digits"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "--name toy" in words
    # a watch ends when its device is revoked, or its token replaced
    watches = [connect(t).watch() for t in (token, other)]
    for watch in watches:
        watch.next("directive")
    fleet.operate(RevokeDevice(at=time.time(), device="cam3"))
    fleet.renew_token("cam4", now=time.time(), actor="ada")
    assert [w.end() for w in watches] == [grpc.StatusCode.UNAUTHENTICATED] * 2
    assert fleet.health("cam4") is None


def test_limits_per_device(connect: Callable[..., Client], enrol: Callable[[str], str]) -> None:
    token = enrol("cam5")
    client, other = connect(token), connect(enrol("cam6"))
    for number in range(20):
        client.call("Report", report(number))
    code, words = client.refused("Report", report(20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert words.startswith("try again in")
    other.call("Report", report())
    large = report(21, error="x" * 70_000)
    assert other.refused("Report", large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    first = client.watch()
    first.next("directive")
    second = connect(token).watch()
    second.next("directive")
    assert first.end() is grpc.StatusCode.ABORTED
    second.next("keep_alive")


def test_files_come_in_chunks_from_any_offset_and_nothing_else(
    connect: Callable[..., Client], enrol: Callable[[str], str], repository: Repository
) -> None:
    client = connect(enrol("cam7"))
    sha = "5" * 64
    content = bytes(range(256)) * 5000
    (repository.path / blob_path(sha)).write_bytes(content)
    chunks = client.fetch(blob_path(sha))
    assert b"".join(c.data for c in chunks) == content
    assert [c.offset for c in chunks] == [0, 524288, 1048576]
    assert {c.length for c in chunks} == {len(content)}
    (rest,) = client.fetch(blob_path(sha), 1_000_001)
    assert rest.data == content[1_000_001:]
    (empty,) = client.fetch(blob_path(sha), len(content))
    assert (empty.data, empty.length) == (b"", len(content))

    def code(path: str, offset: int = 0) -> str:
        request = messages.FetchRequest(path=path, offset=offset)
        return str(client.refused("Fetch", request)[0].name)

    assert code(blob_path(sha), len(content) + 1) == "OUT_OF_RANGE"
    assert code(blob_path("6" * 64)) == "NOT_FOUND"
    (repository.path / blob_path("7" * 64)).symlink_to("/etc/passwd")
    assert code(blob_path("7" * 64)) == "NOT_FOUND"
    (repository.path / "blobs" / "secret").write_text("x")
    for path in (
        *("", "/etc/passwd", "../keys/targets", "blobs/../../keys/targets", "blobs/secret"),
        *("blobs/" + "5" * 64 + "/..", "metadata/../blobs/" + sha, "blobs\\x", "blobs/\0"),
    ):
        assert code(path) == "INVALID_ARGUMENT"


def test_devices_with_certificates_and_a_certificate_that_is_renewed(
    database: str,
    fleet: FleetService,
    repository: Repository,
    authority: Authority,
    enrol: Callable[[str], str],
    connect: Callable[..., Client],
) -> None:
    token = enrol("cam8")
    certificate, key = authority.server("renewed")
    with ControlServer(
        *(database, repository.path),
        certificate=certificate, key=key, client_ca=authority.ca, interval=0.1,
    ) as server:  # fmt: skip

        def client(name: str | None) -> Client:
            files = authority.device(name) if name else None
            pair = (files[0].read_bytes(), files[1].read_bytes()) if files else None
            return connect(token, server.address, certificate=pair)

        assert client("cam8").watch(device="cam8").next("welcome").device == "cam8"
        code, words = client("cam9").refused("Report", report())
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "certificate is for 'cam9'" in words
        # a valid token alone does not help
        assert client(None).refused("Report", report())[0] is grpc.StatusCode.UNAVAILABLE
        code, _ = client("cam8").refused("Report", report(device="cam1"))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        # another authority's certificate under the same file names: taken without a restart
        other = Authority(authority.folder / "other")
        for old, new in zip((certificate, key), other.server(), strict=True):
            old.write_bytes(new.read_bytes())
        stale = client("cam8")
        assert stale.refused("Report", report())[0] is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_names_one_device(
    database: str,
    fleet: FleetService,
    repository: Repository,
    authority: Authority,
    enrol: Callable[[str], str],
    connect: Callable[..., Client],
) -> None:
    enrol("cam11")
    certificate, key = authority.server("odd")
    with ControlServer(
        *(database, repository.path), certificate=certificate, key=key, client_ca=authority.ca
    ) as server:

        def client(names: list[str], hosts: list[str]) -> Client:
            pair = [file.read_bytes() for file in authority.odd("device", names, hosts)]
            return connect(None, server.address, certificate=tuple(pair))

        def refusal(names: list[str], hosts: list[str]) -> str:
            code, words = client(names, hosts).refused("Report", report(1))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            return words

        for hosts in ([], ["cam11", "cam11.example.org"]):
            assert client(["cam11"], hosts).call("Report", report(1)) is not None
        for names, said in (
            (["cam11", "cam1"], "'cam11', 'cam1'"),
            (["cam1", "cam11"], "'cam1', 'cam11'"),
            ([], "none"),
            (["cam11\n"], repr("cam11\n")),
        ):
            assert f"it has {said}: issue it anew" in refusal(names, [])
        assert "and 'cam1' as an alternative" in refusal(["cam11"], ["cam11", "cam1"])


def test_health_and_a_graceful_end(
    database: str,
    fleet: FleetService,
    repository: Repository,
    authority: Authority,
    enrol: Callable[[str], str],
    connect: Callable[..., Client],
) -> None:
    certificate, key = authority.server()
    token = enrol("cam10")
    sha = "8" * 64
    (repository.path / blob_path(sha)).write_bytes(bytes(8_000_000))
    server = ControlServer(
        *(database, repository.path),
        certificate=certificate, key=key, limits=ControlLimits(drain=15.0),
    ).__enter__()  # fmt: skip
    client = connect(token, server.address)
    alive = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    assert alive.Check(request, timeout=20).status == health_pb2.HealthCheckResponse.SERVING
    watch = client.watch()
    watch.next("directive")
    transfer = client.call("Fetch", messages.FetchRequest(path=blob_path(sha)))
    received = len(next(transfer).data)
    ender = threading.Thread(target=server.stop)
    begun = time.monotonic()
    ender.start()
    assert watch.end() is grpc.StatusCode.UNAVAILABLE
    received += sum(len(chunk.data) for chunk in transfer)  # what has begun is finished
    assert received == 8_000_000
    ender.join(20)
    assert time.monotonic() - begun < 12
    assert connect(token, server.address).refused("Report", report())[0] in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )


def test_unusable_files_and_ports_are_named(
    database: str, fleet: FleetService, repository: Repository, authority: Authority,
    server: ControlServer,
) -> None:  # fmt: skip
    certificate, key = authority.server()
    _, foreign = authority.device("foreign")
    for files in ((certificate, foreign), (certificate, key.with_name("absent"))):
        with pytest.raises(Unbindable, match="a TLS file is unusable"):
            ControlServer(database, repository.path, certificate=files[0], key=files[1])
    taken = ControlServer(
        database, repository.path, certificate=certificate, key=key, port=server.port
    )
    with pytest.raises(Unbindable, match="cannot bind"):
        taken.run()

"""The protocol: generated code is of the .proto, and everything in it is explained."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from prunecast.common.fleet_protocol import CHUNK_BYTES, SERVICE, add_servicer, make_stub, messages

FOLDER = Path(str(messages.__file__)).parent


def test_generated_code_is_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed: pip install '.[dev]'")
    from prunecast.common.fleet_protocol.generate import GENERATED, generate

    generate(tmp_path)
    for name in GENERATED:
        made, held = (tmp_path / name).read_text(), (FOLDER / name).read_text()
        assert made == held, f"{name} is not of fleet.proto: make proto"


class Echo:
    """Answers every method of the service with what it was asked."""

    def Watch(self, request: Any, context: object) -> Iterator[Any]:
        yield messages.WatchEvent(welcome=messages.Welcome(device=request.device))
        yield messages.WatchEvent(keep_alive=messages.KeepAlive())

    def Report(self, request: Any, context: object) -> Any:
        return messages.ReportReply(counted=bool(request.id))

    def Fetch(self, request: Any, context: object) -> Iterator[Any]:
        yield messages.FetchChunk(offset=request.offset, data=request.path.encode())


def answers(stub: Any) -> list[Any]:
    return [
        *stub.Watch(messages.WatchRequest(device="cam"), timeout=20),
        stub.Report(messages.ReportRequest(id="report01"), timeout=20),
        *stub.Fetch(messages.FetchRequest(path="a", offset=3), timeout=20),
    ]


def test_the_service_is_the_one_that_generated_code_talks_to(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    source = tmp_path / "prunecast/common/fleet_protocol/fleet.proto"
    source.parent.mkdir(parents=True)
    shutil.copyfile(FOLDER / source.name, source)
    kind = f"--grpc_python_out={tmp_path}"
    assert protoc.main(["protoc", f"-I{tmp_path}", kind, str(source)]) == 0
    generated = runpy.run_path(str(source.with_name("fleet_pb2_grpc.py")))
    with ThreadPoolExecutor(2) as threads:
        for add in (add_servicer, generated["add_FleetControlServicer_to_server"]):
            server = grpc.server(threads)
            add(Echo(), server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            try:
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    found = answers(make_stub(channel))
                    assert found == answers(generated["FleetControlStub"](channel))
                    assert [type(one).__name__ for one in found] == [
                        *("WatchEvent", "WatchEvent", "ReportReply", "FetchChunk")
                    ]
            finally:
                server.stop(None).wait()
    with pytest.raises(AttributeError, match="Watch"):
        add_servicer(object(), grpc.server(None))


def test_every_message_field_and_method_has_a_comment() -> None:
    lines = (FOLDER / "fleet.proto").read_text().splitlines()
    declared = re.compile(r"\s*(message|service|enum|rpc|oneof|optional|map<|\w+ \w+ = |[A-Z_]+ =)")
    bare = [
        line.strip()
        for before, line in pairwise(lines)
        if declared.match(line) and not before.strip().startswith("//")
    ]
    assert bare == []


def test_the_package_is_versioned_and_chunks_are_large_enough() -> None:
    file = messages.DESCRIPTOR
    assert file.package == "prunecast.fleet.v1"
    assert f"{file.package}.{file.services_by_name['FleetControl'].name}" == SERVICE
    assert 256 * 1024 <= CHUNK_BYTES < 4 * 2**20  # gRPC's default limit for a message

"""The protocol: generated code is of the .proto, and everything in it is explained."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from prunecast.common.fleet_protocol import CHUNK_BYTES, SERVICE, messages

FOLDER = Path(str(messages.__file__)).parent


def test_generated_code_is_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed: pip install '.[dev]'")
    from prunecast.common.fleet_protocol.generate import GENERATED, generate

    generate(tmp_path)
    for name in GENERATED:
        made, held = (tmp_path / name).read_text(), (FOLDER / name).read_text()
        assert made == held, f"{name} is not of fleet.proto: make proto"


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

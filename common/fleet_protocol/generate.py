"""Generate the Python code of `fleet.proto`; needs the pinned grpcio-tools.

``python common/fleet_protocol/generate.py`` (or ``make proto``) rewrites the files beside this one.
An old generator is pinned, because generated code runs with its own and later versions of protobuf,
and with none before.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

__all__ = ["GENERATED", "generate"]

GENERATED = ("fleet_pb2.py", "fleet_pb2.pyi")
_HERE = Path(__file__).parent
_PACKAGE = Path("prunecast/common/fleet_protocol")


def generate(target: Path) -> None:
    """Write the generated files into a folder.

    Raises:
        ModuleNotFoundError: grpcio-tools is not installed.
        RuntimeError: the compiler refuses the .proto.
    """
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as name:
        # the path below the include folder becomes the import name
        source = Path(name) / _PACKAGE / "fleet.proto"
        source.parent.mkdir(parents=True)
        shutil.copyfile(_HERE / source.name, source)
        kinds = [f"--{kind}_out={name}" for kind in ("python", "pyi")]
        if protoc.main(["protoc", f"-I{name}", *kinds, str(source)]) != 0:
            raise RuntimeError("the compiler refuses fleet.proto: see its messages above")
        for made in GENERATED:
            shutil.copyfile(source.parent / made, target / made)


if __name__ == "__main__":
    generate(_HERE)

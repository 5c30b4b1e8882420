"""A release as one self-contained ``.onnx`` file, for people who want nothing else."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from prunecast.common.files import write_atomically
from prunecast.compression.onnx.errors import BindError
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.versions import PublishedModel

__all__ = ["export_single"]

_PROTOBUF_LIMIT = 2**31 - 1


def export_single(graph: bytes, layout: WeightsLayout, model: PublishedModel, path: Path) -> int:
    """Put the weights of a release into its graph and write one file; returns its size in bytes.

    The values are those a device runs, bit for bit, in the release's own variant.

    Args:
        graph: content of `model.onnx`.
        layout: content of `layout.json`.
        model: the published model.
        path: file to write.

    Raises:
        BindError: graph and layout do not belong together, or the result exceeds 2 GiB.
        LayoutError: layout and model do not belong together.
        StorageError: the file cannot be written.
    """
    if layout.size + len(graph) > _PROTOBUF_LIMIT:
        raise BindError(f"{layout.size} bytes of weights do not fit into one protobuf file")
    try:
        proto = onnx.ModelProto.FromString(graph)
    except DecodeError as error:
        raise BindError(f"model.onnx of the release is damaged: {error}") from error
    segments = {segment.name: segment for segment in layout.segments}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        segment = segments.get(tensor.name)
        if segment is None:
            raise BindError(
                f"layout.json does not place {tensor.name!r}, which model.onnx refers to"
            )
        values = segment.values(model)
        tensor.raw_data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    data = proto.SerializeToString(deterministic=True)
    write_atomically(Path(path), data)
    return len(data)

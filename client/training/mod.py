"""`compression_mod`: the client's half of the compressed grid."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from prunecast.client.training.errors import ModError
from prunecast.client.training.store import NodeStore, default_root
from prunecast.client.training.updates import compress_update
from prunecast.compression.codec import CodecError
from prunecast.compression.flower import (
    CONTROL_RECORD,
    array_record,
    dense_arrays,
    is_codable,
    payload_of,
    payload_record,
    stream_id,
)
from prunecast.compression.flower.internals import ClientAppCallable, Mod, make_message
from prunecast.compression.pruning import holding
from prunecast.compression.versions import (
    BaseMissing,
    Instruction,
    Kind,
    PublishedModel,
    Report,
    VersionsError,
    decode_model,
    encode_plain,
    encode_update,
    inspect,
    open_plain,
    reply_tag,
    short,
)

__all__ = ["compression_mod"]


def compression_mod(store: Path | str | None = None) -> Mod:
    """A Flower mod that decodes what `CompressedGrid` sends and encodes the reply.

    Put it first, outside mods that look at arrays::

        app = ClientApp(mods=[compression_mod()])

    With a server that does not compress, messages pass through unchanged, so the same client
    serves both.

    Args:
        store: directory for held models and residuals. Default: ``prunecast-store`` of the node
            config, else ``$PRUNECAST_STORE``, else ``prunecast/nodes`` in the user's cache
            directory. Simulations that span machines need one that all of them see.

    Raises (while handling a message, reported to the server by Flower):
        ModError: a payload is damaged, of another run, or of a newer format.
        NonFiniteUpdate: local training produced NaN or infinity.
        StoreError: the store cannot be written.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        control = message.content.config_records.get(CONTROL_RECORD)
        data = control.get("instruction") if control is not None else None
        if not isinstance(data, bytes):
            return call_next(message, context)
        root = Path(store or str(context.node_config.get("prunecast-store", "")) or default_root())
        node = NodeStore(root, message.metadata.run_id, context.node_id)
        try:
            exchange = _Exchange(message, Instruction.from_bytes(data), node)
        except (VersionsError, CodecError) as error:
            raise ModError(f"message from the server was refused: {error}") from error
        if exchange.missing:
            return Message(exchange.wrap(RecordDict()), reply_to=message)
        with holding(exchange.masks()):
            reply = call_next(make_message(message.metadata, exchange.content), context)
        if reply.has_error():
            return reply
        return make_message(reply.metadata, exchange.encode(reply.content))

    return mod


class _Exchange:
    """One message and its reply."""

    def __init__(self, message: Message, instruction: Instruction, store: NodeStore) -> None:
        self._metadata = message.metadata
        self._instruction = instruction
        self._store = store
        self._models: dict[str, PublishedModel] = {}
        self.missing: list[str] = []
        self.content = RecordDict()
        for key, record in message.content.items():
            if key == CONTROL_RECORD:
                continue
            payload = payload_of(record)
            if key in instruction.reuse:
                self.content[key] = self._reuse(key, instruction.reuse[key])
            else:
                self.content[key] = record if payload is None else self._decode(key, payload)

    def _stream(self, key: str) -> bytes:
        return stream_id(self._metadata.run_id, key)

    def _reuse(self, key: str, digest: bytes) -> ArrayRecord:
        held = self._store.held(key)
        if held is None or short(held.digest) != digest:
            self.missing.append(key)
            return ArrayRecord()
        self._models[key] = held
        return array_record(held.arrays())

    def _decode(self, key: str, payload: bytes) -> ArrayRecord:
        if inspect(payload).kind is Kind.PLAIN:
            return array_record(open_plain(payload, stream=self._stream(key)))
        held = self._store.held(key)
        try:
            model = decode_model(payload, held=held, stream=self._stream(key))
        except BaseMissing:
            self.missing.append(key)
            return ArrayRecord()
        if held is None or held.digest != model.digest:
            self._store.keep(key, model)
        self._models[key] = model
        return array_record(model.arrays())

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """Masks of all received models together."""
        return {
            name: mask for model in self._models.values() for name, mask in model.masks().items()
        }

    def wrap(self, content: RecordDict, encode_ms: float = 0.0) -> RecordDict:
        """Add the report of what this node holds."""
        held = {key: short(model.digest) for key, model in self._models.items()}
        report = Report(held, tuple(self.missing), encode_ms)
        content[CONTROL_RECORD] = ConfigRecord({"report": report.to_bytes()})
        return content

    def encode(self, reply: RecordDict) -> RecordDict:
        """The reply's array records as payloads, everything else as it is."""
        started = time.perf_counter()
        content = RecordDict()
        for key, record in reply.items():
            if isinstance(record, ArrayRecord) and is_codable(record):
                content[key] = payload_record(self._encode(key, dense_arrays(record)))
            else:
                content[key] = record
        return self.wrap(content, (time.perf_counter() - started) * 1e3)

    def _encode(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> bytes:
        base_key = self._base_for(key, arrays)
        if base_key is None:
            return encode_plain(arrays, stream=self._stream(key))
        base = self._models[base_key]
        residual = self._store.residual(base_key, self._instruction.accepted)
        change = compress_update(base, arrays, residual, self._instruction.rule)
        payload = encode_update(base, change.changes, stream=self._stream(base_key))
        if change.residual:
            self._store.stage(base_key, reply_tag(self._metadata.message_id), change.residual)
        return payload

    def _base_for(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> str | None:
        """The received record a reply's record is an update of: same key or same layout."""
        layout = [(name, array.dtype, array.shape) for name, array in arrays.items()]
        matching = [
            candidate
            for candidate, model in self._models.items()
            if layout == [(n, spec.dtype, spec.shape) for n, spec in model.specs.items()]
        ]
        if key in matching:
            return key
        return matching[0] if len(matching) == 1 and key not in self._models else None

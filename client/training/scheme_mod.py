"""`scheme_mod`: the client's half of `SchemeGrid`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from prunecast.client.training.errors import ModError, NonFiniteUpdate
from prunecast.client.training.store import NodeStore, default_root
from prunecast.compression.flower.internals import ClientAppCallable, Mod, make_message
from prunecast.compression.flower.schemes import (
    SCHEME_RECORD,
    SchemeInstruction,
    SchemeReport,
    coded_record,
    float_names,
)
from prunecast.compression.schemes import (
    NonFiniteError,
    Scheme,
    SchemeError,
    State,
    layout_of,
    scheme,
)
from prunecast.compression.versions import BadPayload, reply_tag

__all__ = ["scheme_mod"]


def scheme_mod(store: Path | str | None = None) -> Mod:
    """A Flower mod that sends updates by the scheme that `SchemeGrid` asks for.

    Put it first, outside mods that look at arrays::

        app = ClientApp(mods=[scheme_mod()])

    What the ClientApp gets is plain; of its reply, every array record of the names and shapes of
    one it got travels as *trained - received* in a payload of the scheme. Arrays that are not of
    floating point travel as they are. With a server that asks for no scheme, messages pass
    through unchanged.

    What a scheme keeps from one update to the next lies in the node's store, and is committed
    when the server says with its next message that it accepted the reply it belongs to.

    Args:
        store: directory for that; see `compression_mod`.

    Raises (while handling a message, reported to the server by Flower):
        ModError: the instruction is not understood, or the update cannot be coded.
        NonFiniteUpdate: local training produced NaN or infinity.
        StoreError: the store cannot be written.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        control = message.content.config_records.get(SCHEME_RECORD)
        if control is None:
            return call_next(message, context)
        root = Path(store or str(context.node_config.get("prunecast-store", "")) or default_root())
        try:
            instruction = SchemeInstruction.from_bytes(control.get("instruction"))
            chosen = scheme(instruction.name, **instruction.config)
        except (BadPayload, SchemeError) as error:
            raise ModError(f"the server's scheme was refused: {error}") from error
        received = RecordDict({k: r for k, r in message.content.items() if k != SCHEME_RECORD})
        reply = call_next(make_message(message.metadata, received), context)
        if reply.has_error():
            return reply
        started = time.perf_counter()
        node = NodeStore(root, message.metadata.run_id, context.node_id)
        tag = reply_tag(message.metadata.message_id)
        content = RecordDict()
        for key, record in reply.content.items():
            base = received.array_records.get(key)
            if isinstance(record, ArrayRecord) and base is not None and _alike(record, base):
                kept = _Kept(node, f"{key} by {chosen.name}", instruction.accepted, tag)
                content[key] = _coded(chosen, record, base, kept, instruction.key)
            else:
                content[key] = record
        report = SchemeReport(chosen.name, (time.perf_counter() - started) * 1e3)
        content[SCHEME_RECORD] = ConfigRecord({"report": report.to_bytes()})
        return make_message(reply.metadata, content)

    return mod


def _alike(record: ArrayRecord, base: ArrayRecord) -> bool:
    """Whether a record is an update of another: same names, dtypes and shapes."""
    return bool(float_names(base)) and [
        (name, a.dtype, tuple(a.shape), a.stype) for name, a in record.items()
    ] == [(name, a.dtype, tuple(a.shape), a.stype) for name, a in base.items()]


def _coded(
    chosen: Scheme, record: ArrayRecord, base: ArrayRecord, kept: _Kept, key: int
) -> ArrayRecord:
    names = float_names(base)
    update = {name: record[name].numpy() - base[name].numpy() for name in names}
    try:
        payload, state = chosen.encode(update, kept.load(chosen, update), key=key)
    except NonFiniteError as error:
        raise NonFiniteUpdate(f"the update was not sent: {error}") from error
    except SchemeError as error:
        raise ModError(f"the update was not sent: {error}") from error
    kept.stage(state)
    return coded_record(payload, {name: a for name, a in record.items() if name not in names})


class _Kept:
    """The state of one record's scheme, in files that belong to a reply."""

    def __init__(self, node: NodeStore, key: str, accepted: str, tag: str) -> None:
        self._node, self._key, self._accepted, self._tag = node, key, accepted, tag

    def load(self, chosen: Scheme, update: Mapping[str, NDArray[Any]]) -> State:
        """The state committed last; that of the beginning where there is none that fits."""
        start = chosen.init(layout_of(update))
        found = self._node.residual(self._key, self._accepted)
        buffers = {
            buffer: {name: found.get(f"{buffer}/{name}") for name in tensors}
            for buffer, tensors in start.buffers.items()
        }
        fits = "step" in found and all(
            array is not None and array.shape == start.layout[name] and array.dtype == np.float32
            for tensors in buffers.values()
            for name, array in tensors.items()
        )
        if not fits:
            return start
        return State(start.layout, int(found["step"]), buffers)  # type: ignore[arg-type]

    def stage(self, state: State) -> None:
        """Write the state that holds if the reply is accepted."""
        arrays: dict[str, NDArray[np.floating]] = {"step": np.asarray(state.step, np.float64)}
        for buffer, tensors in state.buffers.items():
            arrays.update({f"{buffer}/{name}": array for name, array in tensors.items()})
        self._node.stage(self._key, self._tag, arrays)

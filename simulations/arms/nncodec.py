"""NNCodec: models and updates quantised and coded as ISO/IEC 15938-17 does it, where installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import Range

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from torch import nn

    from prunecast.simulations.scenarios import Scenario

__all__ = ["Nncodec", "coded", "decoded", "step_of"]

_EXTENSION = "nncodec.extensions.deepCABAC"
_REMEDY = "pip install --no-deps nncodec==2.1.3, which builds an extension"
_ACTION = "nncodec"  # messages are of the type train.nncodec
_CODED, _BASE, _STATE = "coded", "base", "nncodec"
_NOTHING = -1  # version of a node that holds no model
_QP_DENSITY = 2
# Of the extension, as NNCodec calls it by default: 11 unary flags, optimised context states, no
# trellis, rows of zeros skipped, no temporal contexts.
_UNARY, _OPTIMISED, _NO_TRELLIS, _ROW_MAJOR, _PROFILE, _TEMPORAL, _ROW_SKIP = 11, 1, 0, 0, 1, 0, 1

Integers = Mapping[str, NDArray[np.int32]]


def step_of(qp: int) -> float:
    """The quantiser's step for a quantisation parameter (ISO/IEC 15938-17, with a density of 2).

    >>> step_of(0), step_of(-4), step_of(-32)
    (1.0, 0.5, 0.00390625)
    """
    part = 1 << _QP_DENSITY
    return float((part + qp % part) * 2.0 ** (qp // part - _QP_DENSITY))


@dataclass(frozen=True)
class Nncodec(Arm):
    """Differences in both directions, quantised uniformly and coded by DeepCABAC.

    Becking, Haase, Kirchhoffer, Müller, Samek & Marpe 2023, "NNCodec: An Open Source Software
    Implementation of the Neural Network Coding ISO/IEC Standard". Steps follow from a parameter
    for weights and another for all else, as in its mode for federations; what quantisation drops is
    added to a client's next update, and the server's model is rounded as a whole, so that its
    changes are whole numbers. Its sparsification, trellis and temporal contexts are not used, and
    headers of its bitstream are not counted. Arrays that are no floats travel as they are.

    Attributes:
        qp: of tensors of two or more dimensions.
        nonweight_qp: of other floats: biases, normalisation.
    """

    qp: Annotated[int, Range(-100, 0)] = -26
    nonweight_qp: Annotated[int, Range(-100, 0)] = -75

    @classmethod
    def missing(cls) -> str:
        """How to install NNCodec, where its extension is not there."""
        try:
            found = importlib.util.find_spec(_EXTENSION)
        except ModuleNotFoundError:
            found = None
        return "" if found else _REMEDY

    def weights(self, arrays: Any, scenario: Scenario, server_round: int) -> Any:
        """What the clients hold: the model, rounded."""
        return _record(self._rounded(_dense(arrays)))

    def equip(
        self,
        client: ClientApp,
        model: Callable[[Context], nn.Module],
        data: Callable[[Context], tuple[Any, Any]],
        scenario: Scenario,
    ) -> None:
        """Teach the clients to decode the model and to code their updates."""

        @client.train(_ACTION)  # type: ignore[untyped-decorator, unused-ignore]
        def train_coded(message: Message, context: Context) -> Message:
            return _trained(self, model(context), data(context)[0], scenario, message, context)

    def strategy(self, average: Any) -> Any:
        """The average of what the updates decode to, by `average`, whose sampling stays."""
        return _coding(self, average)

    def text(self) -> str:
        """The parameters."""
        return f"qp = {self.qp}, nonweight_qp = {self.nonweight_qp}"

    def step(self, array: NDArray[Any]) -> np.float32:
        """Of a tensor."""
        return np.float32(step_of(self.qp if array.ndim > 1 else self.nonweight_qp))

    def integers(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.int32]]:
        """The floats of some arrays as multiples of their steps."""
        most = np.iinfo(np.int32)
        return {
            name: np.clip(np.rint(array / np.float64(self.step(array))), most.min, most.max).astype(
                np.int32
            )
            for name, array in arrays.items()
            if array.dtype.kind == "f"
        }

    def floats(self, integers: Integers) -> dict[str, NDArray[np.float32]]:
        """Inverse of `integers`."""
        return {name: q.astype(np.float32) * self.step(q) for name, q in integers.items()}

    def _rounded(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {**arrays, **self.floats(self.integers(arrays))}


# -- the coder ------------------------------------------------------------------------------------


def coded(integers: Integers) -> NDArray[np.uint8]:
    """The stream of DeepCABAC, one tensor after the other."""
    library: Any = importlib.import_module(_EXTENSION)
    coder = library.Encoder()
    for q in integers.values():
        if not q.size:
            continue
        coder.initCtxModels(_UNARY, _OPTIMISED)
        rows = np.atleast_1d(np.ascontiguousarray(q))
        used = np.any(rows.reshape(len(rows), -1), axis=1) if q.ndim > 1 else np.ones(len(rows))
        empty = np.logical_not(used).astype(np.int32)
        off = library.HdspMode.AlwaysOff, np.zeros(2, np.int8)
        flags = (_PROFILE, _TEMPORAL, _ROW_SKIP, empty, *off, 0, 0)
        coder.encodeLayer(rows, _NO_TRELLIS, _ROW_MAJOR, *flags)
    return np.frombuffer(bytes(coder.finish()), np.uint8)


def decoded(stream: NDArray[np.uint8], shapes: Mapping[str, tuple[int, ...]]) -> Integers:
    """Inverse of `coded`; names and shapes are known to both sides."""
    library: Any = importlib.import_module(_EXTENSION)
    coder = library.Decoder()
    coder.setStream(np.ascontiguousarray(stream))
    found: dict[str, NDArray[np.int32]] = {}
    for name, shape in shapes.items():
        q = np.zeros(shape or (1,), np.int32)
        if q.size:
            coder.initCtxModels(_UNARY)
            off = library.HdspMode.AlwaysOff, np.zeros(2, np.int8)
            coder.decodeLayer(q, _NO_TRELLIS, _ROW_MAJOR, _PROFILE, _TEMPORAL, *off, 0, 0)
        found[name] = q.reshape(shape)
    coder.finish()
    return found


# -- both sides -----------------------------------------------------------------------------------


def _dense(record: Any) -> dict[str, NDArray[Any]]:
    from prunecast.compression.flower import dense_arrays

    return dict(dense_arrays(record))


def _record(arrays: Mapping[str, NDArray[Any]]) -> Any:
    from prunecast.compression.flower import array_record

    return array_record(dict(arrays))


def _packed(integers: Integers, others: Mapping[str, NDArray[Any]]) -> Any:
    """A record of coded integers, and of the arrays that are no floats."""
    return _record({_CODED: coded(integers), **others})


def _others(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in arrays.items() if array.dtype.kind != "f"}


def _trained(
    arm: Nncodec,
    module: nn.Module,
    loader: Iterable[Any],
    scenario: Scenario,
    message: Message,
    context: Context,
) -> Message:
    """The model that came, trained as in every other arm, and the coded change."""
    import torch
    from flwr.app import Message, MetricRecord, RecordDict

    from prunecast.compression.flower import stated_round

    [(key, record)] = message.content.array_records.items()
    others = _dense(record)
    stream = others.pop(_CODED)
    state = module.state_dict()
    shapes = {n: tuple(t.shape) for n, t in state.items() if t.is_floating_point()}
    change = decoded(stream, shapes)
    config: Any = message.content[_BASE]
    kept: Any = context.state.get(_STATE)
    whole, residual = dict(change), {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    if kept is not None:
        known = _dense(kept)
        residual = {name: known[f"residual.{name}"] for name in shapes}
        if config["version"] != _NOTHING:
            whole = {name: known[f"held.{name}"] + q for name, q in change.items()}
    received = arm.floats(whole)
    arrived = {n: torch.from_numpy(np.array(a)) for n, a in {**received, **others}.items()}
    module.load_state_dict(arrived)
    loss_fn, server_round = scenario.task.training_loss, stated_round(message.content)
    local = scenario.local_training()
    outcome = local.train(module, loader, server_round, context, loss_fn=loss_fn)
    after = {name: value.cpu().numpy() for name, value in module.state_dict().items()}
    wanted = {name: after[name] - received[name] + residual[name] for name in shapes}
    update = arm.integers(wanted)
    left = {n: wanted[n] - sent for n, sent in arm.floats(update).items()}
    context.state[_STATE] = _record(
        {
            **{f"held.{name}": q for name, q in whole.items()},
            **{f"residual.{name}": array for name, array in left.items()},
        }
    )
    metrics = MetricRecord({"num-examples": outcome.examples, "train-loss": outcome.loss})
    content = RecordDict({key: _packed(update, _others(after)), "metrics": metrics})
    return Message(content, reply_to=message)


def _coding(arm: Nncodec, average: Any) -> Any:
    from flwr.app import ConfigRecord, Message, RecordDict

    configure, mean = average.configure_train, average.aggregate_train
    now: dict[str, NDArray[np.int32]] = {}
    held: dict[int, int] = {}  # node -> round whose model it holds
    latest = {"round": _NOTHING}
    others: dict[str, NDArray[Any]] = {}  # as they were sent

    def configure_train(server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        dense = _dense(arrays)
        before = dict(now)
        now.update(arm.integers(dense))
        others.update(_others(dense))
        records: dict[int, Any] = {}
        messages = []
        for message in configure(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            version = held.get(node, _NOTHING)
            version = version if version == latest["round"] else _NOTHING  # else the whole model
            if version not in records:
                same = version != _NOTHING
                change = {n: q - before[n] for n, q in now.items()} if same else dict(now)
                records[version] = _packed(change, others)
            [key] = message.content.array_records
            content = RecordDict(dict(message.content.items()))
            content[key] = records[version]
            content[_BASE] = ConfigRecord({"version": version})
            kind = f"{message.metadata.message_type}.{_ACTION}"
            messages.append(Message(content, node, kind, group_id=message.metadata.group_id))
        latest["round"] = server_round
        return messages

    def aggregate_train(server_round: int, replies: Iterable[Any]) -> Any:
        got = list(replies)
        shapes = {name: q.shape for name, q in now.items()}
        sent = arm.floats(now)
        for reply in got:
            if reply.has_error():
                continue
            held[reply.metadata.src_node_id] = server_round
            [(key, record)] = reply.content.array_records.items()
            after = _dense(record)
            update = arm.floats(decoded(after.pop(_CODED), shapes))
            after.update({name: sent[name] + update[name] for name in sent})
            reply.content[key] = _record(after)
        merged, metrics = mean(server_round, got)
        if merged is None:
            return merged, metrics
        arrays = _dense(merged)  # an average of counters is no whole number
        arrays.update({n: np.asarray(np.rint(arrays[n]), a.dtype) for n, a in others.items()})
        return _record({name: np.asarray(array) for name, array in arrays.items()}), metrics

    average.configure_train, average.aggregate_train = configure_train, aggregate_train
    return average

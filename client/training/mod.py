"""`compression_mod`: the client's half of the compressed grid."""

from __future__ import annotations

from contextlib import ExitStack
from logging import ERROR
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from prunecast.client.training.capabilities import capabilities
from prunecast.client.training.housekeeping import default_root
from prunecast.client.training.incoming import Incoming
from prunecast.client.training.replying import Reply
from prunecast.client.training.store import ModError, NodeStore
from prunecast.compression.codec import CodecError
from prunecast.compression.flower import CONTROL_RECORD, ERROR_CODE, ERROR_REASON, open_coded
from prunecast.compression.flower.envelope import is_packed, pack, unpack
from prunecast.compression.flower.internals import (
    ClientAppCallable,
    ErrorCode,
    Mod,
    adds_noise,
    log,
    make_message,
)
from prunecast.compression.pruning.masks import holding
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.statistics import asked
from prunecast.compression.pruning.structure.channels import holding_channels
from prunecast.compression.versions import (
    MAX_MODEL_BYTES,
    BadPayload,
    Capabilities,
    Instruction,
    NodeReport,
    TooLarge,
    VersionsError,
    short,
)

__all__ = ["compression_mod"]

_LONGEST = 10_000  # characters of the reason of an error


def compression_mod(
    store: Path | str | None = None,
    *,
    max_model_bytes: int | None = None,
    store_quota: int | None = None,
    teacher: bool | None = None,
    noised_feedback: bool = False,
) -> Mod:
    """A Flower mod that decodes what `CompressedGrid` sends and encodes the reply.

    Put it first, outside mods that look at arrays::

        app = ClientApp(mods=[compression_mod()])

    Files of a node go by its id; by ``prunecast-node`` of its config, a number that no other node
    of this machine has, where Flower gives it another id whenever it starts.

    A node whose config has ``prunecast-width`` says so to the server, which may then send it a
    slice of the model, see docs/pruning.md.

    How arrays come and go is the server's choice, told with every message. With a server that does
    not compress, messages pass through unchanged, so the same client serves both.

    Args:
        store: directory for held models and residuals. Default: ``prunecast-store`` of the node
            config, else ``$PRUNECAST_STORE``, else ``prunecast/nodes`` in the user's cache
            directory. Simulations that span machines need one that all of them see.
        max_model_bytes: of the largest model that this node may take.
        store_quota: most bytes that all jobs and nodes of this machine may keep in the store, or
            ``prunecast-store-quota`` of the node config; default: any number. Jobs used longest
            ago make room, and never the one whose message is handled; where that alone needs more,
            the update is sent all the same, and nothing is kept for the next one.
        teacher: keep the last dense version on disk once the model is pruned, for
            `current_teacher()`; None: where the run config has `distillation` above 0.
        noised_feedback: also where Flower's `LocalDpMod` stands behind, add what quantisation
            dropped of a noised reply to the next one. Off, as what a node sends in one round is
            then made of several.

    A message that arrives after the server's deadline is not trained on, so that a slow node
    catches up; the model that came with it is kept.

    An exception of the ClientApp, or of a mod inside, is logged and reported to the server together
    with what the node holds; strategies see Flower's error reply.

    So is a message that this node refuses: a payload is damaged, of another run, or of a newer
    format; and a reply that is not sent, as training produced NaN or infinity.

    Raises (while handling a message, reported to the server by Flower):
        ModError: the message is none of the compressed grid's.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        with ExitStack() as stack:
            return handled(message, context, call_next, stack)

    def handled(
        message: Message, context: Context, call_next: ClientAppCallable, stack: ExitStack
    ) -> Message:
        if not is_packed(message.content) and CONTROL_RECORD not in message.content.config_records:
            if any(map(open_coded, message.content.array_records.values())):
                raise ModError(
                    "arrays came as the server coded them, and without what it says of them: "
                    "another mod in front of this one changed the message. Put compression_mod() "
                    "first in ClientApp(mods=[...])"
                )
            return call_next(message, context)
        root = Path(store or str(context.node_config.get("prunecast-store", "")) or default_root())
        try:
            message = make_message(message.metadata, unpack(message.content))
            control = message.content.config_records.get(CONTROL_RECORD) or ConfigRecord()
            stated = control.get("instruction")
            if stated is None:
                raise BadPayload("its control record has no instruction")
        except (VersionsError, CodecError) as error:
            raise ModError(f"message from the server was refused: {error}") from error
        node: NodeStore | None = None
        try:
            instruction = Instruction.from_bytes(stated)
            most = _bytes_of("max_model_bytes", max_model_bytes, context) or MAX_MODEL_BYTES
            quota = _bytes_of("store_quota", store_quota, context)
            job = instruction.job or message.metadata.run_id
            node = NodeStore(root, job, _number(context), quota=quota)
            stack.callback(node.close)
            node.note_end(last=instruction.last)
            able = capabilities(root, context.node_config) if instruction.asks else None
            incoming = Incoming(
                *(message, instruction, node, most),
                able=able,
                keeps_teacher=_distils(context) if teacher is None else teacher,
                noised=adds_noise(call_next),
                feeds_back=noised_feedback,
                width=str(context.node_config.get("prunecast-width", "")),
            )
        except (ModError, VersionsError, CodecError, PlanError) as error:
            return _refusal(message, node, capabilities(root, context.node_config), error)
        if incoming.missing or incoming.stale:
            return Message(pack(incoming.wrap(RecordDict())), reply_to=message)
        try:
            with (
                holding_channels(incoming.channels()),
                holding(
                    incoming.masks(), tuple(asked(instruction.statistics)), incoming.teacher
                ) as statistics,
            ):
                reply = call_next(make_message(message.metadata, incoming.content), context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned {type(reply).__name__}, which is no Message")
            if not reply.has_error():
                coded = Reply(incoming, reply.content).encode(statistics)
                return make_message(reply.metadata, pack(coded))
            failure = reply.error
        except Exception as raised:
            # Flower would make the error reply, in which there is no place for what this node holds
            log(ERROR, "ClientApp raised an exception", exc_info=raised)
            failure = _raised(raised)
        return Message(pack(_with_error(incoming.wrap(RecordDict()), failure)), reply_to=message)

    return mod


def _refusal(
    message: Message, store: NodeStore | None, able: Capabilities, error: Exception
) -> Message:
    """An error reply that says what this node holds of the records that it was sent.

    Where the instruction could not be read, it says nothing of that, and the server goes by what it
    knows; but what this node is able to read.
    """
    text = f"message from the server was refused: {error}"
    if isinstance(error, TooLarge):
        text += (
            ": set compression_mod(max_model_bytes=...), or prunecast-max-model-bytes in the node "
            "config, to the bytes of the largest model that this node may take"
        )
    refused = error if isinstance(error, ModError) else ModError(text)
    log(ERROR, "%s", refused)
    held: dict[str, bytes] = {}
    if store is not None:
        found = {key: store.held(key) for key in message.content.array_records}
        held = {key: short(model.digest) for key, model in found.items() if model is not None}
    report = NodeReport(held, able=able if store is None else None)
    content = RecordDict({CONTROL_RECORD: ConfigRecord({"report": report.to_bytes()})})
    return Message(pack(_with_error(content, _raised(refused))), reply_to=message)


def _raised(error: Exception) -> Error:
    """What Flower makes of an exception of a ClientApp."""
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>")


def _with_error(content: RecordDict, error: Error) -> RecordDict:
    """The content of a reply, with an error in whose place the server puts an error reply."""
    control = content.config_records[CONTROL_RECORD]
    control[ERROR_CODE], control[ERROR_REASON] = error.code, (error.reason or "")[:_LONGEST]
    return content


def _bytes_of(name: str, stated: int | None, context: Context) -> int | None:
    """A limit, of the code or else of the node config; None for neither."""
    key = f"prunecast-{name.replace('_', '-')}"
    most = context.node_config.get(key) if stated is None else stated
    if most is None:
        return None
    if not isinstance(most, int) or isinstance(most, bool) or most <= 0:
        raise ModError(f"{name} ({key}) is {most!r}: give a positive number of bytes")
    return most


def _number(context: Context) -> int:
    """What the node's files go by: Flower's id of it, or its own where that is another each time.

    Raises:
        ModError: its own is no number.
    """
    number = context.node_config.get("prunecast-node", context.node_id)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ModError(f"prunecast-node in the node config is {number!r}: give a whole number")
    return number


def _distils(context: Context) -> bool:
    share = context.run_config.get("distillation", 0.0)
    return isinstance(share, int | float) and share > 0

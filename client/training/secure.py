"""`shared_mask_mod`: of a pruned model, secure aggregation sums the weights that are kept alone."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from prunecast.compression.flower.internals import ClientAppCallable, make_message
from prunecast.compression.flower.secure import is_secure
from prunecast.compression.pruning.masks import current_masks

__all__ = ["shared_mask_mod"]


def shared_mask_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod that leaves pruned weights out of what secure aggregation sums.

    All nodes hold the same published model, so they leave out the same ones, and the vectors that
    are masked and summed remain aligned. `SecureStrategy` on the server puts them back. It goes
    last, so that what it returns is masked::

        ClientApp(client_fn=..., mods=[compression_mod(), secaggplus_mod, shared_mask_mod])

    Messages that are no part of secure aggregation, and models that are not pruned yet, pass
    through unchanged.
    """
    reply = call_next(message, context)
    masks = current_masks()
    if not masks or not is_secure(message.content) or reply.has_error():
        return reply
    content = RecordDict(dict(reply.content.items()))
    for key, record in reply.content.array_records.items():
        kept = ArrayRecord()
        for name, array in record.items():
            mask = masks.get(name)
            fits = mask is not None and mask.shape == tuple(array.numpy().shape)
            kept[name] = Array(array.numpy()[mask]) if fits else array
        content[key] = kept
    return make_message(reply.metadata, content)

"""What befalls a node's store, or its package, for tests that say so in the run config."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from prunecast.client.training import capabilities as stating
from prunecast.compression.versions import control

FILLER = "filler"


def fault_of(context: Context) -> str:
    """What befalls this node: the first of the names, joined by "+", is for the first node."""
    faults = dict(enumerate(str(context.run_config["fault"]).split("+")))
    return faults.get(int(context.node_config["partition-id"]), "")


def strike(fault: str, store: Path) -> None:
    """Damage what the node keeps."""
    if fault == "lost":
        for path in store.iterdir():
            shutil.rmtree(path)
    for path in store.rglob("*.model"):
        data = bytearray(path.read_bytes())
        if fault == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif fault == "corrupted":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    if fault == "full":
        handle = os.open(store / FILLER, os.O_WRONLY | os.O_CREAT)
        for size in (1 << 16, 1):
            try:
                while True:
                    os.write(handle, bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        os.close(handle)


def heal(store: Path) -> None:
    """Make room again."""
    (store / FILLER).unlink(missing_ok=True)


def of_another_kind(message: Message, context: Context, call_next: Any) -> Message:
    """A mod in front: a node of an earlier package or format, or one with little memory."""
    known = control.INSTRUCTION_FORMAT, stating._package, stating._memory
    fault = fault_of(context)
    if fault == "foreign":
        control.INSTRUCTION_FORMAT = stating.INSTRUCTION_FORMAT = 0
    if fault in ("foreign", "old"):
        stating._package = lambda: "0.0.1"
    if fault == "poor":
        stating._memory = lambda: 256 * 10**6
    try:
        return call_next(message, context)
    finally:
        control.INSTRUCTION_FORMAT = stating.INSTRUCTION_FORMAT = known[0]
        stating._package, stating._memory = known[1:]

"""A command that is asked to end leaves nothing half-written behind.

By default SIGTERM and SIGHUP end a process at once, with its temporary files still there. Here they
raise, as SIGINT does, so that every file and folder is cleaned up by whoever made it. Commands with
an end of their own (servers, the agent) replace these handlers while they run.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

__all__ = ["end_cleanly"]

_GRACE = 5.0  # seconds; Python runs handlers only between two steps of its own


def end_cleanly(grace: float = _GRACE) -> None:
    """Let SIGTERM and SIGHUP raise `SystemExit` in the main thread, with 128 + the signal's number.

    A signal that is ignored, as nohup does it, stays so.

    Args:
        grace: seconds after which the process ends without cleaning up, because a computation
            outside Python does not let the handler run.
    """
    raised = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        raised.set()
        for one in (signal.SIGTERM, signal.SIGHUP):  # once more would interrupt the cleaning up
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    chosen = [
        one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL
    ]
    for number in chosen:
        signal.signal(number, end)
    if not chosen:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            for number in os.read(reading, 64):
                ours = number in chosen and signal.getsignal(number) in (end, signal.SIG_IGN)
                if ours and not raised.wait(grace):
                    with suppress(OSError):
                        os.write(2, b"ended without cleaning up: a computation went on\n")
                    os._exit(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()

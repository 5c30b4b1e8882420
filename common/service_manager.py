"""What a service manager is told: that a process is ready, alive, or about to end.

The protocol of sd_notify(3): datagrams to the socket that the manager names in the environment.
Without a manager, nothing is sent.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

__all__ = ["ServiceManager"]


class ServiceManager:
    """The service manager that started this process, if there is one.

    Args:
        environment: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are read from it.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        # a leading @ stands for the abstract namespace of Linux
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._watchdog = 0.0
        if environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with suppress(ValueError):
                self._watchdog = int(environment.get("WATCHDOG_USEC", "0")) / 1e6

    @property
    def watchdog_seconds(self) -> float:
        """After how many silent seconds the manager ends this process; 0: never."""
        return self._watchdog

    def tell(self, **state: object) -> None:
        """Send assignments, such as ``READY=1``."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in state.items())
        with (
            suppress(OSError),  # a manager that does not listen must neither end nor hold us
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.connect(self._address)
            sender.send(text.encode())

    @contextmanager
    def watching(self, alive: Callable[[], bool]) -> Iterator[None]:
        """Ready while the block runs; the watchdog is fed for as long as `alive` says so.

        Args:
            alive: called in a thread of its own, four times in the watchdog's interval.
        """
        over = threading.Event()

        def feed() -> None:
            while not over.wait(self._watchdog / 4):
                if alive():
                    self.tell(WATCHDOG=1)

        self.tell(READY=1)
        thread = threading.Thread(target=feed, name="watchdog", daemon=True)
        if self._watchdog > 0:
            thread.start()
        try:
            yield
        finally:
            self.tell(STOPPING=1)
            over.set()
            if thread.ident is not None:
                thread.join()

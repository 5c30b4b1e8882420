"""Where the control server is, and how a device proves who it is."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from prunecast.client.edge.errors import ControlProblem

__all__ = ["ControlSettings"]

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class ControlSettings:
    """Connection of a device to its fleet; always over TLS.

    Files are read at every connection, so what is renewed is taken without a restart.

    Attributes:
        address: ``HOST:PORT``.
        ca_file: PEM file of the authorities to trust; None: those that gRPC brings along.
        token_file: file with the device's token.
        certificate: PEM files of the device's certificate and key, instead of a token.
        first_wait: seconds that the first wait for a new connection lasts at most.
        most_wait: seconds that any wait lasts at most.
        report_every: seconds after which a device says how it is when nothing has happened.

    Raises:
        ControlProblem: no address, or not exactly one credential.
    """

    address: str
    ca_file: Path | None = None
    token_file: Path | None = None
    certificate: tuple[Path, Path] | None = None
    first_wait: float = 5.0
    most_wait: float = 120.0
    report_every: float = 300.0

    def __post_init__(self) -> None:
        found = _ADDRESS.fullmatch(self.address)
        if not found or not 1 <= int(found[2]) <= 65535:
            raise ControlProblem(f"{self.address!r} is no HOST:PORT of a control server")
        if (self.token_file is None) == (self.certificate is None):
            raise ControlProblem(
                "a device shows its fleet either a token or a certificate with its key"
            )

    @property
    def url(self) -> str:
        """What names the release repository when it is reached through the control server."""
        return f"grpcs://{self.address}/"

    def token(self) -> str | None:
        """The device's token; None: it has a certificate.

        Raises:
            ControlProblem: the file is missing or holds no token.
        """
        if self.token_file is None:
            return None
        text = self.read(self.token_file).decode("ascii", "replace").strip()
        if not _TOKEN.fullmatch(text):
            raise ControlProblem(
                f"{self.token_file} holds no device token: one line, as printed by "
                "`prunecast fleet device add`"
            )
        return text

    def fingerprint(self) -> str:
        """Tells one credential from another without holding it: SHA-256 in hex.

        Raises:
            ControlProblem: a file is missing.
        """
        shown = self.token()
        data = shown.encode() if shown else self.read(self.certificate[0])  # type: ignore[index]
        return hashlib.sha256(b"prunecast credential\0" + data).hexdigest()

    def read(self, path: Path) -> bytes:
        """Content of one of the files.

        Raises:
            ControlProblem: it cannot be read.
        """
        try:
            return path.read_bytes()
        except OSError as error:
            raise ControlProblem(f"cannot read {path}: {error.strerror or error}") from error

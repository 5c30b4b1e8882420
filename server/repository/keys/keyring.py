"""Private keys of the four TUF roles, as files that only their owner can read.

``root`` and ``targets`` sign rarely and belong offline; ``snapshot`` and ``timestamp`` sign every
publication and every renewal. A `KeyRing` looks for ``<role>.pem`` in the folders it is given, so
the offline keys can live on another medium than the online ones. There is no default location.

These files are not encrypted, since timers read them. Keys that people hold are: see `keyholders`.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner

from prunecast.common.files import write_new
from prunecast.server.repository.errors import KeyFileError, RepositoryExists
from prunecast.server.repository.roles import ROLES

__all__ = ["KeyRing", "as_signer", "write_key", "write_private"]


class KeyRing:
    """Finds and loads the private key of a role.

    Args:
        folders: where key files lie, searched in order.

    Raises:
        KeyFileError: no folder was given.
    """

    def __init__(self, *folders: Path | str) -> None:
        if not folders:
            raise KeyFileError("name the folder that holds the keys")
        self.folders = tuple(Path(folder) for folder in folders)

    @classmethod
    def create(cls, folder: Path | str) -> KeyRing:
        """Make an Ed25519 key for every role in `folder`; files get mode 0600, the folder 0700.

        Raises:
            RepositoryExists: a key file is there already.
            KeyFileError: the folder cannot be written.
        """
        folder = Path(folder)
        for role in ROLES:
            if (folder / f"{role}.pem").exists():
                raise RepositoryExists(f"{folder / f'{role}.pem'} exists: keys are not overwritten")
        for role in ROLES:
            write_key(folder / f"{role}.pem", Ed25519PrivateKey.generate())
        return cls(folder)

    def path(self, role: str) -> Path:
        """Path of the role's key file.

        Raises:
            KeyFileError: not in any folder.
        """
        for folder in self.folders:
            if (folder / f"{role}.pem").is_file():
                return folder / f"{role}.pem"
        where = ", ".join(map(str, self.folders))
        raise KeyFileError(f"the {role} key is needed, but {role}.pem is not in {where}")

    def signer(self, role: str) -> CryptoSigner:
        """Load the role's key.

        Raises:
            KeyFileError: missing, no Ed25519 key in PEM, or readable by others.
        """
        return _load(self.path(role))

    def signers(self, role: str) -> list[CryptoSigner]:
        """Load every key of the role, at most one from each folder.

        Raises:
            KeyFileError: none is there, or one is unusable.
        """
        paths = [folder / f"{role}.pem" for folder in self.folders]
        found = [_load(path) for path in paths if path.is_file()]
        return found or [_load(self.path(role))]


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a private key as PEM (PKCS #8) with mode 0600; never over an existing file.

    Raises:
        RepositoryExists: the file exists.
        KeyFileError: it cannot be written.
    """
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read; never over an existing file.

    Raises:
        RepositoryExists: the file exists.
        KeyFileError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new(path, content)
    except FileExistsError as error:
        raise RepositoryExists(f"{path} exists: keys are not overwritten") from error
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror or error}") from error


def _load(path: Path) -> CryptoSigner:
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror or error}") from error
    if os.name == "posix" and mode & 0o077:
        raise KeyFileError(f"{path} can be read by others: chmod 600 {path}")
    if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in data:
        raise KeyFileError(
            f"{path} is encrypted: its holder signs with it, `prunecast release keys sign`"
        )
    return as_signer(path, data, None)


def as_signer(path: Path, data: bytes, passphrase: bytes | None) -> CryptoSigner:
    """The signer of a key file's content.

    Raises:
        KeyFileError: not an Ed25519 key in PEM, or another passphrase.
    """
    try:
        key = load_pem_private_key(data, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise KeyFileError(f"{path} does not open: another passphrase, or damaged") from error
        raise KeyFileError(f"{path} is not a private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key")
    return CryptoSigner(key)

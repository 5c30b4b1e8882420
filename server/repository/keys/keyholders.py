"""Key files: of machines, which sign by themselves, and of people whose signatures count.

``root`` and ``targets`` sign rarely and belong offline; ``snapshot`` and ``timestamp`` sign every
publication and every renewal. A `KeyRing` looks for ``<role>.pem`` in the folders it is given, so
the offline keys can live on another medium than the online ones. There is no default location.
These files are not encrypted, since timers read them.

A holder has two files: ``<holder>.key``, the private key under a passphrase, which never leaves
their machine, and ``<holder>.pub``, JSON that names holder and public key and goes to whoever
prepares the ceremony. The holder's name becomes part of the public metadata, so that messages can
say who has not signed yet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import textwrap
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from prunecast.common.files import exposure, write_atomically, write_new
from prunecast.server.repository.errors import CeremonyError, KeyFileError, RepositoryExists
from prunecast.server.repository.roles import HOLDER, HOLDER_NAME, OFFLINE_ROLES, ROLES, holder_of

__all__ = [
    "KeyRing",
    "as_signer",
    "describe_key",
    "encrypted_pem",
    "fingerprint",
    "key_of",
    "load_holder",
    "load_public",
    "make_holder",
    "make_online",
    "write_key",
]

_MOST = 16_384  # bytes of a key file
_LEAST = 8  # characters of a passphrase


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
        paths = [Path(folder) / f"{role}.pem" for role in ROLES]
        if held := [path for path in paths if path.exists()]:
            raise RepositoryExists(f"{held[0]} exists: keys are not overwritten")
        for path in paths:
            write_key(path, Ed25519PrivateKey.generate())
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

    def signers(self, role: str) -> list[CryptoSigner]:
        """Load every key of the role, at most one from each folder.

        Raises:
            KeyFileError: none is there; or one is no Ed25519 key in PEM, or readable by others.
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
    _write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _write_private(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new(path, content)
    except FileExistsError as error:
        raise RepositoryExists(f"{path} exists: keys are not overwritten") from error
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror or error}") from error


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST)
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror or error}") from error


def _secret(path: Path) -> bytes:
    data = _content(path)
    if exposed := exposure(path, own=False):
        raise KeyFileError(exposed)
    return data


def _load(path: Path) -> CryptoSigner:
    data = _secret(path)
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


def make_holder(folder: Path, holder: str, passphrase: str) -> tuple[Path, Path]:
    """Make an Ed25519 key for a holder, encrypted with a passphrase.

    Returns:
        The private key file, which stays with the holder, and the public one, which goes to
        whoever prepares the ceremony.

    Raises:
        KeyFileError: an unusable name or passphrase, or the folder cannot be written.
        RepositoryExists: the holder has a key there already.
    """
    if len(passphrase) < _LEAST:
        raise KeyFileError(f"the passphrase is too short: take at least {_LEAST} characters")
    private = Ed25519PrivateKey.generate()
    key = key_of(private.public_key(), holder)
    files = folder / f"{holder}.key", folder / f"{holder}.pub"
    # the lines above the PEM block tell `release doctor` whose key it is
    head = f"Prunecast key of {holder}\nKey-Id: {key.keyid}\n".encode()
    _write_private(files[0], head + encrypted_pem(private, passphrase.encode()))
    _write_public(files[1], key)
    return files


def load_holder(path: Path, passphrase: str) -> CryptoSigner:
    """A holder's private key.

    Raises:
        KeyFileError: not readable, not a key, or another passphrase.
    """
    data = _secret(path)
    if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" not in data:
        raise KeyFileError(
            f"{path} is not an encrypted private key: make one with `release keys make`"
        )
    return as_signer(path, data, passphrase.encode())


def make_online(folder: Path, role: str) -> tuple[Path, Path]:
    """Make a key that a machine signs with by itself: ``<role>.pem``, not encrypted, and its .pub.

    Returns:
        Where the private and the public key were written.

    Raises:
        CeremonyError: the role's keys belong to holders.
        KeyFileError: the folder cannot be written.
        RepositoryExists: there is such a key already.
    """
    if role in OFFLINE_ROLES:
        raise CeremonyError(
            f"{role} keys belong to holders, offline: make them with `release keys make`"
        )
    private = Ed25519PrivateKey.generate()
    public = key_of(private.public_key(), role)
    files = folder / f"{role}.pem", folder / f"{role}.pub"
    write_key(files[0], private)
    _write_public(files[1], public)
    return files


def key_of(public: Ed25519PublicKey, holder: str) -> SSlibKey:
    """A public key as TUF writes it, with its holder's name.

    Raises:
        KeyFileError: a name that cannot be used.
    """
    if not HOLDER_NAME.fullmatch(holder):
        raise KeyFileError(f"{holder[:80]!r} cannot name a holder: use a-z 0-9 . _ -")
    key = SSlibKey.from_crypto(public)
    key.unrecognized_fields[HOLDER] = holder
    return key


def _write_public(path: Path, key: Key) -> None:
    document = {"keyid": key.keyid, **key.to_dict()}
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())


def load_public(path: Path) -> SSlibKey:
    """Read a public key file.

    Raises:
        KeyFileError: not readable, or not a public key with its holder's name.
    """
    data = _content(path)
    try:
        document: dict[str, Any] = json.loads(data)
        holder, public = document[HOLDER], bytes.fromhex(document["keyval"]["public"])
        key = key_of(Ed25519PublicKey.from_public_bytes(public), holder)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeyFileError(
            f"{path} is not a public key file: `release keys make` writes them as <holder>.pub"
        ) from error
    if document.get("keyid") != key.keyid:
        raise KeyFileError(f"{path} names another key than it holds: ask its holder for it again")
    return key


def fingerprint(key: Key) -> str:
    """SHA-256 (hex) of the raw 32 bytes of an Ed25519 public key, for reading out aloud.

    The same as ``openssl pkey -in KEY -pubout -outform DER | tail -c 32 | sha256sum``.
    """
    return hashlib.sha256(bytes.fromhex(str(key.keyval["public"]))).hexdigest()


def describe_key(key: Key) -> str:
    """Holder and fingerprint in one line."""
    return f"{holder_of(key)} (SHA-256 of the public key {fingerprint(key)})"


# 16 MiB per lane: OpenSSL refuses to read files that need more than 32 MiB at once, so the cost
# beyond that is in the lanes (OWASP Password Storage Cheat Sheet lists N = 2^14, r = 8, p = 5)
_N, _R, _P = 2**14, 8, 5
_PBES2 = bytes.fromhex("06092a864886f70d01050d")  # 1.2.840.113549.1.5.13
_SCRYPT = bytes.fromhex("06092b06010401da47040b")  # 1.3.6.1.4.1.11591.4.11
_AES256_CBC = bytes.fromhex("060960864801650304012a")  # 2.16.840.1.101.3.4.1.42


def encrypted_pem(key: Ed25519PrivateKey, passphrase: bytes) -> bytes:
    """A private key as ``ENCRYPTED PRIVATE KEY`` in PEM.

    Args:
        key: to be encrypted.
        passphrase: not empty.

    Examples:
        >>> from cryptography.hazmat.primitives.serialization import load_pem_private_key
        >>> key = Ed25519PrivateKey.generate()
        >>> again = load_pem_private_key(encrypted_pem(key, b"secret"), b"secret")
        >>> again.public_key() == key.public_key()
        True
    """
    plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    salt, iv = os.urandom(16), os.urandom(16)
    derived = Scrypt(salt=salt, length=32, n=_N, r=_R, p=_P).derive(passphrase)
    padder = PKCS7(128).padder()
    padded = padder.update(plain) + padder.finalize()
    encryptor = Cipher(AES256(derived), CBC(iv)).encryptor()
    content = encryptor.update(padded) + encryptor.finalize()
    costs = b"".join(map(_integer, (_N, _R, _P)))
    derivation = _sequence(_SCRYPT, _sequence(_octets(salt), costs))
    cipher = _sequence(_AES256_CBC, _octets(iv))
    scheme = _sequence(_PBES2, _sequence(derivation, cipher))
    document = base64.b64encode(_sequence(scheme, _octets(content))).decode()
    lines = ["-----BEGIN ENCRYPTED PRIVATE KEY-----", *textwrap.wrap(document, 64)]
    return "\n".join([*lines, "-----END ENCRYPTED PRIVATE KEY-----", ""]).encode()


def _encoded(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _sequence(*parts: bytes) -> bytes:
    return _encoded(0x30, b"".join(parts))


def _octets(content: bytes) -> bytes:
    return _encoded(0x04, content)


def _integer(value: int) -> bytes:
    return _encoded(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))

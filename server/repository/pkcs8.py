"""Encrypted private keys: PKCS #8 (RFC 5958) under PBES2 with scrypt (RFC 7914) and AES-256.

`cryptography` writes PKCS #8 with 2,048 rounds of PBKDF2 whatever one asks for, which a graphics
card tries a million times a second. scrypt is as standard: `cryptography` and ``openssl pkey``
read these files.
"""

from __future__ import annotations

import base64
import os
import textwrap

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

__all__ = ["encrypted_pem"]

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

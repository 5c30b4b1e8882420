"""TLS of a SuperLink and keys of its SuperNodes: one folder, made by one call.

::

    ca.key               signs the server's certificate; needed again only to renew it
    ca.crt               what SuperNodes and `flwr` verify the SuperLink by
    server.key           of the SuperLink
    server.crt           its certificate, for the hosts that were named and for loopback
    nodes/node-1         of a SuperNode, for ``--auth-supernode-private-key``
    nodes/node-1.pub     what ``flwr supernode register`` is given

Keys are of mode 0600 before anything is in them. Nothing that is there is replaced, but by
`renew`, which leaves every key of a node and the authority's key as they are.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prunecast.common.files import StorageError, lock_file, make_folder, replacing_all
from prunecast.server.federation.errors import CredentialsError

__all__ = ["Credential", "make_credentials"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the SuperLink's own processes ask it there
_AUTHORITY_DAYS = 3650
_MOST_NODES, _MOST_DAYS = 100_000, 3650
_EARLY = timedelta(hours=1)  # certificates hold so long before they are made: clocks differ


@dataclass(frozen=True)
class Credential:
    """One file of the folder.

    Attributes:
        path: of the certificate or the private key.
        state: whether this call made it, renewed it, or found it there.
        expires: when a certificate does; None for keys, which do not.
        hosts: that a server's certificate is for.
    """

    path: Path
    state: Literal["made", "kept", "renewed"]
    expires: datetime | None = None
    hosts: tuple[str, ...] = ()


def make_credentials(
    folder: Path,
    *,
    hosts: Sequence[str] = (),
    nodes: int = 0,
    days: int = 397,
    renew: bool = False,
    now: datetime | None = None,
) -> list[Credential]:
    """Make what is missing in a folder of credentials.

    Args:
        folder: is made with mode 0700.
        hosts: names and addresses at which the SuperLink is reached; loopback is always added.
        nodes: how many SuperNodes there are: keys ``node-1`` to ``node-<nodes>``.
        days: that the server's certificate holds, at most as long as the authority's.
        renew: make certificate and key of the server anew, and the authority's certificate of the
            same key, so that who has the old one accepts both until it expires. Without `hosts`,
            for those of the old certificate.
        now: the time, for tests.

    Returns:
        Authority, server, and each node, in this order.

    Raises:
        CredentialsError: a host is no name, a file is damaged, the certificate that is there has
            expired or lacks a host, or the authority's key is not there to sign with.
        StorageError: a file cannot be written.
    """
    if not 0 <= nodes <= _MOST_NODES or not 1 <= days <= _MOST_DAYS:
        raise CredentialsError(
            f"a federation has 0 to {_MOST_NODES} nodes and a certificate 1 to {_MOST_DAYS} days"
        )
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *_LOOPBACK))]
    try:
        for part in (folder, folder / "nodes"):
            if not part.is_dir():
                make_folder(part)
                part.chmod(0o700)
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(folder / ".lock"))
            except BlockingIOError:
                raise CredentialsError(
                    f"another command is writing {folder}: wait for it"
                ) from None
            authority, certificate, signs = _authority(folder, renew, now)
            server = _server(folder, names, bool(hosts), days, renew, now, certificate, signs)
            return [authority, server, *(_node(folder, n) for n in range(1, nodes + 1))]
    except OSError as error:
        where = error.filename or folder
        raise StorageError(f"cannot write {where}: {error.strerror or error}") from error


# -- the authority --------------------------------------------------------------------------------


def _authority(
    folder: Path, renew: bool, now: datetime
) -> tuple[Credential, x509.Certificate, ec.EllipticCurvePrivateKey | None]:
    """The authority, its certificate, and its key where that is in the folder."""
    key_path, path = folder / "ca.key", folder / "ca.crt"
    if key_path.exists():
        key = _private(key_path)
        if path.exists() and not renew:
            found = _certificate(path)
            if found.public_key() != key.public_key():
                raise CredentialsError(f"{path} is not of {key_path}: put the right one back")
            return Credential(path, "kept", found.not_valid_after_utc), found, key
        state: Literal["made", "renewed"] = "renewed" if path.exists() else "made"
    elif path.exists():  # kept elsewhere, as is right
        if renew:
            raise CredentialsError(f"{key_path} is not there to sign with: bring it back first")
        found = _certificate(path)
        return Credential(path, "kept", found.not_valid_after_utc), found, None
    elif (old := folder / "server.crt").exists():
        raise CredentialsError(
            f"{path} is not there, by whose key {old} was signed: bring it back, or take another "
            "folder for an authority that every node is to be told of"
        )
    else:
        key, state = ec.generate_private_key(ec.SECP384R1()), "made"
    until = now + timedelta(days=_AUTHORITY_DAYS)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Prunecast federation authority")])
    made = _signed(name, key.public_key(), name, key, now, until, authority=True)
    _write({key_path: _pem(key), path: made.public_bytes(Encoding.PEM)})
    return Credential(path, state, until), made, key


# -- the server -----------------------------------------------------------------------------------


def _server(
    folder: Path,
    names: list[x509.GeneralName],
    given: bool,
    days: int,
    renew: bool,
    now: datetime,
    authority: x509.Certificate,
    signs: ec.EllipticCurvePrivateKey | None,
) -> Credential:
    key_path, path = folder / "server.key", folder / "server.crt"
    old = _certificate(path) if path.exists() else None
    if old is not None:
        had = _names_of(old)
        if not renew:
            _check_server(path, old, names, now, authority)
            if not key_path.exists() or _private(key_path).public_key() != old.public_key():
                raise CredentialsError(f"{path} is not of {key_path}: give --renew")
            return Credential(path, "kept", old.not_valid_after_utc, _texts(had))
        names = names if given else had
    if signs is None:
        raise CredentialsError(
            f"{folder / 'ca.key'} is not there to sign with: bring it back first"
        )
    if authority.not_valid_after_utc <= now:
        expired = f"{authority.not_valid_after_utc:%F}"
        raise CredentialsError(f"{folder / 'ca.crt'} expired on {expired}: give --renew")
    key = ec.generate_private_key(ec.SECP256R1())
    if key_path.exists() and not renew:
        key = _private(key_path)
    until = min(now + timedelta(days=days), authority.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Prunecast SuperLink")])
    made = _signed(subject, key.public_key(), authority.subject, signs, now, until, names=names)
    _write({key_path: _pem(key), path: made.public_bytes(Encoding.PEM)})
    return Credential(path, "renewed" if old else "made", until, _texts(names))


def _check_server(
    path: Path,
    found: x509.Certificate,
    names: Iterable[x509.GeneralName],
    now: datetime,
    authority: x509.Certificate,
) -> None:
    try:
        found.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise CredentialsError(
            f"{path} was not signed by the authority beside it: give --renew"
        ) from None
    if found.not_valid_after_utc <= now:
        raise CredentialsError(f"{path} expired on {found.not_valid_after_utc:%F}: give --renew")
    if missing := set(names) - set(_names_of(found)):
        hosts = ", ".join(_texts(sorted(missing, key=str)))
        raise CredentialsError(f"{path} is not for {hosts}: give --renew with every --host")


def _names_of(found: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (x509.ExtensionNotFound, ValueError):
        return []


def _texts(names: Iterable[x509.GeneralName]) -> tuple[str, ...]:
    return tuple(str(name.value) for name in names)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    sound = len(host) <= 253 and all(
        0 < len(one) < 64 and one.isascii() and one.replace("-", "").replace("_", "").isalnum()
        for one in labels
    )
    if not sound:
        raise CredentialsError(
            f"{host!r} is neither a host's name nor an address: give it without scheme and port"
        )
    return x509.DNSName(host)


# -- nodes ----------------------------------------------------------------------------------------


def _node(folder: Path, number: int) -> Credential:
    """The key of a node, in the form that Flower reads: OpenSSH's, on the curve P-384."""
    private = folder / "nodes" / f"node-{number}"
    public = private.with_suffix(".pub")
    state: Literal["made", "kept"] = "made"
    if private.exists():
        state = "kept"
        try:
            key = load_ssh_private_key(private.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CredentialsError(f"{private} is no key of a node: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CredentialsError(f"{private} is no key of a node: not ECDSA")
        if public.exists():
            return Credential(private, state)
    elif public.exists():
        raise CredentialsError(
            f"{public} is there without its key: bring the key back, or remove it for a new pair, "
            "which is to be registered anew"
        )
    else:
        key = ec.generate_private_key(ec.SECP384R1())
    contents = {public: key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)}
    if state == "made":
        text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        contents = {private: text, **contents}
    _write(contents)
    return Credential(private, state)


# -- files ----------------------------------------------------------------------------------------


def _signed(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    until: datetime,
    *,
    authority: bool = False,
    names: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    """A certificate with what OpenSSL asks for when it is strict (RFC 5280)."""
    usage = x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    of = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(of, critical=False)
    )
    if names:
        server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(server, critical=False)
    return builder.sign(key, hashes.SHA384())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CredentialsError(f"{path} is no private key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CredentialsError(f"{path} is no ECDSA key")
    return key


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise CredentialsError(f"{path} is no certificate: {error}") from None


def _write(contents: Mapping[Path, bytes]) -> None:
    """Write a key and what belongs to it; a key is its owner's alone before anything is in it."""
    with replacing_all(list(contents)) as temporaries:
        for (path, data), temporary in zip(contents.items(), temporaries, strict=True):
            os.chmod(temporary, 0o644 if path.suffix in (".crt", ".pub") else 0o600)
            temporary.write_bytes(data)

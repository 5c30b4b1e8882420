"""`prunecast release keys`: key ceremonies, from the first root to every later change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunecast.cli.console import AsJson, show
from prunecast.cli.release_create import Folder
from prunecast.common.clock import utc_now

if TYPE_CHECKING:
    from securesystemslib.signer import Key

    from prunecast.server.repository import Ceremony

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Key ceremonies: several holders sign root and targets, each on a machine of their own.",
)

_Where = Annotated[Path, typer.Argument(help="Folder of the ceremony; it holds no secret.")]
_Passphrase = Annotated[
    Path | None,
    typer.Option(help="File whose first line is the passphrase; without it you are asked."),
]


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Where the two key files go.")],
    holder: Annotated[str, typer.Argument(help="Your name, as others will see it: a-z 0-9 . _ -")],
    passphrase_file: _Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Make a holder's key: <holder>.key, encrypted, for you alone, and <holder>.pub to send off."""
    from prunecast.server.repository import load_public, make_holder
    from prunecast.server.repository.keys.keyholders import fingerprint

    private, public = make_holder(folder, holder, _passphrase(passphrase_file, confirm=True))
    digest = fingerprint(load_public(public))
    show(
        {"private": str(private), "public": str(public), "sha256": digest},
        as_json,
        f"private key, keep it: {private}\npublic key, send it: {public}\n"
        f"SHA-256 of the public key, to compare by voice: {digest}",
    )


@app.command()
def online(
    folder: Annotated[Path, typer.Argument(help="Key folder on the machine that publishes.")],
    roles: Annotated[
        list[str] | None,
        typer.Argument(help="snapshot, timestamp, or a delegated role; default the first two."),
    ] = None,
) -> None:
    """Make keys that a machine signs with by itself: <role>.pem, not encrypted, and <role>.pub."""
    from prunecast.server.repository import ONLINE_ROLES, make_online

    for role in roles or ONLINE_ROLES:
        private, public = make_online(folder, role)
        print(f"{role}: {private} and {public}")  # noqa: T201


@app.command()
def plan(
    ceremony: _Where,
    root: Annotated[list[Path], typer.Option(help="Public key file of a root holder.")],
    targets: Annotated[list[Path], typer.Option(help="Public key file of a targets holder.")],
    snapshot: Annotated[Path, typer.Option(help="Public key file of the online role.")],
    timestamp: Annotated[Path, typer.Option(help="Public key file of the online role.")],
    root_threshold: Annotated[int, typer.Option(help="How many root holders must sign.", min=1)],
    targets_threshold: Annotated[
        int, typer.Option(help="How many targets holders must sign.", min=1)
    ],
) -> None:
    """Prepare the first root and targets of a new repository for their holders to sign."""
    from prunecast.server.repository import Ceremony, RoleKeys, first_metadata
    from prunecast.server.repository.roles import Expiry

    now = utc_now()
    roles = {
        "root": RoleKeys(_publics(root), root_threshold),
        "targets": RoleKeys(_publics(targets), targets_threshold),
        "snapshot": RoleKeys(_publics([snapshot])),
        "timestamp": RoleKeys(_publics([timestamp])),
    }
    made = Ceremony.create(ceremony, first_metadata(roles, Expiry(), now), None, now)
    _tell(made)


@app.command()
def change(
    ceremony: _Where,
    repository: Folder,
    add: Annotated[
        list[str] | None, typer.Option(help="role=file.pub: a key that the role trusts from now.")
    ] = None,
    revoke: Annotated[
        list[str] | None, typer.Option(help="role=holder, or the beginning of a key id.")
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="role=number of holders who must sign.")
    ] = None,
    delegate: Annotated[
        list[str] | None,
        typer.Option(help="role=release name (with * and ?) that this new role publishes."),
    ] = None,
    withdraw: Annotated[
        list[str] | None, typer.Option(help="Delegated role that ends; its releases stay.")
    ] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="root or targets: sign again, for a later expiry.")
    ] = None,
) -> None:
    """Prepare a change of keys, thresholds or delegations, or a renewal; needs no private key."""
    from prunecast.server.repository import CeremonyError, Change, RepositoryReader

    thresholds: dict[str, int] = {}
    for role, numbers in _pairs(threshold, "--threshold").items():
        if not numbers[-1].isdecimal():
            raise CeremonyError(f"--threshold {role}={numbers[-1]} is no number")
        thresholds[role] = int(numbers[-1])
    wanted = Change(
        add={role: _publics(map(Path, files)) for role, files in _pairs(add, "--add").items()},
        revoke=_pairs(revoke, "--revoke"),
        threshold=thresholds,
        delegate=_pairs(delegate, "--delegate"),
        withdraw=tuple(withdraw or ()),
        renew=tuple(renew or ()),
    )
    _tell(RepositoryReader(repository).change(ceremony, wanted, utc_now()))


@app.command(name="show")
def show_transcript(ceremony: _Where) -> None:
    """Print the transcript: keys, what is to be signed, who has signed, who is still needed."""
    from prunecast.server.repository import Ceremony
    from prunecast.server.repository.keys.ceremony import transcript

    print(transcript(Ceremony(ceremony)), end="")  # noqa: T201


@app.command()
def sign(
    ceremony: _Where,
    key: Annotated[Path, typer.Option(help="Your <holder>.key.")],
    passphrase_file: _Passphrase = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether to sign.")] = False,
) -> None:
    """Sign what asks for your key, on your own machine; prints the files to send back."""
    from prunecast.server.repository import Ceremony, load_holder
    from prunecast.server.repository.keys.ceremony import describe_requests

    held = Ceremony(ceremony)
    signer = load_holder(key, _passphrase(passphrase_file))
    print("\n".join(describe_requests(held)))  # noqa: T201
    if not yes:
        typer.confirm("Have you compared the digests with the others? Sign", abort=True)
    for path in held.sign(signer, utc_now()):
        print(f"send back: {path}")  # noqa: T201


@app.command()
def merge(
    ceremony: _Where,
    signatures: Annotated[list[Path], typer.Argument(help="Files that holders sent back.")],
) -> None:
    """Take over signature files; says who is still needed."""
    from prunecast.server.repository import Ceremony

    held = Ceremony(ceremony)
    held.merge(signatures)
    _tell(held)


@app.command()
def enact(
    ceremony: _Where,
    repository: Folder,
    keys: Annotated[
        list[Path], typer.Option("--keys", help="Folder with the keys of the online roles.")
    ],
) -> None:
    """Let a repository take over what was signed; a first ceremony creates it.

    Refused below any threshold. Devices follow at their next check, also from older roots.
    """
    from prunecast.server.repository import Ceremony, KeyRing, Repository

    held, ring = Ceremony(ceremony), KeyRing(*keys)
    if held.trusted is None:
        Repository.create(repository, ring, ceremony=held)
        root = repository / "metadata" / f"{held.requests['root'].signed.version}.root.json"
        print(f"created {repository}\nroot for devices: {root}")  # noqa: T201
    else:
        print("wrote " + ", ".join(Repository(repository, ring).enact(held)))  # noqa: T201
    print(f"transcript: {held.folder / 'transcript.txt'}")  # noqa: T201


def _tell(ceremony: Ceremony) -> None:
    from prunecast.server.repository.keys.ceremony import describe_requests

    lines = describe_requests(ceremony)
    for counted in ceremony.tallies():
        lines.append(f"{counted}{f'; {counted.asked}' if counted.missing else ''}")
    print("\n".join(lines))  # noqa: T201


def _publics(paths: Sequence[Path] | map[Path]) -> list[Key]:
    from prunecast.server.repository import load_public

    return [load_public(path) for path in paths]


def _pairs(given: list[str] | None, option: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in given or ():
        role, equals, value = text.partition("=")
        if not (role and equals and value):
            raise typer.BadParameter(f"{text!r} is not role=value", param_hint=option)
        found.setdefault(role, []).append(value)
    return found


def _passphrase(file: Path | None, *, confirm: bool = False) -> str:
    from prunecast.common.files import exposure
    from prunecast.server.repository import KeyFileError

    if file is None:
        asked: Callable[..., str] = typer.prompt
        return asked("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    if exposed := exposure(file, own=False):
        raise KeyFileError(exposed)
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0]:
        raise KeyFileError(f"the first line of {file} holds no passphrase")
    return lines[0]

"""`prunecast release`: create and keep a release repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import AsJson, MaxBytes, MaxSeconds, show, warn
from prunecast.cli.release_create import Fleets, Folder, Keys, Name, create
from prunecast.cli.release_keys import app as keys_app

if TYPE_CHECKING:
    from prunecast.server.repository import Repository, RepositoryReader

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Publish signed releases of a model for edge devices.")
app.add_typer(keys_app, name="keys")


@app.command()
def init(repository: Folder, keys: Keys, as_json: AsJson = False) -> None:
    """Make one key per role where there are none, and sign an empty repository.

    The root metadata that is printed goes onto every device. Move root.pem and targets.pem to a
    medium of their own; snapshot.pem and timestamp.pem are needed for every renewal. Where several
    people hold the keys, begin with `release keys` instead.
    """
    from prunecast.server.repository import ROLES, KeyRing, Repository

    held = [role for role in ROLES if any((f / f"{role}.pem").is_file() for f in keys)]
    ring = KeyRing(*keys) if held else KeyRing.create(keys[0])
    made = Repository.create(repository, ring)
    root = repository / "metadata" / "1.root.json"
    paths = {role: str(ring.path(role)) for role in ROLES}
    result = {
        "repository": str(repository),
        "root": str(root),
        "keys": paths,
        "expires": _iso(made.expires()),
    }
    lines = [f"created {repository}", f"root for devices: {root}"]
    lines += [f"{role} key: {path}" for role, path in paths.items()]
    show(result, as_json, "\n".join(lines))


app.command()(create)


@app.command(name="list")
def list_(repository: Folder, as_json: AsJson = False) -> None:
    """List the live releases and when the metadata expires."""
    target = _reader(repository)
    entries = target.releases()
    manifests = [target.show(e.name, e.version) for e in entries]
    rows = [
        {
            "name": m.name,
            "version": m.version,
            "created": m.created,
            "model": m.model_digest,
            "keyframe_bytes": m.keyframe.length,
            "patches_from": [p.base_version for p in m.patches],
            "metrics": dict(m.metrics),
        }
        for m in manifests
    ]
    expires = _iso(target.expires())
    show({"releases": rows, "expires": expires}, as_json, _table(rows, expires))


@app.command(name="show")
def show_manifest(
    repository: Folder,
    name: Name,
    version: Annotated[
        int | None, typer.Argument(help="Number of the release; default the newest.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the release as a single .onnx file, too.")
    ] = None,
) -> None:
    """Print the manifest of a release, as JSON."""
    reader = _reader(repository)
    manifest = reader.show(name, version)
    if export is not None:
        from prunecast.server.repository.authoring import export_release

        export_release(reader, manifest, export)
    print(json.dumps(json.loads(manifest.to_bytes()), indent=2))  # noqa: T201


@app.command()
def verify(
    repository: Folder,
    root: Annotated[Path, typer.Option(help="Root metadata that devices were given.")],
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Check everything as a device would: signatures, digests, payloads, weights, self-tests."""
    from prunecast.server.repository import verify_repository

    verified = verify_repository(
        _reader(repository), root.read_bytes(), max_bytes=max_bytes, max_seconds=max_seconds
    )
    lines = [
        f"{v.name} {v.version}: verified, {v.patches} patches, self-test differs by "
        f"{v.difference:.2g}"
        for v in verified
    ] or ["the metadata is valid; there is no release yet"]
    show({"verified": [asdict(v) for v in verified]}, as_json, "\n".join(lines))


@app.command()
def doctor(
    repository: Folder,
    keys: Annotated[
        list[Path] | None,
        typer.Option("--keys", help="Folder with private keys, to examine them too."),
    ] = None,
    fleet: Fleets = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a repository and what to do; nothing is changed.

    Looks at metadata, keys, the files of every live release, permissions and leftovers, and whether
    its fleets stand on releases that are live. The exit code is 1 if something must be done.
    """
    from prunecast.server.repository import KeyRing, examine

    findings = examine(repository, KeyRing(*keys) if keys else None, fleets=fleet or ())
    problems = sum(f.severity == "problem" for f in findings)
    lines = [f"{f.severity}: {f.subject}: {f.what}\n  {f.remedy}" for f in findings]
    lines.append(f"{problems} problems" if problems else "nothing needs to be done")
    found = {"problems": problems, "findings": [asdict(f) for f in findings]}
    show(found, as_json, "\n".join(lines))
    if problems:
        raise typer.Exit(1)


@app.command()
def retire(
    repository: Folder,
    name: Name,
    version: Annotated[int, typer.Argument(help="Number of the release.")],
    keys: Keys,
    fleet: Fleets = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Withdraw it whatever fleets stand on; they are not asked."),
    ] = False,
) -> None:
    """Withdraw a release; devices that run it keep it until a later one appears.

    What a fleet stands on is refused: a group's stable release, a pin, the release of a rollout
    that is under way and the one that it would go back to.
    """
    missed = _writer(repository, keys, fleet or ()).retire(name, version, force=force)
    print(f"retired {name} {version}")  # noqa: T201
    warn(*missed)


@app.command()
def fleets(
    repository: Folder,
    remember: Annotated[
        str | None, typer.Option(help="Database of a fleet to ask from now on.")
    ] = None,
    forget: Annotated[
        str | None, typer.Option(help="Database of a fleet that is no more: ask it no longer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the fleets that are asked before a release is withdrawn; `fleet init` adds its own."""
    from prunecast.server.repository.fleets import forget_fleet, known_fleets, remember_fleet

    with _reader(repository).held():
        if remember is not None:
            remember_fleet(repository, remember)
        if forget is not None:
            forget_fleet(repository, forget)
        known = known_fleets(repository)
    show({"fleets": known}, as_json, "\n".join(known or ["no fleet follows this repository"]))


@app.command()
def renew(
    repository: Folder,
    keys: Keys,
    role: Annotated[
        list[str] | None,
        typer.Option(help="root, targets, snapshot, timestamp or a delegated role."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign metadata anew before it expires; by default the online roles.

    Meant for a timer, at least as often as half the lifetime of the timestamp (7 days). Warns of
    roles that it did not sign in the last quarter of their lifetime; `release doctor` fails then.
    """
    target = _writer(repository, keys)
    renewed, ahead = _iso(target.renew(role)), _iso(target.expiring())
    lines = [f"{name} is valid until {when}" for name, when in renewed.items()]
    lines += [f"warning: {_ahead(name, when)}" for name, when in ahead.items()]
    show({"renewed": renewed, "expires_soon": ahead}, as_json, "\n".join(lines))


@app.command(name="rotate-key")
def rotate_key(
    repository: Folder,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot or timestamp.")],
    keys: Keys,
) -> None:
    """Replace a role's key; devices stop trusting the old one at their next check."""
    _writer(repository, keys).rotate_key(role)
    print(f"rotated the {role} key; destroy {role}.pem.old")  # noqa: T201


def _ahead(role: str, when: str) -> str:
    if role in ("root", "targets"):
        return (
            f"{role} expires at {when}: renew it with the offline key, or let its holders sign "
            f"(release keys change --renew {role})"
        )
    return f"{role} expires at {when} and was not renewed: is its key at hand?"


def _iso(times: Mapping[str, datetime]) -> dict[str, str]:
    return {role: when.isoformat() for role, when in times.items()}


def _reader(repository: Path) -> RepositoryReader:
    from prunecast.server.repository import RepositoryReader

    return RepositoryReader(repository)


def _writer(repository: Path, keys: list[Path], fleets: Sequence[str] = ()) -> Repository:
    from prunecast.server.repository import KeyRing, Repository

    return Repository(repository, KeyRing(*keys), fleets=fleets)


def _table(rows: list[dict[str, Any]], expires: dict[str, str]) -> str:
    lines = [
        f"{r['name']} {r['version']}  {r['created']}  keyframe {r['keyframe_bytes']:,} bytes, "
        f"{len(r['patches_from'])} patches"
        + "".join(f", {k} {v:.4g}" for k, v in r["metrics"].items())
        for r in rows
    ]
    ends = ", ".join(f"{role} {when[:10]}" for role, when in expires.items())
    return "\n".join([*(lines or ["no release yet"]), f"metadata expires: {ends}"])

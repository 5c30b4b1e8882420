"""What a device fetches beside releases of other names: one list of all, and a list for each.

    python benchmarks/names.py [--names N ...] [--releases N] [--json FILE]

A repository is filled with signed lists of made-up releases (the digests are drawn; nothing but
metadata is fetched here), once in one list of all names, as before, and once with a list for each
name, as `prunecast release create` makes them. Counted are the bytes of metadata that the agent's
own client receives: of a new device; when a release of its name appears; when one of another name
appears; and when another name appears for the first time.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import TargetFile

from prunecast.client.edge.updating.transport import Fetcher, Stream
from prunecast.client.edge.updating.trust import TrustedListing
from prunecast.compression.release.manifest import manifest_path
from prunecast.server.repository import Expiry, KeyRing, Repository
from prunecast.server.repository.metadata import MetadataSet

URL, MANIFEST = "http://repository.invalid/", 4321  # bytes; manifests are not fetched
EVENTS = ("new device", "its own name", "another name", "a new name")


class _Folder(Fetcher):
    """A repository's folder in place of a server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, url: str, offset: int = 0) -> Stream:
        file = self._folder / url.removeprefix(URL)
        if not file.is_file():
            raise DownloadHTTPError(f"{url} answered 404", 404)
        return Stream(offset, self._content(file))

    @staticmethod
    def _content(file: Path) -> Iterator[bytes]:
        yield file.read_bytes()


class Lists:
    """A repository whose releases are lines of signed lists."""

    def __init__(self, folder: Path, *, parted: bool) -> None:
        self.keys = KeyRing.create(folder / "keys")
        self.repository = Repository.create(folder / "served", self.keys)
        self._metadata, self._parted = folder / "served" / "metadata", parted
        self._state = MetadataSet.load(lambda name: (self._metadata / name).read_bytes(), 1)

    def publish(self, *names: str) -> None:
        """One more release of each name, and metadata that are signed once."""
        state, roles = self._state, set[str]()
        for name in names:
            if self._parted:
                roles |= state.separate(name)
            version = state.next_version(name)
            path = manifest_path(name, version)
            state.list_release(
                name, version, TargetFile(MANIFEST, {"sha256": secrets.token_hex(32)}, path)
            )
            roles.add(state.publisher_of(name))
        files = state.sign(roles, self.keys.signers, Expiry(), datetime.now(UTC))
        for name, data in files.items():
            (self._metadata / name).write_bytes(data)

    def check(self, device: Path, name: str) -> int:
        """Bytes that a device which follows `name` receives now."""
        got: list[int] = []
        root, network = self.repository.trusted_root(), _Folder(self.repository.path)
        listing = TrustedListing(URL, device, root, network, on_bytes=got.append)
        assert listing.versions(name)[-1] == self._state.next_version(name) - 1
        return sum(got)


def measure(names: int, releases: int, *, parted: bool) -> dict[str, int]:
    """Bytes by event, in a repository of so many names and releases of each."""
    with tempfile.TemporaryDirectory() as folder:
        lists = Lists(Path(folder), parted=parted)
        known = [f"model-{number:03}" for number in range(names)]
        for _ in range(releases):
            lists.publish(*known)
        device = Path(folder) / "device"
        found = {EVENTS[0]: lists.check(device, known[0])}
        for event, name in zip(EVENTS[1:], (known[0], known[-1], "model-new"), strict=True):
            if event != EVENTS[2] or names > 1:
                lists.publish(name)
                found[event] = lists.check(device, known[0])
        return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--names", type=int, nargs="+", default=[1, 20, 100], help="(default: 1 20 100)")
    add("--releases", type=int, default=10, help="live ones of each name (default: 10)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'':28}" + "".join(f"{event:>14}" for event in EVENTS))
    for parted in (False, True):
        for names in chosen.names:
            found = measure(names, chosen.releases, parted=parted)
            layout = "a list each" if parted else "one list"
            rows.append({"layout": layout, "names": names, **found})
            label = f"{layout}, {names} names"
            cells = (f"{found[event]:,}" if event in found else "-" for event in EVENTS)
            print(f"{label:28}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

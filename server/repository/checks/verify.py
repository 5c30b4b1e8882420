"""Verify a repository the way a device would, from its trusted root, without a network."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tuf.api import exceptions as tuf_errors
from tuf.ngclient import FetcherInterface, Updater

from prunecast.common.bounds import disk_bytes
from prunecast.common.clock import utc_now
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.externals import check_externals
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.release.manifest import ReleaseManifest, manifest_path
from prunecast.compression.release.runtime import open_session
from prunecast.compression.release.selftest import Tolerance, check_outputs, unpack_arrays
from prunecast.compression.versions import PublishedModel, VersionsError, decode_model
from prunecast.server.repository.apart import run_apart
from prunecast.server.repository.errors import RepositoryError, VerificationFailed
from prunecast.server.repository.reading import RepositoryReader

__all__ = ["VerifiedRelease", "verify_repository"]

_TUF_ERRORS = (tuf_errors.RepositoryError, tuf_errors.DownloadError)
_HOST = "http://repository.invalid/"


@dataclass(frozen=True)
class VerifiedRelease:
    """A release that passed.

    Attributes:
        name: of the release.
        version: its number.
        patches: how many patches lead to its model from a live base.
        difference: largest difference in the self-test.
    """

    name: str
    version: int
    patches: int
    difference: float


class _FolderFetcher(FetcherInterface):
    """Reads a repository's folder in place of HTTP."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._folder / unquote(urlsplit(url).path).lstrip("/")
        if not path.is_file():
            raise tuf_errors.DownloadHTTPError(f"{path} does not exist", 404)
        return iter([path.read_bytes()])


def verify_repository(
    repository: RepositoryReader,
    trusted_root: bytes,
    *,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
) -> list[VerifiedRelease]:
    """Check signatures, digests, payloads, rebuilt weights and self-tests of every live release.

    Self-tests run in a process of their own, one after the other.

    Args:
        repository: what to verify.
        trusted_root: the root metadata that devices were provisioned with.
        max_bytes: of memory that a self-test may take; None for 1 GiB, or 64 times the release.
        max_seconds: that it may take; None for 40, and one for every megabyte.

    Raises:
        VerificationFailed: names the release and what is wrong with it.
        ClockWrong: by this machine's clock nothing would have expired.
    """
    utc_now()
    verified = []
    with tempfile.TemporaryDirectory() as folder:
        updater = _refreshed(repository.path, trusted_root, Path(folder))
        models: dict[tuple[str, str], PublishedModel] = {}
        for entry in repository.releases():
            label = f"release {entry.name} {entry.version}"
            try:
                target = updater.get_targetinfo(manifest_path(entry.name, entry.version))
                if target is None:
                    raise VerificationFailed(f"{label} is not in the signed metadata")
                path = updater.download_target(target, str(Path(folder) / "release.json"))
                manifest = ReleaseManifest.from_bytes(Path(path).read_bytes())
                if (manifest.name, manifest.version) != (entry.name, entry.version):
                    raise VerificationFailed(f"{label} holds the manifest of another release")
                model = repository.model(manifest)
                patches = _check_payloads(repository, manifest, model, models)
                difference = _run(repository, manifest, model, max_bytes, max_seconds)
            except VerificationFailed:
                raise
            except (RepositoryError, ReleaseError, VersionsError, *_TUF_ERRORS) as error:
                raise VerificationFailed(f"{label}: {error}") from error
            models[manifest.name, manifest.model_digest] = model
            verified.append(VerifiedRelease(entry.name, entry.version, patches, difference))
    return verified


def _refreshed(path: Path, trusted_root: bytes, folder: Path) -> Updater:
    try:
        updater = Updater(
            metadata_dir=str(folder / "metadata"),
            metadata_base_url=f"{_HOST}metadata/",
            target_dir=str(folder),
            target_base_url=f"{_HOST}targets/",
            fetcher=_FolderFetcher(path),
            bootstrap=trusted_root,
        )
        updater.refresh()
    except (*_TUF_ERRORS, OSError) as error:
        raise VerificationFailed(f"the metadata does not verify: {error}") from error
    return updater


def _check_payloads(
    repository: RepositoryReader,
    manifest: ReleaseManifest,
    model: PublishedModel,
    models: dict[tuple[str, str], PublishedModel],
) -> int:
    if model.digest.hex() != manifest.model_digest:
        raise VerificationFailed(f"keyframe of {manifest.name} {manifest.version}: another model")
    working = 0
    for patch in manifest.patches:
        data = repository.blob(patch.file)
        base = models.get((manifest.name, patch.base_digest))
        if base is None:
            continue  # its base is no longer live; the bytes are intact
        if decode_model(data, held=base, stream=manifest.stream).digest != model.digest:
            raise VerificationFailed(f"patch from {patch.base_version} leads to another model")
        working += 1
    return working


def _run(
    repository: RepositoryReader,
    manifest: ReleaseManifest,
    model: PublishedModel,
    max_bytes: int | None,
    max_seconds: float | None,
) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {file: repository.blob(ref) for file, ref in manifest.files.items()}
        layout = WeightsLayout.from_bytes(files["layout.json"])
        if layout.write(model, folder / "weights.bin") != manifest.weights.sha256:
            raise VerificationFailed("the rebuilt weights.bin is not the signed one")
        check_externals(files["model.onnx"], file="weights.bin", size=layout.size)
        for file in ("model.onnx", "selftest.npz", "expected.npz"):
            (folder / file).write_bytes(files[file])
        difference: float = run_apart(
            f"{__name__}:self_test",
            {"name": name, "tolerance": asdict(manifest.tolerance)},
            what=f"the self-test of {manifest.name} {manifest.version}",
            size=sum(disk_bytes(path) for path in folder.iterdir()),
            max_bytes=max_bytes,
            max_seconds=max_seconds,
        )
        return difference


def self_test(name: str, tolerance: dict[str, Any]) -> float:
    """Run the self-test of a release that lies in the folder `name`.

    Returns:
        The largest difference, in units of the output.

    Raises:
        ReleaseError: onnxruntime refuses the model, or its outputs are not the recorded ones.
    """
    folder = Path(name)
    got = open_session(folder / "model.onnx").run(_arrays(folder / "selftest.npz"))
    return check_outputs(_arrays(folder / "expected.npz"), got, Tolerance(**tolerance))


def _arrays(path: Path) -> dict[str, Any]:
    return unpack_arrays(path.read_bytes())

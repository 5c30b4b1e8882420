"""Signed releases for edge devices: a TUF repository, its payloads, and the server for its files.

Imported without torch; `publish` needs onnx and onnxruntime, `ReleaseServer` h11.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.server.releases.errors import (
    CeremonyError,
    KeyFileError,
    ReleaseNotFound,
    ReleasesError,
    RepositoryCorrupt,
    RepositoryExists,
    ServerError,
    ThresholdNotMet,
    VerificationFailed,
)
from prunecast.server.releases.keys import OFFLINE_ROLES, ONLINE_ROLES, ROLES, KeyRing
from prunecast.server.releases.metadata import Expiry

if TYPE_CHECKING:
    from prunecast.server.releases.ceremony import Ceremony
    from prunecast.server.releases.changes import Change, RoleKeys, changed_metadata, first_metadata
    from prunecast.server.releases.checkpoint import from_arrays, read_checkpoint
    from prunecast.server.releases.doctor import examine
    from prunecast.server.releases.findings import Finding
    from prunecast.server.releases.foreign import (
        ForeignRelease,
        export_release,
        from_onnx,
        run_original,
    )
    from prunecast.server.releases.holders import load_holder, load_public, make_holder
    from prunecast.server.releases.reading import ReleaseEntry, RepositoryReader
    from prunecast.server.releases.repository import PublishedRelease, Repository
    from prunecast.server.releases.serving import Limits, ReleaseServer
    from prunecast.server.releases.structured import (
        Narrowed,
        make_narrow,
        module_outputs,
        plan_of,
        with_weights,
    )
    from prunecast.server.releases.variants import (
        KINDS,
        Samples,
        VariantRelease,
        make_variant,
        reference_outputs,
        split_samples,
    )
    from prunecast.server.releases.verify import VerifiedRelease, verify_repository

__all__ = [
    "KINDS",
    "OFFLINE_ROLES",
    "ONLINE_ROLES",
    "ROLES",
    "Ceremony",
    "CeremonyError",
    "Change",
    "Expiry",
    "Finding",
    "ForeignRelease",
    "KeyFileError",
    "KeyRing",
    "Limits",
    "Narrowed",
    "PublishedRelease",
    "ReleaseEntry",
    "ReleaseNotFound",
    "ReleaseServer",
    "ReleasesError",
    "Repository",
    "RepositoryCorrupt",
    "RepositoryExists",
    "RepositoryReader",
    "RoleKeys",
    "Samples",
    "ServerError",
    "ThresholdNotMet",
    "VariantRelease",
    "VerificationFailed",
    "VerifiedRelease",
    "changed_metadata",
    "examine",
    "export_release",
    "first_metadata",
    "from_arrays",
    "from_onnx",
    "load_holder",
    "load_public",
    "make_holder",
    "make_narrow",
    "make_variant",
    "module_outputs",
    "plan_of",
    "read_checkpoint",
    "reference_outputs",
    "run_original",
    "split_samples",
    "verify_repository",
    "with_weights",
]

_LAZY = {
    "KINDS": "variants",
    "Ceremony": "ceremony",
    "Change": "changes",
    "RoleKeys": "changes",
    "changed_metadata": "changes",
    "first_metadata": "changes",
    "load_holder": "holders",
    "load_public": "holders",
    "make_holder": "holders",
    "Finding": "findings",
    "ForeignRelease": "foreign",
    "Narrowed": "structured",
    "PublishedRelease": "repository",
    "ReleaseEntry": "reading",
    "Limits": "serving",
    "ReleaseServer": "serving",
    "Repository": "repository",
    "RepositoryReader": "reading",
    "Samples": "variants",
    "VariantRelease": "variants",
    "VerifiedRelease": "verify",
    "examine": "doctor",
    "export_release": "foreign",
    "from_arrays": "checkpoint",
    "from_onnx": "foreign",
    "make_narrow": "structured",
    "make_variant": "variants",
    "module_outputs": "structured",
    "plan_of": "structured",
    "read_checkpoint": "checkpoint",
    "reference_outputs": "variants",
    "run_original": "foreign",
    "split_samples": "variants",
    "verify_repository": "verify",
    "with_weights": "structured",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

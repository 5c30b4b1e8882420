"""Signed releases for edge devices: a TUF repository, its payloads, and the server for its files.

Imported without torch; `publish` needs onnx and onnxruntime, `ReleaseServer` h11.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.server.repository.errors import (
    CeremonyError,
    KeyFileError,
    ReleaseNotFound,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryExists,
    ServerError,
    ThresholdNotMet,
    VerificationFailed,
)
from prunecast.server.repository.keys import OFFLINE_ROLES, ONLINE_ROLES, ROLES, KeyRing
from prunecast.server.repository.metadata import Expiry

if TYPE_CHECKING:
    from prunecast.server.repository.ceremony import Ceremony
    from prunecast.server.repository.changes import (
        Change,
        RoleKeys,
        changed_metadata,
        first_metadata,
    )
    from prunecast.server.repository.checkpoint import from_arrays, read_checkpoint
    from prunecast.server.repository.doctor import examine
    from prunecast.server.repository.findings import Finding
    from prunecast.server.repository.foreign import (
        ForeignRelease,
        export_release,
        from_onnx,
        run_original,
    )
    from prunecast.server.repository.holders import load_holder, load_public, make_holder
    from prunecast.server.repository.reading import ReleaseEntry, RepositoryReader
    from prunecast.server.repository.repository import PublishedRelease, Repository
    from prunecast.server.repository.serving import Limits, ReleaseServer
    from prunecast.server.repository.structured import (
        Narrowed,
        make_narrow,
        module_outputs,
        plan_of,
        with_weights,
    )
    from prunecast.server.repository.variants import (
        KINDS,
        Samples,
        VariantRelease,
        make_variant,
        reference_outputs,
        split_samples,
    )
    from prunecast.server.repository.verify import VerifiedRelease, verify_repository

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
    "Repository",
    "RepositoryCorrupt",
    "RepositoryError",
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

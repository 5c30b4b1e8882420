"""What a release is made from, and how it is built; needs onnx and onnxruntime."""

from prunecast.server.repository.authoring.build import ReleaseContents
from prunecast.server.repository.authoring.recipe import NewestRelease, ReleaseRecipe, read_recipe
from prunecast.server.repository.authoring.sources import export_release, read_checkpoint
from prunecast.server.repository.authoring.variants import Samples

__all__ = [
    "NewestRelease",
    "ReleaseContents",
    "ReleaseRecipe",
    "Samples",
    "export_release",
    "read_checkpoint",
    "read_recipe",
]

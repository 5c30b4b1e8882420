"""What a release is made from, and how it is built; needs onnx and onnxruntime."""

from prunecast.server.repository.authoring.build import (
    ReleaseContents,
    Samples,
    split_samples,
)
from prunecast.server.repository.authoring.recipe import (
    VARIANTS,
    NewestRelease,
    ReleaseRecipe,
    read_recipe,
)
from prunecast.server.repository.authoring.sources import (
    export_release,
    from_arrays,
    from_onnx,
    plan_of,
    read_checkpoint,
)

__all__ = [
    "VARIANTS",
    "NewestRelease",
    "ReleaseContents",
    "ReleaseRecipe",
    "Samples",
    "export_release",
    "from_arrays",
    "from_onnx",
    "plan_of",
    "read_checkpoint",
    "read_recipe",
    "split_samples",
]

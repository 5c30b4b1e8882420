"""What a release is made from, and how it is built; needs onnx and onnxruntime."""

from prunecast.server.repository.authoring.sources import (
    ForeignRelease,
    export_release,
    from_arrays,
    from_onnx,
    read_checkpoint,
    run_original,
)
from prunecast.server.repository.authoring.variants import (
    KINDS,
    Narrowed,
    Samples,
    VariantRelease,
    make_narrow,
    make_variant,
    module_outputs,
    plan_of,
    reference_outputs,
    split_samples,
    with_weights,
)

__all__ = [
    "KINDS",
    "ForeignRelease",
    "Narrowed",
    "Samples",
    "VariantRelease",
    "export_release",
    "from_arrays",
    "from_onnx",
    "make_narrow",
    "make_variant",
    "module_outputs",
    "plan_of",
    "read_checkpoint",
    "reference_outputs",
    "run_original",
    "split_samples",
    "with_weights",
]

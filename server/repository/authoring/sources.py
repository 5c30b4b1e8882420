"""What releases are made from: torch modules, ``.onnx`` files of any origin, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import StorageError
from prunecast.common.text import first_line
from prunecast.compression.codec import Limits
from prunecast.compression.files import FilesError
from prunecast.compression.files.contents import content_hint
from prunecast.compression.files.formats import open_tensors
from prunecast.compression.files.tensors import FOREIGN, FileTensor
from prunecast.compression.onnx import ForeignModel, NumericsError
from prunecast.compression.onnx.bind import WRAPPERS, Variant, explain_names, export_single
from prunecast.compression.onnx.compare import Difference, differ, draw_inputs, record
from prunecast.compression.onnx.graph import ExportedGraph, read_note, with_note
from prunecast.compression.onnx.lattice import Steps, snap
from prunecast.compression.onnx.lift import LiftedModel, lift_model
from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.runtime import fit_inputs, open_session
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, load_model
from prunecast.server.repository.authoring.build import ReleaseContents, bound_session, check_names
from prunecast.server.repository.errors import RecipeError, RepositoryError
from prunecast.server.repository.reading import RepositoryReader

if TYPE_CHECKING:
    import torch

__all__ = [
    "Architecture",
    "export_module",
    "export_release",
    "from_arrays",
    "from_onnx",
    "plan_of",
    "read_checkpoint",
]

_NOTE = "prunecast.channels"
_BATCH = 32


@dataclass(frozen=True)
class Architecture:
    """A graph, the weights that belong to it, and what to compare them with.

    Attributes:
        graph: of the architecture.
        weights: before they are quantised.
        narrow: whether channels were removed.
        reference: outputs in float32 by name, for all samples; None: those of the graph.
        notes: what a user should know, a sentence each.
    """

    graph: ExportedGraph
    weights: PublishedModel
    narrow: bool = False
    reference: Arrays | None = None
    notes: tuple[str, ...] = ()


def plan_of(graph: bytes) -> ChannelPlan | None:
    """The channels that remain in a graph of fewer; None for any other graph.

    Raises:
        PlanError: the plan in it is damaged.
    """
    text = read_note(graph, _NOTE)
    return None if text is None else ChannelPlan.from_text(text)


def export_module(
    factory: Callable[[], object],
    model: PublishedModel | None,
    inputs: Arrays,
    *,
    cache: Path,
    share: float | None = None,
    held: ChannelPlan | None = None,
    samples: Arrays | None = None,
) -> Architecture:
    """Export what `factory` makes, or what remains of it.

    Args:
        factory: makes the module; torch's random state is left as it was.
        model: the weights; None only looks at the architecture, and only without `share`.
        inputs: examples by name, in the order of the module's arguments, the batch first.
        cache: folder of exported graphs.
        share: of the channels that remain; None for all.
        held: the plan of the newest live release; used if it is for the same share and fits.
        samples: with `share`, what the whole module is run on for reference.

    Raises:
        RecipeError: `factory` makes no torch module.
        RepositoryError: the model does not fit the module.
        PlanError: channels of this module cannot be removed.
        ExportError: it cannot be exported.
    """
    import torch

    from prunecast.compression.onnx.export import export_cached
    from prunecast.compression.pruning.narrowing import choose_channels, narrow_module

    try:
        with torch.random.fork_rng(devices=[]):
            module = factory()
    except Exception as error:  # of the user's code
        what = f"{type(error).__name__}: {first_line(error)}"
        raise RecipeError("module", f"cannot be made, {what}") from error
    if not isinstance(module, torch.nn.Module):
        raise RecipeError("module", f"makes a {type(module).__name__}, not a torch module")
    if model is not None:
        _load(module, model)
    module.eval()
    examples = _tensors(module, inputs)
    example, names = tuple(examples.values()), list(examples)
    try:
        with torch.no_grad():
            module(*example)
    except Exception as error:  # of the user's code
        shapes = ", ".join(f"{n} {str(x.dtype)[6:]}{list(x.shape)}" for n, x in examples.items())
        raise RecipeError(
            "selftest",
            f"{type(module).__name__} does not take {shapes}: {first_line(error)}; give arrays in "
            "the order of its arguments, the batch first",
        ) from error
    weights = model or PublishedModel({})
    if share is None:
        graph, found = export_cached(module, example, names, cache)
        return Architecture(graph, weights, notes=("the graph was exported before",) * found)
    narrow = None
    if held is not None and held.share == share:
        try:
            narrow = narrow_module(module, example, held)
        except PlanError:
            held = None  # another architecture: choose anew
    plan = held if narrow is not None else choose_channels(module, example, share)
    assert plan is not None
    narrow = narrow or narrow_module(module, example, plan)
    graph, _ = export_cached(narrow, example, names, cache)
    which = "as in the newest release" if plan is held else "chosen by the norm of their groups"
    return Architecture(
        with_note(graph, _NOTE, plan.to_text()),
        plan.narrow(weights),
        narrow=True,
        reference=None if samples is None else _outputs(module, samples, graph),
        notes=(f"{share:.0%} of the channels remain, {which}",),
    )


def _load(module: torch.nn.Module, model: PublishedModel) -> None:
    import torch

    state = {name: torch.from_numpy(np.array(a)) for name, a in model.arrays().items()}
    wanted = module.state_dict()
    if unknown := [name for name in state if name not in wanted]:
        few = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise RepositoryError(
            f"{type(module).__name__} has no {few}: {explain_names(state, list(wanted))}"
        )
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RepositoryError(
            f"the model does not fit {type(module).__name__}: {reason}"
        ) from error


def _tensors(module: torch.nn.Module, inputs: Arrays) -> dict[str, torch.Tensor]:
    """Inputs as tensors; floats in the dtype of the module's own, whatever the file holds."""
    import torch

    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in inputs.items()}
    return {n: t.to(own) if t.is_floating_point() else t for n, t in tensors.items()}


def _outputs(
    module: torch.nn.Module, samples: Arrays, graph: ExportedGraph
) -> Mapping[str, NDArray[np.generic]]:
    """Outputs of a module for all samples, by the names that its graph gives them."""
    import onnx
    import torch

    inputs = list(_tensors(module, samples).values())
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), _BATCH):
            made = module(*(x[start : start + _BATCH] for x in inputs))
            parts.append(list(made) if isinstance(made, tuple | list) else [made])
    outputs = onnx.ModelProto.FromString(graph.skeleton).graph.output
    return {
        output.name: np.concatenate([np.atleast_1d(part[i].numpy()) for part in parts])
        for i, output in enumerate(outputs)
    }


# What onnxruntime says of a model that no device could run, and what to do.
_REFUSED = (
    ("not a registered function/op", "; devices have ONNX's own operators: export it with these"),
    ("No Op registered", "; devices have ONNX's own operators: export it with these"),
    ("IR version", "; save it with a lower ir_version, by an earlier release of onnx say"),
    ("*guarantees* support", "; export it with a lower opset"),
)
_REWRITTEN = 1e-4  # relative; moving weights must not change what a model computes
_DEQUANTISES_INT8, _DEQUANTISES_INT16 = 10, 21  # opsets
_NARROW = (np.dtype(np.int8), np.dtype(np.int32))


def from_onnx(
    path: Path,
    *,
    bits: int | None = None,
    steps: Steps = "held",
    variant: Variant = "lattice",
    held: PublishedModel | None = None,
    inputs: Arrays | None = None,
    seed: int = 0,
    most_difference: float | None = None,
    max_bytes: int | None = None,
) -> ReleaseContents:
    """Take a model apart, quantise it, and compare it with the original in onnxruntime.

    The metrics state the difference between the outputs, on the inputs: ``onnx_max_difference``,
    ``onnx_relative_difference`` (of the largest value), ``onnx_classes_changed``.

    Args:
        path: the ``.onnx`` file; external data in its folder or below.
        bits: for kernels and embeddings, see `from_arrays`, and so `steps` and `held`.
        steps: how lattice steps are chosen.
        variant: what `weights.bin` should hold; ``fp32`` where the opset allows nothing else.
        held: the newest live version of the same release, for ``steps="held"``.
        inputs: real inputs by name; drawn from `seed` when not given.
        seed: of drawn inputs.
        most_difference: refuse a relative difference above this.
        max_bytes: most bytes that its tensors may take, see `TensorReader`; what running it takes
            is bounded by `authoring.foreign`.

    Raises:
        ForeignModel: the file is damaged, draws random numbers, or refers to
            files outside its folder.
        NumericsError: the rebuilt model computes something else, or differs too much.
        RuntimeFailure: onnxruntime refuses the original or its inputs.
    """
    lifted = lift_model(
        path, max_bytes=max_bytes
    )  # checks what the original refers to, before anything runs it
    try:
        original = open_session(path)
    except RuntimeFailure as error:
        remedy = next((text for words, text in _REFUSED if words in str(error)), "")
        raise RuntimeFailure(f"{error}{remedy}") from error
    if inputs is not None:
        check_names(original, inputs)
    wanted_types = {s.name: s.dtype for s in original.inputs}
    given = draw_inputs(original, seed) if inputs is None else fit_inputs(inputs, wanted_types)
    wanted = record(original, given)
    del original
    exact = PublishedModel({name: RawTensor(a) for name, a in lifted.arrays.items()})
    moved = _difference(lifted.graph, exact, "fp32", given, wanted)
    if moved.relative > _REWRITTEN:
        raise NumericsError(
            f"{path} computes something else when its weights are moved out of its graph "
            f"(relative difference {moved.relative:.2g}): please report the model"
        )
    counter = held.counter + 1 if held is not None else 1
    model = snap(lifted.arrays, lifted.kernels, bits=bits, steps=steps, held=held, counter=counter)
    chosen, notes = _variant(lifted, model, variant, bits)
    difference = moved if bits is None else _difference(lifted.graph, model, chosen, given, wanted)
    if most_difference is not None and difference.relative > most_difference:
        raise NumericsError(
            f"at {bits} bits the outputs differ by {difference.relative:.2g} of the largest value, "
            f"accepted are {most_difference:.2g}: use more bits, or none"
        )
    if inputs is None:
        notes.append(f"the self-test holds drawn inputs (seed {seed}): give real ones if you can")
    graph = replace(lifted.graph, max_difference=moved.absolute)
    return ReleaseContents(
        model,
        graph,
        given,
        chosen,
        metrics={
            "onnx_max_difference": difference.absolute,
            "onnx_relative_difference": difference.relative,
            "onnx_classes_changed": difference.classes,
        },
        kind="int8" if chosen == "lattice" else "fp32",
        notes=(*lifted.notes, *notes),
        exported=graph,
    )


def _difference(
    graph: ExportedGraph, model: PublishedModel, variant: Variant, given: Arrays, wanted: Arrays
) -> Difference:
    with bound_session(graph, model, variant) as session:
        return differ(wanted, session.run(given))


def _variant(
    lifted: LiftedModel, model: PublishedModel, variant: Variant, bits: int | None
) -> tuple[Variant, list[str]]:
    lattice: list[Any] = [t for t in model.tensors.values() if isinstance(t, LatticeTensor)]
    if bits is None:
        return "fp32", []
    notes = [f"{len(lattice)} of {len(model.tensors)} tensors are on the lattice"]
    wide, why = any(t.q.dtype not in _NARROW for t in lattice), ""
    if variant == "lattice" and lifted.opset < _DEQUANTISES_INT8:
        why = "has no DequantizeLinear"
    elif variant == "lattice" and wide and lifted.opset < _DEQUANTISES_INT16:
        why = "cannot dequantise 16 bits"
    if not why:
        return variant, notes
    stay = "weights.bin holds float32; integers travel all the same"
    return "fp32", [*notes, f"opset {lifted.opset} {why}: {stay}"]


def export_release(repository: RepositoryReader, manifest: ReleaseManifest, path: Path) -> int:
    """Write a release as one self-contained ``.onnx`` file; returns its size in bytes.

    Raises:
        RepositoryCorrupt: a file of the release is missing or damaged.
        ReleaseError: graph and weights do not fit together, or exceed 2 GiB.
        StorageError: the file cannot be written.
    """
    layout = WeightsLayout.from_bytes(repository.blob(manifest.files["layout.json"]))
    graph = repository.blob(manifest.files["model.onnx"])
    return export_single(graph, layout, repository.model(manifest), path)


def read_checkpoint(
    path: Path,
    *,
    bits: int | None = None,
    steps: Steps = "range",
    held: PublishedModel | None = None,
    max_bytes: int | None = None,
    prefix: str = "",
) -> PublishedModel:
    """Read a published model, or a dense checkpoint as one.

    Args:
        path: ``.safetensors``, ``.npz``, or a file that `save_model` wrote.
        bits: for dense checkpoints, see `from_arrays`, and so the others.
        max_bytes: most bytes that its tensors may take together; default 1 GiB, or 64 times what
            the file takes on disk if that is more.
        prefix: take the tensors whose names begin so, under the rest of their names, and no
            others; what torch itself puts into names, such as ``_orig_mod.``, goes wherever it is.

    Raises:
        RepositoryError: not readable as its suffix says, or `bits` given for a published model.
        StorageError: no such file, or not a published model.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        if bits is not None:
            raise RepositoryError(f"{path} is a published model: its lattice is fixed already")
        try:
            model = load_model(path, limits=_limits(path, max_bytes))
        except StorageError as error:
            if not path.is_file():
                raise
            if "above the limits" in str(error):
                raise RepositoryError(f"{error} (--max-bytes)") from error
            raise RepositoryError(f"{error}{_no_checkpoint(path)}") from error
        return _stripped(path, model, prefix)
    try:
        tensors = open_tensors(path, max_bytes=max_bytes)
        arrays = {name: _plain(path, name, tensor) for name, tensor in tensors.items()}
    except FilesError as error:
        raise RepositoryError(str(error)) from error
    return _stripped(path, from_arrays(arrays, bits=bits, steps=steps, held=held), prefix)


def _no_checkpoint(path: Path) -> str:
    """What to do with a file that is neither a published model nor a checkpoint."""
    if path.suffix.lower() == ".onnx":
        return ": an .onnx file has graph and weights, give it with --from"
    known = "; a checkpoint is a .safetensors or .npz file"
    return known + content_hint(path)


def _stripped(path: Path, model: PublishedModel, prefix: str) -> PublishedModel:
    """The tensors under a prefix, named without it."""
    if not prefix:
        return model
    wrapper = prefix in WRAPPERS
    has = [
        name for name in model.tensors if (prefix in name if wrapper else name.startswith(prefix))
    ]
    if not has:
        few = ", ".join(map(repr, list(model.tensors)[:3]))
        raise RepositoryError(f"{path}: no name begins with {prefix!r}; there are {few}, ...")
    kept = list(model.tensors) if wrapper else has
    found = {name.replace(prefix, "", -1 if wrapper else 1): model.tensors[name] for name in kept}
    if len(found) != len(kept):
        raise RepositoryError(f"{path}: without {prefix!r} two tensors have the same name")
    return PublishedModel(found, model.counter)


def _limits(path: Path, max_bytes: int | None) -> Limits | None:
    """Of a file that the user names; a published model is smaller than its weights by far."""
    if max_bytes is None or not path.is_file():
        return None
    size = path.stat().st_size
    most = {"elements": max_bytes, "decoded_bytes": max_bytes, "free_bytes": max_bytes}
    return replace(Limits(), payload_bytes=max(size, Limits().payload_bytes), **most)


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    *,
    bits: int | None = None,
    steps: Steps = "range",
    held: PublishedModel | None = None,
    counter: int = 0,
) -> PublishedModel:
    """A dense checkpoint as a published model.

    Args:
        arrays: tensors by name.
        bits: 2 to 16: put every floating tensor of two or more dimensions on a symmetric lattice,
            rounding to nearest. None keeps every value exactly, which costs more bytes.
        steps: how a step is chosen, see `prunecast.compression.onnx.lattice`; ``held`` is what
            keeps patches small.
        held: the newest live version of the same release, for ``steps="held"``.
        counter: number of the version.

    Raises:
        RepositoryError: `bits` out of range, or a value that is not finite.
    """
    kernels = {name for name, a in arrays.items() if a.dtype.kind == "f" and a.ndim >= 2}
    try:
        return snap(arrays, kernels, bits=bits, steps=steps, held=held, counter=counter)
    except ForeignModel as error:
        raise RepositoryError(str(error)) from error


def _plain(path: Path, name: str, tensor: FileTensor) -> NDArray[Any]:
    if tensor.dtype in FOREIGN and tensor.dtype != "bfloat16":
        raise RepositoryError(f"{path}: tensor {name!r} is {tensor.dtype}: convert it to float32")
    return tensor.real()

"""Export a torch module to an ONNX graph, once per architecture.

The exporter keeps parameter names when it does not optimise, and only then: its optimiser folds
BatchNorm statistics into convolutions and would leave initialisers that no later weights can be
bound to. onnxruntime performs the same fusions while loading, on the weights of the day, but only
where a convolution's bias is a constant by then: the bias that the exporter computes for a layer
without one is taken out. GroupNorm, which it has no kernel for, is written in what it has
(`prunecast.compression.onnx.norms`).

Two checks make sure that later weights act. A parameter that the traced program reads must be an
initialiser of the graph. And the graph is run in onnxruntime against the module twice, with the
module's weights and with perturbed ones: a value frozen into the graph would show in the second.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper

from prunecast.common.text import first_line, quiet
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx import ExportError, FoldedParameter, NumericsError
from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.onnx.compare import differ
from prunecast.compression.onnx.folding import drop_zero_biases
from prunecast.compression.onnx.graph import ExportedGraph, all_graphs, load_graph, save_graph
from prunecast.compression.onnx.norms import spell_out_group_norms
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import PublishedModel, RawTensor

__all__ = ["export_cached", "export_graph"]

_EDITION = 3  # raised when the same module would be exported to another graph
_LOWEST_OPSET = 21  # DequantizeLinear on int16
_BATCH = "batch"


def export_graph(
    module: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int = _LOWEST_OPSET,
    tolerance: float = 1e-4,
) -> ExportedGraph:
    """Trace `module` in evaluation mode and return its graph without weights.

    Args:
        module: any module that ``torch.export`` can trace; left as it was.
        example_inputs: positional inputs. With `dynamic_batch`, dimension 0 of each is the batch.
        input_names: names of the inputs; default ``input`` or ``input_0``, ``input_1``, ...
        output_names: names of the outputs; default ``output`` or ``output_0``, ...
        dynamic_batch: leave the size of dimension 0 free.
        opset: ONNX operator set, at least 21.
        tolerance: largest accepted difference between graph and module, relative to the larger
            of 0.1 and the largest absolute output.

    Raises:
        ExportError: the module cannot be traced or uses a dtype without a published form.
        FoldedParameter: a parameter or buffer that inference reads is frozen into the graph.
        NumericsError: the graph and the module disagree.
    """
    if opset < _LOWEST_OPSET:
        raise ExportError(f"opset {opset} cannot dequantise int16: use {_LOWEST_OPSET} or later")
    if not example_inputs:
        raise ExportError("export needs example inputs")
    example = tuple(_at_least_two(x) for x in example_inputs) if dynamic_batch else example_inputs
    inputs = list(input_names or _numbered("input", len(example)))
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        with torch.no_grad():
            produced = module(*example)
            count = len(produced) if isinstance(produced, tuple | list) else 1
            outputs = list(output_names or _numbered("output", count))
            program = _trace(module, example, inputs, outputs, dynamic_batch, opset)
            state = module.state_dict(keep_vars=True)
            graph = _strip(program, state)
            worst = _check(graph, module, example, inputs, tolerance)
    finally:
        for child in training:
            child.training = True
    return replace(graph, max_difference=worst)


def _check(
    graph: ExportedGraph,
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    tolerance: float = 1e-4,
) -> float:
    """Run a graph against a module in evaluation mode; returns the largest absolute difference.

    Raises:
        BindError: the graph has other parameters than the module.
        NumericsError: they disagree.
    """
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        return max(
            _compare(graph, module, weights, example, inputs, tolerance)
            for weights in (dict(state), _perturbed(state))
        )


def export_cached(
    module: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    input_names: Sequence[str],
    folder: Path,
) -> tuple[ExportedGraph, bool]:
    """The graph of a module with a free batch: from `folder`, or exported and put there.

    A graph is found again by what the module looks like: its class and configuration, the names
    and shapes of its tensors, the inputs, and the versions of the exporter. What its code does
    cannot be seen that way, so a graph that is found is run against the module before it is used,
    with the module's weights and with perturbed ones; one that computes something else is exported
    anew.

    Args:
        module: in evaluation mode.
        example_inputs: positional inputs, the batch first.
        input_names: names of the inputs.
        folder: of the kept graphs; created when missing.

    Returns:
        The graph, its `max_difference` measured now, and whether it was found.

    Raises:
        ExportError: the module cannot be exported.
        StorageError: the graph cannot be kept.
    """
    path = Path(folder) / f"{_key(module, example_inputs, input_names)}.onnx"
    if path.is_file():
        try:
            graph = load_graph(path)
            worst = _check(graph, module, example_inputs, input_names)
        except ReleaseError:
            path.unlink(missing_ok=True)  # damaged, or the code has changed
        else:
            return replace(graph, max_difference=worst), True
    graph = export_graph(module, example_inputs, input_names=input_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_graph(graph, path)
    return graph, False


def _key(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], names: Sequence[str]) -> str:
    look = [
        _EDITION,
        [version(name) for name in ("torch", "onnx", "onnxscript")],
        f"{type(module).__module__}.{type(module).__qualname__}",
        repr(module),
        [[n, str(t.dtype), list(t.shape)] for n, t in module.state_dict().items()],
        [[n, str(x.dtype), list(x.shape[1:])] for n, x in zip(names, inputs, strict=True)],
    ]
    return hashlib.sha256(json.dumps(look).encode()).hexdigest()


def _at_least_two(x: torch.Tensor) -> torch.Tensor:
    # torch.export specialises a dimension whose example size is 0 or 1
    if x.dim() == 0:
        raise ExportError("an input without dimensions has no batch: pass dynamic_batch=False")
    return torch.cat([x, x]) if x.shape[0] == 1 else x


def _numbered(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{i}" for i in range(count)]


def _trace(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic_batch: bool,
    opset: int,
) -> Any:
    shapes = tuple({0: _BATCH} for _ in example) if dynamic_batch else None
    try:
        with quiet("torch.onnx"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=opset,
            )
    except Exception as error:  # the exporter raises its own, torch.export's and plain errors
        hint = "; if its batch size is fixed, pass dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(
            f"{type(module).__name__} cannot be exported: {first_line(error)}{hint}"
        ) from error
    if program is None:
        raise ExportError(f"{type(module).__name__} cannot be exported")
    return program


def _strip(program: Any, state: Mapping[str, torch.Tensor]) -> ExportedGraph:
    """Take the weights out of the exported model, and everything that names a developer's disk."""
    proto = program.model_proto
    held = {initialiser.name: initialiser for initialiser in proto.graph.initializer}
    canonical = _tied(state, held)
    missing = [n for n in _read_tensors(program) if canonical.get(n, n) not in held]
    if missing:
        raise FoldedParameter(
            f"{', '.join(map(repr, missing[:5]))}: read by the module but not an input of the "
            "graph, so new weights would not act; compute with the tensor itself in forward(), "
            "not with a Python number or a copy of it"
        )
    parameters: dict[str, TensorSpec] = {}
    for name, initialiser in held.items():
        if name in state:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(initialiser.data_type))
            if dtype.kind not in "biuf" or dtype.name == "bfloat16":
                raise ExportError(f"parameter {name!r} is {dtype}: convert the module to float32")
            parameters[name] = TensorSpec(dtype, tuple(initialiser.dims))
            if f"{name}::q" in held or f"{name}::step" in held:
                raise ExportError(f"parameter {name!r} collides with a reserved name")
    aliases = {n: c for n, c in canonical.items() if n != c and c in parameters}
    unused = tuple(n for n in state if n not in parameters and n not in aliases)
    constants = [i for i in proto.graph.initializer if i.name not in parameters]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(constants)
    drop_zero_biases(proto.graph)
    spell_out_group_norms(proto.graph, parameters)
    _anonymise(proto)
    return ExportedGraph(proto.SerializeToString(deterministic=True), parameters, aliases, unused)


def _tied(state: Mapping[str, torch.Tensor], held: Mapping[str, Any]) -> dict[str, str]:
    """Each name of the state to the one among its ties that is an initialiser, if any is."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        groups.setdefault(place if tensor.numel() else id(tensor), []).append(name)
    canonical: dict[str, str] = {}
    for names in groups.values():
        leader = next((name for name in names if name in held), names[0])
        canonical.update(dict.fromkeys(names, leader))
    return canonical


def _read_tensors(program: Any) -> list[str]:
    """Parameters and buffers that the traced program reads."""
    traced = program.exported_program
    signature = traced.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return [
        targets[node.name]
        for node in traced.graph.nodes
        if node.op == "placeholder" and node.name in targets and node.users
    ]


def _anonymise(proto: Any) -> None:
    proto.producer_name, proto.producer_version, proto.doc_string = "prunecast", "", ""
    del proto.metadata_props[:]
    for graph in all_graphs(proto):
        for kind in ("metadata_props", "value_info"):
            if hasattr(graph, kind):
                del getattr(graph, kind)[:]
        if graph.HasField("doc_string"):
            graph.doc_string = ""
        for kind in ("input", "output", "initializer"):
            for item in getattr(graph, kind, ()):
                if not isinstance(item, str):
                    del item.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""


def _perturbed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating tensor moved by up to a tenth of itself; variances stay positive, ties ties.

    Matrices get noise without a mean, or activations would grow from layer to layer.
    """
    generator = torch.Generator().manual_seed(0)
    moved: dict[int, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            changed[name] = tensor
            continue
        if id(tensor) not in moved:
            noise = 2 * torch.rand(tensor.shape, generator=generator).to(tensor) - 1
            value = tensor * (1 + 0.1 * noise)
            if tensor.dim() < 2:
                value = value + 0.01 * noise.abs()  # biases often begin at zero
            elif not tensor.any():
                value = 0.1 * noise / max(1, tensor[0].numel()) ** 0.5
            moved[id(tensor)] = value.detach()
        changed[name] = moved[id(tensor)]
    return changed


def _compare(
    graph: ExportedGraph,
    module: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    example: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    tolerance: float,
) -> float:
    produced = torch.func.functional_call(module, weights, example)
    wanted = list(produced) if isinstance(produced, tuple | list) else [produced]
    exact = PublishedModel({n: RawTensor(_array(t)) for n, t in weights.items()})
    with tempfile.TemporaryDirectory() as folder:
        bound = bind_weights(graph, exact, Path(folder), variant="fp32")
        session = open_session(bound.model, threads=1)
        feed = {n: _array(x) for n, x in zip(inputs, example, strict=True)}
        got = session.run(feed)
    if len(got) != len(wanted):
        raise NumericsError(f"the graph has {len(got)} outputs, the module {len(wanted)}")
    worst = 0.0
    for (name, have), want in zip(got.items(), map(_array, wanted), strict=True):
        difference = differ({name: want}, {name: have}).absolute
        scale = max(0.1, float(np.abs(want.astype(np.float64)).max(initial=0)))
        if not difference <= tolerance * scale:
            raise NumericsError(
                f"graph and module differ by {difference:.3g} (accepted: {tolerance:.1g} of "
                f"{scale:.3g}): a value was frozen into the graph, or an operator is imprecise"
            )
        worst = max(worst, difference)
    return worst


def _array(tensor: torch.Tensor) -> NDArray[np.generic]:
    values: NDArray[np.generic] = tensor.detach().cpu().numpy()
    return values

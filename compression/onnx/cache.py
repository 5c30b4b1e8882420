"""Exported graphs kept on disk: one export per architecture, seconds to minutes each.

A graph is found again by what the module looks like: its class and configuration, the names and
shapes of its tensors, the inputs, and the versions of the exporter. What its code does cannot be
seen that way, so a graph that is found is run against the module before it is used, with the
module's weights and with perturbed ones; one that computes something else is exported anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from prunecast.common.files import cache_folder
from prunecast.compression.onnx.export import check_graph, export_graph
from prunecast.compression.onnx.graph import ExportedGraph, load_graph, save_graph
from prunecast.compression.release import ReleaseError

__all__ = ["default_cache", "export_cached"]

_EDITION = 1  # raised when the same module would be exported to another graph


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/prunecast/graphs``, by default under ``~/.cache``."""
    return cache_folder("graphs")


def export_cached(
    module: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    input_names: Sequence[str],
    folder: Path,
) -> tuple[ExportedGraph, bool]:
    """The graph of a module with a free batch: from `folder`, or exported and put there.

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
            worst = check_graph(graph, module, example_inputs, input_names)
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

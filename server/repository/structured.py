"""Structured variants: the same network on fewer channels, a smaller graph exported again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import ExportedGraph, read_note, with_note
from prunecast.compression.onnx.cache import export_cached
from prunecast.compression.pruning import ChannelPlan, PlanError
from prunecast.compression.pruning.narrowing import choose_channels, narrow_module
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository.errors import RepositoryError

if TYPE_CHECKING:
    import torch

__all__ = ["Narrowed", "make_narrow", "module_outputs", "plan_of", "with_weights"]

_NOTE = "prunecast.channels"
_BATCH = 32


@dataclass(frozen=True)
class Narrowed:
    """A network on fewer channels.

    Attributes:
        plan: which remain.
        graph: the smaller architecture; the plan travels in it, for the versions to come.
        held: whether the plan is that of the newest live release.
    """

    plan: ChannelPlan
    graph: ExportedGraph
    held: bool


def plan_of(graph: bytes) -> ChannelPlan | None:
    """The plan that a graph was narrowed by; None for any other graph.

    Raises:
        PlanError: it is damaged.
    """
    text = read_note(graph, _NOTE)
    return None if text is None else ChannelPlan.from_text(text)


def with_weights(module: torch.nn.Module, model: PublishedModel) -> torch.nn.Module:
    """A copy of a module, in evaluation mode, with the values of a model.

    Raises:
        RepositoryError: the model does not fit the module.
    """
    import torch

    copied = copy.deepcopy(module).eval()
    state = {name: torch.from_numpy(np.array(a)) for name, a in model.arrays().items()}
    try:
        copied.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RepositoryError(
            f"the model does not fit {type(module).__name__}: {reason}"
        ) from error
    return copied


def make_narrow(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    share: float,
    *,
    held: ChannelPlan | None = None,
    cache: Path,
) -> Narrowed:
    """Choose channels, or keep to the choice that devices hold, and export what remains.

    Args:
        module: with weights, in evaluation mode.
        inputs: examples by name, in the order of the module's arguments.
        share: of the channels that remain.
        held: the plan of the newest live release; used if it is for the same share and fits.
        cache: folder of exported graphs.

    Raises:
        PlanError: channels of this module cannot be removed.
        ExportError: what remains cannot be exported.
    """
    example = tuple(inputs.values())
    narrow = None
    if held is not None and held.share == share:
        try:
            narrow = narrow_module(module, example, held)
        except PlanError:
            narrow = None  # another architecture: choose anew
    plan = held if narrow is not None and held is not None else None
    if plan is None:
        plan = choose_channels(module, example, share)
    if narrow is None:
        narrow = narrow_module(module, example, plan)
    graph, _ = export_cached(narrow, example, list(inputs), cache)
    return Narrowed(plan, with_note(graph, _NOTE, plan.to_text()), plan is held)


def module_outputs(
    module: torch.nn.Module, inputs: Arrays, names: tuple[str, ...]
) -> dict[str, NDArray[np.generic]]:
    """Outputs of a torch module for all samples, by the names that its graph gives them."""
    import torch

    count = len(next(iter(inputs.values())))
    parts = []
    with torch.no_grad():
        for start in range(0, count, _BATCH):
            part = [torch.from_numpy(np.array(a[start : start + _BATCH])) for a in inputs.values()]
            made = module(*part)
            parts.append(list(made) if isinstance(made, tuple | list) else [made])
    return {
        name: np.concatenate([np.atleast_1d(part[i].numpy()) for part in parts])
        for i, name in enumerate(names)
    }

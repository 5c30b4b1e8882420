"""What releases are made from: torch modules, whole or without some channels, heads or layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunecast.common.text import first_line
from prunecast.compression.onnx.bind import explain_names
from prunecast.compression.onnx.graph import ExportedGraph, read_note, with_note
from prunecast.compression.pruning.plan import PlanError, Shares
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository.errors import RecipeError, RepositoryError

if TYPE_CHECKING:
    import torch

__all__ = ["Architecture", "export_module", "plan_of"]

_NOTE = "prunecast.channels"
_BATCH = 32


@dataclass(frozen=True)
class Architecture:
    """A graph, the weights that belong to it, and what to compare them with.

    Attributes:
        graph: of the architecture.
        weights: before they are quantised.
        narrow: whether channels, heads or layers were removed.
        reference: outputs in float32 by name, for all samples; None: those of the graph.
        notes: what a user should know, a sentence each.
        whole: graph and weights with all of them, where they were asked for.
    """

    graph: ExportedGraph
    weights: PublishedModel
    narrow: bool = False
    reference: Arrays | None = None
    notes: tuple[str, ...] = ()
    whole: tuple[ExportedGraph, PublishedModel] | None = None


def plan_of(graph: bytes) -> ChannelPlan | None:
    """What remains in a graph of fewer channels, heads or layers; None for any other graph.

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
    shares: Shares | None = None,
    held: ChannelPlan | None = None,
    samples: Arrays | None = None,
    whole: bool = False,
) -> Architecture:
    """Export what `factory` makes, or what remains of it.

    Args:
        factory: makes the module; torch's random state is left as it was.
        model: the weights; None only looks at the architecture, and only without `shares`.
        inputs: examples by name, in the order of the module's arguments, the batch first.
        cache: folder of exported graphs.
        shares: of channels, heads and layers that remain; None for all.
        held: the plan of the newest live release; used if it is for the same shares and fits.
        samples: with `shares`, what the whole module is run on for reference, and what tells which
            layers change it the least; without, `inputs` do.
        whole: with `shares`, export the whole module as well.

    Raises:
        RecipeError: `factory` makes no torch module.
        RepositoryError: the model does not fit the module.
        PlanError: channels, heads or layers of this module cannot be removed.
        ExportError: it cannot be exported.
    """
    import torch

    from prunecast.compression.onnx.export import export_cached
    from prunecast.compression.pruning.structure.narrowing import choose_channels, narrow_module

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
    if shares is None:
        graph, found = export_cached(module, example, names, cache)
        return Architecture(graph, weights, notes=("the graph was exported before",) * found)
    plan = narrow = None
    sizes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if held is not None and held.shares == shares and held.fits(sizes):
        with suppress(PlanError):  # of another architecture: choose anew
            plan, narrow = held, narrow_module(module, example, held)
    if plan is None or narrow is None:
        part, heads, layers = shares
        seen = example if samples is None else _some(_tensors(module, samples))
        plan = choose_channels(module, seen, part, heads=heads, layers=layers)
        narrow = narrow_module(module, example, plan)
    graph, _ = export_cached(narrow, example, names, cache)
    everything = (export_cached(module, example, names, cache)[0], weights) if whole else None
    which = "as in the newest release" if plan is held else "chosen by these weights"
    return Architecture(
        with_note(graph, _NOTE, plan.to_text()),
        plan.narrow(weights),
        narrow=True,
        reference=None if samples is None else _outputs(module, samples, graph),
        notes=(f"{shares.text()} remain, {which}",),
        whole=everything,
    )


def _some(samples: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(values[:_BATCH] for values in samples.values())


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

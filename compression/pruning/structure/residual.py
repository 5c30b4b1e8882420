"""Whole residual layers: which go, and what takes their place in a module; needs torch.

A residual layer adds something to what comes in, so that the rest of a module goes on without it:
a block of a ResNet that keeps its shape, a layer of a transformer. One that goes leaves nothing
behind but `PassThrough`, which returns its first argument.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.comparing import outputs_of

__all__ = ["PassThrough", "choose_layers", "pass_through", "residual_layers"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_ALIKE = 1e-4  # of a derivative


class PassThrough(nn.Module):
    """Returns its first argument; made of a layer in place, by `pass_through`."""

    def forward(self, given: Any, *_: Any, **__: Any) -> Any:
        """What came in."""
        return given


def pass_through(layer: nn.Module) -> None:
    """Let a layer return what comes in, and have no tensors, in place: others may hold it."""
    at: Any = layer
    attention: Any = getattr(layer, "self_attn", None)
    layer._parameters.clear()
    layer._buffers.clear()
    layer._modules.clear()
    at.__class__ = PassThrough
    if isinstance(attention, nn.Module):  # torch's encoders ask their first layer
        told: Any = nn.Module()
        told.batch_first = getattr(attention, "batch_first", False)
        at.self_attn = told


def residual_layers(module: nn.Module, example: tuple[Tensor, ...]) -> list[str]:
    """Names of the layers that add something to what comes in, in the module's order.

    Found by what they do: a layer that is run once, puts out one tensor of the shape of its first
    argument, and, its matrices and biases zero and its norms left out, returns that argument, but
    for a ReLU. Of several inside one another the innermost.

    Args:
        module: left as it was.
        example: positional inputs that it accepts.
    """
    work = copy.deepcopy(module).eval()
    every: dict[nn.Module, list[str]] = {}
    for name, layer in work.named_modules(remove_duplicate=False):
        every.setdefault(layer, []).append(name)
    names = {layer: of[0] for layer, of in every.items() if len(of) == 1 and of[0]}
    calls: dict[nn.Module, list[Any]] = {layer: [] for layer in names}

    def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        same = (
            bool(args) and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            and args[0].is_floating_point() and args[0].shape == output.shape
        )  # fmt: skip
        calls[layer].append((args, kwargs) if same else None)

    for layer in names:
        layer.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        work(*example)
    for layer in names:
        layer._forward_hooks.clear()
        layer._forward_hooks_with_kwargs.clear()
    found: list[str] = []
    for layer, name in reversed(names.items()):  # what is inside comes first
        called = calls[layer]
        if len(called) != 1 or called[0] is None or isinstance(layer, PassThrough):
            continue
        if any(inner.startswith(f"{name}.") for inner in found) or not any(layer.children()):
            continue
        if any(p.dim() > 1 for p in layer.parameters()) and _adds(layer, *called[0]):
            found.append(name)
    return found[::-1]


def _adds(layer: nn.Module, args: Any, kwargs: Any) -> bool:
    work = copy.deepcopy(layer)
    for part in work.modules():
        if isinstance(part, _NORMS):
            part.forward = lambda x: x  # type: ignore[method-assign]
    for tensor in (*work.parameters(), *work.buffers()):
        tensor.data.zero_()
    given = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
    given = given.to(args[0].dtype).requires_grad_()
    try:
        with torch.enable_grad():
            (through,) = torch.autograd.grad(work(given, *args[1:], **kwargs).sum(), given)
    except Exception:  # of the user's code: what needs its weights is no such layer
        return False
    ones = (through - 1).abs() < _ALIKE
    return bool(ones.any()) and bool((ones | (through.abs() < _ALIKE)).all())


def choose_layers(
    module: nn.Module,
    example: tuple[Tensor, ...],
    share: float,
    removed: ChannelPlan | None = None,
) -> ChannelPlan:
    """Choose which residual layers remain: those without which the outputs change the most.

    The change is the norm of the difference by the norm of the outputs, for the example, each
    layer skipped by itself.

    Args:
        module: with the weights that the choice is made on; left as it was.
        example: positional inputs that it accepts.
        share: of all residual layers that remain, rounded to the nearest number.
        removed: what is gone from the module already.

    Raises:
        PlanError: there is no such layer, or none would remain.
    """
    names, before = residual_layers(module, example), 0 if removed is None else len(removed.gone)
    whole = len(names) + before
    wanted = math.floor(share * whole + 0.5)
    if not whole:
        raise PlanError(
            f"{type(module).__name__} has no residual layer that could go: set prunecast.layers = 1"
        )
    if wanted < 1:
        raise PlanError(
            f"a share of {share:.3g} leaves none of the {whole} residual layers of "
            f"{type(module).__name__}: set prunecast.layers to more"
        )
    work, changes = copy.deepcopy(module).eval(), {}
    with torch.no_grad():
        outputs = _joined(work(*example))
        for name in names:
            with _skipping(work.get_submodule(name)):
                changes[name] = float((_joined(work(*example)) - outputs).norm())
    least = sorted(names, key=lambda name: changes[name])[: max(0, len(names) - wanted)]
    gone = tuple(name for name in names if name in least)
    left = share if removed is None else share / removed.layers_share
    return ChannelPlan({}, gone=gone, layers_share=left)


def _joined(outputs: Any) -> Tensor:
    return torch.cat([part.double().flatten() for part in outputs_of(outputs)])


@contextmanager
def _skipping(layer: Any) -> Iterator[None]:
    layer.forward = lambda given, *_, **__: given
    try:
        yield
    finally:
        del layer.forward

"""BatchNorm's running statistics estimated anew on pruned weights; needs torch.

Running means and variances are averages over the weights of many steps. Pruning changes the
weights at once, and averaging clients changes them too, so a layer in evaluation mode normalises by
what its inputs no longer are. Forward passes repair that, without labels or gradients (Li et al.
2020, "EagleEye", section 3.3, for pruned networks).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecast.compression.pruning.training.measuring import Batch, outputs_of

__all__ = ["recalibrate"]


def recalibrate(module: nn.Module, batches: Iterable[Batch]) -> int:
    """Replace the running statistics of BatchNorm layers by those of the weights as they are now.

    Each becomes the mean over the batches, every batch counting once. Nothing else changes: other
    layers run in evaluation mode, nothing is trained, and momentum and training mode are put back.
    A layer that does not run then, as a head for training alone, keeps the statistics that it has.

    Args:
        module: on any device; a module without BatchNorm is left alone and no batch is drawn.
        batches: yields (inputs, targets), of which the targets are not looked at; batches of a
            single example are passed over, as BatchNorm has no variance of them.

    Raises:
        Exception: whatever the batches or the module raise; the statistics stay as they were.

    Returns:
        Number of examples that were looked at; 0 where statistics stayed as they were.

    Examples:
        >>> norm = nn.BatchNorm1d(1)
        >>> inputs = torch.tensor([[1.0], [3.0]])
        >>> recalibrate(norm, [(inputs, torch.zeros(2))]), norm.running_mean.item()
        (2, 2.0)
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    before = [{n: b.clone() for n, b in norm.named_buffers()} for norm in norms]
    modes = [(part, part.training) for part in module.modules()]
    momenta = [norm.momentum for norm in norms]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    examples = 0
    module.eval()
    try:
        with torch.no_grad():
            for inputs, targets in batches:
                if len(targets) < 2:
                    continue
                if not examples:
                    _begin(norms)
                outputs_of(module, inputs, device)
                examples += len(targets)
    except BaseException:
        _put_back(norms, before)
        raise
    else:
        idle = [bool(norm.num_batches_tracked == 0) for norm in norms]
        _put_back(compress(norms, idle), compress(before, idle))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for part, training in modes:
            part.training = training
    return examples


def _put_back(norms: Iterable[_BatchNorm], before: Iterable[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])


def _begin(norms: Iterable[_BatchNorm]) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches, not a moving one
        norm.train()

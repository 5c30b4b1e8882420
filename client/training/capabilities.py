"""What this node can do and bear, for the server's classes of nodes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prunecast.compression.versions import INSTRUCTION_FORMAT, Capabilities

__all__ = ["capabilities"]

_LINK = "prunecast-link"  # of the node config, in megabits per second
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def capabilities(root: Path, node_config: Mapping[str, object]) -> Capabilities:
    """What is to be said of this node; what cannot be found out is left out.

    Args:
        root: of its store; need not be there.
        node_config: Flower's, in which ``prunecast-link`` are megabits per second.
    """
    formats = (INSTRUCTION_FORMAT, INSTRUCTION_FORMAT)
    return Capabilities(_package(), formats, _free(root), _memory(), _link(node_config))


@cache
def _package() -> str:
    try:
        return version("prunecast")
    except PackageNotFoundError:
        return ""


def _free(root: Path) -> int:
    for folder in (root, *root.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def _memory() -> int:
    found = []
    with suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        found.append(int(_CONTAINER.read_text()))  # "max" where there is no limit
    return max(0, min(found, default=0))


def _link(node_config: Mapping[str, object]) -> float:
    stated = node_config.get(_LINK, 0)
    if isinstance(stated, int | float) and math.isfinite(stated) and stated >= 0:
        return float(stated)
    return 0.0

"""Capability classes: what nodes say of themselves, and how the policy treats them for it.

`prunecast.classes` is a table like `prunecast.widths`, of names, conditions and treatments::

    thin=link<2:steps*2, poor=memory<512&disk<200:keyframes+no-residual, other=foreign:dense

A node is of the first class all of whose conditions it meets.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.flower import is_codable_array, native
from prunecast.compression.versions import (
    INSTRUCTION_FORMAT,
    Capabilities,
    PublishedModel,
    SchemeRule,
    UpdateRule,
)

__all__ = [
    "CapabilityClass",
    "Treatment",
    "as_changes",
    "class_of",
    "foreign_format",
    "parse_classes",
]

_UNITS: dict[str, float] = {"disk": 1e6, "memory": 1e6, "link": 1.0}
_TESTS: dict[str, Callable[[Any, Any], bool]] = {"<": operator.lt, ">=": operator.ge}
_CONDITION = re.compile(r"(disk|memory|link|version)\s*(<|>=)\s*(\d+(?:\.\d+)*)")
_COARSER = re.compile(r"steps\s*\*\s*(\d+(?:\.\d+)?)")
_FOREIGN, _KEYFRAMES, _NO_RESIDUAL, _DENSE = "foreign", "keyframes", "no-residual", "dense"
_HELP = (
    "give conditions (disk<200, memory<512 in MB, link<2 in Mbit/s, version<0.2, foreign; several "
    "joined by &), a colon, and what becomes of it (keyframes, no-residual, steps*2, dense; joined "
    "by +)"
)


@dataclass(frozen=True)
class Treatment:
    """What becomes of a node.

    Attributes:
        name: of its class; "" for none.
        keyframes: it is sent whole versions, and keeps none on its disk.
        residual: whether what its updates drop is added to the next one.
        steps: factor of the steps of its updates.
        dense: arrays travel as in plain Flower, both ways, and it needs no mod.
    """

    name: str = ""
    keyframes: bool = False
    residual: bool = True
    steps: float = 1.0
    dense: bool = False

    def rule(self, rule: UpdateRule | SchemeRule | None) -> UpdateRule | SchemeRule | None:
        """How its updates are quantised, where others go by `rule`."""
        if not isinstance(rule, UpdateRule) or self.steps == 1:
            return rule
        return replace(rule, step=rule.step * self.steps, floor=rule.floor * self.steps)


@dataclass(frozen=True)
class CapabilityClass:
    """A class of nodes.

    Attributes:
        treatment: what becomes of its nodes; has its name.
        conditions: of each what is compared (``disk``, ``memory``, ``link``, ``version``), how, and
            with what.
        foreign: whether it is for nodes that do not understand this server's format.
    """

    treatment: Treatment
    conditions: tuple[tuple[str, str, str], ...] = ()
    foreign: bool = False

    def has(self, node: Capabilities) -> bool:
        """Whether a node meets all conditions; what it does not know meets none."""
        if self.foreign != bool(foreign_format(node)):
            return False
        return all(_meets(node, *condition) for condition in self.conditions)


def _meets(node: Capabilities, what: str, how: str, bound: str) -> bool:
    if what == "version":
        stated = _release(node.package)
        return bool(stated) and _TESTS[how](stated, _release(bound))
    stated_number = float(getattr(node, what))
    return stated_number > 0 and _TESTS[how](stated_number, float(bound) * _UNITS[what])


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at the end."""
    found = re.match(r"\d{1,9}(\.\d{1,9}){0,5}", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def parse_classes(table: Mapping[str, object]) -> tuple[CapabilityClass, ...]:
    """The classes of a policy, in their order.

    Raises:
        ValueError: one of them says something else; names it and what may be said.

    >>> parse_classes({"thin": "link<2:steps*2"})[0].treatment.steps
    2.0
    """
    return tuple(_parse(name, text) for name, text in table.items())


def _parse(name: str, text: object) -> CapabilityClass:
    parts = str(text).split(":")
    if len(parts) != 2:
        raise ValueError(f"class {name!r}: {_HELP}")
    asked, foreign = [], False
    for part in map(str.strip, parts[0].split("&")):
        found = _CONDITION.fullmatch(part)
        if part == _FOREIGN:
            foreign = True
        elif found is not None and (found[1] == "version" or found[3].count(".") < 2):
            asked.append((found[1], found[2], found[3]))
        else:
            raise ValueError(f"class {name!r}: {part!r} is no condition; {_HELP}")
    treatment = Treatment(name)
    for part in map(str.strip, parts[1].split("+")):
        if part == _KEYFRAMES:
            treatment = replace(treatment, keyframes=True)
        elif part == _NO_RESIDUAL:
            treatment = replace(treatment, residual=False)
        elif part == _DENSE:
            treatment = replace(treatment, dense=True)
        elif (found := _COARSER.fullmatch(part)) is not None and 1 <= float(found[1]) < math.inf:
            treatment = replace(treatment, steps=float(found[1]))
        else:
            raise ValueError(f"class {name!r}: {part!r} is no treatment; {_HELP}")
    if foreign and treatment != Treatment(name, dense=True):
        raise ValueError(f"class {name!r}: foreign nodes read nothing but what is dense")
    return CapabilityClass(treatment, tuple(asked), foreign)


def class_of(classes: Iterable[CapabilityClass], node: Capabilities) -> Treatment:
    """How a node is treated for what it says of itself."""
    return next((one.treatment for one in classes if one.has(node)), Treatment())


def foreign_format(node: Capabilities) -> str:
    """Why a node understands nothing that is sent to it; "" where it does."""
    lowest, highest = node.formats
    if lowest <= INSTRUCTION_FORMAT <= highest:
        return ""
    side = "the node" if highest < INSTRUCTION_FORMAT else "the server"
    return (
        f"it has Prunecast {node.package or 'of an unknown version'}, which understands formats "
        f"{lowest} to {highest}, and this server writes {INSTRUCTION_FORMAT}: update {side}"
    )


def as_changes(
    record: ArrayRecord, model: PublishedModel, master: Mapping[str, NDArray[Any]]
) -> ArrayRecord:
    """What a node trained from a version that was sent densely, as changes of the master.

    So it stands beside the updates of others, and what rounding dropped is not lost.

    Args:
        record: of the reply; arrays that are no floats of a name and shape that were sent stay.
        model: the version that it was sent.
        master: master weights that this stands for.
    """
    result = ArrayRecord()
    for name, array in record.items():
        result[name] = array
        tensor, base = model.tensors.get(name), master.get(name)
        if tensor is None or base is None or not is_codable_array(array):
            continue
        trained = native(array)
        if trained.dtype.kind == "f" and trained.shape == base.shape and base.dtype.kind == "f":
            change = trained.astype(np.float64) - tensor.dense().astype(np.float64)
            result[name] = Array(np.asarray(base + change, base.dtype))
    return result

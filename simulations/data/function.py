"""What a function of the user's own returns, named as ``package.module:function``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunecast.common.text import first_line
from prunecast.simulations.data import DataError, DataSource, Examples
from prunecast.simulations.kinds import ScenarioError, function_named

__all__ = ["Function"]

_FORMS = "(inputs, targets) or (inputs, targets, identities)"


@dataclass(frozen=True)
class Function(DataSource):
    """Examples that a function returns; it is called once, before anything is trained.

    It returns inputs and targets, and identities where the data say whose an example is; inputs
    are an array, or several by name, in the network's order. `Examples` will do as well.

    Attributes:
        function: ``package.module:function``, installed or in the current folder.
        test: another one, of what is set apart for ``held_out = "test"``; empty for none.
        options: ``[data.options]``, keyword arguments of both.
    """

    function: str = ""
    test: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, key: str) -> None:
        """A function is named."""
        if not self.function:
            remedy = 'source = "function" calls one: name it as package.module:function'
            raise ScenarioError(f"{key}.function", "is missing", remedy)

    def read(self) -> Examples:
        """What `function` returns."""
        return self._returned("function", self.function)

    def read_test(self) -> Examples | None:
        """What `test` returns; None where none is named."""
        return self._returned("test", self.test) if self.test else None

    def _returned(self, key: str, name: str) -> Examples:
        function = function_named(name, f"data.{key}")
        try:
            found = function(**self.options)
        except Exception as error:  # of the user's code
            raise DataError(
                f"data.{key}: {name} fails ({type(error).__name__}: {first_line(error)}): correct "
                "it, or data.options, which are all it is called with"
            ) from error
        if isinstance(found, Examples):
            return found
        if not isinstance(found, tuple) or len(found) not in (2, 3):
            raise DataError(f"data.{key}: {name} returns a {type(found).__name__}, not {_FORMS}")
        inputs, targets, *whose = found
        named = inputs if isinstance(inputs, Mapping) else {"x": inputs}
        arrays = {str(label): np.asarray(values) for label, values in named.items()}
        identities = np.asarray(whose[0]) if whose else None
        for label, values in {**arrays, "targets": np.asarray(targets)}.items():
            if not values.ndim:
                raise DataError(f"data.{key}: {label} of {name} is no array of examples")
        if identities is not None and identities.dtype.kind not in "iu":
            raise DataError(
                f"data.{key}: identities of {name} are {identities.dtype}, not whole numbers: "
                "numpy.unique(names, return_inverse=True)[1]"
            )
        numbers = None if identities is None else identities.astype(np.int64)
        return Examples(arrays, np.asarray(targets), numbers)

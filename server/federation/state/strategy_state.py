"""What a strategy keeps from round to round, found without knowing the strategy.

State is what differs from how the strategy was made: moments, momentum, current arrays, adapted
clips, counters, random generators. What was set when it was made and never changed is
configuration, which stays the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from logging import WARNING
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from prunecast.compression.flower.internals import log
from prunecast.server.federation.errors import CheckpointError
from prunecast.server.federation.state.snapshots import Unstorable, fingerprint

__all__ = ["StrategyState"]

_WHOLE = ""  # in place of an attribute: the strategy gives its state itself


class StrategyState:
    """The state of one strategy, and of those that it wraps.

    A strategy with methods ``state_dict()`` and ``load_state_dict(state)`` is asked for its state;
    of others it is the attributes that have changed. An attribute that cannot be stored is named
    once, in a warning.

    Args:
        strategy: as it was made, before it has seen a round.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._said: set[str] = set()
        self._made: dict[tuple[str, str], Any] = {}
        for path, owner in _strategies(strategy):
            for name, _, content in self._attributes(path, owner):
                self._made[path, name] = content

    def taken(self) -> dict[str, dict[str, Any]]:
        """What has changed since: path of the strategy (of the outermost "") to attributes."""
        found: dict[str, dict[str, Any]] = {}
        for path, owner in _strategies(self._strategy):
            found[path] = {}
            if _gives(owner):
                found[path][_WHOLE] = owner.state_dict()
                continue
            for name, value, content in self._attributes(path, owner):
                if (path, name) not in self._made or self._made[path, name] != content:
                    found[path][name] = value
        return found

    def put(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on where another strategy of the same classes was.

        Raises:
            CheckpointError: the strategy wraps others than that.
        """
        owners = dict(_strategies(self._strategy))
        if state.keys() != owners.keys():
            raise CheckpointError(
                f"the strategy wraps {', '.join(map(repr, owners))}, and that of the checkpoint "
                f"{', '.join(map(repr, state))}: use the strategy that wrote it"
            )
        for path, attributes in state.items():
            for name, value in attributes.items():
                if name == _WHOLE:
                    owners[path].load_state_dict(value)
                else:
                    setattr(owners[path], name, value)

    def _attributes(self, path: str, owner: Any) -> Iterator[tuple[str, Any, Any]]:
        """Those that can be stored, and what tells their values apart; others are said."""
        if _gives(owner):
            return
        for name, value in list(vars(owner).items()):
            if isinstance(value, Strategy | Grid) or callable(value):
                continue
            try:
                content = fingerprint(value)
            except Unstorable as error:
                self._say(f"{path}.{name}".lstrip("."), type(owner).__name__, str(error))
                continue
            yield name, value, content

    def _say(self, name: str, owner: str, what: str) -> None:
        if name in self._said:
            return
        self._said.add(name)
        log(
            WARNING,
            "A checkpoint cannot hold %r of %s (%s): a run that is resumed begins with it anew. "
            "Give the strategy state_dict() and load_state_dict(state), of arrays, numbers and "
            "text.",
            *(name, owner, what),
        )


def _strategies(strategy: Strategy, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, strategy
    for name, value in list(vars(strategy).items()):
        if isinstance(value, Strategy):
            yield from _strategies(value, f"{path}.{name}".lstrip("."))


def _gives(owner: Any) -> bool:
    return callable(getattr(owner, "state_dict", None)) and callable(
        getattr(owner, "load_state_dict", None)
    )

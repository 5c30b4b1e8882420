"""Flower's strategies by name, for run configs and scenario files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from prunecast.server.federation.errors import FederationError

__all__ = ["STRATEGIES", "StrategyError", "build_strategy", "private_strategy"]

_CLASSES = ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedMedian", "FedTrimmedAvg")
STRATEGIES = {name.lower(): name for name in (*_CLASSES, "Krum", "MultiKrum", "Bulyan")}
"""Name to class in `flwr.serverapp.strategy`: those that need nothing special of the client."""


class StrategyError(FederationError):
    """A strategy has an unknown name or an option it does not take."""


def build_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """Make one of Flower's strategies.

    Args:
        name: a key of `STRATEGIES`.
        options: keyword arguments of the class; dashes may stand for underscores.

    Raises:
        StrategyError: unknown name or option, or a value the class refuses.
    """
    if name not in STRATEGIES:
        raise StrategyError(f"unknown strategy {name!r}: choose one of {', '.join(STRATEGIES)}")
    cls = getattr(flower, STRATEGIES[name])
    given = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    known = [name for name in inspect.signature(cls).parameters if not name.endswith("_fn")]
    for key in given:
        if key not in known:
            raise StrategyError(f"{name} has no option {key!r}: choose one of {', '.join(known)}")
    try:
        made: Strategy = cls(**given)
    except (TypeError, ValueError) as error:
        raise StrategyError(f"strategy {name!r}: {error}") from error
    return made


def private_strategy(strategy: object) -> str:
    """The class of a strategy, or of one that it wraps, that is Flower's for differential privacy.

    "" for none.
    """
    name = type(strategy).__name__
    if name.startswith("DifferentialPrivacy"):
        return name
    within = (private_strategy(v) for v in vars(strategy).values() if isinstance(v, Strategy))
    return next(filter(None, within), "")

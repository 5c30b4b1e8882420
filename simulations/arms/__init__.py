"""Arms: ways of doing the same training that a scenario compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prunecast.simulations.kinds import Kind, Registry

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from torch import nn

    from prunecast.server.federation import Policy
    from prunecast.simulations.scenarios import Scenario

__all__ = ["ARMS", "Arm"]


@dataclass(frozen=True)
class Arm(Kind):
    """``[arms.<name>]``: one way of doing the same training.

    Attributes:
        trains: whether it trains; one that does not measures the messages of another arm.
        baseline: whether it is plain Flower, to which others are compared.
    """

    trains: ClassVar[bool] = True
    baseline: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str:
        """How to install what it needs besides, where that is not there; empty for nothing."""
        return ""

    @property
    def publishes(self) -> bool:
        """Whether it publishes versions: they are what is measured and what devices can run."""
        return False

    def check(self, key: str, arms: Mapping[str, Arm]) -> None:
        """Raise `ScenarioError` for what is wrong below `key` of this arm, among all arms."""

    def check_widths(self, key: str, classes: Sequence[str]) -> None:
        """Raise `ScenarioError` for what does not go with the width classes of the clients.

        Args:
            key: of this arm.
            classes: of every client, in their order; "" for none.
        """

    @property
    def without(self) -> tuple[str, ...]:
        """Width classes whose clients take no part in it."""
        return ()

    def grid_policy(self) -> Policy:
        """How its messages travel, if it trains: those of plain Flower, if no kind says otherwise.

        Raises:
            FederationError: a preset or knob is unknown, or out of range.
        """
        from prunecast.server.federation import Policy

        return Policy.preset("dense")

    def initial(self, arrays: Any, scenario: Scenario) -> Any:
        """What the strategy begins with: the first weights, if no kind says otherwise."""
        return arrays

    def weights(self, arrays: Any, scenario: Scenario, server_round: int) -> Any:
        """The weights that the strategy's arrays stand for: themselves, as a rule."""
        return arrays

    def equip(
        self,
        client: ClientApp,
        model: Callable[[Context], nn.Module],
        data: Callable[[Context], tuple[Any, Any]],
        scenario: Scenario,
    ) -> None:
        """Give the clients a function of their own, where they do not train as all others."""

    def strategy(self, average: Any) -> Any:
        """How the server aggregates: as the scenario's strategy, if no kind says otherwise.

        Args:
            average: that strategy, new for this arm.
        """
        return average

    def source(self, name: str) -> str:
        """The arm whose messages this one, called `name`, measures: its own where it trains."""
        return name

    def recode(self) -> Callable[[bytes], int]:
        """How it measures a message of its source, if it does not train."""
        raise NotImplementedError

    def label(self, name: str) -> str:
        """How tables call the arm `name`."""
        return name

    def text(self) -> str:
        """What was chosen, for the page of a run; empty for nothing."""
        return ""


ARMS: Registry[Arm] = Registry(Arm, default="prunecast")
"""The kinds of arm: the modules beside this one."""

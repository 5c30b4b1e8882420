"""Which part of the model nodes get: the channels that remain of it, and slices of it."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord

from prunecast.compression.flower import array_record, dense_arrays, put_back, set_apart
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.messages import MessageExchange
from prunecast.server.federation.publishing.widths import Slices

__all__ = ["ChannelExchange"]


class ChannelExchange(MessageExchange):
    """An exchange whose models lose channels, and are sliced for classes of nodes."""

    def channels(self, *, key: str = "arrays") -> ChannelPlan | None:
        """Which channels remain of the module that everybody's code makes; None for all.

        Narrow such a module by it before arrays of the model are loaded, with `fit_module` of
        `prunecast.compression.pruning.structure.narrowing`.
        """
        if self.policy.down != "lattice":
            return None
        return self._stream(key).channels

    def try_channels(self, choose: ChannelChooser, *, key: str = "arrays") -> None:
        """Say which channels go, where automatic pruning tries how many; before the first message.

        On trial they are zero in what is published; the master keeps them.

        Raises:
            FederationError: the record is not pruned.
        """
        stream = self._stream(key)
        if stream.pruner.plan is None:
            raise FederationError(
                f"channels of record {key!r} cannot be tried: name it in prunecast.pruning-records"
            )
        stream.choose = choose

    def settled_channels(self, *, key: str = "arrays") -> ChannelPlan | None:
        """What automatic pruning has found to be dispensable, to be given to `remove_channels`.

        None while it searches, and once they are gone.
        """
        return self._stream(key).settled

    def remove_channels(
        self, arrays: ArrayRecord, plan: ChannelPlan, *, key: str = "arrays"
    ) -> ArrayRecord:
        """Go on without the channels that a plan removes: call it between two rounds.

        Nodes are sent the plan with the next version, narrow by it what they hold, and their
        ClientApp finds it by `current_channels`. A strategy's own state is not reached from here:
        `Run` narrows it.

        Args:
            arrays: master weights as the strategy holds them.
            plan: made of these, such as by `prunecast.compression.pruning.structure.narrowing`.
            key: key of the record in the strategy's messages.

        Returns:
            What remains of the arrays, to go on from.

        Raises:
            PlanError: the plan is of another model; nothing was changed.
            FederationError: models do not travel as versions, or channels of another record have
                gone: a ClientApp is told one plan.
        """
        if self.policy.widths:
            raise FederationError("prunecast.widths slices a model that keeps all of its channels")
        if self.policy.down != "lattice":
            raise FederationError("channels are removed where models travel as versions: set "
                                  "prunecast.down = 'lattice'")  # fmt: skip
        other = self._streams.narrowed_beside(self.run.run_id, key)
        if other is not None:
            raise FederationError(
                f"channels of record {other!r} have gone, and nodes are told one plan: those of "
                f"{key!r} stay"
            )
        known, others = set_apart(arrays)
        others = {at: a for at, a in others.items() if not plan.loses(at.partition("=")[2])}
        narrow = plan.arrays(dense_arrays(known))
        plan.check({name: array.shape for name, array in known.items()})
        self._stream(key).remove(plan)
        return put_back(array_record(narrow), others)

    def use_widths(self, plans: Mapping[str, ChannelPlan], *, key: str = "arrays") -> None:
        """Say which slice of the model each class of nodes trains; call before the first message.

        A node states its class by ``prunecast-width`` in its node config; one that states none
        trains the whole model. `Run` calls this with what `widths.leading_slices` chooses.

        Args:
            plans: of every class that the policy names, which channels of the whole model remain.
            key: key of the record in the strategy's messages.

        Raises:
            PlanError: a slice is not contained in the wider ones.
            FederationError: these are not the policy's classes.
        """
        if plans.keys() != self.policy.widths.keys():
            raise FederationError(
                f"slices of {', '.join(map(repr, plans)) or 'no class'} were given, and "
                f"prunecast.widths has {', '.join(map(repr, self.policy.widths)) or 'none'}"
            )
        stream = self._stream(key)
        stream.slices = Slices(plans, stream.new_history)

    def sliced(
        self, arrays: ArrayRecord, width: str, *, key: str = "arrays"
    ) -> tuple[PublishedModel, ChannelPlan]:
        """What nodes of a class get when `arrays` is sent under `key`, and its channels.

        Raises:
            NonFiniteModel: an array holds NaN or infinity.
            FederationError: there is no such class.
        """
        stream = self._stream(key)
        if stream.slices is None or width not in stream.slices.plans:
            raise FederationError(f"prunecast.widths has no class {width!r}")
        version = stream.version_of(set_apart(arrays)[0], arrays.object_id)
        return stream.slice_of(version, width).model, stream.slices.plans[width]

    def nodes_of(self, width: str) -> int:
        """How many nodes said that they are of a class; "" for those that state none."""
        return self._streams.nodes_of(width)

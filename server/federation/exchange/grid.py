"""`CompressedGrid`: any Flower strategy, a fraction of the bytes, all of them counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, MetricRecord
from numpy.typing import NDArray

from prunecast.compression.flower import array_record, dense_arrays, put_back, set_apart
from prunecast.compression.flower.internals import Measured
from prunecast.compression.versions import MAX_MODEL_BYTES, PublishedModel
from prunecast.server.federation.errors import CheckpointError, FederationError
from prunecast.server.federation.exchange.channels import ChannelExchange
from prunecast.server.federation.exchange.outbound import say_exceeded
from prunecast.server.federation.knobs import OTHERS
from prunecast.server.federation.publishing.masks.progress import measured_in
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.reporting.notices import uncodable
from prunecast.server.federation.state.checkpoints import Checkpoint
from prunecast.server.federation.state.stream_state import grid_state, know_nodes, put_grid

__all__ = ["CompressedGrid"]


class CompressedGrid(ChannelExchange):
    """A Flower grid that prunes, quantises and codes every array record in both directions.

    It wraps the grid Flower hands to the ServerApp; strategies and custom loops use it unchanged::

        strategy.start(grid=CompressedGrid(grid, "balanced"), initial_arrays=arrays)

    Several threads may use it, each with messages of its own, as Flower's legacy server does.

    The clients need ``ClientApp(mods=[compression_mod()])``. With the policy "dense" it changes
    nothing, needs no mod, and records what plain Flower costs.

    Args:
        grid: the grid to wrap.
        policy: a `Policy`, or the name of a preset, such as "balanced" or "small".
        ledger: where messages are recorded: a `Ledger`, a path for a JSON Lines file that is
            appended to, or None for no file. The latest 1000 are kept in memory.
        seed: decides, with the number of the message, everything random in replies by a scheme.
        alternatives: other codings to measure on the very same messages, by name, such as
            ``{"zstd-3": lambda data: len(zstandard.compress(data, 3))}``. Each is given the
            objects of one message, joined.
        verify_replies: decode every reply once on arrival. A damaged reply then becomes an error
            of its own instead of stopping the aggregation it takes part in.
        poll_interval: seconds between looking for replies in `send_and_receive`.
        job: name of what this run of Flower goes on with: nodes keep what they hold from one run
            of a job to its next; "" for a job of this run alone. Two runs of one job at a time
            cost each other what their nodes hold.
        deadlines: when `send_and_receive` returns without every reply, and what becomes of those
            that are late.

    Attributes:
        samples: bytes by tensor of single messages; off, unless it is wanted.
        deadlines: see `use_deadlines`.
    """

    # -- the published model ------------------------------------------------------------------

    def draw_initial(
        self,
        like: ArrayRecord,
        seed: int,
        *,
        key: str = "arrays",
        max_model_bytes: int = MAX_MODEL_BYTES,
    ) -> ArrayRecord:
        """Draw a from-scratch model from a seed, so that its first keyframe is a few bytes.

        Args:
            like: a freshly initialised model; layout, means and spreads are taken from it, its
                values are not.
            seed: 0 to 2**64 - 1; the same seed draws the same model on every machine.
            key: key of the record in the strategy's messages.
            max_model_bytes: what nodes have as `compression_mod(max_model_bytes=...)`; a larger
                model travels whole.

        Returns:
            The arrays to give to the strategy as `initial_arrays`.

        Raises:
            FederationError: the stream has published a version already.
        """
        stream = self._stream(key)
        known, others = set_apart(like)
        drawn = stream.draw(dense_arrays(known), seed, max_model_bytes)
        return put_back(array_record(drawn), others)

    def published(self, arrays: ArrayRecord, *, key: str = "arrays") -> PublishedModel:
        """The version that nodes get when `arrays` is sent under `key`, published if need be.

        Args:
            arrays: master weights as the strategy holds them.
            key: key of the record in the strategy's messages.

        Raises:
            NonFiniteModel: an array holds NaN or infinity.
            FederationError: models travel densely, so that no version is published.
        """
        if self.policy.down == "dense":
            raise FederationError(
                "nothing is published where models travel densely: choose a policy with "
                "down = 'lattice'"
            )
        stream = self._stream(key)
        return stream.version_of(set_apart(arrays)[0], arrays.object_id).model

    def evaluate_published(
        self,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None],
        *,
        key: str = "arrays",
    ) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """Wrap a strategy's `evaluate_fn` so that it measures the published model.

        Flower hands `evaluate_fn` the master weights, which no client and no device ever runs.
        Where models travel densely they are what clients run, and are measured.
        """
        if self.policy.down == "dense":
            return evaluate_fn

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            dense = array_record(self.published(arrays, key=key).arrays())
            return evaluate_fn(server_round, put_back(dense, set_apart(arrays)[1]))

        return evaluate

    def catching_up(self, arrays: ArrayRecord, *, key: str = "arrays") -> dict[str, Any]:
        """Bytes that a node would be sent now, to hold the model of `arrays`; nothing is sent.

        Args:
            arrays: master weights as the strategy holds them.
            key: key of the record in the strategy's messages.

        Returns:
            ``whole``: of a node that holds nothing; ``missed``: of one that holds an earlier
            version, by how many versions ago. Of the array record alone, without its message.
        """
        if self.policy.down == "dense":
            return {"whole": Measured(arrays).nbytes, "missed": {}}
        stream = self._stream(key)
        known = set_apart(arrays)[0]
        version = stream.version_of(known, arrays.object_id)
        earlier = stream.earlier(version)
        asked = {1, min(5, len(earlier)), len(earlier)} if earlier else set()
        return {
            "whole": stream.payload(version, None).measured.nbytes,
            "missed": {
                str(back): stream.payload(version, earlier[back - 1]).measured.nbytes
                for back in sorted(asked)
            },
        }

    def holds(self, node_id: int, *, key: str = "arrays") -> tuple[int | None, str]:
        """Which version a node last said it holds under a key.

        Returns:
            Its number, None once it is too old for deltas, and its digest's first bytes in
            hexadecimal, "" for no version.
        """
        digest = self._streams.node(node_id).held.get(key, b"")
        model = self._streams.held(digest) if digest else None
        return None if model is None else model.counter, digest.hex()

    def restate(
        self, arrays: ArrayRecord, statistics: Mapping[str, NDArray[Any]], *, key: str = "arrays"
    ) -> ArrayRecord:
        """Publish the latest version again with other running statistics of its normalisation.

        Args:
            arrays: master weights that it was published from.
            statistics: name to array in the shape and dtype of the tensor.
            key: key of the record in the strategy's messages.

        Returns:
            The arrays to go on from.
        """
        changed = ArrayRecord(
            {n: Array(statistics[n]) if n in statistics else a for n, a in arrays.items()}
        )
        self.published(arrays, key=key)
        stream = self._stream(key)
        stream.restate(arrays.object_id, statistics, changed.object_id)
        return changed

    # -- pruning and the budget ---------------------------------------------------------------

    def prunes_further(self, arrays: ArrayRecord, *, key: str = "arrays") -> bool:
        """Whether a pruning event takes weights from the version of `arrays`, published if need be.

        Only of the latest version; arguments and errors as of `published`.
        """
        self.published(arrays, key=key)
        return self._stream(key).pruner.pruned

    def note_metrics(self, metrics: Mapping[str, Any], *, key: str = "arrays") -> None:
        """Tell automatic pruning what the server measured of the last version, held out.

        Args:
            metrics: name to number; those whose name ends as `pruning_metric` says count.
            key: key of the record in the strategy's messages.
        """
        if self.policy.down == "lattice":
            stream = self._stream(key)
            for value in measured_in(metrics, self.policy.pruning_metric):
                stream.pruner.measured.add(value, held_out=True)

    def pruned(self, *, key: str = "arrays") -> list[dict[str, Any]]:
        """What pruning did to the versions published since this was asked before.

        Returns:
            For every version whose masks an event changed, and every level that a search chose: the
            fields of the run's event ``pruning`` (docs/run.md).
        """
        if self.policy.down == "dense":
            return []
        return self._stream(key).pruner.take_events()

    def classes(self) -> dict[str, dict[str, int]]:
        """Of each capability class, and the nodes of none: how many, and their bytes so far."""
        found = {}
        for name in [*self.policy.classes, OTHERS] if self.policy.classes else []:
            capability = "" if name == OTHERS else name
            spent = self.ledger.totals(capability=capability)
            found[name] = {
                "nodes": self._streams.able_nodes(capability),
                "bytes_down": spent.bytes_down,
                "bytes_up": spent.bytes_up,
            }
        return found

    def mask_cost(self, *, key: str = "arrays") -> dict[str, float]:
        """What making masks took so far: ``seconds``, ``peak_bytes``, and how often (``made``)."""
        cost = self._stream(key).mask_cost
        return {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "made": cost.made}

    def budget(self) -> dict[str, Any] | None:
        """What the round may cost and has cost, see docs/run.md; None without a budget."""
        budget = self._streams.budget
        if budget is None:
            return None
        say_exceeded(budget)
        return budget.report(self.policy.down_step)

    # -- secure aggregation -------------------------------------------------------------------

    def allow_secure_aggregation(self) -> None:
        """Say that a `SecureStrategy` makes master weights of what is summed."""
        self._outbound.secure = True

    @property
    def securely_trained(self) -> Version | None:
        """The version that nodes were sent last to train under secure aggregation."""
        return self._outbound.securely

    # -- a job and its checkpoints ------------------------------------------------------------

    def use_job(self, job: str) -> None:
        """Be of a job, see `CompressedGrid`; before the first message.

        Raises:
            FederationError: there was one, or it is no name.
        """
        self._streams.use_job(job)

    @property
    def job(self) -> str:
        """Name of the job; the run's id where it has none."""
        return self._streams.job or str(self.run.run_id)

    @property
    def attempt(self) -> int:
        """How often the job was resumed."""
        return self._streams.attempt

    def note_saved(self, *, again: bool = True) -> None:
        """A checkpoint of the present state is on the disk.

        Args:
            again: whether others follow: nodes are then told that their replies were accepted once
                there is a checkpoint which has it, so that a run that is resumed from one trains
                the round after it again as it was.
        """
        self._streams.saves = again
        self._streams.saved()

    def note_unsaved(self) -> None:
        """The checkpoint that `note_saved` spoke of could not be written after all."""
        self._streams.unsaved()

    def checkpoint(self, arrays: ArrayRecord, *, key: str = "arrays") -> Checkpoint:
        """What a later run needs to go on from these master weights; see `Checkpoint.save`."""
        stream = self._stream(key)
        known, others = set_apart(arrays)
        if others:
            self._notices.unsaved(key, uncodable(arrays))
        master = stream.master_of(arrays.object_id)
        if master is None:
            master = stream.as_published(stream.narrowed(dense_arrays(known)))
        widths = {} if stream.slices is None else stream.slices.statistics
        tried = tuple(stream.tried.values())
        contents = {key: arrays.object_id}
        state = {
            "arrays": arrays,
            "grid": grid_state(self._streams, self._outbound, self.run.run_id, contents),
        }
        position = stream.position
        return Checkpoint(dict(master), *position, key, stream.channels, widths, tried, state)

    def resume(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Continue a stream from a checkpoint; call before the first message.

        Returns:
            The master weights, to be given to the strategy as `initial_arrays`.

        Raises:
            CheckpointError: its search for a sparsity is of other knobs than the policy's.
        """
        self._rounds_checked = True  # the schedule goes on, and does not begin
        job = None if checkpoint.state is None else checkpoint.state["grid"]["job"]
        if checkpoint.state is not None and job == self._streams.job:
            know_nodes(self._streams, self.run.run_id, checkpoint.state["grid"])
        stream = self._streams.stream(self.run.run_id, checkpoint.key)
        at = checkpoint.counter, checkpoint.steps, checkpoint.clock
        try:
            stream.resume(
                *at,
                checkpoint.progress,
                checkpoint.masks,
                checkpoint.searched,
                checkpoint.channels,
                checkpoint.tried,
            )
            if stream.slices is not None:
                stream.slices.resume(checkpoint.widths, checkpoint.arrays)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint does not fit the policy ({error}): go on with the policy of the "
                "run that wrote it"
            ) from error
        return array_record(checkpoint.arrays)

    def go_on(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Be just where the grid was that a checkpoint is of; call before the first message.

        Nothing is published anew, as by `resume`: the next message carries the version that nodes
        were sent last, or would have been.

        Returns:
            The arrays that the strategy had then.

        Raises:
            CheckpointError: the checkpoint says too little for that, or is of another policy.
        """
        self._rounds_checked = True
        try:
            if checkpoint.state is None:
                raise ValueError("it has the weights alone")
            arrays: ArrayRecord = checkpoint.state["arrays"]
            contents = {checkpoint.key: arrays.object_id}
            state = checkpoint.state["grid"]
            put_grid(self._streams, self._outbound, self.run.run_id, state, contents)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint cannot be gone on from: {error}") from error
        return arrays

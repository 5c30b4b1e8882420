"""FedPM: random weights that nobody trains, and masks over them that everybody votes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Context, Limits, TensorSpec, decode, encode
from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import Range

if TYPE_CHECKING:
    from flwr.app import Context as FlowerContext
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from torch import Tensor, nn

    from prunecast.simulations.scenarios import Scenario

__all__ = ["Masks", "posterior"]

_ACTION = "masks"  # messages are of the type train.masks
_MASK, _METRICS = "mask", "metrics"
_SURE = 1e-3  # a probability of 0 or 1 has no finite score


@dataclass(frozen=True)
class Masks(Arm):
    """Clients train the probability that a weight is kept, and send a mask drawn from it.

    Isik, Pase, Gunduz, Weissman & Zorzi 2023, "Sparse Random Networks for Communication-Efficient
    Federated Learning", ICLR, algorithms 1 and 2. Weights of two or more dimensions are
    ``±sqrt(2 / fan in)`` by a random sign (signed Kaiming constant) and never change, biases are
    zero. Down goes the probability of every weight, a float32 as in the paper; up goes a bit for
    each, entropy-coded, which takes less than one where the probabilities are not even. The server
    has a Beta distribution for each weight, which begins anew when all clients were asked about
    once. Running statistics are averaged.

    Attributes:
        learning_rate: of the scores, with Adam.
        prior: both parameters of the Beta distribution to begin with, 1 for an even one.
    """

    learning_rate: Annotated[float, Range(0, above=True)] = 0.1
    prior: Annotated[float, Range(1)] = 1.0

    def initial(self, arrays: Any, scenario: Scenario) -> Any:
        """Even probabilities in the place of weights, zeros in that of biases."""
        from prunecast.compression.flower import array_record, dense_arrays

        module = _module(scenario)
        masked, free = _names(module)
        found = dict(dense_arrays(arrays))
        for name in masked:
            found[name] = np.full(found[name].shape, 0.5, np.float32)
        for name in free:
            if name.rpartition(".")[2] == "bias":
                found[name] = np.zeros_like(found[name])
        return array_record(found)

    def weights(self, arrays: Any, scenario: Scenario, server_round: int) -> Any:
        """The random weights under a mask drawn from the probabilities."""
        from prunecast.compression.flower import array_record, dense_arrays

        module = _module(scenario)
        found = dict(dense_arrays(arrays))
        draws = np.random.default_rng([scenario.seed, server_round, 0x3A5C])
        for name, frozen in frozen_weights(module, scenario.seed).items():
            found[name] = frozen * (draws.random(frozen.shape) < found[name]).astype(np.float32)
        return array_record(found)

    def equip(
        self,
        client: ClientApp,
        model: Callable[[FlowerContext], nn.Module],
        data: Callable[[FlowerContext], tuple[Any, Any]],
        scenario: Scenario,
    ) -> None:
        """Teach the clients to train masks."""

        @client.train(_ACTION)  # type: ignore[untyped-decorator, unused-ignore]
        def train_masks(message: Message, context: FlowerContext) -> Message:
            return _trained(self, model(context), data(context)[0], scenario, message, context)

    def strategy(self, average: Any) -> Any:
        """The posterior in the place of the average of `average`, whose sampling stays."""
        return _by_posterior(self, average)

    def text(self) -> str:
        """The learning rate and the prior."""
        return f"learning_rate = {self.learning_rate}, prior = {self.prior}"


# -- what both sides know -------------------------------------------------------------------------


def _module(scenario: Scenario) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        module: nn.Module = scenario.model.network()()
    return module


def _names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Parameters that have masks, and the others."""
    masked = [n for n, p in module.named_parameters() if p.ndim >= 2 and p.is_floating_point()]
    return masked, [n for n, _ in module.named_parameters() if n not in masked]


def frozen_weights(module: nn.Module, seed: int) -> dict[str, NDArray[np.float32]]:
    """The weights of a seed, the same on all sides: ``±sqrt(2 / fan in)``."""
    found = {}
    parameters = dict(module.named_parameters())
    for place, name in enumerate(_names(module)[0]):
        shape = tuple(parameters[name].shape)
        size = math.sqrt(2 / max(1, math.prod(shape[1:])))
        signs = np.random.default_rng([seed, place, 0xF20]).integers(0, 2, shape) * 2 - 1
        found[name] = (signs * size).astype(np.float32)
    return found


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> Context:
    return Context(layout={name: TensorSpec(np.dtype(bool), s) for name, s in shapes.items()})


def coded_masks(masks: Mapping[str, NDArray[np.bool_]]) -> bytes:
    """Masks, entropy-coded, or a bit for each weight where that is shorter (even chances)."""
    plain = np.packbits(np.concatenate([mask.ravel() for mask in masks.values()])).tobytes()
    coded = encode(dict(masks), context=_layout({n: mask.shape for n, mask in masks.items()}))
    return min(b"\0" + plain, b"\1" + coded, key=len)


def decoded_masks(
    data: bytes, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, NDArray[np.bool_]]:
    """Inverse of `coded_masks`."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    if data[0]:
        most = 4 * sum(sizes) + 4096
        limits = Limits(decoded_bytes=most, free_bytes=most)
        return decode(data[1:], context=_layout(shapes), limits=limits)
    bits = np.unpackbits(np.frombuffer(data[1:], np.uint8), count=sum(sizes)).view(np.bool_)
    parts = np.split(bits, np.cumsum(sizes)[:-1])
    return {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}


# -- the client -----------------------------------------------------------------------------------


def _trained(
    arm: Masks,
    module: nn.Module,
    loader: Iterable[Any],
    scenario: Scenario,
    message: Message,
    context: FlowerContext,
) -> Message:
    """Scores trained from the probabilities that came, and a mask drawn from them."""
    import torch
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    from prunecast.client.training.trainer import best_device
    from prunecast.compression.flower import stated_round

    [(key, record)] = message.content.array_records.items()
    arrays = {name: array.numpy() for name, array in record.items()}
    named = scenario.training.device
    device = best_device() if named == "auto" else torch.device(named)
    masked, _ = _names(module)
    state = {n: torch.from_numpy(np.array(a)) for n, a in arrays.items()}
    module.load_state_dict(state)  # probabilities lie where their weights are called for
    module.to(device).train()
    frozen = {
        n: torch.from_numpy(w).to(device) for n, w in frozen_weights(module, scenario.seed).items()
    }
    chances = {n: state[n].clamp(_SURE, 1 - _SURE) for n in masked}
    scores = {n: torch.logit(p).to(device).requires_grad_() for n, p in chances.items()}
    partition = int(context.node_config["partition-id"])
    draw = [scenario.seed, stated_round(message.content), partition, 0x5C0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng(draw).integers(2**63)))
        total, examples = _train_scores(arm, module, loader, scenario, frozen, scores, device)
    draws = np.random.default_rng([*draw, 1])
    kept = {}
    for name, score in scores.items():
        chance = torch.sigmoid(score.detach()).cpu().numpy()
        kept[name] = draws.random(chance.shape) < chance
    after = ArrayRecord({_MASK: Array(np.frombuffer(coded_masks(kept), np.uint8))})
    buffers = dict(module.named_buffers())
    for name, value in module.state_dict().items():
        if name in buffers:
            after[name] = Array(value.cpu().numpy())
    metrics = MetricRecord({"num-examples": examples, "train-loss": total / max(examples, 1)})
    return Message(RecordDict({key: after, _METRICS: metrics}), reply_to=message)


def _train_scores(
    arm: Masks,
    module: nn.Module,
    loader: Iterable[Any],
    scenario: Scenario,
    frozen: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    device: Any,
) -> tuple[float, int]:
    """Train scores in place; summed loss and number of examples of the last epoch.

    A mask is drawn in every step; its gradient is taken as that of the probability (section 3.1).
    """
    import torch
    from torch.func import functional_call

    optimiser = torch.optim.Adam(list(scores.values()), lr=arm.learning_rate)
    total, examples = 0.0, 0
    for _ in range(scenario.training.epochs):
        total, examples = 0.0, 0
        for inputs, targets in loader:
            weights = {}
            for name, score in scores.items():
                chance = torch.sigmoid(score)
                mask = chance + (torch.bernoulli(chance.detach()) - chance).detach()
                weights[name] = frozen[name] * mask
            given = tuple(value.to(device) for value in inputs)
            outputs = functional_call(module, weights, given)
            loss = scenario.task.training_loss(outputs, targets.to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(loss.detach()) * len(targets)
            examples += len(targets)
    return total, examples


# -- the server -----------------------------------------------------------------------------------


def posterior(kept: NDArray[Any], dropped: NDArray[Any]) -> NDArray[np.float32]:
    """The most likely probability under a Beta distribution: ``(α − 1) / (α + β − 2)``.

    Args:
        kept: α, what the prior begins with and the votes for a weight.
        dropped: β, likewise against it.

    Returns:
        float32; a half where nothing is known (α = β = 1).

    >>> posterior(np.array([4.0, 1.0, 1.0]), np.array([1.0, 4.0, 1.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    votes = kept + dropped - 2
    return np.where(votes > 0, (kept - 1) / np.maximum(votes, 1e-9), 0.5).astype(np.float32)


def _by_posterior(arm: Masks, average: Any) -> Any:
    from flwr.app import Message, MetricRecord

    from prunecast.compression.flower import array_record, dense_arrays

    configure = average.configure_train
    rounds = max(1, math.ceil(1 / (getattr(average, "fraction_train", 1.0) or 1.0)))
    known: dict[str, Any] = {"arrays": {}, "kept": {}, "dropped": {}}

    def configure_train(server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        known["arrays"] = dict(dense_arrays(arrays))
        return [
            Message(
                message.content,
                message.metadata.dst_node_id,
                f"{message.metadata.message_type}.{_ACTION}",
                group_id=message.metadata.group_id,
            )
            for message in configure(server_round, arrays, config, grid)
        ]

    def aggregate_train(server_round: int, replies: Iterable[Any]) -> Any:
        used = [reply for reply in replies if not reply.has_error()]
        if not used:
            return None, None
        arrays, others = known["arrays"], [_reply(reply) for reply in used]
        buffers = others[0][1].keys()
        shapes = {n: a.shape for n, a in arrays.items() if n in _probabilities(arrays, buffers)}
        if (server_round - 1) % rounds == 0:
            for which in ("kept", "dropped"):
                known[which] = {n: np.full(s, arm.prior) for n, s in shapes.items()}
        for coded, _, _ in others:
            for name, vote in decoded_masks(coded, shapes).items():
                known["kept"][name] += vote
                known["dropped"][name] += ~vote
        weights = np.array([examples for _, _, (examples, _) in others], np.float64)
        mean = {}
        for name in buffers:
            merged = np.average([held[name] for _, held, _ in others], axis=0, weights=weights)
            whole = arrays[name].dtype.kind in "biu"  # a counter of batches
            mean[name] = np.asarray(np.rint(merged) if whole else merged, arrays[name].dtype)
        after = {n: posterior(known["kept"][n], known["dropped"][n]) for n in shapes}
        loss = float(np.average([loss for *_, (_, loss) in others], weights=weights))
        made = {name: after.get(name, mean.get(name, array)) for name, array in arrays.items()}
        return array_record(made), MetricRecord({"train-loss": loss})

    average.configure_train, average.aggregate_train = configure_train, aggregate_train
    return average


def _probabilities(arrays: Mapping[str, NDArray[Any]], buffers: Iterable[str]) -> list[str]:
    """Which of a model's arrays are probabilities: floats of two dimensions, and no buffers."""
    held = set(buffers)
    return [n for n, a in arrays.items() if a.ndim >= 2 and a.dtype.kind == "f" and n not in held]


def _reply(message: Any) -> tuple[bytes, dict[str, NDArray[Any]], tuple[float, float]]:
    """Coded mask, buffers, and examples and loss of a reply."""
    [record] = message.content.array_records.values()
    arrays = {name: array.numpy() for name, array in record.items()}
    coded = arrays.pop(_MASK).tobytes()
    metrics = message.content[_METRICS]
    return coded, arrays, (float(metrics["num-examples"]), float(metrics["train-loss"]))

"""What of data and model shows before anything is trained, client by client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.text import first_line
from prunecast.server.federation.errors import PolicyError
from prunecast.simulations.data import DataError, Examples, keyed
from prunecast.simulations.kinds import ScenarioError
from prunecast.simulations.runner.prepared import PartitionedData
from prunecast.simulations.scenarios import Scenario

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["UnprunableArms", "check_data_and_model", "check_pruning"]

_NAMED = 3  # clients in a message


class UnprunableArms(PolicyError):
    """The model of a scenario cannot be pruned as some of its arms ask; says so of the first.

    Attributes:
        refused: why, by arm.
    """

    def __init__(self, refused: Mapping[str, str]) -> None:
        super().__init__(next(iter(refused.values())))
        self.refused = refused


def check_data_and_model(scenario: Scenario, data: PartitionedData) -> None:
    """Look at every client's examples, and train the model on one batch of one client.

    Args:
        scenario: what is to be run; its factory can be imported.
        data: loaded and spread.

    Raises:
        DataError: a client has no example, a batch of it cannot be trained on, or targets do not
            suit what the model returns.
        ScenarioError: the factory makes no model, or there is a release and the task cannot compare
            what a device answers.
    """
    training, held_out, clients = data
    sizes = [len(chosen) for chosen in clients]
    if empty := [number for number, size in enumerate(sizes) if not size]:
        raise DataError(
            f"{_clients(empty)} without examples, of {len(training)} to train on: lower "
            "clients.count, or change the partition"
        )
    module = _model(scenario)
    for examples in (training, held_out):
        _check_indices(scenario, module, examples)
    number, batch = _telling_batch(training, clients, scenario.training.batch_size)
    if len(batch) == 1:  # every other client has as few
        _check_single_examples(scenario, module, training, clients)
    what = f"a batch of {len(batch)} examples of client {number}"
    with keyed("model.factory"):
        outputs = _train(scenario, module, batch, what)
    targets = np.concatenate([training.targets, held_out.targets])
    with keyed("data.targets"):
        scenario.task.check(outputs, targets)
    with keyed("training.batch_size"):
        _check_single_examples(scenario, module, training, clients)
    with keyed("model.factory"):
        _evaluate(scenario, module, held_out)


def check_pruning(scenario: Scenario, data: PartitionedData) -> None:
    """See of every arm that its model can be pruned as its policy asks.

    Args:
        scenario: what is to be run; its model was found to train.
        data: loaded and spread.

    Raises:
        UnprunableArms: weights or channels cannot go; names arm, key and remedy.
    """
    import torch

    from prunecast.compression.flower import dense_arrays, set_apart
    from prunecast.compression.pruning.plan import PlanError
    from prunecast.server.federation.errors import FederationError
    from prunecast.server.federation.publishing.masks.prunable import check_model, frozen_parameters
    from prunecast.server.federation.run import initial_arrays
    from prunecast.server.federation.shrinking.choosing import module_chooser
    from prunecast.server.federation.shrinking.removals import check_channels

    arms = {name: (arm, arm.grid_policy()) for name, arm in scenario.trained_arms().items()}
    pruned = {
        n: (a, p) for n, (a, p) in arms.items() if p.target or p.channels_at or p.tried_structures
    }
    if not pruned:
        return
    network, inputs = scenario.model.network(), data[1].take(np.arange(2)).inputs.values()
    module, first = initial_arrays(network, seed=scenario.seed)
    frozen = frozen_parameters(module)
    choose = module_chooser(network, lambda: tuple(map(torch.from_numpy, inputs)))
    refused: dict[str, str] = {}
    for name, (arm, policy) in pruned.items():
        arrays = arm.initial(first, scenario)
        try:
            check_model(policy, arrays, scenario.rounds, frozen=frozen)
            schedule = policy.pruning(scenario.rounds).channels
            master = dense_arrays(set_apart(arrays)[0])
            tries = policy.tried_structures
            check_channels(schedule, choose, master, scenario.rounds, tries=tries)
        except (FederationError, PlanError) as error:
            refused[name] = f"arms.{name}: {error}"
    if refused:
        raise UnprunableArms(refused)


def _clients(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:_NAMED])) + (", ..." if len(numbers) > _NAMED else "")
    return f"client {named} is" if len(numbers) == 1 else f"clients {named} are"


def _model(scenario: Scenario) -> nn.Module:
    import torch

    make = scenario.model.network()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(scenario.seed)
            module = make()
    except Exception as error:  # of the user's code
        raise ScenarioError(
            "model.factory",
            f"{scenario.model.factory} fails: {type(error).__name__}: {first_line(error)}",
            "correct it, or model.options, which are all it is called with",
        ) from error
    if not isinstance(module, torch.nn.Module):
        made = f"{scenario.model.factory} returns a {type(module).__name__}"
        raise ScenarioError("model.factory", made, "return a torch.nn.Module")
    return module.to(_device(scenario))


def _device(scenario: Scenario) -> torch.device:
    """Where clients train: some layers run nowhere else."""
    import torch

    from prunecast.client.training.trainer import best_device

    named = scenario.training.device
    return best_device() if named == "auto" else torch.device(named)


def _inputs(scenario: Scenario, batch: Examples) -> list[Tensor]:
    import torch

    device = _device(scenario)
    return [torch.from_numpy(np.ascontiguousarray(v)).to(device) for v in batch.inputs.values()]


def _check_indices(scenario: Scenario, module: nn.Module, examples: Examples) -> None:
    """The largest and smallest of whole numbers, which may be rows of a table that lacks them."""
    import torch

    for name, values in examples.inputs.items():
        if values.dtype.kind not in "iu" or not values.size:
            continue
        flat = values.reshape(len(values), -1)
        ends = np.unique([flat.min(axis=1).argmin(), flat.max(axis=1).argmax()])
        try:
            module.eval()
            with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                module(*_inputs(scenario, examples.take(ends)))
        except IndexError as error:
            raise DataError(
                f"data.inputs: input {name!r} reaches from {flat.min()} to {flat.max()}, for which "
                f"the model has no row ({first_line(error)}): count from 0, or set in "
                "model.options how many there are"
            ) from error
        except Exception:  # training on a batch says what it is
            return


def _infinite(examples: Examples) -> NDArray[np.bool_]:
    """Which examples hold an infinity."""
    found = np.zeros(len(examples), bool)
    for values in examples.inputs.values():
        if values.dtype.kind == "f":
            found |= np.isinf(values.reshape(len(values), -1)).any(axis=1)
    return found


def _telling_batch(
    training: Examples, clients: Sequence[NDArray[np.int64]], size: int
) -> tuple[int, Examples]:
    """A client and a batch of it: one that holds an infinity, or else the client with most."""
    odd = _infinite(training)
    most = int(np.argmax([len(chosen) for chosen in clients]))
    number = next((n for n, chosen in enumerate(clients) if odd[chosen].any()), most)
    chosen = clients[number]
    order = np.argsort(~odd[chosen], kind="stable")
    return number, training.take(chosen[order][:size])


def _train(scenario: Scenario, module: nn.Module, batch: Examples, what: str) -> NDArray[Any]:
    """One step forward and backward, as a client does them; the outputs."""
    import torch

    task = scenario.task
    try:
        with torch.random.fork_rng(devices=[]):
            module.train()
            outputs = module(*_inputs(scenario, batch))
            if not isinstance(outputs, torch.Tensor):
                raise DataError(
                    f"the model returns a {type(outputs).__name__}: return one tensor, the "
                    "example first"
                )
            found: NDArray[Any] = outputs.detach().float().cpu().numpy()
            with keyed("data.targets"):
                task.check(found, batch.targets)
            loss = task.training_loss(outputs, torch.from_numpy(batch.targets).to(outputs.device))
            loss.backward()  # type: ignore[no-untyped-call]
            module.zero_grad(set_to_none=True)
    except DataError:
        raise
    except Exception as error:  # torch raises many, and the model is the user's
        raise DataError(
            f"{what} ({_shapes(batch)}) cannot be trained on: {type(error).__name__}: "
            f"{first_line(error)}; make data and model fit"
        ) from error
    _check_loss(loss.item(), batch, what)
    return found


def _check_loss(loss: float, batch: Examples, what: str) -> None:
    if math.isfinite(loss):
        return
    held = [n for n, v in batch.inputs.items() if v.dtype.kind == "f" and np.isinf(v).any()]
    key, reason = "model", "scale the inputs, or let the model begin with other weights"
    if held:
        key, reason = "data.inputs", f"input {held[0]!r} holds an infinity, replace it"
    raise DataError(f"{key}: {what} gives a loss of {loss} before any training: {reason}")


def _shapes(batch: Examples) -> str:
    return ", ".join(f"{n} {v.dtype}{list(v.shape)}" for n, v in batch.inputs.items())


def _check_single_examples(
    scenario: Scenario, module: nn.Module, training: Examples, clients: Sequence[NDArray[np.int64]]
) -> None:
    """Batches of one example, which some layers refuse: normalisation over a batch does."""
    size, sizes = scenario.training.batch_size, [len(chosen) for chosen in clients]
    single = [n for n, count in enumerate(sizes) if count % size == 1 or size == 1]
    if not single:
        return
    number = single[0]
    try:
        _train(
            scenario, module, training.take(clients[number][:1]), f"one example of client {number}"
        )
    except DataError as error:
        if error.__cause__ is None:
            raise  # what it says has nothing to do with how many there are
        remedy = "lower clients.count or raise partition.min_size, so that each has more"
        if 1 not in sizes:
            other = range(size + 1, max(sizes) + 2)
            fits = next(b for b in other if all(count % b != 1 for count in sizes))
            remedy = f"choose training.batch_size = {fits}"
        raise DataError(
            f"{_clients(single)} left with a batch of a single example ({sizes[number]} examples "
            f"in batches of {size}): {remedy} ({error})"
        ) from error


def _evaluate(scenario: Scenario, module: nn.Module, held_out: Examples) -> None:
    """The metric on held-out examples, as it is measured after every round."""
    import torch

    order = np.argsort(~_infinite(held_out), kind="stable")  # an infinity, if there is one
    batch = held_out.take(order[: scenario.training.batch_size])
    try:
        module.eval()
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            found = module(*_inputs(scenario, batch))
            targets = torch.from_numpy(batch.targets).to(found.device)
            loss = float(scenario.task.training_loss(found, targets))
            outputs = found.cpu().numpy()
            scenario.task.score(outputs, batch.targets)
    except Exception as error:  # torch raises many, and the model is the user's
        raise DataError(
            f"held-out examples ({_shapes(batch)}) cannot be measured: {type(error).__name__}: "
            f"{first_line(error)}; make data and model fit"
        ) from error
    _check_loss(loss, batch, f"a batch of {len(batch)} held-out examples")
    if scenario.release is not None:
        _check_comparable(scenario, outputs)


def _check_comparable(scenario: Scenario, outputs: NDArray[Any]) -> None:
    """Whether the task can tell what a device answers from what the server did."""
    task, remedy = scenario.task, "mend its method `different`, or leave out [release]"
    try:
        different = len(task.different(outputs, outputs.copy()))
    except Exception as error:  # of the user's code
        problem = f"{task.kind()} cannot compare what a device answers ({first_line(error)})"
        raise ScenarioError("task.kind", problem, remedy) from error
    if different:
        raise ScenarioError(
            "task.kind",
            f"{task.kind()} finds {different} of {len(outputs)} answers other than themselves",
            remedy,
        )

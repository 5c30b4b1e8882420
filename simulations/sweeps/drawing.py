"""Which points a sweep trains: Optuna's samplers, so that nothing but the seed decides.

What is drawn for trial n follows from the sweep's seed, n, and, with "nsga2", from how the
generations before came out; a generation is drawn as a whole, once the one before is finished. So
neither the number of processes nor an interruption changes which points are trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from prunecast.simulations.sweeps import Parameter, SweepSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = ["draw", "quiet_optuna", "trial_of", "unfinished"]

Point = dict[str, Any]


def draw(study: Study, spec: SweepSpec, *, idle: bool) -> list[tuple[int, Point]]:
    """Draw what may be drawn now: numbers of trials, and their points.

    Args:
        study: gets the trials, as running ones.
        spec: of the sweep.
        idle: whether every trial that was drawn has ended.
    """
    number = len(study.get_trials(deepcopy=False))
    batch = 1
    if spec.sampler == "nsga2":
        if not idle:  # a generation follows from the whole one before
            return []
        batch = spec.population - number % spec.population
    made = []
    for _ in range(min(batch, spec.count - number)):
        study.sampler = _sampler(spec, len(study.get_trials(deepcopy=False)))
        trial = study.ask(_distributions(spec))
        made.append((trial.number, dict(trial.params)))
    return made


def unfinished(study: Study, spec: SweepSpec) -> Iterator[tuple[int, Point]]:
    """What was drawn and not trained to the end, when the sweep was interrupted."""
    from optuna.trial import TrialState

    for frozen in study.get_trials(states=[TrialState.RUNNING]):
        if len(frozen.params) < len(spec.space()):
            # killed between drawing the number and drawing the point
            study.sampler = _sampler(spec, frozen.number)
            trial = trial_of(study, frozen)
            for name, distribution in _distributions(spec).items():
                trial._suggest(name, distribution)
        yield frozen.number, dict(study.trials[frozen.number].params)


def _sampler(spec: SweepSpec, number: int) -> BaseSampler:
    from optuna import samplers

    if spec.sampler == "grid":
        return samplers.GridSampler({p.key: p.points() for p in spec.space()}, seed=spec.seed)
    # one for each trial: nothing else of its state would outlive an interruption
    seed = int(np.random.SeedSequence([spec.seed, number]).generate_state(1)[0])
    if spec.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.NSGAIISampler(population_size=spec.population, seed=seed)


def _distributions(spec: SweepSpec) -> dict[str, BaseDistribution]:
    return {p.key: _distribution(p, spec.sampler) for p in spec.space()}


def _distribution(parameter: Parameter, sampler: str) -> BaseDistribution:
    from optuna import distributions

    if sampler == "grid" or parameter.choices:
        return distributions.CategoricalDistribution(parameter.points())
    low, high, step, log = parameter.low, parameter.high, parameter.step, parameter.log
    if parameter.whole:
        return distributions.IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return distributions.FloatDistribution(float(low), float(high), log=log, step=step)


def trial_of(study: Study, frozen: FrozenTrial) -> Trial:
    """The trial that a frozen one is of, to write what it came to."""
    from optuna.trial import Trial

    return Trial(study, frozen._trial_id)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without lines of its own, which tell what events do."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(before)

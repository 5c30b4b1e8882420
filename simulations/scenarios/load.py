"""Read and check scenario files."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import typing
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from prunecast.compression.schemes import SCHEMES, BadConfig, scheme
from prunecast.simulations.scenarios.errors import ScenarioError
from prunecast.simulations.scenarios.schema import (
    SCHEMA,
    ArmSpec,
    ReleaseSpec,
    Scenario,
)

__all__ = ["load_scenario", "packaged_scenarios", "scenario_from_mapping"]

_T = TypeVar("_T")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ARM_KEYS = {
    "dense": {"kind"},
    "prunecast": {"kind", "preset", "policy"},
    "scheme": {"kind", "scheme", "options"},
    "recoded": {"kind", "of", "codec", "level"},
}


def packaged_scenarios() -> list[str]:
    """Names of the scenarios that come with the package."""
    folder = files("prunecast.simulations.scenarios")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load_scenario(source: Path | str) -> Scenario:
    """Read a scenario.

    Args:
        source: path of a TOML file, or the name of a packaged scenario such as "demo".

    Raises:
        ScenarioError: there is no such file, it is no TOML, or a key of it is unusable.
    """
    if str(source) in packaged_scenarios():
        text = files("prunecast.simulations.scenarios").joinpath(f"{source}.toml").read_text()
        base = None
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            names = ", ".join(packaged_scenarios())
            raise ScenarioError(
                "", f"cannot read {source} ({reason})", f"give a TOML file, or one of: {names}"
            ) from error
        base = Path(source).parent
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError("", f"{source} is not TOML ({error})", "correct that line") from error
    scenario = scenario_from_mapping(table)
    if base is not None and scenario.data.path:
        data = dataclasses.replace(scenario.data, path=str(base / scenario.data.path))
        scenario = dataclasses.replace(scenario, data=data)
    return scenario


def scenario_from_mapping(table: Mapping[str, Any]) -> Scenario:
    """Build a scenario from parsed TOML (or JSON), checking every key.

    Raises:
        ScenarioError: names the key, what is wrong with it, and the remedy.
    """
    table = dict(table)
    schema = table.pop("schema", None)
    if schema != SCHEMA:
        found = "is missing" if schema is None else f"is {schema!r}"
        raise ScenarioError("schema", found, f"this version reads schema = {SCHEMA}")
    arms = table.pop("arms", None)
    release = table.pop("release", None)
    scenario = _build(Scenario, table, "")
    if arms is not None:
        scenario = dataclasses.replace(scenario, arms=_arms(arms))
    if release is not None:
        scenario = dataclasses.replace(scenario, release=_build(ReleaseSpec, release, "release"))
    _check(scenario)
    return scenario


def _arms(table: object) -> dict[str, ArmSpec]:
    arms = {}
    for name, entry in _table(table, "arms").items():
        key = f"arms.{name}"
        if not _NAME.fullmatch(name):
            raise ScenarioError(key, "names files, so it cannot be used", "use a-z 0-9 . _ -")
        kind = _table(entry, key).get("kind", "prunecast")
        _choice(f"{key}.kind", kind, _ARM_KEYS)
        for wrong in sorted(set(entry) - _ARM_KEYS[kind]):
            allowed = ", ".join(sorted(_ARM_KEYS[kind]))
            raise ScenarioError(
                f"{key}.{wrong}", f"means nothing in an arm of kind {kind!r}", f"keys: {allowed}"
            )
        arms[name] = _build(ArmSpec, entry, key)
    return arms


def _table(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ScenarioError(key, f"is {value!r}", f"it is a table: write [{key}]")
    return dict(value)


def _build(cls: type[_T], value: object, path: str) -> _T:
    table = _table(value, path or "scenario")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, given in table.items():
        key = f"{path}.{name}" if path else name
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(sorted(known))}"
            raise ScenarioError(key, "unknown key", hint)
        made[name] = _value(hints[name], given, key)
    return cls(**made)


def _value(hint: Any, given: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, given, key)
    if hint in (float, float | None):
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ScenarioError(key, f"is {given!r}", "it must be a number")
        if not math.isfinite(given):
            raise ScenarioError(key, f"is {given!r}", "it must be finite")
        return float(given)
    if hint is int:
        if isinstance(given, bool) or not isinstance(given, int):
            raise ScenarioError(key, f"is {given!r}", "it must be a whole number")
        return given
    if hint is str:
        if not isinstance(given, str):
            raise ScenarioError(key, f"is {given!r}", "it must be a string in quotes")
        return given
    return _table(given, key)


def _choice(key: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        offered = ", ".join(sorted(allowed))
        remedy = f"choose one of {offered}" if offered else "there is none to choose: add one"
        raise ScenarioError(key, f"is {value!r}", remedy)


def _least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ScenarioError(key, f"is {value}", f"it must be at least {least}")


def _check(s: Scenario) -> None:
    if not _NAME.fullmatch(s.name):
        raise ScenarioError("name", f"is {s.name!r}", "it names a folder: use a-z 0-9 . _ -")
    _least("seed", s.seed, 0)
    _least("rounds", s.rounds, 1)
    _choice("data.source", s.data.source, ("mnist-5k", "npz"))
    if (s.data.source == "npz") != bool(s.data.path):
        raise ScenarioError("data.path", "goes with source = 'npz' only", "give both or neither")
    _least("data.held_out", s.data.held_out, 1)
    _choice("partition.kind", s.partition.kind, ("dirichlet", "iid"))
    _positive("partition.alpha", s.partition.alpha)
    _least("partition.min_size", s.partition.min_size, 1)
    _least("clients.count", s.clients.count, 1)
    _positive("clients.fraction", s.clients.fraction)
    _most("clients.fraction", s.clients.fraction, 1)
    _least("training.epochs", s.training.epochs, 1)
    _least("training.batch_size", s.training.batch_size, 1)
    _positive("training.learning_rate", s.training.learning_rate)
    _positive("training.learning_rate_decay", s.training.learning_rate_decay)
    _most("training.learning_rate_decay", s.training.learning_rate_decay, 1)
    _least("training.momentum", s.training.momentum, 0)
    _least("training.weight_decay", s.training.weight_decay, 0)
    _choice("training.device", s.training.device, ("auto", "cpu", "cuda"))
    _choice("training.mixed_precision", s.training.mixed_precision, ("auto", "on", "off"))
    _choice("engine.backend", s.engine.backend, ("ray", "inline"))
    _least("engine.concurrent", s.engine.concurrent, 1)
    _least("engine.cpus", s.engine.cpus, 1)
    _least("engine.gpus", s.engine.gpus, 0)
    _choice("model.initial", s.model.initial, ("factory", "drawn"))
    if ":" not in s.model.factory:
        raise ScenarioError(
            "model.factory", f"is {s.model.factory!r}", "write it as package.module:function"
        )
    _check_arms(s)


def _most(key: str, value: float, most: float) -> None:
    if value > most:
        raise ScenarioError(key, f"is {value}", f"it must be at most {most}")


def _positive(key: str, value: float) -> None:
    if value <= 0:
        raise ScenarioError(key, f"is {value}", "it must be above 0")


def _check_arms(s: Scenario) -> None:
    if not s.trained_arms():
        raise ScenarioError(
            "arms", "nothing is trained", "add an arm of kind dense, scheme or prunecast"
        )
    for name, arm in s.arms.items():
        if arm.kind == "scheme":
            _choice(f"arms.{name}.scheme", arm.scheme, SCHEMES)
            try:
                scheme(arm.scheme, **arm.options)
            except BadConfig as error:
                remedy = f"options: {', '.join(SCHEMES[arm.scheme].options())}"
                raise ScenarioError(f"arms.{name}.options", str(error), remedy) from error
        if arm.kind == "recoded":
            dense = [n for n, a in s.arms.items() if a.kind == "dense"]
            _choice(f"arms.{name}.of", arm.of, dense)
            _choice(f"arms.{name}.codec", arm.codec, ("zstd",))
            if not 1 <= arm.level <= 22:
                raise ScenarioError(f"arms.{name}.level", f"is {arm.level}", "use 1 to 22")
    if s.release is not None:
        compressed = [n for n, a in s.arms.items() if a.kind == "prunecast"]
        if not compressed:
            raise ScenarioError("release", "there is no model to release", "add a prunecast arm")
        if s.release.arm:
            _choice("release.arm", s.release.arm, compressed)
        if not _NAME.fullmatch(s.release.name):
            raise ScenarioError("release.name", f"is {s.release.name!r}", "use a-z 0-9 . _ -")
        _least("release.selftest_images", s.release.selftest_images, 1)
        _least("release.every", s.release.every, 0)
        _choice("release.metric", s.release.metric, ("accuracy", "loss"))
        if s.release.improve is not None:
            _positive("release.improve", s.release.improve)

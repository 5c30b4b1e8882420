"""The fuzzer's corpus under its own oracle, and that oracle and mutators do what they are for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz import oracle, seeds
from fuzz.grammar import generate
from fuzz.mutate import cross, mutate, sections
from fuzz.oracle import CONTEXTS, TIGHT, Finding, Mode, check
from fuzz.script import play, record
from prunecast.compression.codec import (
    ChecksumMismatch,
    CodecError,
    LimitExceeded,
    MalformedPayload,
    TensorSpec,
    decode,
    encode,
    errors,
)

CORPUS = sorted((Path(oracle.__file__).parent / "corpus").iterdir())


@cache
def real_payloads() -> list[bytes]:
    return seeds.seeds()


def test_no_input_of_the_corpus_breaks_a_promise() -> None:
    results: Counter[str] = Counter()
    modes: Counter[Mode] = Counter()
    for number, path in enumerate(CORPUS):
        data = path.read_bytes()
        outcome = check(data, thorough=number % 4 == 0, trace=number % 8 == 0)
        assert not outcome.unforeseen, f"{path.name}: {outcome.unforeseen}"
        results[outcome.result] += 1
        if outcome.result == "decoded":
            modes[Mode.of(data[0])] += 1
    only_elsewhere = {"CodecError", "MaskViolation", "NonFiniteError", "QuantiseError"}
    # No input changes the layout of its context, so none has a dtype without a coding; and only
    # what is encoded can have too many dimensions.
    only_elsewhere |= {"UnsupportedDtype", "UnsupportedShape"}
    assert set(results) >= {"decoded", *errors.__all__} - only_elsewhere
    assert {mode.context for mode in modes} == set(range(len(CONTEXTS)))
    assert {mode.order for mode in modes} == set(range(4))
    assert {mode.generous for mode in modes} == {False, True}


def test_real_payloads_of_every_mode_pass() -> None:
    assert len(real_payloads()) > 150
    for number, data in enumerate(real_payloads()):
        outcome = check(data, thorough=number % 4 == 0, trace=number % 8 == 0)
        assert outcome.result == "decoded"


# --- the oracle finds what it is there for -----------------------------------------------------


def wrong(what: Callable[..., Any]) -> Callable[..., Any]:
    def decoder(payload: bytes, **known: Any) -> Any:
        return what(decode(payload, **known))

    return decoder


def raising(error: Exception, cause: Exception | None = None) -> Callable[..., Any]:
    def decoder(*_: Any, **__: Any) -> Any:
        raise error from cause

    return decoder


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (raising(ValueError("oops")), "decode raised ValueError"),
        (raising(RecursionError()), "decode raised RecursionError"),
        (raising(MemoryError()), "decode raised MemoryError"),
        (raising(LimitExceeded(), MemoryError()), "memory ran out"),
        (wrong(lambda t: {k: v.astype("i8") for k, v in t.items()}), "int64"),
        (wrong(lambda t: {k: v.ravel() for k, v in t.items()}), r"\(60,\)"),
        (wrong(lambda t: dict(reversed(t.items()))), "not those of the layout"),
        (wrong(lambda t: {k: v.tolist() for k, v in t.items()}), "not an array"),
        (wrong(lambda t: t | {"w": np.zeros((200, 200), "i4")}), "int32"),
    ],
)
def test_the_oracle_sees_a_broken_decoder(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Any], says: str
) -> None:
    data = next(d for d in real_payloads() if Mode.of(d[0]) == Mode(1))
    monkeypatch.setattr(oracle, "decode", broken)
    with pytest.raises(Finding, match=says):
        check(data)


def test_the_oracle_sees_values_that_do_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(d for d in real_payloads() if Mode.of(d[0]) == Mode(1))
    monkeypatch.setattr(oracle, "encode", lambda t, **k: encode({n: 0 * v for n, v in t.items()}))
    with pytest.raises(Finding, match="encoded again"):
        check(bytes([Mode(0).byte]) + encode({"w": np.arange(5)}), thorough=True)
    monkeypatch.undo()
    check(data, thorough=True)


def test_the_oracle_sees_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(payload: bytes, **known: Any) -> Any:
        np.zeros(16 << 20, np.uint8)
        return decode(payload, **known)

    data = next(d for d in real_payloads() if Mode.of(d[0]) == Mode(1))
    monkeypatch.setattr(oracle, "decode", greedy)
    with pytest.raises(Finding, match="bytes of memory"):
        check(data, trace=True)


def test_the_oracle_sees_what_depends_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moody(dict[str, np.ndarray]):
        @property
        def specs(self) -> dict[str, TensorSpec]:
            return {"w": TensorSpec(np.dtype("i8"), (2,))}

        calls = 0

        def __getitem__(self, name: str) -> np.ndarray:
            if name != "w":
                raise KeyError(name)
            self.calls += 1
            return np.array([self.calls, 0])

    monkeypatch.setattr(oracle, "open_payload", lambda *_, **__: Moody(w=np.zeros(2)))
    with pytest.raises(Finding, match="changed from one reading"):
        check(bytes([Mode(order=2).byte]))


# --- the mutators get past the checksum, and far -----------------------------------------------


def test_a_recorded_head_plays_back_to_itself() -> None:
    for data in real_payloads():
        context = CONTEXTS[Mode.of(data[0]).context]
        ops = record(data[1:], context, TIGHT)
        head, _ = sections(data[1:])
        assert play(ops, data[1:], context, TIGHT, random.Random(0)) == head


def test_most_payloads_made_by_the_grammar_go_deep() -> None:
    early, decoded = 0, 0
    for seed in range(240):
        context = CONTEXTS[seed % 8]
        payload = generate(random.Random(seed), context)
        try:
            decode(payload, context=context, limits=TIGHT)
        except CodecError as error:
            early += not isinstance(error, (MalformedPayload, LimitExceeded))
        else:
            decoded += 1
    assert decoded > 80
    assert early < 36


def test_mutations_keep_the_envelope_intact() -> None:
    rng = random.Random(3)

    def engine(data: bytes, most: int) -> bytes:
        at = rng.randrange(len(data))
        return (data[:at] + rng.randbytes(1) + data[at + 1 :])[:most]

    broken, same, deep = 0, 0, 0
    for seed in range(600):
        data = rng.choice(real_payloads())
        made = mutate(data, 1024, seed, engine)
        if seed % 3 == 0:
            made = cross(data, rng.choice(real_payloads()), 1024, seed)
        assert len(made) <= 1024
        same += made == data
        result = check(made).result
        broken += result == ChecksumMismatch.__name__
        deep += result in ("decoded", MalformedPayload.__name__)
    assert broken < 40
    assert same < 60
    assert deep > 400

"""Replies that fit a number of bytes, or say nothing: what is left out is kept, all of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prunecast.client.training.encoding import compress_reply
from prunecast.client.training.sparing import MOST_COARSER, coarser_rule, fitted, unsent
from prunecast.client.training.store import NonFiniteUpdate
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    UpdateRule,
    decode_update,
    encode_update,
)

RULE = UpdateRule(0.5, 0.5, floor=0.1)


def model_of(*, pruned=False):
    rng = np.random.default_rng(1)
    q = np.rint(rng.normal(size=(60, 40)) * 40).astype(np.int32)
    if pruned:
        q[np.abs(q) < 20] = 0
    tensors = {
        "w": LatticeTensor(q, 0.025, pruned),
        "b": LatticeTensor(np.zeros(60, np.int32), 0.01),
        "running_mean": RawTensor(np.arange(8, dtype=np.float32)),
    }
    return PublishedModel(tensors, 1)


def trained(base, seed=2, scale=0.01):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(array + scale * rng.normal(size=array.shape), array.dtype)
        for name, array in base.arrays().items()
    }


def coder(base, arrays, residual=None):
    def encoded(rule):
        coded = compress_reply(base, arrays, residual or {}, rule)
        return coded, encode_update(base, coded.changes, tensors=coded.tensors)

    return encoded


@pytest.mark.parametrize("part", [0.9, 0.5, 0.3])
def test_a_reply_fits_in_the_finest_steps_that_do(part):
    base = model_of()
    encoded = coder(base, trained(base))
    free = len(encoded(RULE)[1])
    most = int(part * free)
    coded, payload, quarters = fitted(encoded, RULE, most)
    assert len(payload) <= most
    assert 0 < quarters < MOST_COARSER
    # what is one quarter finer does not fit
    assert len(encoded(coarser_rule(RULE, quarters - 1))[1]) > most
    assert coded.dropped["w"].any()


def test_a_reply_that_fits_is_as_the_rule_says():
    base = model_of()
    encoded = coder(base, trained(base))
    _, payload, quarters = fitted(encoded, RULE, 1_000_000)
    assert quarters == 0
    assert payload == encoded(RULE)[1]
    assert fitted(encoded, RULE, 0)[1:] == (payload, 0)
    exact = UpdateRule(0.0)
    assert fitted(encoded, exact, 100)[2] == 0  # exact is exact


def test_what_nothing_can_make_fit_is_told_apart():
    base = model_of()
    assert fitted(coder(base, trained(base)), RULE, 40) is None


def test_coarser_steps_lose_nothing():
    base, arrays = model_of(), trained(model_of())
    coded, payload, _ = fitted(coder(base, arrays), RULE, 700)
    update = decode_update(payload, base)
    got = update.apply("w", update.start("w", base.arrays()))
    np.testing.assert_allclose(got + coded.dropped["w"], arrays["w"], atol=1e-6)


def test_what_is_not_sent_is_the_residual_all_of_it():
    base, arrays = model_of(pruned=True), trained(model_of(pruned=True))
    mask = base["w"].q != 0
    change = (arrays["w"] - base["w"].dense()) * mask
    first = unsent(base, arrays, {}, math.inf)
    np.testing.assert_allclose(first.dropped["w"], change, atol=1e-7)
    assert first.changes == {}
    second = unsent(base, arrays, first.dropped, math.inf)
    np.testing.assert_allclose(second.dropped["w"], 2 * change, atol=1e-6)
    np.testing.assert_allclose(
        second.dropped["b\0either"], 2 * arrays["b"], atol=1e-6
    )  # as a tensor that is all zero has it
    # and what follows takes it along
    coded, payload, _ = fitted(coder(base, arrays, second.dropped), RULE, 0)
    update = decode_update(payload, base)
    got = update.apply("w", update.start("w", base.arrays())) - base["w"].dense()
    np.testing.assert_allclose(got + coded.dropped["w"], 3 * change, atol=1e-5)


def test_only_what_is_below_the_norm_is_not_sent():
    base, arrays = model_of(), trained(model_of())
    norm = math.hypot(np.linalg.norm(arrays["w"] - base["w"].dense()), np.linalg.norm(arrays["b"]))
    assert unsent(base, arrays, {}, 0.999 * norm) is None
    kept = unsent(base, arrays, {}, 1.001 * norm)
    assert kept is not None
    assert unsent(base, arrays, kept.dropped, 1.001 * norm) is None  # by now it is twice that


def test_what_is_no_change_of_the_version_is_sent():
    base, arrays = model_of(), trained(model_of())
    gradients = {name: np.asarray(0.001 * a, a.dtype) for name, a in arrays.items()}
    assert unsent(base, gradients, {}, math.inf) is None
    assert unsent(base, {**arrays, "more": np.ones(3, np.float32)}, {}, math.inf) is None
    assert unsent(base, {**arrays, "text": None}, {}, math.inf) is None
    assert unsent(base, {"running_mean": arrays["running_mean"]}, {}, math.inf) is None
    assert unsent(base, arrays, {"w\0values": np.ones((60, 40))}, math.inf) is None
    with pytest.raises(NonFiniteUpdate):
        unsent(base, {**arrays, "w": np.full((60, 40), np.nan, np.float32)}, {}, math.inf)


@pytest.mark.parametrize("name", ["head", "seen", "w"])
def test_what_no_residual_could_keep_is_sent(name):
    """A tensor that has no lattice, a counter of the app's own, integers in place of floats."""
    exact = {
        "head": RawTensor(np.ones(5, np.float32)),
        "seen": RawTensor(np.zeros(3, np.int64)),
        "bn.num_batches_tracked": RawTensor(np.array(7)),
    }
    base = PublishedModel({**model_of().tensors, **exact}, 1)
    arrays = {**base.arrays(), "bn.num_batches_tracked": np.array(8)}
    arrays["running_mean"] = arrays["running_mean"] + np.float32(1)
    assert unsent(base, arrays, {}, math.inf) is not None
    changed = np.rint(arrays[name]).astype(np.int64) if name == "w" else arrays[name] + 1
    assert unsent(base, {**arrays, name: changed}, {}, math.inf) is None

"""Client-side differential privacy: what is sent never has a larger norm than what was clipped."""

import logging

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM, KEY_NORM_BIT

from prunecast.client.training import compression_mod, contribute_statistics
from prunecast.compression.flower import CLIPPING_NORM, STATISTICS_RECORD
from prunecast.compression.flower.envelope import unpack
from prunecast.server.federation import Policy
from support.federation import initial_arrays, local_step, seed_of, to_arrays, to_record

CLIP = 0.5
ROUNDS = 4


def norm(arrays):
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays)))


def client(store, *mods, scale=1.0, given=None, **options):
    app = ClientApp(mods=[compression_mod(store, **options), *mods])

    def note(message, context, call_next):
        """What was clipped, as the mod outside of this one is given it."""
        reply = call_next(message, context)
        received, replied = (to_arrays(m.content["arrays"]) for m in (message, reply))
        given.append(norm([replied[n].astype("f8") - a for n, a in received.items()]))
        return reply

    if given is not None:
        app = ClientApp(mods=[compression_mod(store), note, *mods])

    @app.train()
    def train(message, context):
        received = to_arrays(message.content["arrays"])
        trained = local_step(received, seed_of(message, context))
        contribute_statistics("gradient", {n: np.abs(a) for n, a in received.items()})
        trained = {n: a + np.float32(scale) * (trained[n] - a) for n, a in received.items()}
        content = {"arrays": to_record(trained), "m": MetricRecord({"num-examples": 1, "loss": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


class Seen(FedAvg):
    """Notes the norms of changes as the server reads them, and what else came."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
        self.norms, self.bits = [], []

    def configure_train(self, server_round, arrays, config, grid):
        self.sent = to_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            assert not reply.has_error(), reply.error.reason
            got = to_arrays(reply.content["arrays"])
            self.norms.append(norm([got[n].astype("f8") - a for n, a in self.sent.items()]))
            self.bits += [m.get(KEY_NORM_BIT) for m in reply.content.metric_records.values()]
        return super().aggregate_train(server_round, replies)


def fixed(strategy):
    return DifferentialPrivacyClientSideFixedClipping(strategy, 0.01, CLIP, 2)


def adaptive(strategy):
    return DifferentialPrivacyClientSideAdaptiveClipping(
        strategy, 0.01, 2, initial_clipping_norm=CLIP, clipped_count_stddev=0.1
    )


def test_flower_still_calls_its_clipping_norm_so():
    assert CLIPPING_NORM == KEY_CLIPPING_NORM


@pytest.mark.parametrize("up_step", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("preset", ["balanced", "small"])
@pytest.mark.parametrize("scale", [5.0, 0.1])
def test_with_fixed_clipping_no_norm_as_sent_is_above_the_clip(
    federation, tmp_path, preset, scale, up_step
):
    pruned = {"pruning_begin": 0, "pruning_end": 2} if preset == "small" else {}
    policy = Policy.preset(preset, up_step=up_step, **pruned)
    given = []
    app = client(tmp_path / "store", fixedclipping_mod, scale=scale, given=given)
    grid, _, _ = federation(policy, nodes=2, app=app)
    seen = Seen()
    fixed(seen).start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert len(seen.norms) == len(given) == 2 * ROUNDS
    for clipped, sent in zip(given, seen.norms, strict=True):
        assert 0.05 * clipped < sent <= min(CLIP, clipped) * (1 + 1e-6)
    assert (max(given) > 0.9 * CLIP) is (scale > 1)
    assert {e.kind for e in grid.ledger.entries if e.direction == "up"} == {"update"}
    # nothing of what was dropped is kept for another round
    assert not list((tmp_path / "store").rglob("*.residual"))
    assert not list((tmp_path / "store").rglob("*.pending*"))


@pytest.mark.parametrize("scale", [5.0, 0.1])
def test_with_adaptive_clipping_the_bit_arrives_and_the_clip_moves(federation, tmp_path, scale):
    given = []
    app = client(tmp_path / "store", adaptiveclipping_mod, scale=scale, given=given)
    grid, _, _ = federation("balanced", nodes=2, app=app)
    seen = Seen()
    wrapped = adaptive(seen)
    wrapped.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert seen.bits == [int(scale > 1)] * 2 * ROUNDS
    assert wrapped.clipping_norm != CLIP
    for clipped, sent in zip(given, seen.norms, strict=True):
        assert 0 < sent <= clipped * (1 + 1e-6)


def test_where_nothing_is_clipped_there_is_feedback(federation, tmp_path):
    """What the tests above see nothing of."""
    app = client(tmp_path / "store", scale=5.0)
    grid, _, _ = federation("balanced", nodes=2, app=app)
    Seen().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
    assert list((tmp_path / "store").rglob("*.pending*"))


@pytest.mark.parametrize("up_step", [1.5, 3.0])
def test_without_feedback_a_clipping_mod_of_ones_own_is_kept_to(federation, tmp_path, up_step):
    given = []

    def clip(message, context, call_next):
        reply = call_next(message, context)
        received, replied = (to_arrays(m.content["arrays"]) for m in (message, reply))
        change = {n: replied[n] - a for n, a in received.items()}
        factor = np.float32(min(1.0, CLIP / norm(change.values())))
        clipped = {n: a + factor * change[n] for n, a in received.items()}
        reply.content["arrays"] = to_record(clipped)
        return reply

    app = client(tmp_path / "store", clip, scale=5.0, given=given)
    policy = Policy.preset("balanced", up_step=up_step, error_feedback=False)
    grid, _, _ = federation(policy, nodes=2, app=app)
    seen = Seen()
    seen.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert len(seen.norms) == 2 * ROUNDS
    for clipped, sent in zip(given, seen.norms, strict=True):
        assert 0.05 * clipped < sent <= clipped * (1 + 1e-6)


@pytest.mark.usefixtures("unpacked")
def test_what_is_sent_of_noised_replies_depends_on_these_alone(federation, tmp_path, monkeypatch):
    """Post-processing: residuals, too, are made of noised arrays, and of nothing before the noise.

    Two data sets of one node, and noise that makes the very same replies of them: the same bytes.
    """
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.ERROR)
    payloads = []
    for scale in (5.0, 0.3):

        def noised(message, context, call_next, scale=scale):
            mod = LocalDpMod(CLIP, 1.0, 1.0, 1e-5)
            reply = mod(message, context, call_next)
            received = to_arrays(message.content["arrays"])
            rng = np.random.default_rng(seed_of(message, context))
            outcome = {n: a + rng.normal(size=a.shape).astype("f4") for n, a in received.items()}
            reply.content["arrays"] = to_record(outcome)
            return reply

        app = client(tmp_path / str(scale), noised, scale=scale)
        grid, inner, _ = federation("balanced", nodes=1, app=app)
        inner.on_reply = lambda reply: (
            payloads.append(reply.content["arrays"]["prunecast"].data) or reply
        )
        model = to_record(initial_arrays())
        for _ in range(3):
            (reply,) = grid.send_and_receive([Message(RecordDict({"arrays": model}), 1, "train")])
            model = to_record(to_arrays(reply.content["arrays"]))
    assert payloads[:3] == payloads[3:]


def noising(place):
    """Flower's mod, with little noise; behind others, or first among them."""

    def beside(message, context, call_next):
        return call_next(message, context)

    mod = LocalDpMod(CLIP, 0.001, 1.0, 1e-5)
    return [[mod], [beside, beside, mod], [mod, beside]][place]


@pytest.mark.parametrize("up", ["lattice", "stc"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_there_is_no_feedback_of_noised_replies(federation, tmp_path, place, up):
    """What is sent in one round is made of that round's reply, and says as much as it is long."""
    app = client(tmp_path / "store", *noising(place), scale=5.0)
    grid, _, _ = federation(Policy.preset("balanced", up=up), nodes=2, app=app)
    seen = Seen()
    result = seen.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert len(seen.norms) == 2 * ROUNDS
    assert result.arrays is not None
    noise = 0.001 * np.sqrt(2 * np.log(1.25 / 1e-5)) * np.sqrt(3088)
    assert max(seen.norms) < CLIP + 2 * noise
    assert not list((tmp_path / "store").rglob("*.residual"))
    assert not list((tmp_path / "store").rglob("*.pending*"))


def test_feedback_of_noised_replies_is_allowed_by_name(federation, tmp_path):
    """`test_local_differential_privacy_runs_with_feedback`, when it was not asked for."""
    mods = noising(0)
    app = client(tmp_path / "store", *mods, noised_feedback=True)
    grid, _, _ = federation("balanced", nodes=2, app=app)
    seen = Seen()
    result = seen.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert len(seen.norms) == 2 * ROUNDS
    assert result.arrays is not None
    assert list((tmp_path / "store").rglob("*.pending*"))


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(("mods", "told"), [(1, False), (0, True)])
def test_no_statistics_are_told_beside_noised_replies(federation, tmp_path, mods, told, allowed):
    """They are of the data, and nobody noised them; `noised_feedback` is of replies alone."""
    app = client(tmp_path / "store", *noising(0)[:mods], noised_feedback=allowed)
    policy = Policy.preset("small", pruning_criterion="fisher", pruning_begin=1, pruning_end=3)
    grid, inner, _ = federation(policy, nodes=2, app=app)
    keys = set()
    inner.on_reply = lambda reply: keys.update(unpack(reply.content)) or reply
    Seen().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert (STATISTICS_RECORD in keys) is told


def server_side(strategy, kind):
    if kind == "fixed":
        return DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, CLIP, 2)
    return DifferentialPrivacyServerSideAdaptiveClipping(
        strategy, 0.0, 2, initial_clipping_norm=CLIP, clipped_count_stddev=0.1
    )


class Clipped(Seen):
    """Sees what the wrapper made of the replies."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.clipped = [
            norm([to_arrays(r.content["arrays"])[n] - a for n, a in self.sent.items()])
            for r in replies
        ]
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_clipping_on_the_server_is_of_decoded_replies_and_leaves_feedback(
    federation, tmp_path, kind
):
    app = client(tmp_path / "store", scale=5.0)
    grid, _, _ = federation("balanced", nodes=2, app=app)
    seen = Clipped()
    wrapped = server_side(seen, kind)
    result = wrapped.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=ROUNDS)
    assert result.arrays is not None
    assert len(seen.clipped) == 2
    limit = CLIP if kind == "fixed" else np.inf
    assert all(0 < n <= limit * (1 + 1e-5) for n in seen.clipped)
    assert list((tmp_path / "store").rglob("*.pending*"))
    assert {e.kind for e in grid.ledger.entries if e.direction == "up"} == {"update"}

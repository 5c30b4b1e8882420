"""What does not travel as the policy has it is said once, with its remedy, and summed up."""

import gc
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod
from prunecast.server.federation import Policy, Run
from support.federation import initial_arrays, to_arrays, to_record

pytestmark = pytest.mark.usefixtures("unpacked")  # they look into messages


def app_of(tmp_path, reply=lambda arrays: to_record(arrays), mods=()):
    app = ClientApp(mods=[*mods, compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        record = reply(to_arrays(message.content["arrays"]))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app


def send(grid, *records, rounds=1):
    for _ in range(rounds):
        messages = [
            Message(RecordDict({"arrays": record}), node, "train")
            for node, record in enumerate(records, start=1)
        ]
        replies = list(grid.send_and_receive(messages))
    return replies


def told(caplog):
    return [r.getMessage() for r in caplog.records if "array record" in r.getMessage()]


WORDS = np.array(["a", "b"])
OWN = Array("float32", (2,), "my-own-format", b"12345678")


@pytest.mark.parametrize(
    ("tensor", "cause"),
    [
        (Array(WORDS), "tensor 'odd' has dtype <U1, which the codec does not take: make numbers"),
        (Array(np.ones(2, np.complex64)), "tensor 'odd' has dtype complex64"),
        (OWN, "tensor 'odd' is in a serialisation of its own, 'my-own-format': use NumPy's"),
    ],
)
@pytest.mark.parametrize("way", ["down", "up"])
def test_what_travels_as_it_is_is_named_once(federation, tmp_path, caplog, tensor, cause, way):
    odd, usual = ArrayRecord({"odd": tensor}), to_record(initial_arrays())
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        record = odd if way == "up" else usual
        return Message(RecordDict({"arrays": record}), reply_to=message)

    sent = odd if way == "down" else usual
    grid, _, _ = federation("balanced", app=app)
    send(grid, sent, sent, sent, rounds=2)
    (text,) = [text for text in told(caplog) if "verbatim" in text]
    assert text.startswith(f"Node 1: array record 'arrays' went {way} verbatim: {cause}")


def test_personal_models_are_said_to_travel_exactly(federation, tmp_path, caplog):
    grid, _, _ = federation("balanced", app=app_of(tmp_path))
    send(grid, *(to_record(initial_arrays(seed)) for seed in (1, 2, 3)), rounds=2)
    text = told(caplog)[0]
    assert text.startswith(
        "Node 1: array record 'arrays' went down plain: it is of this node alone"
    )


@pytest.fixture(autouse=True)
def _no_grids_of_before():
    gc.collect()


def test_nothing_is_said_where_all_goes_as_it_should(federation, caplog):
    grid, _, _ = federation("small")
    FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
    grid.sum_up()
    assert told(caplog) == []
    assert not [r for r in caplog.records if "Prunecast:" in r.getMessage()]


def test_one_line_at_the_end_sums_it_up(federation, tmp_path, caplog):
    grid, inner, _ = federation("balanced", app=app_of(tmp_path))
    inner.online.discard(3)
    odd = to_record({"odd": WORDS})
    send(grid, odd, odd, odd, rounds=2)
    expected = (
        "Prunecast: 10 of 10 array records did not travel as updates (6 verbatim down, "
        "4 verbatim up); 2 of 6 replies failed, of node 3; the reasons are above"
    )
    alive = weakref.ref(grid)
    del grid
    gc.collect()
    assert alive() is None
    assert [r.getMessage() for r in caplog.records if "Prunecast:" in r.getMessage()] == [expected]


def test_a_run_sums_it_up(federation, tmp_path, caplog):
    _, inner, _ = federation("balanced", app=app_of(tmp_path, lambda _: to_record({"x": WORDS})))
    run = Run(inner, OwnAverage(fraction_evaluate=0.0))
    run.start(to_record(initial_arrays()), num_rounds=1)
    said = [r.getMessage() for r in caplog.records if "did not travel" in r.getMessage()]
    assert len(said) == 1


class OwnAverage(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None, None


# -- the order of mods ----------------------------------------------------------------------------


def changing(part):
    """A mod that changes the content of what passes, on the way down or up."""

    def mod(message, context, call_next):
        if part == "nothing":
            message.content["arrays"].to_numpy_ndarrays()  # as those that clip or add noise
        if part == "control":
            del message.content["prunecast"]
        reply = call_next(message, context)
        if part == "reply":
            reply.content["arrays"] = to_record(initial_arrays(7))
        return reply

    return mod


def test_a_mod_in_front_that_reads_arrays_is_told_apart(federation, tmp_path, caplog):
    grid, _, _ = federation("balanced", app=app_of(tmp_path, mods=[changing("nothing")]))
    (reply,) = send(grid, to_record(initial_arrays()))
    assert reply.has_error()
    (text,) = [r.getMessage() for r in caplog.records if "put it first" in r.getMessage()]
    assert text.startswith("Node 1: ")
    assert text.index("Error") < text.index("put it first")


def test_a_mod_in_front_that_drops_the_control_record(federation, tmp_path):
    grid, _, _ = federation("balanced", app=app_of(tmp_path, mods=[changing("control")]))
    (reply,) = send(grid, to_record(initial_arrays()))
    assert "Put compression_mod() first" in reply.error.reason


def test_a_mod_in_front_that_replaces_what_was_coded(federation, tmp_path, caplog):
    grid, _, _ = federation("balanced", app=app_of(tmp_path, mods=[changing("reply")]))
    (reply,) = send(grid, to_record(initial_arrays()))
    assert not reply.has_error()
    (text,) = told(caplog)
    assert "put compression_mod() first" in text


def test_a_scheme_codes_what_it_can_and_says_what_it_cannot(federation, tmp_path, caplog):
    replies = iter([to_record({"fc.weight": np.ones((64, 40), np.float32)}), to_record({"n": N})])
    app = app_of(tmp_path, lambda _: next(replies))
    grid, _, _ = federation(Policy.preset("balanced", up="stc"), app=app)
    for expected in ([], ["Node 1: array record 'arrays' went up verbatim: it has no"]):
        send(grid, to_record(initial_arrays()))
        assert [text[: len(expected[0])] for text in told(caplog)] == expected


N = np.arange(9)

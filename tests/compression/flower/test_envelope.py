"""A message in one record: nothing lost, small, and nothing believed."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.flower import CONTROL_RECORD, coded_record, payload_of, payload_record
from prunecast.compression.flower.envelope import PACKED_RECORD, is_packed, pack, unpack
from prunecast.compression.flower.internals import object_bytes
from prunecast.compression.versions import BadPayload

NUMBERS = st.one_of(
    st.integers(-(2**62) + 1, 2**62 - 1), st.floats(allow_nan=False), st.sampled_from([-0.0, 0.0])
)
NAMES = st.text(max_size=12) | st.sampled_from(["num-examples", "server-round", "eval-loss"])
METRICS = st.dictionaries(NAMES, st.one_of(NUMBERS, st.lists(st.integers(0, 9), max_size=3)))
CONFIGS = st.dictionaries(
    NAMES, st.one_of(NUMBERS, st.booleans(), st.text(max_size=9), st.binary(max_size=9))
)


def control(data: bytes = b"told") -> ConfigRecord:
    return ConfigRecord({"instruction": data})


def records() -> st.SearchStrategy[object]:
    return st.one_of(
        METRICS.map(MetricRecord),
        CONFIGS.map(ConfigRecord),
        st.binary(max_size=50).map(payload_record),
        st.just(ArrayRecord()),
        st.just(ArrayRecord({"w": Array(np.arange(3.0))})),
        st.just(coded_record(b"coded", {"text": Array(np.array(["a"]))})),
    )


@given(st.dictionaries(NAMES, records(), max_size=5), st.sampled_from(["instruction", "report"]))
def test_what_is_packed_comes_back_in_its_order(found, field):
    content = RecordDict(
        {k: r for k, r in found.items() if k not in (CONTROL_RECORD, PACKED_RECORD)}
    )
    content[CONTROL_RECORD] = ConfigRecord({field: b"\0\1"})
    packed = pack(content)
    assert is_packed(packed)
    again = unpack(packed)
    assert list(again) == list(content)
    for key, record in content.items():
        assert type(again[key]) is type(record)
        assert again[key] == record
        for one, other in zip(again[key].values(), record.values(), strict=True):
            assert type(one) is type(other)
            assert repr(one) == repr(other)  # -0.0 is not 0.0


def test_an_envelope_is_small():
    payload = payload_record(b"\x07" * 3000)
    content = RecordDict({"arrays": payload, "config": ConfigRecord({"server-round": 6})})
    content[CONTROL_RECORD] = control(bytes(20))
    assert object_bytes(pack(content)) - 3000 < 250 < object_bytes(content) - 3000 - 400
    # what every usual name costs beside its value: one byte
    usual = [MetricRecord({"num-examples": 3}), ConfigRecord({"server-round": 3})]
    long = [type(r)({name[:-1] + "?": 3 for name in r}) for r in usual]
    for short, other in zip(usual, long, strict=True):
        told = [RecordDict({"metrics": r, CONTROL_RECORD: control()}) for r in (short, other)]
        one, two = (object_bytes(pack(content)) for content in told)
        assert two - one == 12


def test_a_record_of_the_packed_ones_name_keeps_the_others_as_they_are():
    content = RecordDict({"=": ConfigRecord({"m": b"a user's"}), CONTROL_RECORD: control()})
    assert pack(content) is content


def test_large_payloads_stay_records_of_their_own_and_order_is_kept():
    content = RecordDict({"arrays": payload_record(bytes(40_000)), CONTROL_RECORD: control()})
    assert pack(content) is content
    assert unpack(content) is content
    without = RecordDict({"arrays": payload_record(b"small")})
    assert pack(without) is without


def test_records_that_were_added_on_the_way_are_there():
    packed = pack(RecordDict({"arrays": payload_record(b"p"), CONTROL_RECORD: control()}))
    packed["arrays"] = payload_record(b"another")
    packed["more"] = MetricRecord({"n": 1})
    again = unpack(packed)
    assert list(again) == ["arrays", CONTROL_RECORD, "more"]
    assert payload_of(again["arrays"]) == b"another"


@given(st.binary(max_size=80))
def test_any_bytes_are_a_content_or_refused(data):
    content = RecordDict({PACKED_RECORD: ConfigRecord({"m": data})})
    try:
        again = unpack(content)
    except BadPayload:
        return
    assert sum(len(key) for key in again) <= 20 * len(data)


@given(st.data())
def test_a_changed_or_shortened_record_is_a_content_or_refused(draw):
    content = RecordDict(
        {
            "arrays": payload_record(b"payload"),
            "metrics": MetricRecord({"num-examples": 3, "loss": [0.5, 1.0]}),
            "config": ConfigRecord({"text": "abc", "server-round": 5}),
            CONTROL_RECORD: control(),
        }
    )
    data = bytearray(pack(content)[PACKED_RECORD]["m"])
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] = draw.draw(st.integers(0, 255))
    data = data[: draw.draw(st.integers(0, len(data)))]
    with suppress(BadPayload):
        unpack(RecordDict({PACKED_RECORD: ConfigRecord({"m": bytes(data)})}))


@pytest.mark.parametrize("value", ["text", 3, [1]])
def test_a_record_of_no_bytes_is_refused(value):
    with pytest.raises(BadPayload, match="damaged"):
        unpack(RecordDict({PACKED_RECORD: ConfigRecord({"m": value})}))

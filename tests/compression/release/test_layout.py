from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.release import LayoutError
from prunecast.compression.release.layout import ALIGNMENT, WeightsLayout, place
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor

ROWS = [
    ("a::q", "a", "q", "int8", (3, 5)),
    ("a::step", "a", "step", "float32", ()),
    ("b", "b", "raw", "int64", (2,)),
    ("a.dense", "a", "dense", "float32", (3, 5)),
]


def _model() -> PublishedModel:
    q = np.arange(-7, 8).reshape(3, 5)
    return PublishedModel({"a": LatticeTensor(q, 0.5), "b": RawTensor(np.array([1, -1], np.int64))})


def test_every_segment_lies_where_the_layout_says(tmp_path: Path) -> None:
    layout = place(ROWS)
    model = _model()
    digest = layout.write(model, tmp_path / "weights.bin")
    data = (tmp_path / "weights.bin").read_bytes()
    assert len(data) == layout.size
    assert hashlib.sha256(data).hexdigest() == digest == layout.digest(model)
    for s in layout.segments:
        assert s.offset % ALIGNMENT == 0
        found = np.frombuffer(
            data, s.dtype, count=max(1, s.length // np.dtype(s.dtype).itemsize), offset=s.offset
        ).reshape(s.shape)
        assert np.array_equal(found, s.values(model))


def test_layout_survives_its_json() -> None:
    layout = place(ROWS)
    assert WeightsLayout.from_bytes(layout.to_bytes()) == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "schema"),
        (lambda d: d.update(size=d["size"] + 1), "end at byte"),
        (lambda d: d["segments"][1].__setitem__(0, "a::q"), "twice"),
        (lambda d: d["segments"][1].__setitem__(5, 0), "overlaps"),
        (lambda d: d["segments"][1].__setitem__(5, 2**40), "overlaps"),
        (lambda d: d["segments"][0].__setitem__(5, 8), "aligned"),
        (lambda d: d["segments"][0].__setitem__(4, [-1]), "shape"),
        (lambda d: d["segments"][0].__setitem__(4, [2**70]), "shape"),
        (lambda d: d["segments"][0].__setitem__(3, "object"), "unknown types"),
        (lambda d: d["segments"][0].__setitem__(2, "code"), "unknown types"),
        (lambda d: d["segments"][0].pop(), "six fields"),
        (lambda d: d.update(segments=None), "lacks"),
    ],
)
def test_malformed_layouts_are_refused(change, message: str) -> None:
    document = json.loads(place(ROWS).to_bytes())
    change(document)
    with pytest.raises(LayoutError, match=message):
        WeightsLayout.from_bytes(json.dumps(document).encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_our_error(data: bytes) -> None:
    with pytest.raises(LayoutError):
        WeightsLayout.from_bytes(data)


def test_a_model_of_another_release_is_refused(tmp_path: Path) -> None:
    layout = place(ROWS)
    wider = PublishedModel({**_model().tensors, "a": LatticeTensor(np.full((3, 5), 300), 0.5)})
    with pytest.raises(LayoutError, match=r"int16\[3, 5\], the layout places int8"):
        layout.write(wider, tmp_path / "w")
    with pytest.raises(LayoutError, match="no tensor 'b'"):
        layout.digest(PublishedModel({"a": _model().tensors["a"]}))
    raw = PublishedModel({**_model().tensors, "a": RawTensor(np.zeros((3, 5), np.int8))})
    with pytest.raises(LayoutError, match="expects a lattice"):
        layout.digest(raw)


@pytest.mark.parametrize("more", [b'"size":0,', b'"schema":2,"schema":1,', b'"x":NaN,'])
def test_documents_that_two_readers_could_read_differently(more: bytes) -> None:
    whole = place(ROWS).to_bytes()
    assert whole.startswith(b"{")
    with pytest.raises(LayoutError, match=r"given twice|NaN"):
        WeightsLayout.from_bytes(b"{" + more + whole[1:])

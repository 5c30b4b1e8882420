"""What files of named data sets become: small ones made here, and ones that hold something else."""

from __future__ import annotations

import dataclasses
import io
import lzma
import os
import pickle

import numpy as np
import pytest

from prunecast.simulations.data import DATA, DataError, load_examples
from prunecast.simulations.data.named import cache, catalogue, graphs, plays, series, tables
from prunecast.simulations.data.named.pickles import unpickle
from prunecast.simulations.partitions import PARTITIONS
from prunecast.simulations.tasks import TASKS


def named(arrays, monkeypatch, tmp_path, **keys):
    """The data source of a data set that has these arrays, in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nbytes = sum(values.nbytes for values in arrays.values())
    data = dataclasses.replace(
        catalogue.CATALOGUE["ml-100k"], name="tiny", nbytes=nbytes, sha256=cache.digest(arrays)
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", data)
    path = cache.cached_path(data)
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)
    return DATA.read({"source": "named", "name": "tiny", **keys}, "data")


# -- series ---------------------------------------------------------------------------------------


def watch(recordings, *, dtype=np.float64) -> bytes:
    held = {
        "X": [np.arange(n * 6, dtype=dtype).reshape(n, 6) for n in recordings],
        "y": np.arange(len(recordings)) % 7,
        "subject": np.arange(len(recordings)) % 10 + 1,
        "y_labels": ["PEN", "ABD"],
    }
    target = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        target, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    return target.getvalue() + pickle.dumps(np.array(held, dtype=object), protocol=2)


def test_recordings_become_windows_that_do_not_overlap():
    arrays = series._activity({"w.npy": watch([250, 99, 100])})
    assert arrays["x_train"].shape == (3, 6, 100)
    assert arrays["x_train"][1, 2].tolist() == [6.0 * step + 2 for step in range(100, 200)]
    assert arrays["y_train"].tolist() == [0, 0, 2]
    assert arrays["id_train"].tolist() == [0, 0, 2]


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(("function", "argument"), [(os.system, "touch made"), (eval, "1")])
def test_a_pickle_calls_nothing_else(function, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        content = pickle.dumps([Hostile(function, argument)], protocol=protocol)
        with pytest.raises(DataError, match=r"w\.npy cannot be read: it would call"):
            unpickle(content, "w.npy")
    assert not list(tmp_path.iterdir())


def test_damaged_recordings_are_named():
    whole = watch([100])
    for content in (b"", b"GIF89a", whole[:200], whole[:-1], whole[:128] + b"\x80\x02N."):
        with pytest.raises(DataError, match=r"w\.npy"):
            series._activity({"w.npy": content})


def test_voices_are_padded_and_told_apart():
    text = "#about\n@problemName x\n@data\n{}\n\n"
    train = text.format("1.5,2:3,4:1\n5,6,7:8,9,10:9")
    arrays = series._vowels({"a.ts": train.encode(), "b.ts": text.format("1:2:3").encode()})
    assert arrays["x_train"].shape == (2, 2, 29)
    assert arrays["x_train"][0, :, :4].tolist() == [[1.5, 2, 0, 0], [3, 4, 0, 0]]
    assert arrays["x_train"][1, 1, :4].tolist() == [8, 9, 10, 0]
    assert arrays["y_train"].tolist() == arrays["id_train"].tolist() == [0, 8]
    assert arrays["id_test"].tolist() == [2]
    assert series._power({"a.ts": b"@data\n1,2:2", "b.ts": b"@data\n3,4:1"})["y_train"] == [1]


@pytest.mark.parametrize(
    "content",
    [b"", b"@data\n", b"@data\n1,x:1\n", b"@data\n1,2:3:1\n", b"@data\n1,2:one\n", b"@data\n1\n"],
)
def test_damaged_series_are_named(content):
    with pytest.raises(DataError, match=r"a\.ts"):
        series._power({"a.ts": content, "b.ts": b"@data\n3,4:1"})


def test_a_series_that_is_too_long_is_refused():
    content = b"@data\n" + b",".join([b"1"] * 25) + b":1\n"
    with pytest.raises(DataError, match="one of more than 24 steps"):
        series._power({"a.ts": content, "b.ts": content})


# -- plays ----------------------------------------------------------------------------------------

PLAY = """# Hamlet

## ACT I

_FRANCISCO at his post._

**BERNARDO**
Who's there?

**FRANCISCO**
Nay, answer me: \\[stand\\]
_Aside_

**BERNARDO**
{long}

### SCENE II. Another room.

A line of nobody.
"""


def test_roles_say_their_own_lines():
    roles = plays.roles_of(PLAY.format(long="Long live the king!"))
    assert roles == {
        "BERNARDO": "Who's there?\nLong live the king!\n",
        "FRANCISCO": "Nay, answer me: [stand]\n",
    }


def test_windows_of_a_role_follow_each_other(monkeypatch, tmp_path):
    long = "abcdefghij" * 60
    arrays = plays._shakespeare({"hamlet.md": PLAY.format(long=long).encode()})
    windows = (len("Who's there?\n") + len(long)) // 80
    assert (len(arrays["x_train"]), len(arrays["x_test"])) == (windows - 1, 1)
    assert np.array_equal(arrays["x_train"][:, 1:], arrays["y_train"][:, :-1])
    assert np.array_equal(arrays["x_train"][1:, 0], arrays["y_train"][:-1, -1])
    assert arrays["x_train"].min() == 0  # the newline
    source = named(arrays, monkeypatch, tmp_path, held_out="test")
    training, measured = load_examples(source, TASKS.make("positions"), seed=1)
    for part in (training, measured):
        tokens = part.inputs["x"]
        assert tokens.dtype == part.targets.dtype == np.int64
        assert tokens.shape == part.targets.shape == (len(part), 80)
        assert set(part.identities) == {0}  # the other role says less than a window
    with pytest.raises(DataError, match="no UTF-8"):
        plays._shakespeare({"hamlet.md": b"**A**\n\xff"})


# -- ratings --------------------------------------------------------------------------------------


def test_ratings_are_spread_by_user(monkeypatch, tmp_path):
    rows = [(1, 2, 5), (3, 1, 4), (2, 1, 3), (1, 1, 2), (3, 2, 1)]
    text = "user\titem\trating\ttime\n" + "".join(f"{u}\t{i}\t{r}\t88\n" for u, i, r in rows)
    arrays = tables._ratings({"a.inter": text.encode()})
    source = named(arrays, monkeypatch, tmp_path, held_out=1)
    found = source.read()
    assert list(found.inputs) == ["user", "item"]
    assert [values.dtype for values in found.inputs.values()] == [np.int64, np.int64]
    assert found.inputs["item"].tolist() == [1, 0, 0, 0, 1]
    assert found.targets.tolist() == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert load_examples(source, TASKS.make("rating"), seed=1)[0].targets.shape == (4, 1)
    natural = PARTITIONS.make("natural")
    parts = natural.split(natural.groups(found, TASKS.make("rating")), clients=3, seed=1)
    assert [part.tolist() for part in parts] == [[0, 3], [2], [1, 4]]


@pytest.mark.parametrize(
    "row", ["0\t1\t3\t1", "1\t0\t3\t1", "1\t1\t6\t1", "1\t1\t3", "a\tb\tc\td", ""]
)
def test_rows_that_are_no_ratings_are_refused(row):
    with pytest.raises(DataError, match=r"a\.inter"):
        tables._ratings({"a.inter": f"user\titem\trating\ttime\n{row}\n".encode()})


# -- graphs ---------------------------------------------------------------------------------------


def test_a_graph_is_cut_into_parts_of_neighbours():
    count = 150
    edges = [(node, node + 1) for node in range(count - 1)] + [(0, 0), (1, 0)]
    labels = np.arange(count) % 3
    labels[7] = -100
    features = np.zeros((count, 4), np.float32)
    features[:, 1], features[:, 3] = 1, 3
    features[5] = 0
    arrays = graphs.parts_of(features, labels, edges)
    assert arrays["features_train"].shape == (2, 128, 4)
    assert arrays["features_train"][0, 0].tolist() == [0, 0.25, 0, 0.75]
    assert not arrays["features_train"][0, 5].any()
    assert not arrays["features_train"][1, 22:].any()
    adjacency = arrays["adjacency_train"]
    # a path: three neighbours with the node itself, two at its ends and where it was cut
    assert adjacency[0, 1, :3] == pytest.approx([1 / 6**0.5, 1 / 3, 1 / 3])
    assert adjacency[0, 0, :3] == pytest.approx([1 / 2, 1 / 6**0.5, 0])
    assert adjacency[1, 21, 19:23] == pytest.approx([0, 1 / 6**0.5, 1 / 2, 0])
    assert not adjacency[1, 22:].any()
    train, test = arrays["y_train"], arrays["y_test"]
    assert np.flatnonzero(test[0] >= 0)[:3].tolist() == [4, 10, 15]  # 7 has no label
    assert not ((train >= 0) & (test >= 0)).any()
    assert ((train >= 0) | (test >= 0)).sum() == count - 1
    assert train[0, 3] == labels[3]


class csr_matrix:
    """What scipy pickles."""


def sparse(dense, module="scipy.sparse.csr") -> bytes:
    rows, columns = np.nonzero(dense)
    made = csr_matrix()
    made.__dict__ = {
        "_shape": dense.shape,
        "data": dense[rows, columns],
        "indices": columns.astype(np.int32),
        "indptr": np.r_[0, np.cumsum(np.bincount(rows, minlength=len(dense)))].astype(np.int32),
    }
    whole = pickle.dumps(made, protocol=2)
    return whole.replace(f"c{__name__}\n".encode(), f"c{module}\n".encode())


def planetoid() -> dict[str, bytes]:
    features, labels = (
        np.eye(6, dtype=np.float32) + 1,
        np.eye(2, dtype=np.int32)[[0, 1, 0, 1, 1, 0]],
    )
    graph = {node: [(node + 1) % 7] for node in range(7)}
    held = {
        "x": sparse(features[:2]),
        "y": pickle.dumps(labels[:2], protocol=2),
        "tx": sparse(features[4:]),
        "ty": pickle.dumps(labels[4:], protocol=2),
        "allx": sparse(features[:4]),
        "ally": pickle.dumps(labels[:4], protocol=2),
        "graph": pickle.dumps(graph, protocol=2),
        "test.index": b"6\n4\n",
    }
    return {f"ind.tiny.{name}": content for name, content in held.items()}


def test_planetoids_files_are_put_together():
    arrays = graphs._planetoid(planetoid())
    order = [0, 1, 6, 2, 5, 3, 4]  # breadth-first around the ring
    known = np.array([0, 1, 0, 1, 0, -100, 1])[order]
    together = np.where(arrays["y_train"] == -100, arrays["y_test"], arrays["y_train"])[0]
    assert together[:7].tolist() == known.tolist()
    assert (together[7:] == -100).all()
    assert arrays["features_train"][0, 2].tolist() == pytest.approx([*[1 / 7] * 4, 2 / 7, 1 / 7])
    assert not arrays["features_train"][0, 4].any()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("allx", sparse(np.eye(2), module="os")),
        ("allx", pickle.dumps(3)),
        ("ally", b"\x80\x02."),
        ("graph", pickle.dumps([1])),
        ("test.index", b"six"),
        ("tx", sparse(np.eye(9))),
    ],
)
def test_other_files_are_no_graph(name, content):
    with pytest.raises(DataError):
        graphs._planetoid({**planetoid(), f"ind.tiny.{name}": content})


def test_coras_tables_are_read():
    content = "31\t1\t0\tTheory\r\n7\t0\t1\tAgents\r\n9\t1\t1\tTheory\r\n"
    arrays = graphs._cora({"content": content.encode(), "cites": b"31\t9\r\n9\t7\r\n"})
    assert arrays["y_train"][0, :3].tolist() == [1, 1, 0]  # papers 31, 9, 7
    assert arrays["features_train"][0, :3].tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    for cites in (b"31\t8\n", b"31\n"):
        with pytest.raises(DataError, match="not Cora's"):
            graphs._cora({"content": content.encode(), "cites": cites})


# -- tables ---------------------------------------------------------------------------------------


class DataFrame:
    """Pickled as pandas 2 does; the functions below are only named."""


def BlockManager(): ...


def _unpickle_block(): ...


def _new_Index(): ...


class Index: ...


_HOMES = {
    "DataFrame": "pandas.core.frame",
    "BlockManager": "pandas.core.internals.managers",
    "_unpickle_block": "pandas._libs.internals",
    "_new_Index": "pandas.core.indexes.base",
    "Index": "pandas.core.indexes.base",
}


def pickled(columns: dict[str, list[object]]) -> dict[str, bytes]:
    """A table as pandas 2 pickles it: a block for each dtype, placed by numbers or by a slice."""
    texts = [name for name, values in columns.items() if not isinstance(values[0], int | float)]
    numbers = [name for name in columns if name not in texts]
    blocks = []
    for begin, names, dtype in ((0, numbers, np.float64), (len(numbers), texts, object)):
        values = np.array([columns[name] for name in names], dtype)
        place = slice(begin, begin + len(names)) if begin else np.arange(len(names))
        blocks.append(Hostile(_unpickle_block, values, place, 2))
    names = {"data": np.array(numbers + texts, object), "name": None}
    axes = [Hostile(_new_Index, Index, names), None]
    frame = DataFrame()
    frame._mgr = Hostile(BlockManager, tuple(blocks), axes)
    whole = pickle.dumps(frame, protocol=2).replace(b"c__builtin__\nslice\n", b"cbuiltins\nslice\n")
    for name, home in _HOMES.items():
        whole = whole.replace(f"c{__name__}\n{name}\n".encode(), f"c{home}\n{name}\n".encode())
    return {"t.pkl": lzma.compress(whole)}


INSURANCE = {
    "age": [31, 62, 18],
    "family": [4, 1, 2],
    "health": ["yes", "no", "yes"],
    **{name: ["no"] * 3 for name in ("limit", "gender", "married", "selfemp", "ethnicity")},
    "education": ["phd", "ged", "none"],
    "insurance": ["yes", "no", "yes"],
    "region": ["west", "midwest", "south"],
}


def test_people_become_rows_with_a_column_for_each_value():
    arrays = tables._insurance(pickled(INSURANCE))
    assert arrays["x_train"][0].tolist() == pytest.approx(
        [0.31, 0.4, 0, 1, *[1] * 5, 0, 0, 1], abs=1e-7
    )
    assert arrays["y_train"].tolist() == [1, 0, 1]
    assert arrays["id_train"].tolist() == [2, 0, 1]


def test_invalid_tests_are_left_out_and_missing_texts_are_a_value():
    table = {
        "age": [50.0, 1.0, 2.0],
        "pan_day": [10, 1, 2],
        "drive_thru_ind": [1, 0, 0],
        "orderset": [0, 1, 1],
        "gender": ["male", "female", "male"],
        "demo_group": ["patient"] * 3,
        "payor_group": ["other", np.nan, "other"],
        "patient_class": ["day surgery"] * 3,
        "result": ["positive", "negative", "invalid"],
        "clinic_name": ["b", "a", "c"],
    }
    arrays = tables._covid(pickled(table))
    assert arrays["x_train"].tolist() == pytest.approx(
        np.array([[0.5, 0.1, 1, 0, 0, 1, 1, 0, 1, 1], [0.01, 0.01, 0, 1, 1, 0, 1, 1, 0, 1]])
    )
    assert arrays["y_train"].tolist() == [1, 0]
    assert arrays["id_train"].tolist() == [1, 0]


def test_other_tables_are_refused():
    fewer = {name: values for name, values in INSURANCE.items() if name != "region"}
    for content in (
        pickled(fewer)["t.pkl"],
        pickled(INSURANCE)["t.pkl"][:-20],
        lzma.compress(bytes(20 << 20)),
        lzma.compress(pickle.dumps([1])),
        lzma.compress(pickle.dumps(Hostile(os.system, "touch made"))),
        b"odd",
    ):
        with pytest.raises(DataError, match=r"t\.pkl"):
            tables._insurance({"t.pkl": content})


def test_what_was_not_measured_has_a_column():
    head = "@relation flchain\n" + "".join(
        f"@attribute {name} numeric\n"
        for name in ("age", "sex", "sample.yr", "kappa", "lambda", "creatinine", "mgus", "death")
    )
    rows = "97,F,1997,5.7,4.8,?,no,dead\n50,M,1995,1,2,1.5,yes,alive\n"
    arrays = tables._light_chains({"f.arff": f"{head}@data\n{rows}".encode()})
    assert arrays["x_train"].tolist() == pytest.approx(
        np.array([[0.97, 0.57, 0.48, 0, 1, 1, 0, 1, 0], [0.5, 0.1, 0.2, 0.15, 0, 0, 1, 0, 1]])
    )
    assert arrays["y_train"].tolist() == [1, 0]
    assert arrays["id_train"].tolist() == [2, 0]
    for content in ("", head, f"{head}@data\n1,2\n", f"{head}@data\nx{rows}"):
        with pytest.raises(DataError, match=r"f\.arff is another table"):
            tables._light_chains({"f.arff": content.encode()})

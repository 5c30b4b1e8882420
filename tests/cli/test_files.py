"""compress, decompress, inspect: files in, files out, figures that agree, errors in one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from rich.console import Console
from typer.testing import CliRunner

from prunecast.cli.console import Column, print_table, shape_text, short_dtype
from prunecast.cli.main import app
from prunecast.compression.codec import Context, encode
from prunecast.compression.files.formats import open_tensors, write_tensors
from support.checkpoints import assert_same, every_kind

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    runner = CliRunner()

    def invoke(*arguments: object) -> Any:
        return runner.invoke(app, [str(a) for a in arguments], prog_name="prunecast")

    return invoke


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An .npz checkpoint of a small network."""
    rng = np.random.default_rng(7)
    path = tmp_path / "net.npz"
    np.savez(
        path,
        **{
            "features.0.weight": rng.laplace(size=(32, 3, 3, 3)).astype(np.float32),
            "features.0.bias": rng.normal(size=32).astype(np.float32),
            "classifier.weight": rng.laplace(size=(100, 288)).astype(np.float32) * 0.05,
            "steps": np.array(1234),
        },
    )
    return path


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_there_and_back_without_loss(run: Run, weights: Path, tmp_path: Path, suffix: str) -> None:
    shown = ok(run("compress", weights)).output
    assert "Lossless: every bit of every tensor is kept." in shown
    packed = tmp_path / "net.pcc"
    assert f"{packed.stat().st_size:,} bytes instead of 118,792" in shown
    back = tmp_path / f"back{suffix}"
    assert "4 tensors, 118,792 bytes." in ok(run("decompress", packed, "-o", back)).output
    before, after = open_tensors(weights), open_tensors(back)
    assert set(before) == set(after)
    for name in before:
        assert_same(after[name], before[name])


def test_every_dtype_and_the_metadata(run: Run, tmp_path: Path) -> None:
    kinds = every_kind()
    write_tensors(tmp_path / "m.safetensors", kinds, {"format": "pt"})
    ok(run("compress", tmp_path / "m.safetensors"))
    ok(run("decompress", tmp_path / "m.pcc", "--output", tmp_path / "b.safetensors"))
    back = open_tensors(tmp_path / "b.safetensors")
    assert back.metadata == {"format": "pt"}
    for name, tensor in kinds.items():
        assert_same(back[name], tensor)
    failed = run("decompress", tmp_path / "m.pcc", "-o", tmp_path / "b.npz")
    assert failed.exit_code == 1
    assert "which .npz cannot hold: write .safetensors" in failed.output
    native = {n: t for n, t in kinds.items() if t.dtype == "float32"}
    write_tensors(tmp_path / "n.safetensors", native, {"format": "pt"})
    ok(run("compress", tmp_path / "n.safetensors"))
    shown = ok(run("decompress", tmp_path / "n.pcc", "-o", tmp_path / "n.npz")).output
    assert "no place for the metadata format" in shown


def test_lossy_says_so_and_reports_the_errors(run: Run, weights: Path, tmp_path: Path) -> None:
    shown = ok(run("compress", weights, "--error", 0.05)).output
    assert "Lossy: 3 of 4 tensors quantised; largest relative error 0.0" in shown
    result = json.loads(ok(run("compress", weights, "--error", 0.05, "-f", "--json")).stdout)
    assert result["lossy"] is True
    ok(run("decompress", tmp_path / "net.pcc", "-o", tmp_path / "back.npz"))
    before, after = np.load(weights), np.load(tmp_path / "back.npz")
    for entry in result["tensors"]:
        x, y = before[entry["name"]], after[entry["name"]]
        assert y.dtype == x.dtype == entry["dtype"]
        if entry["step"] is None:
            assert np.array_equal(x, y)
            continue
        error = float(np.linalg.norm((x - y).astype(np.float64)) / np.linalg.norm(x))
        assert error == pytest.approx(entry["relative_error"], rel=1e-3)
        assert 0.045 < error <= 0.05
        assert np.allclose(y / np.float32(entry["step"]), np.rint(y / np.float32(entry["step"])))
    assert result["coded_bytes"] == (tmp_path / "net.pcc").stat().st_size
    assert (
        sum(t["coded_bytes"] for t in result["tensors"]) + result["common_bytes"]
        == result["coded_bytes"]
    )


def test_bits_are_met(run: Run, weights: Path, tmp_path: Path) -> None:
    result = json.loads(ok(run("compress", weights, "--bits", 3, "--json")).stdout)
    assert abs(result["bits_per_parameter"] / 3 - 1) <= 0.02 + 1e-9
    assert (tmp_path / "net.pcc").stat().st_size * 8 / result["parameters"] == pytest.approx(
        result["bits_per_parameter"]
    )
    result = json.loads(
        ok(run("compress", weights, "--bits", 3, "--common-step", "--json", "-f")).stdout
    )
    assert len({t["step"] for t in result["tensors"] if t["step"]}) == 1


def test_patterns_and_dead_zone(run: Run, weights: Path) -> None:
    arguments = ["--step", 0.1, "--dead-zone", 0.7, "--keep", "features.*", "--json"]
    result = json.loads(ok(run("compress", weights, *arguments)).stdout)
    assert [t["name"] for t in result["tensors"] if t["step"]] == ["classifier.weight"]


def test_an_onnx_file_comes_back_with_its_graph(run: Run, tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight))
    graph = helper.make_graph([constant], "g", [], [])
    model = helper.make_model(graph).SerializeToString(deterministic=True)
    (tmp_path / "m.onnx").write_bytes(model)
    shown = " ".join(ok(run("compress", tmp_path / "m.onnx")).output.split())
    assert "Lossless: every bit of every tensor is kept" in shown
    assert "It holds the graph too" in shown
    told = " ".join(
        ok(run("decompress", tmp_path / "m.pcc", "-o", tmp_path / "w.npz")).output.split()
    )
    assert "the graph of the .onnx file is left out" in told
    assert np.array_equal(np.load(tmp_path / "w.npz")["w"], weight)
    ok(run("decompress", tmp_path / "m.pcc", "-o", tmp_path / "again.onnx"))
    assert (tmp_path / "again.onnx").read_bytes() == model
    assert "1 tensor" in ok(run("inspect", tmp_path / "m.onnx")).output


def test_a_checkpoint_has_no_graph_to_restore(run: Run, weights: Path, tmp_path: Path) -> None:
    ok(run("compress", weights))
    result = run("decompress", tmp_path / "net.pcc", "-o", tmp_path / "net.onnx")
    assert result.exit_code == 1
    assert "holds tensors without a graph" in " ".join(result.output.split())
    assert not (tmp_path / "net.onnx").exists()


def test_inspecting_a_checkpoint(run: Run, weights: Path, tmp_path: Path) -> None:
    result = json.loads(ok(run("inspect", weights, "--json")).stdout)
    assert result["raw_bytes"] == 118_792
    assert result["zlib_bytes"] > result["coded_bytes"] > 90_000
    assert sum(result["sections"].values()) == result["coded_bytes"]
    tensors = {t["name"]: t for t in result["tensors"]}
    assert tensors["classifier.weight"]["shape"] == [100, 288]
    assert 24 < tensors["classifier.weight"]["entropy_bits"] < 28
    ok(run("compress", weights))
    assert (tmp_path / "net.pcc").stat().st_size == result["coded_bytes"]
    shown = ok(run("inspect", weights)).output
    for text in ("classifier.weight", "100×288", "f32", "zlib -6", "118,792", "4 tensors"):
        assert text in shown


def test_inspecting_a_compressed_file(run: Run, weights: Path, tmp_path: Path) -> None:
    ok(run("compress", weights, "--error", 0.05))
    result = json.loads(ok(run("inspect", tmp_path / "net.pcc", "--json")).stdout)
    assert result["coded_bytes"] == (tmp_path / "net.pcc").stat().st_size
    assert sum(result["sections"].values()) == result["coded_bytes"]
    assert result["payloads"][0]["needs"] == []
    parts = sum(t["coded_bytes"] for t in result["tensors"]) + result["common_bytes"]
    assert parts == result["coded_bytes"]
    shown = ok(run("inspect", tmp_path / "net.pcc")).output
    for text in ("no context needed", "section", "envelope", "classifier.weight", "in common"):
        assert text in shown


def test_a_payload_that_needs_a_context_says_which(run: Run, tmp_path: Path) -> None:
    q = np.arange(50).reshape(5, 10)
    path = tmp_path / "delta.pcc"
    path.write_bytes(encode({"q": q}, context=Context(mask={"q": q > 0}, previous={"q": q})))
    shown = " ".join(ok(run("inspect", path)).output.split())  # the path decides where lines wrap
    assert "coded against mask and previous with the tag" in shown
    said = json.loads(ok(run("inspect", path, "--json")).stdout)["payloads"]
    assert said[0]["needs"] == ["mask", "previous"]
    assert said[0]["bytes"] == path.stat().st_size


def test_names_are_shown_as_they_are_and_steer_no_terminal(run: Run, tmp_path: Path) -> None:
    names = ["layers[0].weight", "[bold]x[/bold]", ":smile:", "\x1b[2Jgone", "two\nlines", "\udc80"]
    path = tmp_path / "odd.pcc"
    path.write_bytes(encode({name: np.arange(5) for name in names}))
    shown = ok(run("inspect", path)).output
    for text in (*names[:3], "\\x1b[2Jgone", "two\\nlines", "\\udc80"):
        assert text in shown
    assert "\x1b" not in shown
    assert [
        t["name"] for t in json.loads(ok(run("inspect", path, "--json")).stdout)["tensors"]
    ] == (names)
    (tmp_path / "[red]").mkdir()
    source = tmp_path / "[red]" / "m.npz"
    np.savez(source, **{names[0]: np.arange(99.0)})
    shown = ok(run("compress", source, "--error", 0.1)).output
    assert f"{source.with_suffix('.pcc')}: " in shown
    assert "(layers[0].weight)" in shown


def test_nothing_is_overwritten_unasked(run: Run, weights: Path, tmp_path: Path) -> None:
    ok(run("compress", weights))
    packed = (tmp_path / "net.pcc").read_bytes()
    refused = run("compress", weights, "--step", 1)
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert (tmp_path / "net.pcc").read_bytes() == packed
    ok(run("compress", weights, "--step", 1, "--force"))
    assert (tmp_path / "net.pcc").read_bytes() != packed
    assert run("decompress", tmp_path / "net.pcc", "-o", weights).exit_code == 2
    ok(run("decompress", tmp_path / "net.pcc", "-o", weights, "-f"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress", "none.npz"], 1, "error: cannot read none.npz: there is no such file"),
        (["compress", "model.pt"], 1, "error: model.pt: the suffix '.pt' is none of"),
        (["inspect", "none.pcc"], 1, "error: cannot read none.pcc: No such file or directory"),
        (["inspect", "text.txt"], 1, "error: text.txt is not a compressed file"),
        (["decompress", "text.txt", "-o", "x.npz"], 1, "error: text.txt is not a compressed"),
        (["decompress", "net.npz", "-o", "x.pt"], 1, "error: x.pt: tensors are written as"),
        (["compress", "text.npz"], 1, "error: text.npz is not a readable .npz archive"),
        (["compress", "text.safetensors"], 1, "error: text.safetensors is not a readable"),
        (["compress", "text.onnx"], 1, "error: text.onnx is not"),
        (["compress", "net.npz", "-o", "net.npz/x"], 1, "error: cannot write net.npz/x"),
        (["compress", "net.npz", "--bits", "0.01"], 1, "error: no step gives 0.01 bits"),
    ],
)
def test_errors_in_one_line(
    run: Run,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(weights.parent)
    for suffix in ("txt", "npz", "safetensors", "onnx"):
        Path(f"text.{suffix}").write_text("this is a text and nothing else")
    result = run(*arguments)
    assert result.exit_code == code
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1
    kept = {"net.npz", *(f"text.{s}" for s in ("txt", "npz", "safetensors", "onnx"))}
    assert {p.name for p in Path().iterdir()} == kept


@pytest.mark.parametrize(
    "arguments",
    [
        ["--step", "1", "--bits", "2"],
        ["--error", "1.5"],
        ["--error", "0"],
        ["--bits", "-1"],
        ["--keep", "a"],
        ["--dead-zone", "0.7"],
        ["--step", "1", "--dead-zone", "1.5"],
        ["--common-step"],
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_usage_errors(
    run: Run, weights: Path, arguments: list[str]
) -> None:
    assert run("compress", weights, *arguments).exit_code == 2


def test_npz_needs_no_extra_and_others_name_it(weights: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('safetensors', 'onnx', 'torch', 'flwr', 'matplotlib', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "from typer.testing import CliRunner\n"
        "from prunecast.cli.main import app\n"
        f"folder = {str(weights.parent)!r}\n"
        "run = lambda *a: CliRunner().invoke(app, list(a))\n"
        "for arguments in (['compress', folder + '/net.npz'], ['inspect', folder + '/net.npz'],\n"
        "        ['inspect', folder + '/net.pcc'],\n"
        "        ['decompress', folder + '/net.pcc', '-o', folder + '/back.npz']):\n"
        "    result = run(*arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
        "for suffix, library in (('safetensors', 'safetensors'), ('onnx', 'onnx')):\n"
        "    open(folder + '/x.' + suffix, 'w').close()\n"
        "    for command in ('compress', 'inspect'):\n"
        "        result = run(command, folder + '/x.' + suffix)\n"
        "        assert result.exit_code == 1, result.output\n"
        "        wanted = library + \" is not installed: pip install 'prunecast[files]'\"\n"
        "        assert wanted in result.output, result.output\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_and_lose_nothing(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    name = "transformer.encoder.layers.11.self_attention.query_key_value.weight"
    columns = [Column("tensor"), *(Column(f"c{i}", wide_only=i == 3) for i in range(6))]
    row, total = ([f"{kind}{i}" for i in range(6)] for kind in ("row", "sum"))
    print_table(console, columns, [[name, *row]], total=["all", *total])
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert name in "".join(line[1:].split("  ")[0].strip() for line in lines)
    for i in range(6):
        shown = width >= 100 or i != 3
        assert all((text in out.getvalue()) == shown for text in (row[i], total[i], f"c{i}"))


def test_figures_as_people_read_them() -> None:
    assert shape_text((64, 32, 5, 5)) == "64×32×5×5"
    assert shape_text(()) == "–"
    names = ("float32", "bfloat16", "int64", "uint8", "bool", "float8_e4m3fn")
    assert [short_dtype(n) for n in names] == ["f32", "bf16", "i64", "u8", "bool", "f8_e4m3fn"]

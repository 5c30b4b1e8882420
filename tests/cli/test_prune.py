"""prune: a checkpoint in, a pruned one with masks and a report out, refusals in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.files import FileTooLarge
from prunecast.compression.files.formats import open_tensors, write_tensors
from prunecast.compression.files.mask_files import read_masks
from prunecast.compression.files.tensors import FileTensor

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    runner = CliRunner()

    def invoke(*arguments: object) -> Any:
        return runner.invoke(app, ["prune", *map(str, arguments)], prog_name="prunecast")

    return invoke


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    rng = np.random.default_rng(7)
    path = tmp_path / "net.safetensors"
    shapes = {"a.weight": (40, 32), "b.weight": (64, 48), "b.bias": (64,)}
    write_tensors(
        path,
        {n: FileTensor(rng.normal(size=s).astype("f4"), "float32") for n, s in shapes.items()},
        {"format": "pt"},
    )
    return path


def test_a_checkpoint_its_masks_and_its_report(run: Run, weights: Path, tmp_path: Path) -> None:
    shown = run(weights, "--sparsity", 0.9, "--allocation", "global")
    assert shown.exit_code == 0, shown.output
    pruned, masks = tmp_path / "net.pruned.safetensors", tmp_path / "net.pruned.masks.safetensors"
    report = json.loads((tmp_path / "net.pruned.report.json").read_text())
    assert report["removed"] == int(0.9 * 4352) == 3916
    assert (report["prunable"], report["parameters"]) == (4352, 4416)
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert report["file_bytes"] == report["pruned_file_bytes"] == pruned.stat().st_size
    assert 10e6 < report["peak_memory_bytes"] < 10e9
    zeros = {n: int((t.values == 0).sum()) for n, t in open_tensors(pruned).items()}
    assert zeros == {t["name"]: t["removed"] for t in report["tensors"]}
    assert {n: int((~m).sum()) for n, m in read_masks(masks).items()} == {
        n: z for n, z in zeros.items() if z
    }
    told = " ".join(shown.output.split())
    assert "3,916 of 4,416 weights are zero (88.7 %); 1 tensor left whole." in told
    assert "Peak memory" in told
    again = run(weights, "--sparsity", 0.9, "--json")
    assert again.exit_code == 2
    assert "exists: give --force" in again.output
    document = json.loads(run(weights, "--sparsity", 0.5, "--json", "-f").stdout)
    assert document["removed"] == 640 + 1536
    assert document == json.loads((tmp_path / "net.pruned.report.json").read_text())


def test_masks_are_no_checkpoint_of_their_folder(run: Run, weights: Path, tmp_path: Path) -> None:
    """As they lie beside an .onnx model that was pruned, or where the rest was moved away."""
    assert run(weights, "--sparsity", 0.9).exit_code == 0
    weights.unlink()
    (tmp_path / "net.pruned.safetensors").rename(tmp_path / "net.safetensors")
    assert run(tmp_path, "--sparsity", 0.95, "--force").exit_code == 0
    for path in (weights, tmp_path / "net.pruned.safetensors"):
        path.unlink()
    shown = run(tmp_path, "--sparsity", 0.9)
    assert shown.exit_code == 1
    assert "is a folder with no checkpoints: name the file in it" in " ".join(shown.output.split())


def test_what_compressing_makes_of_it_is_measured(run: Run, weights: Path, tmp_path: Path) -> None:
    report = json.loads(run(weights, "--sparsity", 0.9, "--coded", "--json").stdout)
    for key, file in (("coded_bytes", weights), ("pruned_coded_bytes", report["output"])):
        packed = tmp_path / "packed.pcc"
        CliRunner().invoke(app, ["compress", str(file), "-o", str(packed), "--force"])
        assert report[key] == packed.stat().st_size
    assert report["pruned_coded_bytes"] < 0.2 * report["coded_bytes"]


def test_a_report_is_there_when_measuring_fails(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressing takes memory that pruning does not."""

    def failing(*arguments: Any, **named: Any) -> None:
        raise FileTooLarge("its tensors take more than memory has")

    monkeypatch.setattr("prunecast.compression.files.inspection.inspect_tensors", failing)
    shown = run(weights, "--sparsity", 0.9, "--coded")
    assert shown.exit_code == 1
    assert shown.output == "error: its tensors take more than memory has\n"
    report = json.loads((tmp_path / "net.pruned.report.json").read_text())
    assert report["removed"] == int(0.9 * 1280) + int(0.9 * 3072)
    assert "coded_bytes" not in report


def test_the_command_can_be_imported_where_there_is_no_resource_module() -> None:
    code = "import sys; sys.modules['resource'] = None; import prunecast.cli.prune"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pattern_says_its_sparsity_itself(run: Run, weights: Path) -> None:
    document = json.loads(run(weights, "--pattern", "1:4", "--json").stdout)
    assert (document["pattern"], document["sparsity"]) == ("1:4", 0.75)


def test_a_pattern_that_names_nothing_is_said(run: Run, weights: Path) -> None:
    result = run(weights, "--sparsity", 0.5, "--exclude", "a.wieght", "--exclude", "a.*", "--json")
    assert result.stderr == "note: --exclude 'a.wieght' names no tensor of the checkpoint\n"
    assert json.loads(result.stdout)["tensors"][0]["removed"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--sparsity", 1.0], 2, "1 removes all weights"),
        (["--sparsity", -1], 2, "removes nothing"),
        ([], 2, "give --sparsity"),
        (["--sparsity", 0.5, "--criterion", "fisher"], 1, "criterion 'fisher' looks at"),
        (["--pattern", "4:4"], 2, "4:4 keeps nothing or everything"),
        (["--pattern", "4:2"], 2, "4:2 keeps nothing or everything: give N:M with 1 <= N < M"),
        (["--pattern", "2-4"], 2, "'2-4' is no pattern"),
        (["--sparsity", 0.5, "--memory", 1], 1, "more than 1 B: allow more with --memory"),
        (["--pattern", "2:5"], 1, "2:5 does not divide 'a.weight' of shape [40, 32]"),
        (["--sparsity", 0.5, "--exclude", "*"], 1, "has no tensor that may be pruned"),
        (["--sparsity", 0.5, "--out", "there.onnx"], 1, "name it so"),
    ],
)
def test_refusals_are_one_line(
    run: Run, weights: Path, tmp_path: Path, arguments: list[object], code: int, said: str
) -> None:
    result = run(weights, *arguments)
    assert result.exit_code == code, result.output
    text = " ".join(result.output.replace("│", " ").split())
    assert said in text
    assert "or choose the allocation layer" not in text  # which it is
    if code == 1:
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == [weights]


def test_the_advice_on_compressing_can_be_followed(run: Run, weights: Path) -> None:
    folder = weights.parent / "parts"
    folder.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {}
    for name, tensor in zip(names, ("a.weight", "b.weight"), strict=True):
        values = np.ones((40, 32), "f4")
        write_tensors(folder / name, {tensor: FileTensor(values, "float32")}, {})
        where[tensor] = name
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for source, others in ((weights, ""), (folder, ", and of 1 other file likewise,")):
        said = " ".join(run(source, "--sparsity", 0.5).output.split())
        found = re.search(r"prunecast (compress \S+?\.safetensors)(.*) makes the zeros pay\.", said)
        assert found is not None, said
        assert found[2] == others
        result = CliRunner().invoke(app, found[1].split())
        assert result.exit_code == 0, result.output


def test_a_pickle_is_refused_with_the_remedy(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    result = run(tmp_path / "pytorch_model.bin", "--sparsity", 0.5)
    assert result.exit_code == 1
    assert "save_file" in result.output
    assert result.output.count("\n") == 1

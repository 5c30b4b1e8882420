"""Prune a checkpoint that is made on the fly, and say what it takes: seconds and peak memory.

    python benchmarks/prune_checkpoint.py [--gigabytes 3] [--memory-gigabytes 1] [--shards 1]
        [--dtype float32] [--allocation global] [--pattern 2:4] [--folder FOLDER] [--json FILE]

The checkpoint holds blocks of a transformer, drawn at random, in a temporary folder that is removed
afterwards (twice its size has to be free). `prunecast prune` runs in a process of its own whose
VmHWM, the most memory that it ever held, must stay below --memory-gigabytes: else the exit status
is 1. The zeros of the result are counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prunecast.common.text import bytes_text, duration_text
from prunecast.compression.files.checkpoints import open_checkpoint
from prunecast.compression.files.selection import Part, read_part
from prunecast.compression.files.tensors import FileSpec, FileTensor, raw_dtype

__all__ = ["layers", "make", "measure"]

_CHUNK = 1 << 22
_WIDTH = 2048


def layers(nbytes: int, dtype: str, width: int = _WIDTH) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a transformer of about so many bytes.

    >>> [name for name, _ in layers(10_000, "float32", 8)][:3]
    ['embedding.weight', 'blocks.0.norm.weight', 'blocks.0.attention.weight']
    """
    itemsize, left = raw_dtype(dtype).itemsize, nbytes
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding.weight", (16 * width, width))]
    block = 0
    while left > 0:
        for name, shape in shapes:
            yield name, shape
            left -= int(np.prod(shape)) * itemsize
        shapes = [
            (f"blocks.{block}.norm.weight", (width,)),
            (f"blocks.{block}.attention.weight", (4 * width, width)),
            (f"blocks.{block}.wide.weight", (4 * width, width)),
            (f"blocks.{block}.narrow.weight", (width, 4 * width)),
        ]
        block += 1


def make(folder: Path, nbytes: int, dtype: str, shards: int, width: int = _WIDTH) -> Path:
    """Write a checkpoint tensor by tensor, and return the path to prune."""
    tensors = dict(layers(nbytes, dtype, width))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    homes = {name: names[i * shards // len(tensors)] for i, name in enumerate(tensors)}
    rng = np.random.default_rng(0)
    for file in names:
        mine = {n: FileSpec(dtype, s) for n, s in tensors.items() if homes[n] == file}
        with open(folder / file, "wb") as out:
            out.write(_header(mine))
            for number, spec in enumerate(mine.values()):
                scale = np.float32(0.02 * (1 + number % 5))
                for at in range(0, spec.size, _CHUNK):
                    drawn = rng.standard_normal(min(_CHUNK, spec.size - at), np.float32) * scale
                    FileTensor.rounded(drawn, dtype).values.tofile(out)
    if shards == 1:
        return folder / names[0]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return index


def _header(specs: dict[str, FileSpec]) -> bytes:
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    document, at = {}, 0
    for name, spec in specs.items():
        ends = [at, at + spec.nbytes]
        document[name] = {"dtype": codes[spec.dtype], "shape": spec.shape, "data_offsets": ends}
        at = ends[1]
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text


def measure(path: Path, arguments: list[str], out: Path) -> dict[str, Any]:
    """Prune in a process of its own; its report with the seconds that it took.

    Raises:
        RuntimeError: it failed; holds what it said.
    """
    command = [sys.executable, "-m", "prunecast.cli", "prune", str(path), "--out", str(out)]
    began = time.monotonic()
    done = subprocess.run([*command, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    report: dict[str, Any] = json.loads(done.stdout)
    report["seconds"] = time.monotonic() - began
    return report


def zeros(path: Path) -> int:
    """Count the zeros of the pruned tensors of a checkpoint, in chunks."""
    checkpoint = open_checkpoint(path)
    count = 0
    for tensor in checkpoint.tensors:
        if len(tensor.spec.shape) > 1:
            file, spec = checkpoint.file(tensor), tensor.spec
            part = Part(tensor.name, spec.dtype, file, tensor.offset, 0, spec.size)
            count += sum(int(np.count_nonzero(values == 0)) for _, values in read_part(part))
    return count


def main(arguments: list[str] | None = None) -> int:
    """Make, prune, check, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--gigabytes", type=float, default=3.0, help="of the checkpoint (default: 3)")
    add("--memory-gigabytes", type=float, default=1.0, help="that are allowed (default: 1)")
    add("--shards", type=int, default=1, help="files (default: 1)")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "float64"])
    add("--sparsity", default="0.9", help="(default: 0.9)")
    add("--allocation", default="global", help="(default: global)")
    add("--pattern", default="", help="N:M instead of a sparsity")
    add("--folder", type=Path, help="for temporary files (default: that of the system)")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add("--smoke", action="store_true", help="a checkpoint of 8 MB, to see that it works")
    chosen = parser.parse_args(arguments)
    size, width = (8_000_000, 128) if chosen.smoke else (int(1e9 * chosen.gigabytes), _WIDTH)
    allowed = int(1e9 * chosen.memory_gigabytes)
    how = ["--sparsity", chosen.sparsity, "--allocation", chosen.allocation]
    if chosen.pattern:
        how = ["--pattern", chosen.pattern]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        folder = Path(scratch)
        path = make(folder, size, chosen.dtype, chosen.shards, width)
        out = folder / "pruned" if chosen.shards > 1 else folder / "pruned.safetensors"
        report = measure(path, [*how, "--memory", str(allowed)], out)
        found = zeros(out / path.name if chosen.shards > 1 else out)
    figures = {
        key: report[key]
        for key in (
            *("file_bytes", "parameters", "prunable", "removed", "sparsity", "passes", "seconds"),
            *("peak_memory_bytes", "memory_bound_bytes", "mask_bytes", "allocation", "pattern"),
        )
    }
    figures |= {"dtype": chosen.dtype, "shards": chosen.shards, "zeros": found}
    fits = report["peak_memory_bytes"] <= min(allowed, report["memory_bound_bytes"])
    exact = report["removed"] <= found <= report["removed"] + 1e-3 * report["prunable"]
    print(
        f"{bytes_text(figures['file_bytes'])} of {chosen.dtype} in {chosen.shards} file(s), "
        f"{' '.join(how)}: {duration_text(figures['seconds'])}, peak "
        f"{bytes_text(figures['peak_memory_bytes'])} (stated bound "
        f"{bytes_text(figures['memory_bound_bytes'])}, allowed {bytes_text(allowed)}), "
        f"{found:,} zeros in {figures['prunable']:,} weights"
    )
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if fits and exact else 1


if __name__ == "__main__":
    sys.exit(main())

"""The tools that make patches: ours, and what others would use on the same file."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zstandard

from prunecast.compression.versions import PublishedModel, decode_model, encode_delta

from . import chunks, plain
from .state import Pair, layout_of

__all__ = ["OURS", "Tool", "tools"]

OURS = "prunecast"
_LEVEL = 19


@dataclass(frozen=True)
class Tool:
    """One way to bring a device from one `weights.bin` to the next.

    Attributes:
        name: of the tool.
        settings: how it is used.
        create: case to patch.
        apply: case and patch to the new file.
        outside: whether it runs as a program of its own.
    """

    name: str
    settings: str
    create: Callable[[Pair], bytes]
    apply: Callable[[Pair, bytes], bytes]
    outside: bool = False


def tools() -> tuple[list[Tool], dict[str, str]]:
    """Tools that are here, ours first; and those that are not, with what would bring them."""
    settings = "delta payload; applied as a device does, base checked, weights.bin written"
    found = [Tool(OURS, settings, _ours, _apply_ours)]
    absent: dict[str, str] = {}
    for name, make in (("bsdiff4", _bsdiff4), ("hdiffpatch", _hdiffpatch)):
        if importlib.util.find_spec(name) is None:
            absent[name] = f"pip install {name}"
        else:
            found += make()
    if shutil.which("xdelta3"):
        found.append(Tool("xdelta3", "-9 -S djw", _xdelta3, _apply_xdelta3, outside=True))
    else:
        absent["xdelta3"] = "apt install xdelta3"
    found += [
        Tool(
            "difference, xz",
            "bytes subtracted place by place, xz -9e",
            lambda p: plain.create(p.old_file, p.new_file),
            lambda p, patch: plain.apply(p.old_file, patch),
        ),
        Tool(
            "masked difference, xz",
            "likewise, places that were zero apart from the others",
            lambda p: plain.create_masked(p.old_file, p.new_file),
            lambda p, patch: plain.apply_masked(p.old_file, patch),
        ),
        Tool("zstd --patch-from", f"level {_LEVEL}, long distance", _zstd, _apply_zstd),
        Tool(
            "chunk dedupe",
            f"gear hash, 16 KiB on average, new chunks zstd -{_LEVEL}",
            lambda p: chunks.create(p.old_file, p.new_file),
            lambda p, patch: chunks.apply(p.old_file, patch),
        ),
    ]
    return found, absent


def _fresh(model: PublishedModel) -> PublishedModel:
    """The same tensors, of which nobody knows the digest yet."""
    return PublishedModel(model.tensors, model.counter)


def _ours(case: Pair) -> bytes:
    return encode_delta(_fresh(case.held), _fresh(case.new))


def _apply_ours(case: Pair, patch: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "weights.bin"
        model = decode_model(patch, held=_fresh(case.held))
        layout_of(model).write(model, path)
        del model
        return path.read_bytes()


def _bsdiff4() -> list[Tool]:
    import bsdiff4

    return [
        Tool(
            "bsdiff4",
            "bzip2",
            lambda p: bytes(bsdiff4.diff(p.old_file, p.new_file)),
            lambda p, patch: bytes(bsdiff4.patch(p.old_file, patch)),
        )
    ]


def _hdiffpatch() -> list[Tool]:
    import hdiffpatch

    def tool(label: str, kind: object) -> Tool:
        return Tool(
            f"hdiffpatch {label}",
            f"{label}, without validation",
            lambda p: bytes(hdiffpatch.diff(p.old_file, p.new_file, kind, validate=False)),
            lambda p, patch: bytes(hdiffpatch.apply(p.old_file, patch)),
        )

    return [
        tool("bzip2", hdiffpatch.COMPRESSION_BZIP2),
        tool("lzma2", hdiffpatch.COMPRESSION_LZMA2),
        tool("zstd", hdiffpatch.COMPRESSION_ZSTD),
    ]


def _zstd(case: Pair) -> bytes:
    size = len(case.old_file) + len(case.new_file)
    known = zstandard.ZstdCompressionDict(case.old_file, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    settings = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=max(20, size.bit_length()), enable_ldm=True
    )
    coder = zstandard.ZstdCompressor(dict_data=known, compression_params=settings)
    return coder.compress(case.new_file)


def _apply_zstd(case: Pair, patch: bytes) -> bytes:
    known = zstandard.ZstdCompressionDict(case.old_file, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=known, max_window_size=2**31).decompress(patch)


def _xdelta3(case: Pair) -> bytes:
    return _through(["-e", "-9", "-S", "djw", "-f"], case.old_file, case.new_file)


def _apply_xdelta3(case: Pair, patch: bytes) -> bytes:
    return _through(["-d", "-f"], case.old_file, patch)


def _through(options: list[str], source: bytes, data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").write_bytes(source)
        (folder / "in").write_bytes(data)
        large = ["-B", str(max(len(source), 1 << 19))]
        command = ["xdelta3", *options, *large, "-s", "source", "in", "out"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return (folder / "out").read_bytes()

"""What is said of files that cannot be read or are not what is asked for, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prunecast.compression.files import UnreadableFile

__all__ = ["CONVERSIONS", "content_hint", "reading"]

_TORCH = (
    ": a file of torch's is a pickle and is not read; load it where you trust it, with "
    "torch.load(file, weights_only=True), and save its state_dict by "
    "safetensors.torch.save_file"
)
CONVERSIONS: Mapping[str, str] = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"), _TORCH),
    ".pt2": ": export the program to .onnx, or save its state_dict by safetensors.torch.save_file",
    ".npy": ": save the array by its name, with numpy.savez",
    ".h5": ": save its arrays by their names, with numpy.savez",
    ".msgpack": ": save its arrays by their names, with numpy.savez",
    ".gguf": ": save its tensors as .safetensors",
    ".pcc": ": it is compressed already; prunecast decompress restores it",
}
"""Suffixes of what is not read: what to do instead, after the sentence that says so."""

# First bytes of what files often are instead of what their suffix says, and what to do then.
_CONTENTS = (
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
    (b"<!DOCTYPE", "a page of HTML: download the file itself, logged in perhaps"),
    (b"<html", "a page of HTML: download the file itself, logged in perhaps"),
    (b"\x1f\x8b", "compressed with gzip: decompress it first"),
    (b"BZh", "compressed with bzip2: decompress it first"),
    (b"\xfd7zXZ", "compressed with xz: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it first"),
    (b"\x89HDF", "a file of HDF5: save its arrays by their names, with numpy.savez"),
    (b"GGUF", "a file of GGUF: save its tensors as .safetensors"),
    (b"\x93NUMPY", "a single array: save it by its name, with numpy.savez"),
    (b"PCC", "a compressed file of Prunecast: prunecast decompress restores it"),
    (b"\x80", "a pickle, of torch perhaps, which is never loaded: save a .safetensors file of it"),
)
_ZIP = b"PK\x03\x04"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise `UnreadableFile` where the block meets an `OSError`: what it does is to read `path`."""
    try:
        yield
    except OSError as error:
        raise UnreadableFile(f"cannot read {str(path)[:300]}: {error.strerror or error}") from error


def content_hint(path: Path) -> str:
    """What a file is by its first bytes, where that is known, and what to do; else empty."""
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError:
        return ""
    if not start:
        return " (it is empty)"
    if start.startswith(_ZIP):
        if b"/data.pkl" in start or b"/version" in start or b"/byteorder" in start:
            return " (it is" + _TORCH.removeprefix(": a file of torch's is") + ")"
        return " (it is an archive: of arrays, perhaps, whose suffix is .npz)"
    for first, what in _CONTENTS:
        if start.lower().startswith(first.lower()):
            return f" (it is {what})"
    return ""

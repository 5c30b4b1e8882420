"""What is read from a file of ours is of the type it is annotated with, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from prunecast.common.documents import from_document, read_document


@dataclass(frozen=True)
class Leaf:
    number: int
    share: float = 0.5


@dataclass(frozen=True)
class Tree:
    name: str
    kind: Literal["oak", "elm"]
    leaf: Leaf | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    by_number: dict[int, Leaf] = field(default_factory=dict)
    alive: bool = True


def test_what_asdict_made_comes_back_and_more_is_ignored() -> None:
    tree = Tree("a", "oak", Leaf(3, 2.0), ((1, 2), (3, 4)), {7: Leaf(1)}, False)
    document = json.loads(json.dumps({**asdict(tree), "later": 1}))
    assert from_document(Tree, document) == tree
    document["leaf"] = {"number": 1, "share": 1}
    assert from_document(Tree, document).leaf == Leaf(1, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", 1),
        ("kind", "ash"),
        ("kind", []),
        ("leaf", {"number": 1}),
        ("leaf", {"number": True, "share": 1.0}),
        ("leaf", {"number": 1, "share": "1"}),
        ("leaf", {"number": 1, "share": 10**400}),
        ("leaf", []),
        ("pairs", [[1]]),
        ("pairs", [[1, 2, 3]]),
        ("pairs", 3),
        ("by_number", {"x": {"number": 1, "share": 1.0}}),
        ("by_number", []),
        ("alive", None),
    ],
)
def test_anything_else_is_a_value_error(name: str, value: Any) -> None:
    document = json.loads(json.dumps(asdict(Tree("a", "oak"))))
    with pytest.raises(ValueError, match=r"\S"):
        from_document(Tree, {**document, name: value})
    del document[name]
    with pytest.raises(ValueError, match=f"there is no {name}"):
        from_document(Tree, document)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b" " * 100 + b"1"])
def test_files_are_read_whole_or_not_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\S"):
        read_document(path, most_bytes=100 if content.startswith(b" ") else 2**20)
    path.write_bytes(b'{"a": 1}')
    assert read_document(path, most_bytes=8) == {"a": 1}
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "none.json")

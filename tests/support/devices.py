"""The devices that a test of torch code runs on."""

from __future__ import annotations

import pytest
import torch

__all__ = ["on_every_device"]

on_every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="torch finds no CUDA device here"
            ),
        ),
    ],
)
"""Parametrise a test by ``device``; without a GPU the CUDA half is skipped, and says so."""

"""Figures as people read them."""

import pytest

from prunecast.common.text import bits_text, bytes_text, count_text, percent, ratio_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_960, "1.00 MB"),
        (984_155_520, "984 MB"),
        (3.2e12, "3.20 TB"),
        (None, "–"),
    ],
)
def test_bytes_are_read_easily(count, text):
    assert bytes_text(count) == text


def test_other_figures_are_read_easily():
    assert [ratio_text(r) for r in (1, 9.996, 41.26, 168.4, None)] == [
        "1.00×",
        "10.00×",
        "41.3×",
        "168×",
        "–",
    ]
    assert percent(0.9549) == "95.5 %"


def test_bits_and_counts_are_read_easily():
    assert [bits_text(b, 8) for b in (12.34, 9.999, 1.006, 0.9949)] == [
        "12.3", "10.0", "1.01", "0.995",
    ]  # fmt: skip
    assert bits_text(3, 0) == "–"
    assert [count_text(n, "part") for n in (0, 1, 12_000)] == ["0 parts", "1 part", "12,000 parts"]
